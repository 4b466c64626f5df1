"""Recordings to transcripts: read them as streams, hand the speech of several to the model, put results back in order.

Importing this module does not import torch, so that the command line answers quickly.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from .audio import SAMPLE_RATE, AudioSource, Samples, read_blocks
from .errors import AsrError, AudioError
from .memory import give_back_memory
from .repetition import repeats
from .results import DEFAULT_MODEL, Segment, Transcript, compression_ratio, language_of
from .vad import Chunk, Clips, VadOptions, speech_chunks
from .words import timed_words

if TYPE_CHECKING:
    from .decoding import Decoded, OnStep
    from .denoise import DenoiseOptions
    from .model import DiffusionGemmaASR

POOL_BATCHES = 4  # recordings are read until they fill so many batches at most, which the model takes as one queue
POOL_S = 300.0  # or so much sound


@dataclass(frozen=True)
class TranscribeOptions:
    """How to transcribe. Raises AsrError on values out of range.

    Attributes:
        language: code of the language spoken; several codes with commas between them: whichever of these is spoken; "auto":
            whichever the model knows.
        initial_prompt, hotwords: put into the prompt: text that came before, words that may occur.
        denoise: how to denoise; a number is so many steps at most (None: 8), and the rest as the backbone's
            generation_config.json says.
        seed: of the random draws; the same seed and recording give the same transcript, whatever
            else is in the batch.
        batch_size: chunks of at most 30 s that the model takes at once.
        sampling_rate: of sound given as an array, in Hz. A file says its own.
        start: what the canvas holds at first, "noise" or the CTC "draft"; None is as the checkpoint says.
        engine: "fast", or "reference": the plain loop, for comparison; see engine.py.
        word_timestamps: whether segments get their words, with times.
        clip_timestamps: start and end, in seconds, of each part to transcribe, rising; an odd number of values leaves the
            end of the last part open. Empty is everything.
        vad_method, vad_onset, chunk_length: see `vad.VadOptions`.
        compression_ratio_threshold: text that compresses better than this repeats itself, and is decoded again.
        logprob_threshold, no_speech_threshold: a segment with a lower avg_logprob and a higher no_speech_prob than these
            is left out.
    """

    language: str = "auto"
    initial_prompt: str = ""
    hotwords: str = ""
    denoise: DenoiseOptions | int | None = None
    seed: int = 0
    batch_size: int = 16
    sampling_rate: int = SAMPLE_RATE
    start: Literal["noise", "draft"] | None = None
    engine: Literal["fast", "reference"] = "fast"
    word_timestamps: bool = False
    clip_timestamps: tuple[float, ...] = ()
    vad_method: Literal["silero", "energy"] = VadOptions.method
    vad_onset: float = VadOptions.onset
    chunk_length: float = VadOptions.chunk_length
    compression_ratio_threshold: float = 2.4
    logprob_threshold: float = -1.0
    no_speech_threshold: float = 0.6

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise AsrError(f"batch_size is {self.batch_size}; it must be at least 1")
        if self.start not in (None, "noise", "draft"):
            raise AsrError(f"start is {self.start!r}; choose 'noise' or 'draft'")
        if self.engine not in ("fast", "reference"):
            raise AsrError(f"engine is {self.engine!r}; choose 'fast' or 'reference'")
        times = self.clip_timestamps
        if any(time < 0 for time in times) or any(b <= a for a, b in itertools.pairwise(times)):
            raise AsrError(f"clip_timestamps are {times}; give start,end,start,end,... in seconds, each later than the last")
        self.vad()

    def vad(self) -> VadOptions:
        """What of it concerns voice activity detection."""
        return VadOptions(self.vad_method, self.vad_onset, self.chunk_length)

    def clips(self) -> Clips:
        """The parts to transcribe."""
        times = [*self.clip_timestamps, float("inf")]
        return tuple(zip(times[0:-1:2], times[1::2], strict=False))


@dataclass(frozen=True)
class Progress:
    """How far a run is: seconds of sound that are transcribed, and that have been read so far."""

    done_s: float
    read_s: float


ProgressCallback = Callable[[Progress], None]


@dataclass(frozen=True)
class End:
    """A recording is read and transcribed to its end; its duration in seconds."""

    duration: float


def transcribe(
    audio: AudioSource,
    model: DiffusionGemmaASR | str = DEFAULT_MODEL,
    *,
    on_progress: ProgressCallback | None = None,
    **options: Any,
) -> Transcript:
    """Transcribe one recording of any length.

    Args:
        audio: path, bytes, binary file object or array of samples; see `audio.read_blocks`.
        model: what `load()` returned, or a name or folder to load for this call alone.
        on_progress: called whenever a chunk is done.
        **options: fields of `TranscribeOptions`, for instance `language="en", seed=1`.

    Raises:
        AudioError: the sound cannot be used.
        AsrError: the model cannot be loaded, or an option has an impossible value.
    """
    chosen = TranscribeOptions(**options)
    (result,) = transcribe_many(loaded(model), [audio], chosen, on_progress=on_progress)
    if isinstance(result, AudioError):
        raise result
    return result


def stream(
    audio: AudioSource,
    model: DiffusionGemmaASR | str = DEFAULT_MODEL,
    *,
    on_progress: ProgressCallback | None = None,
    **options: Any,
) -> Iterator[Segment]:
    """As `transcribe`, but segment by segment, as they come; the recording is read as they are asked for."""
    chosen = TranscribeOptions(**options)
    for _, found in stream_many(loaded(model), [audio], chosen, on_progress=on_progress):
        if isinstance(found, AudioError):
            raise found
        if isinstance(found, Segment):
            yield found


def loaded(model: DiffusionGemmaASR | str) -> DiffusionGemmaASR:
    """The model itself, or the one of that name or folder."""
    if not isinstance(model, str):
        return model
    from diffusion_gemma_asr import load

    return load(model)


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
    segments: list[Segment] = []
    for _, found in stream_many(model, audio, options, on_progress=on_progress):
        if isinstance(found, Segment):
            segments.append(found)
            continue
        done, segments = tuple(segments), []
        language = language_of(done, options.language)
        yield found if isinstance(found, AudioError) else Transcript.from_segments(done, language, found.duration)


def stream_many(
    model: DiffusionGemmaASR,
    audio: Iterable[AudioSource],
    options: TranscribeOptions | None = None,
    *,
    on_progress: ProgressCallback | None = None,
    on_step: OnStep | None = None,
) -> Iterator[tuple[int, Segment | End | AudioError]]:
    """As `transcribe_many`, but segment by segment.

    Args:
        on_step: called before the first denoising step of every chunk and after each one, see
            `DiffusionGemmaASR.transcribe_batch`; chunks are then taken one by one.

    Yields:
        (number of the recording, from 0; what comes next of it): its segments, then its end or the error that cut it short.
        Recordings come in the order given, one behind the other.
    """
    options = options or TranscribeOptions()
    done_s, count, current = 0.0, 0, -1
    for pool in _pools(audio, options, largest=1 if on_step is not None else options.batch_size * POOL_BATCHES):
        chunks = [event for _, event in pool.events if isinstance(event, Chunk)]
        decoded = iter(_decode(model, chunks, options, _Tally(chunks, done_s, pool.read_s, on_progress), on_step))
        done_s = pool.read_s
        give_back_memory()
        for number, event in pool.events:
            if number != current:
                count, current = 0, number
            if not isinstance(event, Chunk):
                yield number, event
            elif (segment := _segment(count, event, next(decoded), model, options)) is not None:
                count += 1
                yield number, segment


Event: TypeAlias = "Chunk | End | AudioError"


@dataclass
class _Pool:
    """What was read, in order: each with the number of its recording; and seconds read since the first recording began."""

    events: list[tuple[int, Event]] = field(default_factory=list)
    read_s: float = 0.0


def _pools(audio: Iterable[AudioSource], options: TranscribeOptions, largest: int) -> Iterator[_Pool]:
    """Read recordings, in order, into pools with enough chunks to sort and few enough to keep in memory, `largest` at most.

    The first pool is one batch, so that the first text appears soon; each has twice as many as the one before.
    """
    enough = min(options.batch_size, largest)
    pool, held, held_s = _Pool(), 0, 0.0
    for number, source in enumerate(audio):
        for event, read_s in _events(source, options):
            pool.events.append((number, event))
            if isinstance(event, Chunk):
                held, held_s = held + 1, held_s + event.duration
            if held >= enough or held_s >= POOL_S:
                yield _Pool(pool.events, pool.read_s + read_s)
                enough = min(2 * enough, largest)
                pool, held, held_s = _Pool([], pool.read_s), 0, 0.0
        pool.read_s += read_s
    if pool.events:
        yield pool


def _events(source: AudioSource, options: TranscribeOptions) -> Iterator[tuple[Event, float]]:
    """The chunks of a recording as they are read, then its end or what is wrong with it; with the seconds read so far."""
    samples = 0

    def counted() -> Iterator[Samples]:
        nonlocal samples
        for block in read_blocks(source, options.sampling_rate):
            samples += len(block)
            yield block

    try:
        for chunk in speech_chunks(counted(), options.vad(), options.clips()):
            yield chunk, samples / SAMPLE_RATE
    except AudioError as error:
        yield error, samples / SAMPLE_RATE
    else:
        yield End(samples / SAMPLE_RATE), samples / SAMPLE_RATE


class _Tally:
    """Counts the seconds of the chunks that are done, and reports them."""

    def __init__(self, chunks: Sequence[Chunk], done_s: float, read_s: float, report: ProgressCallback | None):
        self._chunks, self._done_s, self._read_s, self._report = chunks, done_s, read_s, report

    def __call__(self, index: int) -> None:
        self._done_s += self._chunks[index].duration
        if self._report:
            self._report(Progress(min(self._done_s, self._read_s), self._read_s))


@dataclass(frozen=True)
class _Text:
    """A chunk's text, and how it came about."""

    decoded: Decoded
    fallback: Literal["seed", "draft"] | None


