"""A ctypes binding to the espeak-ng library: speech with the times of its phonemes.

Needs only the runtime library (Debian: libespeak-ng1, a dependency of the package espeak-ng). The structures follow
`speak_lib.h` of espeak-ng 1.51 (API revision 12).

The library keeps state between utterances (phases, flutter, noise), so that the same sentence sounds slightly different
after another one, and 1.51 hangs when it is initialised again after termination. `speak` therefore loads and unloads the
library for every utterance, which takes about 2 ms. The samples equal those of the espeak-ng program.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...errors import SynthesisError

# Names and values of speak_lib.h.
_OUTPUT_SYNCHRONOUS = 2
_INITIALIZE_PHONEME_EVENTS = 0x0001
_INITIALIZE_DONT_EXIT = 0x8000
_CHARS_UTF8 = 1
_SYNTH_PHONEMES = 0x0100  # text in [[ ]] is phonemes; this and the end pause are what the program asks for
_SYNTH_ENDPAUSE = 0x1000
_PARAMETER_RATE = 1
_PARAMETER_PITCH = 3
_POSITION_CHARACTER = 1
_EVENT_LIST_TERMINATED = 0
_EVENT_PHONEME = 7

_library_lock = threading.Lock()  # the library's state is global


class _EventId(ctypes.Union):
    _fields_ = (("number", ctypes.c_int), ("name", ctypes.c_void_p), ("string", ctypes.c_char * 8))


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),  # ms, rounded down
        ("sample", ctypes.c_int),  # the same instant in samples
        ("user_data", ctypes.c_void_p),
        ("id", _EventId),
    )


class _Voice(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("languages", ctypes.c_char_p),
        ("identifier", ctypes.c_char_p),
        ("gender", ctypes.c_ubyte),
        ("age", ctypes.c_ubyte),
        ("variant", ctypes.c_ubyte),
        ("xx1", ctypes.c_ubyte),
        ("score", ctypes.c_int),
        ("spare", ctypes.c_void_p),
    )


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(_Event))


@dataclass(frozen=True)
class Speech:
    """One utterance.

    A phoneme ends where the next one starts, so the silence that espeak-ng puts before some stops at the start of a word
    belongs to the preceding phoneme.

    Attributes:
        samples: (n,) int16.
        sample_rate: in Hz.
        phonemes: (symbol, start, end) in seconds, in order, without gaps; symbols as espeak-ng writes them, "_:" and the
            like are pauses.
    """

    samples: np.ndarray
    sample_rate: int
    phonemes: list[tuple[str, float, float]]


def speak(text: str, voice: str, rate: int, pitch: int) -> Speech:
    """Synthesises `text`; equal arguments give equal samples.

    Args:
        text: in the voice's language.
        voice: language code or voice name, optionally with a variant: "en-us", "en-gb+Andy".
        rate: words per minute, 80 to 450.
        pitch: 0 to 99.

    Raises:
        SynthesisError: the library or its data is missing or already in use by other code in this process, there is no such
            voice or variant, or the text makes no sound.
    """
    sound: list[bytes] = []
    marks: list[tuple[str, int]] = []

    def collect(wave: int | None, count: int, events: ctypes._Pointer[_Event]) -> int:
        if wave and count > 0:
            sound.append(ctypes.string_at(wave, 2 * count))
        for index in range(10_000):  # a terminator ends the list; the bound guards against one that is missing
            event = events[index]
            if event.type == _EVENT_LIST_TERMINATED:
                break
            if event.type == _EVENT_PHONEME:
                marks.append((event.id.string.decode("utf-8", errors="replace"), event.sample))
        return 0

    callback = _Callback(collect)  # must outlive the synthesis
    with _library_lock, _fresh_library() as (library, sample_rate):
        library.espeak_SetSynthCallback(callback)
        _set_voice(library, voice)
        library.espeak_SetParameter(_PARAMETER_RATE, rate, 0)
        library.espeak_SetParameter(_PARAMETER_PITCH, pitch, 0)
        data = text.encode()
        flags = _CHARS_UTF8 | _SYNTH_PHONEMES | _SYNTH_ENDPAUSE
        status = library.espeak_Synth(data, len(data) + 1, 0, _POSITION_CHARACTER, 0, flags, None, None)
        library.espeak_Synchronize()
    samples = np.frombuffer(b"".join(sound), dtype=np.int16)
    if status != 0 or not samples.any():
        raise SynthesisError(f"espeak-ng could not say {text!r} with voice {voice}: no sound; give it another text")
    return Speech(samples, sample_rate, _spans(marks, len(samples), sample_rate))


def _spans(marks: list[tuple[str, int]], count: int, sample_rate: int) -> list[tuple[str, float, float]]:
    """Converts the first sample of each phoneme to spans in seconds, without empty ones."""
    ends = [min(start, count) for _, start in marks[1:]] + [count]
    return [
        (symbol, start / sample_rate, end / sample_rate)
        for (symbol, start), end in zip(marks, ends, strict=True)
        if symbol and end > start
    ]


def _set_voice(library: ctypes.CDLL, voice: str) -> None:
    """Selects a voice and its variant; raises SynthesisError for an unknown variant, which espeak-ng silently ignores."""
    base, _, variant = voice.partition("+")
    wanted = _Voice(languages=base.encode())
    if library.espeak_SetVoiceByName(base.encode()) != 0 and library.espeak_SetVoiceByProperties(wanted) != 0:
        raise SynthesisError(f"espeak-ng has no voice {base!r} (of {voice!r}); espeak-ng --voices lists them")
    if not variant:
        return
    data = ctypes.c_char_p()
    library.espeak_Info(ctypes.byref(data))
    variants = Path(os.fsdecode(data.value or b""), "voices", "!v")
    if not (variants / variant).is_file():
        raise SynthesisError(f"espeak-ng has no voice variant {variant!r} (of {voice!r}); {variants} holds them")
    # By the voice's file: espeak-ng drops the variant of a voice that is selected by language ("en-gb").
    identifier = library.espeak_GetCurrentVoice().contents.identifier
    if library.espeak_SetVoiceByName(identifier + b"+" + variant.encode()) != 0:
        raise SynthesisError(f"espeak-ng could not load voice {voice!r} from its file {identifier.decode()!r}")


@functools.cache
def library_name() -> str | None:
    """The espeak-ng library's name for the dynamic linker; None if it is not installed."""
    for name in ("libespeak-ng.so.1", "libespeak-ng.1.dylib", ctypes.util.find_library("espeak-ng")):
        if name is not None:
            with suppress(OSError):
                _unload(ctypes.CDLL(name))
                return name
    return None


