"""Live transcription: sound as it comes to words that stay, and text behind them that may still change.

What is being said is decoded again about once a second. Words on which two decodings in a row agree are committed
(LocalAgreement-2 of Liu, Spanakis & Niehues 2020, arXiv 2005.11185, as Macháček et al. 2023, arXiv 2307.14743, use it); at a
pause, what was said before it is decoded one last time and all of it committed. Silence and noise are never decoded.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ..audio.mix import Channel
from ..audio.read import SAMPLE_RATE, Samples, convert_blocks
from ..audio.vad import Chunk, SpeechFinder, speech_finder
from ..errors import AsrError
from ..model.model import DiffusionGemmaASR
from .recordings import TranscribeOptions, transcribe_chunk
from .results import Segment, Word, compression_ratio, joiner

CUT_SHARE = 0.5  # of chunk_length: speech that goes on for longer is cut behind its last committed word


DecodeChunk = Callable[[Chunk, TranscribeOptions], Segment | None]


@dataclass(frozen=True)
class LiveUpdate:
    """What is new in a stream.

    Attributes:
        committed: words that will not change any more, behind those of all updates before, with times in seconds from the
            start of the stream. The `word`s of all updates, joined without anything between them, are the transcript.
        partial: what was probably said behind them; the next update's replaces it. Empty at every pause.
        heard: seconds of sound that were read when the update was made.
        segment: where a stretch of speech ended, at a pause or a cut, that stretch: its committed words. It has no tokens,
            since they came from several decodings, and its avg_logprob is the mean over words.
    """

    committed: tuple[Word, ...]
    partial: str
    heard: float
    segment: Segment | None = None


def transcribe_live(
    model: DiffusionGemmaASR, blocks: Iterable[NDArray[np.generic]], options: TranscribeOptions, every: float = 1.0
) -> Iterator[LiveUpdate]:
    """Transcribes sound while it is being recorded.

    Speech under way is decoded once a block at most, however long the block is: where decoding takes longer than speaking, a
    source that hands on as one block what has gathered in the meantime lets the text catch up.

    Args:
        model: that decodes.
        blocks: consecutive arrays of samples as a microphone gives them, of 0.1 s or so; see `audio.read.convert_blocks`.
        options: at most `chunk_length` seconds are decoded at once; speech that goes on for longer than half of it is cut
            behind a committed word. Words always get times; `batch_size` does not matter.
        every: seconds of sound between two decodings of the same speech.

    Yields:
        an update wherever there is something new. Committed words are in order of time and never taken back.

    Raises:
        AudioError: a block cannot be used; see `convert_blocks`.
        AsrError: the options do not suit live sound, or the model.
    """
    options.decode.check(model)
    return live_updates(partial(transcribe_chunk, model), blocks, options, every)


def live_updates(
    decode: DecodeChunk, blocks: Iterable[NDArray[np.generic]], options: TranscribeOptions, every: float = 1.0
) -> Iterator[LiveUpdate]:
    """As `transcribe_live`, with any way to decode a chunk: a server has others to decode for beside it.

    Args:
        decode: (chunk, options) → its segment, None where nothing was said.
        blocks, options, every: see `transcribe_live`.
    """
    check_live(options, every)
    return _updates(blocks, decode, every, replace(options, word_timestamps=True))


def check_live(options: TranscribeOptions, every: float) -> None:
    """Raises AsrError if `transcribe_live` cannot work so."""
    if not every > 0 or not math.isfinite(every):
        raise AsrError(f"every is {every}; choose a number of seconds above 0, such as 1")
    if options.channel == "each":
        raise AsrError("channel each is for recordings; choose mix, left or right for live transcription")
    if options.clip_timestamps:
        raise AsrError("clip_timestamps are for recordings; leave them out of live transcription")


def _updates(
    blocks: Iterable[NDArray[np.generic]], decode: DecodeChunk, every: float, options: TranscribeOptions
) -> Iterator[LiveUpdate]:
    assert options.channel != "each"  # `check_live`
    channel: Channel = "mix" if options.channel == "auto" else options.channel
    with speech_finder(options.vad()) as finder:
        listener = _Listener(decode, finder, every, options)
        for block in convert_blocks(blocks, options.sampling_rate or SAMPLE_RATE, channel=channel):
            yield from listener.hear(block)
        yield from listener.finish()


class _Listener:
    """Decodes the speech under way when it is time, and keeps what is committed apart from what is not.

    All times are seconds from the start of the stream. `_end` is where the last committed word ends; `_hypothesis` what the
    last decoding has behind it; `_words` what is committed of the stretch of speech under way.
    """

    def __init__(self, decode: DecodeChunk, finder: SpeechFinder, every: float, options: TranscribeOptions):
        self._decode_chunk, self._finder, self._every, self._options = decode, finder, every, options
        self._samples = 0  # heard
        self._decoded_at = self._decoded_to = 0.0  # what was heard, and where its speech ended, at the last decoding
        self._end = 0.0
        self._hypothesis: tuple[Word, ...] = ()
        self._words: list[Word] = []
        self._begun = False  # a word was committed
        self._last: Segment | None = None  # the last decoding that has words
        self._segments = 0
        self._partial = ""

    @property
    def _heard(self) -> float:
        return self._samples / SAMPLE_RATE

    def hear(self, block: Samples) -> Iterator[LiveUpdate]:
        """Takes (n,) samples that follow those before."""
        self._samples += len(block)
        for chunk in self._finder.feed(block):
            yield from self._complete(chunk)
        if self._heard - self._decoded_at >= self._every:
            yield from self._look_again()

    def finish(self) -> Iterator[LiveUpdate]:
        """What is left when the stream ends."""
        for chunk in self._finder.finish():
            yield from self._complete(chunk)

    def _look_again(self) -> Iterator[LiveUpdate]:
        """Decodes speech that goes on, unless it has only just begun or nothing was said since the last time."""
        chunk = self._finder.under_way()
        if chunk is None or self._heard - chunk.start < self._every or chunk.end <= self._decoded_to:
            return
        words = self._decode(chunk)
        agreed = _agreement(self._hypothesis, words)
        committed, self._hypothesis = self._commit(words[:agreed]), words[agreed:]
        segment = None
        if chunk.duration > CUT_SHARE * self._options.chunk_length and self._finder.cut(self._end):
            segment = self._segment(chunk)
        yield from self._update(committed, segment)

    def _complete(self, chunk: Chunk) -> Iterator[LiveUpdate]:
        """Decodes speech that has ended for the last time."""
        committed, self._hypothesis = self._commit(self._decode(chunk)), ()
        yield from self._update(committed, self._segment(chunk))

    def _decode(self, chunk: Chunk) -> tuple[Word, ...]:
        """The words of a chunk that are not committed yet: those whose middle lies behind the last committed one's end."""
        self._decoded_at, self._decoded_to = self._heard, chunk.end
        segment = self._decode_chunk(chunk, self._options)
        if segment is None or not segment.words:
            return ()
        self._last = segment
        return tuple(word for word in segment.words if (word.start + word.end) / 2 > self._end)

    def _commit(self, words: Sequence[Word]) -> tuple[Word, ...]:
        """Keeps words, from where the last one ended on."""
        committed = []
        for word in words:
            text = word.word
            if self._begun and self._last is not None and not text[0].isspace():  # the first word of a chunk
                text = joiner(self._last.language) + text
            committed.append(replace(word, word=text, start=max(word.start, self._end)))
            self._begun, self._end = True, word.end
        self._words += committed
        return tuple(committed)

    def _segment(self, chunk: Chunk) -> Segment | None:
        """The stretch of speech that ends here, in its committed words; there is none any more."""
        words, self._words = tuple(self._words), []
        if not words or self._last is None:
            return None
        number, self._segments = self._segments, self._segments + 1
        text = "".join(word.word for word in words).strip()
        return replace(
            self._last,
            id=number,
            start=words[0].start,
            end=words[-1].end,
            text=text,
            tokens=(),
            avg_logprob=float(np.mean([math.log(max(word.probability, 1e-10)) for word in words])),
            no_speech_prob=1.0 - chunk.speech_prob,
            compression_ratio=compression_ratio(text),
            words=words,
            fallback=None,
        )

    def _update(self, committed: tuple[Word, ...], segment: Segment | None) -> Iterator[LiveUpdate]:
        """The update, if it says anything new."""
        partial = "".join(word.word for word in self._hypothesis).strip()
        if committed or segment is not None or partial != self._partial:
            self._partial = partial
            yield LiveUpdate(committed, partial, self._heard, segment)


def _agreement(before: Sequence[Word], now: Sequence[Word]) -> int:
    """How many words two hypotheses have in common at their beginnings."""
    pairs = zip(before, now, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0].word.strip() == pair[1].word.strip(), pairs))