def _decode(
    model: DiffusionGemmaASR,
    chunks: Sequence[Chunk],
    options: TranscribeOptions,
    on_done: Callable[[int], None],
    on_step: OnStep | None,
) -> list[_Text]:
    """Decodes chunks; those whose text repeats itself once more with another seed, and if need be takes their drafts."""
    if not chunks:
        return []
    from .prompt import context_of  # not before: it imports torch

    codes = [code.strip() for code in options.language.split(",")]
    code, among = (codes[0], None) if len(codes) == 1 else ("auto", codes)

    def decode(chosen: Sequence[Chunk], seed: int, done: Callable[[int], None] | None) -> list[Decoded]:
        return model.transcribe_batch(
            [chunk.samples for chunk in chosen],
            language=code,
            among=among,
            context=context_of(options.initial_prompt, options.hotwords),
            options=options.denoise,
            seed=seed,
            start=options.start,
            engine=options.engine,
            rows=options.batch_size,
            on_done=done,
            on_step=on_step,
            align=options.word_timestamps,
        )

    def loops(text: str) -> bool:
        return repeats(text) or compression_ratio(text) > options.compression_ratio_threshold

    texts = [_Text(decoded, None) for decoded in decode(chunks, options.seed, on_done)]
    looping = [i for i, text in enumerate(texts) if loops(text.decoded.text)]
    if looping:
        for i, again in zip(looping, decode([chunks[i] for i in looping], options.seed + 1, None), strict=True):
            texts[i] = _Text(again.as_drafted(), "draft") if loops(again.text) else _Text(again, "seed")
    return texts


