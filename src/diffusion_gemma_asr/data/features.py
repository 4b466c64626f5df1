"""A disk cache for features that training does not change: log-mel spectrograms, frames of a frozen encoder."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from ..errors import DataError
from ..files import whole_file
from .manifest import Utterance
from .shar import tar_of

FORMAT = 2  # of index.json
INDEXED = 60_000  # frames, twenty minutes of sound: what an interruption loses at most, beside a batch

logger = logging.getLogger(__name__)


class _Span(NamedTuple):
    """The frames of one utterance in a frames file, and the state of the sound file that they were computed from."""

    key: str  # of the utterance
    size: int  # bytes of the sound file
    mtime_ns: int  # its modification time
    start: int  # first row in the frames file
    frames: int  # number of rows
    digest: str = ""  # of the sound file's content; older caches lack it

    def fits(self, utterance: Utterance) -> bool:
        """Whether the sound file is what it was: its size and time are, or its size and content."""
        size, mtime_ns = _stamp(utterance)
        if size != self.size:
            return False
        return mtime_ns == self.mtime_ns or self.digest == _digest(_file(utterance), mtime_ns)


@dataclass(frozen=True)
class _Index:
    """The content of an index.json, without spans that lie beyond the end of a truncated frames file."""

    width: int
    fingerprint: str
    spans: list[_Span]


class FeatureCache:
    """Memory-mapped float16 frames (n, width) of many utterances.

    An entry is valid for one utterance `key` and one content of the sound file; if one of them changes, the utterance counts
    as missing. A file of the same size and modification time is taken to be unchanged.

    Args:
        path: folder with `frames.f16` and `index.json`, as `build` writes them, and another pair for every further
            worker that built it (`frames-1.f16`, `index-1.json`).
        fingerprint: of the required source of the frames; None accepts any.

    Attributes:
        width: size of a frame; 0 in an empty cache.
        fingerprint: of the source of the frames, as given to `build`.

    Raises:
        DataError: the frames have another fingerprint, or were written by another version of this package.
    """

    def __init__(self, path: str | Path, fingerprint: str | None = None):
        self._spans: dict[str, tuple[int, _Span]] = {}  # by key: index into `_files`, rows in that file
        self._files: list[np.ndarray] = []
        self.width, self.fingerprint = 0, fingerprint or ""
        for index_path, index in _indices(Path(path)).items():
            _check(Path(path), index, self.width or None, self.fingerprint or None)
            self.width, self.fingerprint = index.width, index.fingerprint
            self._spans |= {span.key: (len(self._files), span) for span in index.spans}
            self._files.append(_frames(index_path, index.width))

    @classmethod
    def open(cls, path: str | Path, utterances: Sequence[Utterance], fingerprint: str | None = None) -> FeatureCache:
        """Opens a cache that must be complete.

        Args:
            path: see `FeatureCache`.
            utterances: whose frames are needed.
            fingerprint: see `FeatureCache`.

        Raises:
            DataError: there is no cache, or frames of an utterance are missing from it; also see `FeatureCache`.
        """
        if not (Path(path) / "index.json").is_file():
            raise DataError(f"{path}: no frames there; run the stage that makes them first")
        cache = cls(path, fingerprint)
        if missing := [u for u in utterances if u not in cache]:
            raise DataError(
                f"{path} lacks {len(missing)} utterances as they are now, such as {missing[0].audio_filepath}; run its stage"
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
        """Opens the cache in `path`, after computing missing frames.

        After an interrupted build all indexed frames are kept and the others appended. Damaged entries are recomputed.

        Args:
            path: folder of the cache, created if missing.
            utterances: whose frames are needed.
            width: size of a frame.
            compute: utterances → one array (n, width) each.
            fingerprint: of everything that the frames depend on besides the utterances; see `fingerprint`.
            batch_size: utterances in one call of `compute`.
            worker: rank of this process among `workers`. Each process computes a share of the utterances and writes separate
                files; the cache that it opens has the frames of those processes that have finished.
            workers: processes that build this cache.

        Returns:
            the opened cache.

        Raises:
            DataError: the cache holds frames of another width or fingerprint, or of another version of this package.
        """
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        with FileLock(path / f".lock-{worker}"):  # another run that fills the same files is waited for
            _fill(path, utterances, width, compute, fingerprint, batch_size, worker, workers)
        return cls(path, fingerprint)

    def __contains__(self, utterance: Utterance) -> bool:
        entry = self._spans.get(utterance.key)
        return entry is not None and entry[1].fits(utterance)

    def __getitem__(self, utterance: Utterance) -> np.ndarray:
        """(n, width) float16 frames of one utterance; KeyError if it is not cached."""
        file, span = self._spans[utterance.key]
        return self._files[file][span.start : span.start + span.frames]

    def length(self, utterance: Utterance) -> int:
        """Number of frames of one utterance, without reading them."""
        return self._spans[utterance.key][1].frames

    def batch(self, utterances: Sequence[Utterance]) -> tuple[Tensor, Tensor]:
        """Reads the frames of several utterances.

        Returns:
            (B, T, width) float32, padded with zeros, and their lengths (B,).
        """
        rows = [torch.from_numpy(self[u].astype(np.float32)) for u in utterances]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows])


def fingerprint(module: nn.Module, *others: str) -> str:
    """A hash of a module's weights, the same in every run and on every device.

    Args:
        module: parameters and buffers are hashed, by name, type, shape and value.
        others: further strings to hash: whatever else its output depends on, such as how its input is made.

    Returns:
        32 hexadecimal digits.
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
    """The indices of a cache by path; damaged ones are ignored, with a warning if `warn`."""
    indices = {}
    for path in sorted(folder.glob("index*.json")):
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            spans = [_Span(*span) for span in index["spans"]] if index.get("format") == FORMAT else []
            width, fingerprint, version = int(index["width"]), str(index.get("fingerprint", "")), index.get("format", 1)
            # Numbers that `build` never writes would address wrong rows.
            if width < 1 or any(type(n) is not int or n < 0 for s in spans for n in (s.start, s.frames)):
                raise ValueError("impossible numbers")
        except (ValueError, KeyError, TypeError, AttributeError, OSError):
            if warn:
                logger.warning("%s is damaged; its frames are computed anew", path)
            continue
        if version != FORMAT:
            raise DataError(f"{folder} holds frames of another version of this package; delete it, to compute them anew")
        rows = len(_frames(path, width))
        complete = [span for span in spans if span.start + span.frames <= rows]
        if warn and len(complete) < len(spans):
            logger.warning("%s is cut short; %d utterances are computed anew", _frames_of(path), len(spans) - len(complete))
        indices[path] = _Index(width, fingerprint, complete)
    return indices


