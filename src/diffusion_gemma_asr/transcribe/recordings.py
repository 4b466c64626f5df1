"""Recordings to transcripts: read them as streams, hand the speech of several to the model, put results back in order."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import numpy as np

from ..audio.mix import Mixer
from ..audio.read import SAMPLE_RATE, AudioSource, Samples, describe, read_blocks, read_channels
from ..audio.vad import Chunk, Clips, Turn, VadOptions, channel_chunks, speech_chunks
from ..audio.voices import held_apart
from ..denoise.clip import Decoded
from ..denoise.decode import OnStep, decode_clips
from ..denoise.options import DecodeOptions
from ..errors import AsrError, AudioError
from ..memory import give_back_memory, of_device
from ..model.ctc import TokenSpan
from ..model.model import DiffusionGemmaASR
from ..strict import check_types, option
from .repetition import repeats
from .results import Segment, Transcript, compression_ratio, language_of
from .words import timed_words

POOL_BATCHES = 4  # recordings are read until they fill so many batches at most, which the model takes as one queue
POOL_S = {"cpu": 20.0, "cuda": 300.0}  # or so much sound: more gains nothing on a processor; 60 s take 50 MB more

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TranscribeOptions:
    """How to transcribe recordings. Raises AsrError on impossible values."""

    decode: DecodeOptions = field(default_factory=DecodeOptions)
    batch_size: int = option(16, "Stretches of speech, of at most 30 s, taken at once.", min=1)
    sampling_rate: int | None = option(None, "Of sound given as an array, in Hz; None is 16,000.", hidden=True)
    audio_track: int | None = option(None, "Track of a file that has several, from 0.", min=0, show_default="its default")
    channel: Literal["auto", "mix", "left", "right", "each"] = option(
        "auto",
        "Of stereo sound; each: every channel on its own, which its segments name; auto: mix, or each where two differ.",
    )
    word_timestamps: bool = option(False, "Times and probabilities of words, for json and the options below.")
    clip_timestamps: tuple[float, ...] = option(
        (), "start,end,start,end,... in s; only these parts.", show_default="all", metavar="SECONDS,..."
    )
    chunk_length: float = option(
        VadOptions.chunk_length, "Seconds of speech taken at once, at most.", names=["--chunk_size"]
    )
    vad_method: Literal["silero", "energy"] = option("silero", "silero, or energy: all that is not silence is speech.")
    vad_onset: float = option(VadOptions.onset, "Probability from which on sound is speech.")
    no_speech_threshold: float = option(0.6, "What is likelier no speech is left out, if its text is unsure.")
    logprob_threshold: float = option(-1.0, "Mean log-probability under which text is unsure.")
    compression_ratio_threshold: float = option(2.4, "Text that compresses better repeats itself, and is decoded again.")

    def __post_init__(self) -> None:
        object.__setattr__(self, "clip_timestamps", clip_times(self.clip_timestamps))
        check_types(self)
        if self.batch_size < 1:
            raise AsrError(f"batch_size is {self.batch_size}; it must be at least 1")
        times = self.clip_timestamps
        if any(time < 0 for time in times) or any(b <= a for a, b in itertools.pairwise(times)):
            raise AsrError(f"clip_timestamps are {times}; give start,end,start,end,... in seconds, each later than the last")
        self.vad()

    def vad(self) -> VadOptions:
        """What of it concerns voice activity detection."""
        return VadOptions(self.vad_method, self.vad_onset, self.chunk_length)

    def clips(self) -> Clips:
        """The parts to transcribe; an odd number of times leaves the end of the last part open."""
        times = [*self.clip_timestamps, float("inf")]
        return tuple(zip(times[0:-1:2], times[1::2], strict=False))


def clip_times(given: Any) -> tuple[float, ...]:
    """Clip times in any form that people write: "0,30", [0, 30], or [{"start": 0, "end": 30}]; None is everything.

    Raises:
        AsrError: they are no finite numbers.
    """
    try:
        if isinstance(given, str):
            given = [part for part in given.split(",") if part.strip()]
        times: list[float] = []
        for item in given or ():
            times += [float(item["start"]), float(item["end"])] if isinstance(item, dict) else [float(item)]
    except (TypeError, ValueError, KeyError):
        raise AsrError(f"clip_timestamps are {given!r}; give seconds such as 0,30,60,90") from None
    if not all(map(math.isfinite, times)):
        raise AsrError(f"clip_timestamps are {given!r}; give seconds such as 0,30,60,90")
    return tuple(times)


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


@dataclass(frozen=True)
class Part:
    """A recording of which other parts are to be transcribed than the options say.

    Attributes:
        source: as for `read_blocks`.
        clip_timestamps: see `TranscribeOptions`.
    """

    source: AudioSource
    clip_timestamps: tuple[float, ...]


def transcribe_many(
    model: DiffusionGemmaASR,
    audio: Iterable[AudioSource],
    options: TranscribeOptions | None = None,
    *,
    on_progress: ProgressCallback | None = None,
) -> Iterator[Transcript | AudioError]:
    """Transcribe recordings, in batches that may hold chunks of several.

    Args:
        model: that decodes.
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
    for _, event in stream_many(model, audio, options, on_progress=on_progress):
        if isinstance(event, Segment):
            segments.append(event)
            continue
        done, segments = tuple(segments), []
        language = language_of(done, options.decode.codes[0])
        yield event if isinstance(event, AudioError) else Transcript.from_segments(done, language, event.duration)


