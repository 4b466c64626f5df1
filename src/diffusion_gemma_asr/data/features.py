"""A cache on disk for features that never change: log-mel spectrograms, frames of a frozen encoder."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from ..errors import DataError
from ..files import whole_file
from .manifest import Utterance

FORMAT = 2  # of index.json

logger = logging.getLogger(__name__)


class _Span(NamedTuple):
    """Where the frames of an utterance lie, and the size and mtime of the sound file that they were made from."""

    key: str
    size: int
    mtime_ns: int
    start: int
    frames: int


@dataclass(frozen=True)
class _Index:
    """What an index.json says; spans that reach beyond the frames there are, are left out."""

    width: int
    fingerprint: str
    spans: list[_Span]


class FeatureCache:
    """Frames (n, width) of many utterances in float16 files, read through memory maps.

    Frames belong to an utterance's `key` and the size and modification time of its sound file: where one of these has
    changed, it is not in the cache.

    Args:
        path: folder that holds `frames.f16` and `index.json`, as `build` writes them, and a pair more for every further
            worker that built it (`frames-1.f16`, `index-1.json`).
        fingerprint: of what the frames are to come from; None: of whatever they come from.

    Attributes:
        width: size of a frame; 0 where there are none.
        fingerprint: what `build` was told.

    Raises:
        DataError: the frames come from something else, or were written by another version of this package.
    """

    def __init__(self, path: str | Path, fingerprint: str | None = None):
        self._spans: dict[str, tuple[int, _Span]] = {}  # by key: number of the file, place in it
        self._files: list[np.ndarray] = []
        self.width, self.fingerprint = 0, fingerprint or ""
        for index_path, index in _indices(Path(path)).items():
            _check(Path(path), index, self.width or None, self.fingerprint or None)
            self.width, self.fingerprint = index.width, index.fingerprint
            self._spans |= {span.key: (len(self._files), span) for span in index.spans}
            self._files.append(_frames(index_path, index.width))

    @classmethod
    def open(cls, path: str | Path, utterances: Sequence[Utterance], fingerprint: str | None = None) -> FeatureCache:
        """Opens a cache that is to hold all of these.

        Args:
            path: see `FeatureCache`.
            utterances: whose frames are needed.
            fingerprint: see `FeatureCache`.

        Raises:
            DataError: there is none, or it lacks some, or see `FeatureCache`.
        """
        if not (Path(path) / "index.json").is_file():
            raise DataError(f"{path}: no frames there; run the stage that makes them first")
        cache = cls(path, fingerprint)
        if lacking := [u for u in utterances if u not in cache]:
            raise DataError(
                f"{path} lacks {len(lacking)} utterances as they are now, such as {lacking[0].audio_filepath}; run its stage"
            )
        return cache

    @classmethod
    def build(
        cls,
        path: str | Path,
        utterances: Sequence[Utterance],
        width: int,
        compute: Callable[[list[Utterance]], list[np.ndarray]],
        fingerprint: str,
        batch_size: int = 16,
        worker: int = 0,
        workers: int = 1,
    ) -> FeatureCache:
        """Opens the cache in `path`, computing first what it lacks.

        A cache that was interrupted while it was built keeps what is indexed; new utterances are appended. What is damaged
        is computed anew.

        Args:
            path: folder of the cache, made if missing.
            utterances: whose frames are needed.
            width: size of a frame.
            compute: utterances → one array (n, width) each.
            fingerprint: stands for everything but the utterances that the frames depend on; see `fingerprint`.
            batch_size: utterances that are computed together.
            worker: which of `workers` this is. Each computes a share of the utterances and writes files of its own; what it
                opens holds the others' once they are done.
            workers: builders of this one cache.

        Raises:
            DataError: the cache holds frames of another width or fingerprint, or of another version of this package.
        """
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        own = path / (f"index-{worker}.json" if worker else "index.json")
        found = _indices(path, warn=True)
        have: dict[str, tuple[int, int]] = {}
        for index in found.values():
            _check(path, index, width, fingerprint)
            have |= {span.key: (span.size, span.mtime_ns) for span in index.spans}
        spans = {span.key: span for span in found[own].spans} if own in found else {}
        unique = {u.key: u for u in utterances}
        share = sorted(unique.items(), key=lambda item: item[1].duration)[worker::workers]
        stamps = {key: _stamp(u) for key, u in share}
        todo = [(key, u) for key, u in share if have.get(key) != stamps[key]]
        position = max((span.start + span.frames for span in spans.values()), default=0)
        if todo:
            if not spans:
                _frames_of(own).unlink(missing_ok=True)  # what another process has mapped stays whole
            with _frames_of(own).open("r+b" if spans else "wb") as file:
                file.truncate(position * width * 2)
                file.seek(position * width * 2)
                batches = [todo[i : i + batch_size] for i in range(0, len(todo), batch_size)]
                for number, batch in enumerate(
                    track(batches, f"features → {path.name}", disable=worker > 0, console=Console(stderr=True)), 1
                ):
                    for (key, _), frames in zip(batch, compute([u for _, u in batch]), strict=True):
                        if frames.ndim != 2 or frames.shape[1] != width:
                            raise ValueError(f"frames of shape {frames.shape}, not (n, {width})")
                        file.write(frames.astype(np.float16).tobytes())
                        spans[key] = _Span(key, *stamps[key], position, len(frames))
                        position += len(frames)
                    if number % 50 == 0 or number == len(batches):
                        file.flush()
                        _write_index(own, _Index(width, fingerprint, list(spans.values())))
        return cls(path, fingerprint)

    def __contains__(self, utterance: Utterance) -> bool:
        held = self._spans.get(utterance.key)
        return held is not None and (held[1].size, held[1].mtime_ns) == _stamp(utterance)

    def __getitem__(self, utterance: Utterance) -> np.ndarray:
        """(n, width) float16 frames of one utterance; KeyError if there are none."""
        file, span = self._spans[utterance.key]
        return self._files[file][span.start : span.start + span.frames]

    def length(self, utterance: Utterance) -> int:
        """Frames of one utterance, without reading them."""
        return self._spans[utterance.key][1].frames

    def batch(self, utterances: Sequence[Utterance]) -> tuple[Tensor, Tensor]:
        """Frames of several utterances: (B, T, width) float32 padded with zeros, and their lengths (B,)."""
        rows = [torch.from_numpy(self[u].astype(np.float32)) for u in utterances]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows])


def fingerprint(module: nn.Module, *others: str) -> str:
    """32 hexadecimal digits that stand for a module's weights, the same in every run and on every device.

    Args:
        module: its parameters and buffers count, by name, type, shape and value.
        others: whatever else its output depends on, such as how its input is made.
    """
    digest = hashlib.blake2b(repr(others).encode(), digest_size=16)
    for name, value in sorted(module.state_dict().items()):
        if isinstance(value, Tensor):
            plain = value.detach().cpu().contiguous()
            digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}\n".encode())
            if plain.numel():
                digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
        else:
            digest.update(f"{name} {value!r}\n".encode())
    return digest.hexdigest()


def _indices(folder: Path, warn: bool = False) -> dict[Path, _Index]:
    """The indices of a cache that can be read, by path; one that is damaged is as good as none."""
    found = {}
    for path in sorted(folder.glob("index*.json")):
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            spans = [_Span(*span) for span in index["spans"]] if index.get("format") == FORMAT else []
            width, mark, held = int(index["width"]), str(index.get("fingerprint", "")), index.get("format", 1)
            # Keys decide what is found, the other numbers where it lies: all must be what `build` writes.
            if width < 1 or any(type(n) is not int or n < 0 for s in spans for n in s[3:]):
                raise ValueError("impossible numbers")
        except (ValueError, KeyError, TypeError, AttributeError, OSError):
            if warn:
                logger.warning("%s is damaged; its frames are computed anew", path)
            continue
        if held != FORMAT:
            raise DataError(f"{folder} holds frames of another version of this package; delete it, to compute them anew")
        rows = len(_frames(path, width))
        whole = [span for span in spans if span.start + span.frames <= rows]
        if warn and len(whole) < len(spans):
            logger.warning("%s is cut short; %d utterances are computed anew", _frames_of(path), len(spans) - len(whole))
        found[path] = _Index(width, mark, whole)
    return found


def _check(folder: Path, index: _Index, width: int | None, mark: str | None) -> None:
    remedy = "delete it to compute them anew, or give every encoder a cache folder of its own"
    if width is not None and index.width != width:
        raise DataError(f"{folder} holds frames of width {index.width}, these are {width} wide; {remedy}")
    if mark is not None and index.fingerprint != mark:
        raise DataError(f"{folder} holds frames of another encoder ({index.fingerprint[:8]}, this is {mark[:8]}); {remedy}")


def _stamp(utterance: Utterance) -> tuple[int, int]:
    """Size and modification time of the sound file; (-1, -1) where there is none."""
    try:
        status = Path(utterance.audio_filepath).stat()
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _frames(index: Path, width: int) -> np.ndarray:
    """(n, width) float16: the whole rows of the file that an index is about, none where there is no file."""
    path = _frames_of(index)
    rows = path.stat().st_size // (2 * width) if path.is_file() else 0
    return np.memmap(path, np.float16, "r", shape=(rows, width)) if rows else np.zeros((0, width), np.float16)


def _frames_of(index: Path) -> Path:
    """The file of the frames that an index is about."""
    return index.with_name(index.name.replace("index", "frames", 1)).with_suffix(".f16")


def _write_index(path: Path, index: _Index) -> None:
    content = {"format": FORMAT, "width": index.width, "fingerprint": index.fingerprint, "spans": index.spans}
    with whole_file(path) as part:
        part.write_text(json.dumps(content), encoding="utf-8")