@contextmanager
def _fresh_library() -> Iterator[tuple[ctypes.CDLL, int]]:
    """Loads and initialises the library, yields it with its sample rate in Hz, and unloads it."""
    name = library_name()
    if name is None:
        raise SynthesisError(
            "the espeak-ng library is not installed; on Debian or Ubuntu: apt-get install espeak-ng, "
            "on macOS: brew install espeak-ng"
        )
    with suppress(OSError):
        _unload(ctypes.CDLL(name, mode=os.RTLD_NOLOAD))
        raise SynthesisError(f"{name} is in use by something else in this process; make the speech in another one")
    library = ctypes.CDLL(name)
    _declare(library)
    try:
        sample_rate = library.espeak_Initialize(
            _OUTPUT_SYNCHRONOUS, 0, None, _INITIALIZE_PHONEME_EVENTS | _INITIALIZE_DONT_EXIT
        )
        if sample_rate <= 0:
            raise SynthesisError(f"{name} does not find its data; on Debian or Ubuntu: apt-get install espeak-ng-data")
        try:
            _seed(library)
            yield library, sample_rate
        finally:
            library.espeak_Terminate()
    finally:
        _unload(library)


def _seed(library: ctypes.CDLL) -> None:
    """Resets the random generators of breath and whisper to their state at the start of a process."""
    ctypes.CDLL(None).srand(1)
    if hasattr(library, "espeak_ng_SetRandSeed"):  # espeak-ng 1.52 has a separate generator, seeded with the time
        library.espeak_ng_SetRandSeed(ctypes.c_long(1))


def _unload(library: ctypes.CDLL) -> None:
    ctypes.CDLL(None).dlclose(ctypes.c_void_p(library._handle))


def _declare(library: ctypes.CDLL) -> None:
    """Sets argument and result types that differ from ctypes' defaults."""
    text, number, unsigned = ctypes.c_char_p, ctypes.c_int, ctypes.c_uint
    pointer = ctypes.c_void_p
    library.espeak_Initialize.argtypes = (number, number, text, number)
    library.espeak_SetSynthCallback.argtypes = (_Callback,)
    library.espeak_SetVoiceByName.argtypes = (text,)
    library.espeak_SetVoiceByProperties.argtypes = (ctypes.POINTER(_Voice),)
    library.espeak_GetCurrentVoice.restype = ctypes.POINTER(_Voice)
    library.espeak_Info.argtypes = (ctypes.POINTER(text),)
    library.espeak_Info.restype = text
    library.espeak_SetParameter.argtypes = (number, number, number)
    library.espeak_Synth.argtypes = (
        text, ctypes.c_size_t, unsigned, number, unsigned, unsigned, pointer, pointer,
    )  # fmt: skip