def stream_many(
    model: DiffusionGemmaASR,
    audio: Iterable[AudioSource | Part],
    options: TranscribeOptions | None = None,
    *,
    on_progress: ProgressCallback | None = None,
    on_step: OnStep | None = None,
) -> Iterator[tuple[int, Segment | End | AudioError]]:
    """As `transcribe_many`, but segment by segment.

    Args:
        on_step: see `denoise.decode.decode_clips`; chunks are then taken one by one.

    Yields:
        (number of the recording, from 0; what comes next of it): its segments, then its end or the error that cut it short.
        Recordings come in the order given, one behind the other.
    """
    options = options or TranscribeOptions()
    options.decode.check(model)  # before any sound is read
    done_s, count, current = 0.0, 0, -1
    largest = 1 if on_step is not None else options.batch_size * POOL_BATCHES
    for pool in _pools(audio, options, largest, of_device(POOL_S, model.device)):
        chunks = [event for _, event in pool.events if isinstance(event, Chunk)]
        decoded = iter(_decode(model, chunks, options, _Tally(chunks, done_s, pool.read_s, on_progress), on_step))
        done_s = pool.read_s
        give_back_memory()
        for number, event in pool.events:
            if number != current:
                count, current = 0, number
            if not isinstance(event, Chunk):
                yield number, event
            elif (segment := chunk_segment(count, event, next(decoded), model, options)) is not None:
                count += 1
                yield number, segment


Event: TypeAlias = "Chunk | End | AudioError"


@dataclass
class _Pool:
    """What was read, in order: each with the number of its recording; and seconds read since the first recording began."""

    events: list[tuple[int, Event]] = field(default_factory=list)
    read_s: float = 0.0


def _pools(
    audio: Iterable[AudioSource | Part], options: TranscribeOptions, largest: int, longest_s: float
) -> Iterator[_Pool]:
    """Read recordings, in order, into pools with enough chunks to sort and few enough to keep in memory: `largest` at most,
    or until their sound is `longest_s` long.

    The first pool is one batch, so that the first text appears soon; each has twice as many as the one before.
    """
    enough = min(options.batch_size, largest)
    pool, held, held_s = _Pool(), 0, 0.0
    for number, source in enumerate(audio):
        if isinstance(source, Part):
            events = recording_events(source.source, replace(options, clip_timestamps=source.clip_timestamps))
        else:
            events = recording_events(source, options)
        for event, read_s in events:
            pool.events.append((number, event))
            if isinstance(event, Chunk):
                held, held_s = held + 1, held_s + event.duration
            if held >= enough or held_s >= longest_s:
                yield _Pool(pool.events, pool.read_s + read_s)
                enough = min(2 * enough, largest)
                pool, held, held_s = _Pool([], pool.read_s), 0, 0.0
        pool.read_s += read_s
    if pool.events:
        yield pool


def recording_events(
    source: AudioSource, options: TranscribeOptions, turn: Turn = nullcontext
) -> Iterator[tuple[Event, float]]:
    """The chunks of a recording as they are read, then its end or what is wrong with it; with the seconds read so far.

    Chunks come in order of the time at which their speech starts, also where they are of several channels.

    Args:
        turn: see `speech_chunks`.
    """
    samples = 0

    def counted(blocks: Iterable[Samples]) -> Iterator[Samples]:
        nonlocal samples
        for block in blocks:
            samples += block.shape[-1]
            yield block

    try:
        apart, blocks = _channels(source, options)
        find = channel_chunks if apart else speech_chunks
        for chunk in find(counted(blocks), options.vad(), options.clips(), turn):
            yield chunk, samples / SAMPLE_RATE
    except AudioError as error:
        yield error, samples / SAMPLE_RATE
    else:
        yield End(samples / SAMPLE_RATE), samples / SAMPLE_RATE


