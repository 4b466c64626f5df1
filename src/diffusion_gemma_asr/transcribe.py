"""Recordings to transcripts: load, cut into chunks, hand the chunks of several to the model, put results back in order.

Importing this module does not import torch, so that the command line answers quickly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from diffusion_gemma_asr.audio import SAMPLE_RATE, AudioSource, Chunk, is_silent, load_audio, split
from diffusion_gemma_asr.errors import AsrError, AudioError
from diffusion_gemma_asr.results import Segment, Transcript, compression_ratio

if TYPE_CHECKING:
    from diffusion_gemma_asr.decoding import Decoded
    from diffusion_gemma_asr.denoise import DenoiseOptions
    from diffusion_gemma_asr.model import DiffusionGemmaASR

POOL_BATCHES = 8  # recordings are read until they fill this many batches, which the model takes as one queue


@dataclass(frozen=True)
class TranscribeOptions:
    """How to transcribe. Raises AsrError on values out of range.

    Attributes:
        language: code of the language spoken.
        denoise: how to denoise; a number is so many steps at most (None: 8), and the rest as the backbone's
            generation_config.json says.
        seed: of the random draws; the same seed and recording give the same transcript, whatever
            else is in the batch.
        batch_size: chunks of at most 30 s that the model takes at once.
        sampling_rate: of sound given as an array, in Hz. A file says its own.
        start: what the canvas holds at first, "noise" or the CTC "draft"; None is as the checkpoint says.
        engine: "fast", or "reference": the plain loop, for comparison; see engine.py.
    """

    language: str = "en"
    denoise: DenoiseOptions | int | None = None
    seed: int = 0
    batch_size: int = 16
    sampling_rate: int = SAMPLE_RATE
    start: Literal["noise", "draft"] | None = None
    engine: Literal["fast", "reference"] = "fast"

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise AsrError(f"batch_size is {self.batch_size}; it must be at least 1")
        if self.start not in (None, "noise", "draft"):
            raise AsrError(f"start is {self.start!r}; choose 'noise' or 'draft'")
        if self.engine not in ("fast", "reference"):
            raise AsrError(f"engine is {self.engine!r}; choose 'fast' or 'reference'")


@dataclass(frozen=True)
class Progress:
    """How far a run is: seconds of sound that are transcribed, and that have been read so far."""

    done_s: float
    read_s: float


ProgressCallback = Callable[[Progress], None]


@dataclass(frozen=True)
class _Recording:
    chunks: list[Chunk]

    @property
    def duration_s(self) -> float:
        return _seconds(self.chunks)


def transcribe(
    audio: AudioSource,
    model: DiffusionGemmaASR | str = "mini",
    *,
    on_progress: ProgressCallback | None = None,
    **options: Any,
) -> Transcript:
    """Transcribe one recording of any length.

    Args:
        audio: path, bytes, binary file object or array of samples; see `audio.load_audio`.
        model: what `load()` returned, or a name or folder to load for this call alone.
        on_progress: called whenever a chunk is done.
        **options: fields of `TranscribeOptions`, for instance `language="en", seed=1`.

    Raises:
        AudioError: the sound cannot be used.
        AsrError: the model cannot be loaded, or an option has an impossible value.
    """
    chosen = TranscribeOptions(**options)
    if isinstance(model, str):
        from diffusion_gemma_asr import load

        model = load(model)
    (result,) = transcribe_many(model, [audio], chosen, on_progress=on_progress)
    if isinstance(result, AudioError):
        raise result
    return result


def transcribe_many(
    model: DiffusionGemmaASR,
    audio: Iterable[AudioSource],
    options: TranscribeOptions | None = None,
    *,
    on_progress: ProgressCallback | None = None,
) -> Iterator[Transcript | AudioError]:
    """Transcribe recordings, in batches that may hold chunks of several.

    Args:
        model: what `load()` returned.
        audio: paths, bytes, binary file objects or arrays of samples, which are read as needed.
        options: None is `TranscribeOptions()`.
        on_progress: called whenever a chunk is done.

    Yields:
        For each recording, in the order given, its transcript, or the error that kept it from being read: one
        bad recording does not lose the others.

    Raises:
        AsrError: what concerns every recording, for instance a language that the model does not know.
    """
    options = options or TranscribeOptions()
    done_s = read_s = 0.0
    for pool in _pools(audio, options):
        chunks = [chunk for entry in pool if isinstance(entry, _Recording) for chunk in entry.chunks]
        spoken = [chunk for chunk in chunks if not is_silent(chunk.samples)]
        read_s += _seconds(chunks)
        done_s += _seconds(chunks) - _seconds(spoken)
        tally = _Tally(spoken, done_s, read_s, on_progress)
        decoded = dict(zip(spoken, _decode(model, spoken, options, tally), strict=True)) if spoken else {}
        done_s += _seconds(spoken)
        for entry in pool:
            yield entry if isinstance(entry, AudioError) else _transcript(entry, decoded, options.language)


def _pools(audio: Iterable[AudioSource], options: TranscribeOptions) -> Iterator[list[_Recording | AudioError]]:
    """Read recordings, in order, into lists with enough chunks to sort and few enough to keep in memory."""
    enough = options.batch_size * POOL_BATCHES
    pool: list[_Recording | AudioError] = []
    held = 0
    for source in audio:
        try:
            recording = _Recording(split(load_audio(source, options.sampling_rate)))
        except AudioError as error:
            pool.append(error)
            continue
        pool.append(recording)
        held += len(recording.chunks)
        if held >= enough:
            yield pool
            pool, held = [], 0
    if pool:
        yield pool


class _Tally:
    """Counts the seconds of the chunks that are done, and reports them."""

    def __init__(self, chunks: list[Chunk], done_s: float, read_s: float, report: ProgressCallback | None):
        self._chunks, self._done_s, self._read_s, self._report = chunks, done_s, read_s, report

    def __call__(self, index: int) -> None:
        self._done_s += self._chunks[index].duration_s
        if self._report:
            self._report(Progress(self._done_s, self._read_s))


def _decode(
    model: DiffusionGemmaASR, chunks: list[Chunk], options: TranscribeOptions, on_done: Callable[[int], None]
) -> list[Decoded]:
    return model.transcribe_batch(
        [chunk.samples for chunk in chunks],
        language=options.language,
        options=options.denoise,
        seed=options.seed,
        start=options.start,
        engine=options.engine,
        rows=options.batch_size,
        on_done=on_done,
    )


def _transcript(recording: _Recording, decoded: dict[Chunk, Decoded], language: str) -> Transcript:
    """A segment per chunk; a chunk that was not decoded is silent."""
    segments = [_segment(index, chunk, decoded.get(chunk)) for index, chunk in enumerate(recording.chunks)]
    return Transcript.from_segments(tuple(segments), language, recording.duration_s)


def _segment(index: int, chunk: Chunk, decoded: Decoded | None) -> Segment:
    text = decoded.text.strip() if decoded else ""
    logprobs = decoded.logprobs if decoded else []
    return Segment(
        id=index,
        start=chunk.offset_s,
        end=chunk.offset_s + chunk.duration_s,
        text=text,
        tokens=tuple(decoded.tokens) if decoded else (),
        avg_logprob=sum(logprobs) / len(logprobs) if logprobs else 0.0,
        no_speech_prob=0.0 if decoded else 1.0,
        compression_ratio=compression_ratio(text),
    )


def _seconds(chunks: Iterable[Chunk]) -> float:
    return sum(chunk.duration_s for chunk in chunks)
