"""A cache on disk for features that never change: log-mel spectrograms, frames of a frozen encoder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn

from ..errors import DataError
from .manifest import Utterance


class FeatureCache:
    """Frames (n, width) of many utterances in float16 files, read through memory maps.

    Args:
        path: folder that holds `frames.f16` and `index.json`, as `build` writes them, and a pair more for every further
            worker that built it (`frames-1.f16`, `index-1.json`).
    """

    def __init__(self, path: str | Path):
        self._spans: dict[str, tuple[int, int, int]] = {}  # file, first frame, frames
        self._files: list[np.ndarray] = []
        for index_path in sorted(Path(path).glob("index*.json")):
            index = json.loads(index_path.read_text(encoding="utf-8"))
            self._spans |= {key: (len(self._files), start, n) for key, start, n in index["spans"]}
            self.width: int = index["width"]
            frames = np.memmap(_frames_of(index_path), np.float16, "r")
            self._files.append(frames.reshape(-1, self.width))

    @classmethod
    def open(cls, path: str | Path, utterances: Sequence[Utterance]) -> FeatureCache:
        """Opens a cache that is to hold all of these.

        Raises:
            DataError: there is none, or it lacks some.
        """
        if not (Path(path) / "index.json").is_file():
            raise DataError(f"{path}: no frames there; run the stage that makes them first")
        cache = cls(path)
        if lacking := [u for u in utterances if u not in cache]:
            raise DataError(f"{path} lacks {len(lacking)} utterances, such as {lacking[0].audio_filepath}; run its stage")
        return cache

    @classmethod
    def build(
        cls,
        path: str | Path,
        utterances: Sequence[Utterance],
        width: int,
        compute: Callable[[list[Utterance]], list[np.ndarray]],
        batch_size: int = 16,
        worker: int = 0,
        workers: int = 1,
    ) -> FeatureCache:
        """Opens the cache in `path`, computing first what it lacks.

        Args:
            compute: utterances → one array (n, width) each.
            width: size of a frame.
            worker, workers: which of how many builders of one cache this is. Each computes a share of the utterances and
                writes files of its own; what it opens holds the others' once they are done.

        A cache that was interrupted while it was built keeps what is indexed; new utterances are appended.

        Raises:
            DataError: the cache holds frames of another width.
        """
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        spans: list[tuple[str, int, int]] = []
        have: set[str] = set()
        own = path / (f"index-{worker}.json" if worker else "index.json")
        for index_path in path.glob("index*.json"):
            index = json.loads(index_path.read_text(encoding="utf-8"))
            if index["width"] != width:
                raise DataError(
                    f"{path} holds frames of width {index['width']}, these are {width} wide; "
                    "give every encoder a cache folder of its own"
                )
            have.update(key for key, _, _ in index["spans"])
            if index_path == own:
                spans = [tuple(s) for s in index["spans"]]
        share = sorted(utterances, key=lambda u: u.duration)[worker::workers]
        todo = [u for u in share if u.audio_filepath not in have]
        position = max((start + n for _, start, n in spans), default=0)
        if todo:
            mode = "r+b" if spans else "wb"
            with _frames_of(own).open(mode) as file:
                file.truncate(position * width * 2)
                file.seek(position * width * 2)
                batches = [todo[i : i + batch_size] for i in range(0, len(todo), batch_size)]
                for number, batch in enumerate(track(batches, f"features → {path.name}", disable=worker > 0), 1):
                    for utterance, frames in zip(batch, compute(batch), strict=True):
                        file.write(frames.astype(np.float16).tobytes())
                        spans.append((utterance.audio_filepath, position, len(frames)))
                        position += len(frames)
                    if number % 50 == 0 or number == len(batches):
                        file.flush()
                        _write_index(own, width, spans)
        return cls(path)

    def __contains__(self, utterance: Utterance) -> bool:
        return utterance.audio_filepath in self._spans

    def __getitem__(self, utterance: Utterance) -> np.ndarray:
        """(n, width) float16 frames of one utterance."""
        file, start, n = self._spans[utterance.audio_filepath]
        return self._files[file][start : start + n]

    def length(self, utterance: Utterance) -> int:
        """Frames of one utterance, without reading them."""
        return self._spans[utterance.audio_filepath][2]

    def batch(self, utterances: Sequence[Utterance]) -> tuple[Tensor, Tensor]:
        """Frames of several utterances: (B, T, width) float32 padded with zeros, and their lengths (B,)."""
        rows = [torch.from_numpy(self[u].astype(np.float32)) for u in utterances]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows])


def _frames_of(index: Path) -> Path:
    """The file of the frames that an index is about."""
    return index.with_name(index.name.replace("index", "frames", 1)).with_suffix(".f16")


def _write_index(path: Path, width: int, spans: list[tuple[str, int, int]]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"width": width, "spans": spans}), encoding="utf-8")
    part.replace(path)
