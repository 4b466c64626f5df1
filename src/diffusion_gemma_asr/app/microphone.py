"""`diffusion-gemma-asr transcribe --microphone`: sound from the default input device, text while it is spoken.

Sound comes through sounddevice (PortAudio), which is imported here alone, and only when a microphone is opened.
"""

from __future__ import annotations

import queue
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType, ModuleType
from typing import Any, TextIO

import numpy as np

from ..audio.read import Samples
from ..errors import AudioError
from ..transcribe.live import LiveUpdate
from ..transcribe.recognizer import Recognizer
from ..transcribe.recordings import TranscribeOptions
from ..transcribe.results import Segment
from .terminal import Line

BLOCK_S = 0.1  # what the device hands over at once
BEHIND_S = 600.0  # of sound that waits for the model at most
WAIT_S = 0.2  # between looks at whether the device is still there


class Microphone:
    """The default input device; blocks of sound until it is stopped.

    Args:
        behind_s: seconds of sound that wait for the model at most.

    Attributes:
        sampling_rate: the device's own, in Hz.
        duration: of what was recorded so far, in seconds.
        lost: how often the device dropped sound, because the machine was too busy.
        failure: why the recording ended, other than by `stop`: the device went away, or too much sound waited.

    Raises:
        AudioError: sounddevice or PortAudio is not installed, or there is no input device.
    """

    def __init__(self, behind_s: float = BEHIND_S) -> None:
        self._library, self._behind_s = _sounddevice(), behind_s
        try:
            device = self._library.query_devices(kind="input")
        except (self._library.PortAudioError, ValueError) as error:
            raise _no_device(error) from None
        self.sampling_rate = round(device["default_samplerate"])
        self.duration, self.lost = 0.0, 0
        self.failure: AudioError | None = None
        self._waiting: queue.SimpleQueue[Samples] = queue.SimpleQueue()
        self._stopped = False

    def stop(self) -> None:
        """Ends the recording; what was recorded before is still given. May be called from a signal handler."""
        self._stopped = True

    def blocks(self) -> Iterator[Samples]:
        """Records, until `stop` or a failure.

        Yields:
            (n,) float32, mono; what has gathered since the last one was asked for.

        Raises:
            AudioError: the device cannot be opened.
        """
        try:
            with self._library.InputStream(
                samplerate=self.sampling_rate,
                blocksize=round(BLOCK_S * self.sampling_rate),
                channels=1,
                dtype="float32",
                callback=self._record,
            ) as stream:
                while not self._stopped and self.failure is None:
                    if (block := self._gathered(WAIT_S)) is not None:
                        yield block
                    elif not stream.active:
                        self.failure = AudioError("microphone: it gives no more sound; see whether it is still connected")
        except self._library.PortAudioError as error:
            raise _no_device(error) from None
        if (block := self._gathered(0.0)) is not None:
            yield block

    def _record(self, block: Samples, frames: int, time: Any, status: Any) -> None:
        """Called by PortAudio, in its thread, with (frames, 1) samples in memory that it uses again."""
        if self._waiting.qsize() > self._behind_s / BLOCK_S:
            self.failure = AudioError(
                f"microphone: the model is {self._behind_s:.0f} s behind the sound; "
                "take a smaller model, fewer --steps or a GPU"
            )
            return
        self.lost += bool(status)
        self.duration += frames / self.sampling_rate
        self._waiting.put(block[:, 0].copy())

    def _gathered(self, wait_s: float) -> Samples | None:
        """All that is waiting; None if there is nothing within a time."""
        blocks: list[Samples] = []
        try:
            blocks.append(self._waiting.get(timeout=wait_s) if wait_s else self._waiting.get_nowait())
            while True:
                blocks.append(self._waiting.get_nowait())
        except queue.Empty:
            return np.concatenate(blocks) if blocks else None


def _sounddevice() -> ModuleType:
    try:
        import sounddevice
    except ImportError:
        raise AudioError(
            "--microphone needs sounddevice, which is not installed: pip install 'diffusion-gemma-asr[microphone]'"
        ) from None
    except OSError as error:  # it is there, the library that it calls is not
        raise AudioError(f"--microphone needs PortAudio ({error}); on Debian: apt-get install libportaudio2") from None
    library: ModuleType = sounddevice
    return library


def _no_device(error: Exception) -> AudioError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return AudioError(f"microphone: no input device can be used ({reason}); connect one and make it the system's default")


class Notes:
    """Shows text while it is spoken.

    Committed words go to standard output as they come, a line for each stretch of speech. Where standard error is a
    terminal, it shows the line under way with the text that may still change, dimmed; where standard output is one as well,
    a line goes there when it is complete, since the two would write over each other.

    Args:
        out: standard output; None where the transcript goes there in another form.
        line: what shows the line under way.
    """

    def __init__(self, out: TextIO | None, line: Line):
        self._out, self._line = out, line
        self._at_once = out is not None and not (out.isatty() and line.shown)
        self.segments: list[Segment] = []
        self._sure = ""

    def __call__(self, update: LiveUpdate) -> None:
        new = "".join(word.word for word in update.committed)
        new = new if self._sure else new.lstrip()
        self._sure += new
        if self._at_once and new:
            print(new, end="", file=self._out, flush=True)
        if update.segment is None:
            self._line.show(self._sure, update.partial)
            return
        self._line.clear()
        if self._out is not None:
            print("" if self._at_once else self._sure, file=self._out, flush=True)
        self.segments.append(update.segment)
        self._sure = ""
        if update.partial:
            self._line.show("", update.partial)

    def close(self) -> None:
        """Ends the line under way, where the recording broke off in the middle of it."""
        self._line.clear()
        if self._sure and self._out is not None:
            print("" if self._at_once else self._sure, file=self._out, flush=True)
        self._sure = ""


def listen(microphone: Microphone, recognizer: Recognizer, options: TranscribeOptions, every: float, notes: Notes) -> None:
    """Shows what is said in front of a microphone until Ctrl-C, and then what was said before it.

    Raises:
        AudioError: the recording broke off; what was said before is in the notes.
    """
    chosen = replace(options, sampling_rate=microphone.sampling_rate)
    try:
        with _ctrl_c(microphone.stop):
            print("listening; Ctrl-C ends it", file=sys.stderr, flush=True)
            for update in recognizer.live(microphone.blocks(), chosen, every=every):
                notes(update)
    finally:
        notes.close()
    if microphone.lost:
        print(f"the device dropped sound {microphone.lost} times: the machine was too busy", file=sys.stderr)
    if microphone.failure is not None:
        raise microphone.failure


@contextmanager
def _ctrl_c(stop: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C calls `stop`; the next one is as ever."""

    def first(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before)
        stop()

    before = signal.signal(signal.SIGINT, first)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