def _check(folder: Path, index: _Index, width: int | None, fingerprint: str | None) -> None:
    """Raises DataError if the index has another width or fingerprint; None accepts any."""
    remedy = "delete it to compute them anew, or give every encoder a cache folder of its own"
    if width is not None and index.width != width:
        raise DataError(f"{folder} holds frames of width {index.width}, these are {width} wide; {remedy}")
    if fingerprint is not None and index.fingerprint != fingerprint:
        prints = f"{index.fingerprint[:8]}, this is {fingerprint[:8]}"
        raise DataError(f"{folder} holds frames of another encoder ({prints}); {remedy}")


def _file(utterance: Utterance) -> str:
    """The sound file, which of a Shar is the tar file with all sounds of the shard."""
    return tar_of(utterance.audio_filepath) or utterance.audio_filepath


def _stamp(utterance: Utterance) -> tuple[int, int]:
    """Size in bytes and modification time in ns of the sound file; (-1, -1) if it does not exist."""
    try:
        status = Path(_file(utterance)).stat()
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


@cache  # many utterances may lie in one long file, and files are looked at more than once
def _digest(path: str, mtime_ns: int) -> str:
    """A hash of a sound file's content, 32 hexadecimal digits; "-" if it does not exist. `mtime_ns` is for the cache."""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError:
        return "-"


def _frames(index: Path, width: int) -> np.ndarray:
    """(n, width) float16 memory map of the complete rows in the frames file of an index; n = 0 without a file."""
    path = _frames_of(index)
    rows = path.stat().st_size // (2 * width) if path.is_file() else 0
    return np.memmap(path, np.float16, "r", shape=(rows, width)) if rows else np.zeros((0, width), np.float16)


def _frames_of(index: Path) -> Path:
    """The path of the frames file that belongs to an index."""
    return index.with_name(index.name.replace("index", "frames", 1)).with_suffix(".f16")


def _write_index(path: Path, index: _Index) -> None:
    content = {"format": FORMAT, "width": index.width, "fingerprint": index.fingerprint, "spans": index.spans}
    with whole_file(path) as part:
        part.write_text(json.dumps(content), encoding="utf-8")


def _fill(
    path: Path,
    utterances: Sequence[Utterance],
    width: int,
    compute: Callable[[list[Utterance]], list[np.ndarray]],
    fingerprint: str,
    batch_size: int,
    worker: int,
    workers: int,
) -> None:
    """Computes what the cache lacks of this worker's share; arguments as for `FeatureCache.build`."""
    index_path = path / (f"index-{worker}.json" if worker else "index.json")  # of this worker
    indices = _indices(path, warn=True)
    cached: dict[str, _Span] = {}
    for index in indices.values():
        _check(path, index, width, fingerprint)
        cached |= {span.key: span for span in index.spans}
    spans = {span.key: span for span in indices[index_path].spans} if index_path in indices else {}
    unique = {u.key: u for u in utterances}
    share = sorted(unique.items(), key=lambda item: item[1].duration)[worker::workers]
    todo = [(key, u) for key, u in share if key not in cached or not cached[key].fits(u)]
    position = indexed = max((span.start + span.frames for span in spans.values()), default=0)
    if todo:
        if not spans:
            _frames_of(index_path).unlink(missing_ok=True)  # a new file: processes that map the old one keep it
        with _frames_of(index_path).open("r+b" if spans else "wb") as file:
            file.truncate(position * width * 2)
            file.seek(position * width * 2)
            batches = [todo[i : i + batch_size] for i in range(0, len(todo), batch_size)]
            for number, batch in enumerate(
                track(batches, f"features → {path.name}", disable=worker > 0, console=Console(stderr=True)), 1
            ):
                for (key, utterance), frames in zip(batch, compute([u for _, u in batch]), strict=True):
                    if frames.ndim != 2 or frames.shape[1] != width:
                        raise ValueError(f"frames of shape {frames.shape}, not (n, {width})")
                    file.write(frames.astype(np.float16).tobytes())
                    stamp = _stamp(utterance)
                    digest = _digest(_file(utterance), stamp[1])
                    spans[key] = _Span(key, *stamp, position, len(frames), digest)
                    position += len(frames)
                if position - indexed >= INDEXED or number == len(batches):
                    indexed = position
                    file.flush()
                    _write_index(index_path, _Index(width, fingerprint, list(spans.values())))