def _channels(source: AudioSource, options: TranscribeOptions) -> tuple[bool, Iterator[Samples]]:
    """Whether channels are transcribed one by one; blocks (channels, n_i) of all of them if so, else (n_i,)."""
    rate, track = options.sampling_rate or SAMPLE_RATE, options.audio_track
    if options.channel == "each":
        return True, read_channels(source, rate, track=track)
    if options.channel != "auto":
        return False, read_blocks(source, rate, track=track, channel=options.channel)
    apart, blocks = held_apart(read_channels(source, rate, track=track, most=2))
    if apart:
        logger.warning(
            "%s: the two channels hold different speech and are transcribed one by one; --channel mix mixes them",
            describe(source),
        )
        return True, blocks
    mixer = Mixer("mix", describe(source))
    return False, (mixer(block.astype(np.float64), SAMPLE_RATE) for block in blocks)


class _Tally:
    """Counts the seconds of the chunks that are done, and reports them."""

    def __init__(self, chunks: Sequence[Chunk], done_s: float, read_s: float, report: ProgressCallback | None):
        self._chunks, self._done_s, self._read_s, self._report = chunks, done_s, read_s, report

    def __call__(self, index: int) -> None:
        self._done_s += self._chunks[index].duration
        if self._report:
            self._report(Progress(min(self._done_s, self._read_s), self._read_s))


@dataclass(frozen=True)
class ChunkText:
    """A chunk's text, and how it came about; see `Segment.fallback`."""

    decoded: Decoded
    fallback: Literal["seed", "draft"] | None = None

    def aligned(self, spans: list[TokenSpan] | None) -> ChunkText:
        """The same with the places of its tokens."""
        return replace(self, decoded=replace(self.decoded, spans=spans))


def _decode(
    model: DiffusionGemmaASR,
    chunks: Sequence[Chunk],
    options: TranscribeOptions,
    on_done: Callable[[int], None],
    on_step: OnStep | None,
) -> list[ChunkText]:
    """Decodes chunks; those whose text repeats itself once more with another seed, and if need be takes their drafts."""
    if not chunks:
        return []

    def decode(chosen: Sequence[Chunk], how: DecodeOptions, done: Callable[[int], None] | None) -> list[Decoded]:
        return decode_clips(
            model,
            [chunk.samples for chunk in chosen],
            how,
            batch_size=options.batch_size,
            align=options.word_timestamps,
            on_done=done,
            on_step=on_step,
        )

    texts = [ChunkText(decoded) for decoded in decode(chunks, options.decode, on_done)]
    again = [i for i, text in enumerate(texts) if wants_another_seed(text.decoded, options)]
    if again:
        for i, decoded in zip(
            again, decode([chunks[i] for i in again], with_another_seed(options.decode), None), strict=True
        ):
            texts[i] = second_text(decoded, options)
    return texts


def wants_another_seed(decoded: Decoded, options: TranscribeOptions) -> bool:
    """Whether a text repeats itself and another seed may change it, which it cannot where a draft was not denoised."""
    return decoded.decoder == "denoising" and _goes_round(decoded.text, options)


def with_another_seed(options: DecodeOptions) -> DecodeOptions:
    """How to decode for the second time."""
    return replace(options, seed=options.seed + 1)


def second_text(decoded: Decoded, options: TranscribeOptions) -> ChunkText:
    """What is taken after the second time: its text, or where that repeats itself too, the draft."""
    return ChunkText(decoded.as_drafted(), "draft") if _goes_round(decoded.text, options) else ChunkText(decoded, "seed")


def _goes_round(text: str, options: TranscribeOptions) -> bool:
    return repeats(text) or compression_ratio(text) > options.compression_ratio_threshold


def transcribe_chunk(model: DiffusionGemmaASR, chunk: Chunk, options: TranscribeOptions) -> Segment | None:
    """The segment of one chunk, with number 0; None where nothing was said."""
    (text,) = _decode(model, [chunk], options, lambda index: None, None)
    return chunk_segment(0, chunk, text, model, options)


def chunk_segment(
    index: int, chunk: Chunk, result: ChunkText, model: DiffusionGemmaASR, options: TranscribeOptions
) -> Segment | None:
    """The segment of a chunk; None where nothing was said.

    A draft without a token heard no speech, whatever the decoder made of it.
    """
    decoded = result.decoded
    text = decoded.text.strip()
    logprob = sum(decoded.logprobs) / len(decoded.logprobs) if decoded.logprobs else 0.0
    no_speech_prob = 1.0 - chunk.speech_prob
    doubtful = no_speech_prob > options.no_speech_threshold and logprob < options.logprob_threshold
    if not text or doubtful or (model.config.ctc and not decoded.draft):
        return None
    words = None
    if options.word_timestamps:
        words = timed_words(decoded, chunk, model.text, model.slot_s)
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
        fallback=result.fallback,
        language=decoded.language,
        decoder=decoded.decoder,
        steps=decoded.steps,
        channel=chunk.channel,
    )
