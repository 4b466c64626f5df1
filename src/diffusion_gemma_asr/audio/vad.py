"""Voice activity: a stream of sound to chunks that hold speech, each as long as the model can take at once.

Speech is found in windows of 32 ms (detectors.py). A chunk goes on until a pause of half a second; where none comes in time
it is cut at the quietest place of its last five seconds. Speech that is far too quiet is raised first, see `level`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..errors import AsrError
from .detectors import WINDOW, Detectors, Method, detectors_for
from .level import HeardAhead, Level, raised
from .read import SAMPLE_RATE, Samples

HYSTERESIS = 0.15  # speech goes on as long as its probability stays above the onset less this, as in Silero's own code
MIN_PAUSE_S = 0.5  # a shorter one is part of the speech
MIN_SPEECH_S = 0.2  # shorter bursts are clicks and chance
LOOK_BACK_S = 1.0  # detection may be late by so much in a voice that is strange to it; heard backwards, ...
LOOK_AHEAD_S = 1.0  # ... from so far inside the speech, it is sure (a probability of 0.9) down to the true beginning
SURE, LOST = 0.9, 0.5  # windows under 0.5 are before it
PADDING_S = 0.4  # kept of the silence before and behind speech, which fades in and out; as in faster-whisper
CUT_SEARCH_S = 5.0  # a chunk that has to be cut is cut somewhere in its last five seconds
CUT_PAUSE_S = 0.2  # a pause between words; the closure of a "p" or "t" is shorter
FRAME = SAMPLE_RATE // 50  # 20 ms

Clips = tuple[tuple[float, float], ...]
Turn = Callable[[], AbstractContextManager[None]]
"""What is entered while speech is looked for in a piece of sound."""


@dataclass(frozen=True)
class VadOptions:
    """How speech is told from other sound. Raises AsrError on values out of range.

    Attributes:
        method: "silero"; or "energy", which takes everything louder than -60 dBFS for speech, after very quiet sound was
            raised.
        onset: probability from which on a window is speech, 0 to 1.
        chunk_length: seconds of sound a chunk has at most, 1 to 30.
    """

    method: Method = "silero"
    onset: float = 0.5
    chunk_length: float = 30.0

    def __post_init__(self) -> None:
        if self.method not in ("silero", "energy"):
            raise AsrError(f"vad_method is {self.method!r}; choose 'silero' or 'energy'")
        if not 0 < self.onset < 1:
            raise AsrError(f"vad_onset is {self.onset}; choose a probability between 0 and 1")
        if not 1 <= self.chunk_length <= 30:
            raise AsrError(f"chunk_length is {self.chunk_length}; choose 1 to 30 seconds")


@dataclass(frozen=True, eq=False)
class Chunk:
    """A piece of a recording that holds speech.

    Attributes:
        offset: where its samples begin, in seconds from the start of the recording.
        samples: (n,) float32, mono, 16 kHz: the speech and a little of what is around it, raised by one factor if the
            recording is very quiet there.
        start, end: of the speech, in seconds from the start of the recording.
        speech_prob: mean probability of speech over its windows.
        channel: that it is of, from 0; None where channels were mixed or one was chosen.
    """

    offset: float
    samples: Samples
    start: float
    end: float
    speech_prob: float
    channel: int | None = None

    @property
    def duration(self) -> float:
        return len(self.samples) / SAMPLE_RATE


def speech_chunks(
    blocks: Iterable[Samples], options: VadOptions | None = None, clips: Clips = (), turn: Turn = nullcontext
) -> Iterator[Chunk]:
    """Find the speech in a recording, without ever holding more of it than a chunk.

    Args:
        blocks: consecutive (n_i,) float32, 16 kHz.
        clips: (start, end) in seconds, rising: the parts to look at; none is all of it.
        turn: entered while speech is looked for, in some 0.75 s of sound at a time.

    Yields:
        chunks in order of time, which do not overlap, each of them when its end is known.
    """
    options = options or VadOptions()
    with detectors_for(options.method) as detectors:
        hearing = _Hearing(detectors, options, clips, turn)
        for block in blocks:
            yield from hearing.feed(block)
        yield from hearing.finish()


def channel_chunks(
    blocks: Iterable[Samples], options: VadOptions | None = None, clips: Clips = (), turn: Turn = nullcontext
) -> Iterator[Chunk]:
    """As `speech_chunks`, of several channels side by side.

    Args:
        blocks: consecutive (channels, n_i) float32, 16 kHz.

    Yields:
        chunks in order of the time at which their speech starts, each of them when no channel can have an earlier one any
        more. Those of different channels may overlap.
    """
    options, hearings, waiting = options or VadOptions(), list[_Hearing](), list[Chunk]()
    with ExitStack() as stack:
        for block in blocks:
            hearings = hearings or [
                _Hearing(stack.enter_context(detectors_for(options.method)), options, clips, turn) for _ in block
            ]
            for number, hearing in enumerate(hearings):
                waiting += (replace(chunk, channel=number) for chunk in hearing.feed(block[number]))
            waiting.sort(key=lambda chunk: (chunk.start, chunk.end))
            earliest_s = min(hearing.earliest_s for hearing in hearings)
            while waiting and waiting[0].start <= earliest_s:
                yield waiting.pop(0)
        for number, hearing in enumerate(hearings):
            waiting += (replace(chunk, channel=number) for chunk in hearing.finish())
        yield from sorted(waiting, key=lambda chunk: (chunk.start, chunk.end))


def speech_windows(samples: Samples) -> NDArray[np.bool_]:
    """In which windows of 32 ms of a whole sound, (n,) at 16 kHz, somebody speaks; -> (n // 512,)."""
    options, level = VadOptions(), Level()
    level.hear(samples)
    windows = raised(samples[: len(samples) // WINDOW * WINDOW], level.gain).reshape(-1, WINDOW)
    with detectors_for(options.method) as detectors:
        detect = detectors.forwards()
        return np.array([detect(window) >= options.onset for window in windows], bool)


class _Hearing:
    """Finds the speech in one channel of a recording, or in parts of it, as it is read."""

    def __init__(self, detectors: Detectors, options: VadOptions, clips: Clips, turn: Turn):
        self._detectors, self._options, self._level, self._turn = detectors, options, Level(), turn
        self._ahead = HeardAhead(self._level)
        self._clips = [(round(start * SAMPLE_RATE), end * SAMPLE_RATE) for start, end in clips or ((0.0, math.inf),)]
        self._finder: SpeechFinder | None = None
        self._clip = 0  # first sample of the clip that it is in
        self._position = 0  # samples looked at

    def feed(self, block: Samples) -> Iterator[Chunk]:
        """Takes (n,) samples; gives the chunks that are complete now."""
        for heard in self._ahead.feed(block):
            with self._turn():
                found = list(self._hear(heard))
            yield from found

    def finish(self) -> Iterator[Chunk]:
        """What is under way when the sound ends."""
        for heard in self._ahead.finish():
            yield from self._hear(heard)
        if self._finder is not None:
            yield from self._finder.finish()

    @property
    def earliest_s(self) -> float:
        """No chunk that is still to come has speech that starts before; in seconds."""
        return self._position / SAMPLE_RATE if self._finder is None else self._finder.earliest_s

    def _hear(self, block: Samples) -> Iterator[Chunk]:
        for start, end in self._clips:
            piece = block[max(0, start - self._position) : max(0, math.ceil(min(end - self._position, len(block))))]
            if not len(piece):
                continue
            if self._finder is None or start != self._clip:
                if self._finder is not None:
                    yield from self._finder.finish()
                self._finder, self._clip = SpeechFinder(self._detectors, self._options, start, self._level), start
            yield from self._finder.feed(piece)
        self._position += len(block)


@contextmanager
def speech_finder(options: VadOptions | None = None) -> Iterator[SpeechFinder]:
    """A finder to push sound into, from the beginning of a recording; not to be used behind the `with` block."""
    with detectors_for((options or VadOptions()).method) as detectors:
        yield SpeechFinder(detectors, options or VadOptions(), 0)


class SpeechFinder:
    """Takes sound as it comes and gives chunks when they are complete; `speech_finder` makes one.

    `_sound` holds what may still be needed, from sample `_first` on. `_start`, `_last` are the first sample of the speech
    under way and the one behind its last window; `_cut` says that it follows a cut, so that nothing before it is to be kept.
    """

    def __init__(self, detectors: Detectors, options: VadOptions, first: int, level: Level | None = None):
        """
        Args:
            first: number, in the recording, of the first sample that will be fed.
            level: what hears the recording elsewhere; None: it hears what is fed.
        """
        self._level, self._listens = level or Level(), level is None
        self._new_detector, self._backwards, self._options = detectors.forwards, detectors.backwards, options
        self._detect = self._new_detector()
        self._longest = round(options.chunk_length * SAMPLE_RATE)
        self._padding, self._pause = round(PADDING_S * SAMPLE_RATE), round(MIN_PAUSE_S * SAMPLE_RATE)
        self._sound = np.zeros(0, np.float32)
        self._first = self._floor = self._next = first  # _floor: nothing before it belongs to a coming chunk
        self._start: int | None = None
        self._last = first
        self._cut = False
        self._probabilities: list[float] = []  # of the speech under way
        self._checked = False  # the beginning of the speech under way was heard backwards

    def feed(self, block: Samples) -> Iterator[Chunk]:
        """Hears (n,) float32, 16 kHz, which follow what it heard before; gives the chunks that are complete now."""
        if self._listens:
            before = self._level.gain
            self._level.hear(block)
            if self._level.gain > 2 * before:
                self._hear_again()
        self._sound = np.concatenate([self._sound, block])
        while self._next + WINDOW <= self._first + len(self._sound):
            yield from self._window(self._piece(self._next, self._next + WINDOW))
        self._forget()

    def _hear_again(self) -> None:
        """Goes back, where no speech is under way, as far as sound is kept: it was so quiet that speech was missed."""
        if self._start is None:
            self._next -= (self._next - max(self._first, self._floor)) // WINDOW * WINDOW
            self._detect = self._new_detector()

    def finish(self) -> Iterator[Chunk]:
        """What is under way when the sound ends."""
        end = self._first + len(self._sound)
        if self._next < end:
            rest = self._piece(self._next, end)
            yield from self._window(np.pad(rest, (0, WINDOW - len(rest))))
        if self._start is not None:
            yield from self._emit(min(self._last, end), min(self._last + self._padding, end))

    def under_way(self) -> Chunk | None:
        """The speech that has not ended yet, as far as it was heard; None in a pause, or where there is less than 0.2 s."""
        if self._start is None or self._last - self._start < MIN_SPEECH_S * SAMPLE_RATE:
            return None
        return self._chunk(self._last, min(self._last + self._padding, self._next))

    @property
    def earliest_s(self) -> float:
        """Speech that is still to come starts there at the earliest, in seconds of the recording."""
        return (self._next if self._start is None else self._start) / SAMPLE_RATE - LOOK_BACK_S

    def cut(self, time_s: float) -> bool:
        """Drops the speech under way up to a time in the recording; the rest of it begins there.

        Returns:
            whether that was done: not where less than 0.2 s of the speech lies behind that time, or none before it.
        """
        at = round(time_s * SAMPLE_RATE)
        if self._start is None or at <= self._start or self._last - at < MIN_SPEECH_S * SAMPLE_RATE:
            return False
        self._probabilities = self._probabilities[(at - self._start) // WINDOW :]
        self._start, self._cut = at, True
        return True

    def _piece(self, start: int, end: int) -> Samples:
        return self._sound[start - self._first : end - self._first]

    def _window(self, window: Samples) -> Iterator[Chunk]:
        probability = self._detect(raised(window, self._level.gain))
        at, self._next = self._next, self._next + WINDOW
        onset = self._options.onset
        if self._start is None:
            if probability >= onset:
                self._start, self._last, self._probabilities = at, self._next, [probability]
                self._cut = self._checked = False
            return
        self._probabilities.append(probability)
        if probability >= max(onset - HYSTERESIS, 0.01):
            self._last = self._next
        if self._next - self._start >= LOOK_AHEAD_S * SAMPLE_RATE:
            self._check_beginning()
        if self._next - self._last >= self._pause:
            yield from self._emit(self._last, self._last + self._padding)
            return
        begin = self._begin()
        if self._next - begin > self._longest:
            earliest = max(begin + self._longest - round(CUT_SEARCH_S * SAMPLE_RATE), begin + self._longest // 2)
            cut = earliest + quietest(self._piece(earliest, begin + self._longest))
            behind = self._probabilities[-math.ceil((self._next - cut) / WINDOW) :]
            speaks_on = self._last > cut
            yield from self._emit(min(self._last, cut), cut)
            if speaks_on:
                self._start, self._cut, self._probabilities = cut, True, behind
                self._last = max(self._last, cut)

    def _check_beginning(self) -> None:
        """Moves the beginning of the speech under way back to where it is heard from behind."""
        if self._checked or self._cut or self._start is None:
            return
        self._checked = True
        first = max(self._first, self._floor, self._start - round(LOOK_BACK_S * SAMPLE_RATE))
        before = (self._start - first) // WINDOW
        inside = (min(self._next, self._first + len(self._sound)) - self._start) // WINDOW
        sound = raised(self._piece(self._start - before * WINDOW, self._start + inside * WINDOW), self._level.gain)
        with self._backwards() as detect:
            heard = (detect(window) for window in sound[::-1].reshape(-1, WINDOW))
            for _ in range(inside):
                next(heard)
            earlier = list(itertools.takewhile(lambda probability: probability >= LOST, heard))
        while earlier and earlier[-1] < SURE:
            earlier.pop()
        self._start -= len(earlier) * WINDOW
        self._probabilities = [*reversed(earlier), *self._probabilities]

    def _begin(self) -> int:
        """The first sample of the chunk under way."""
        assert self._start is not None
        return self._start if self._cut else max(self._start - self._padding, self._floor)

    def _emit(self, end: int, padded_end: int) -> Iterator[Chunk]:
        """The chunk under way, if it is long enough to hold a word; there is none any more."""
        assert self._start is not None
        self._check_beginning()
        chunk = self._chunk(end, padded_end) if end - self._start >= MIN_SPEECH_S * SAMPLE_RATE else None
        self._start, self._floor, self._probabilities = None, padded_end, []
        if chunk is not None:
            yield chunk

    def _chunk(self, end: int, padded_end: int) -> Chunk:
        """The speech under way up to a sample, and what is kept of the silence behind it."""
        assert self._start is not None
        begin, start = self._begin(), self._start
        samples = raised(self._piece(begin, min(padded_end, begin + self._longest)).copy(), self._level.gain)
        own = self._probabilities[: math.ceil((end - start) / WINDOW)]  # without those of the pause behind it
        return Chunk(begin / SAMPLE_RATE, samples, start / SAMPLE_RATE, end / SAMPLE_RATE, float(np.mean(own)))

    def _forget(self) -> None:
        """Lets go of samples that no chunk will need."""
        needed = self._next - self._padding if self._start is None else self._begin()
        if self._start is None or not (self._checked or self._cut):
            needed -= round(LOOK_BACK_S * SAMPLE_RATE)
        needed = max(needed, self._floor, self._first)
        self._sound, self._first = self._sound[needed - self._first :], needed


def quietest(samples: Samples) -> int:
    """Index of the middle of the 0.2 s with the least energy; the last one where several are equal."""
    frames = samples[: len(samples) // FRAME * FRAME].reshape(-1, FRAME)  # (n,) -> (frames, 320)
    energy = np.square(frames, dtype=np.float64).sum(axis=1)
    width = round(CUT_PAUSE_S * SAMPLE_RATE / FRAME)
    smooth = np.convolve(energy, np.ones(width), mode="valid")  # (frames - width + 1,)
    first = len(smooth) - 1 - int(np.argmin(smooth[::-1]))
    return (first + width // 2) * FRAME