def transcribe_chunk(model: DiffusionGemmaASR, chunk: Chunk, options: TranscribeOptions) -> Segment | None:
    """The segment of one chunk, with number 0; None where nothing was said."""
    (text,) = _decode(model, [chunk], options, lambda index: None, None)
    return _segment(0, chunk, text, model, options)


def _segment(
    index: int, chunk: Chunk, found: _Text, model: DiffusionGemmaASR, options: TranscribeOptions
) -> Segment | None:
    """The segment of a chunk; None where nothing was said.

    A draft without a token heard no speech, whatever the decoder made of it.
    """
    decoded = found.decoded
    text = decoded.text.strip()
    logprob = sum(decoded.logprobs) / len(decoded.logprobs) if decoded.logprobs else 0.0
    no_speech_prob = 1.0 - chunk.speech_prob
    doubtful = no_speech_prob > options.no_speech_threshold and logprob < options.logprob_threshold
    if not text or doubtful or (model.drafts and not decoded.draft):
        return None
    words = None
    if options.word_timestamps:
        found_in = decoded.tokens, decoded.logprobs, decoded.spans
        words = timed_words(*found_in, chunk, model.text, decoded.language, model.slot_s)
    return Segment(
        id=index,
        start=chunk.start,
        end=chunk.end,
        text=text,
        tokens=tuple(decoded.tokens),
        avg_logprob=logprob,
        no_speech_prob=no_speech_prob,
        compression_ratio=compression_ratio(text),
        words=words,
        fallback=found.fallback,
        language=decoded.language,
    )
