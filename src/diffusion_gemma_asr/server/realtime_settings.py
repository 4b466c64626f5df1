"""What a `session.update` may say, as pydantic models in OpenAI's shape, and what follows from it for a live session."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..audio.vad import MIN_PAUSE_S, PADDING_S
from ..denoise.options import DEFAULT_STEPS, MAX_SEED, DecodeOptions
from ..errors import AsrError
from ..languages import AUTO
from ..model.config import Start
from ..transcribe.recordings import TranscribeOptions
from .errors import ApiError
from .realtime_inbox import Block, LiveSettings
from .scheduler import Scheduler

TELEPHONE_RATE = 8000  # of G.711


def bad(message: str, param: str | None, code: str = "invalid_value") -> ApiError:
    """What a client sent cannot be used.

    Args:
        message: why, and what to do about it.
        param: the field that is wrong, with dots; None: no single one.
        code: what is wrong, for programs.
    """
    return ApiError(400, message, param=param, code=code)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Format(_Strict):
    """Of the sound: PCM of 16 bits at 16 or 24 kHz, or G.711 at 8 kHz."""

    type: Literal["audio/pcm", "audio/pcmu", "audio/pcma"] = "audio/pcm"
    rate: Literal[8000, 16000, 24000] | None = None


class Transcription(_Strict):
    """How to transcribe; `steps`, `seed` and `start` are ours."""

    model: str | None = None
    language: str | None = None
    languages: list[str] | None = None
    keywords: list[str] | None = None
    prompt: str | None = None
    delay: str | None = None  # taken and ignored: words are committed when two decodings agree
    steps: int = Field(default=DEFAULT_STEPS, ge=1, le=1000)
    seed: int = Field(default=0, ge=0, lt=MAX_SEED)
    start: Start | None = None


class TurnDetection(_Strict):
    """When an item ends. `threshold` alone can be chosen; `session.updated` tells what holds in place of the others."""

    type: Literal["server_vad"] = "server_vad"
    threshold: float = Field(default=0.5, gt=0, lt=1)
    prefix_padding_ms: int | None = None
    silence_duration_ms: int | None = None
    create_response: bool | None = None
    interrupt_response: bool | None = None
    idle_timeout_ms: int | None = None


class Input(_Strict):
    """`session.audio.input`."""

    format: Format = Format()
    noise_reduction: dict[str, Any] | None = None  # taken and ignored: the models were trained with noise
    transcription: Transcription = Transcription()
    turn_detection: TurnDetection | None = TurnDetection()


class Audio(_Strict):
    """`session.audio`."""

    input: Input = Input()


class Session(_Strict):
    """A whole session; `transcript.partial` and `transcript.lag` in `include` ask for events of ours."""

    type: Literal["transcription"] = "transcription"
    audio: Audio = Audio()
    include: list[Literal["item.input_audio_transcription.logprobs", "transcript.partial", "transcript.lag"]] | None = None

    @property
    def transcription(self) -> Transcription:
        """How to transcribe."""
        return self.audio.input.transcription

    @property
    def rate(self) -> int:
        """Samples per second."""
        form = self.audio.input.format
        return (form.rate or 24000) if form.type == "audio/pcm" else TELEPHONE_RATE

    def samples(self, data: bytes) -> Block:
        """The sound in what a client appended.

        Raises:
            ApiError: an odd number of bytes, where samples have two.
        """
        form = self.audio.input.format.type
        if form != "audio/pcm":
            return DECODERS[form][np.frombuffer(data, np.uint8)]
        if len(data) % 2:
            raise bad(f"{len(data)} bytes of 16-bit sound; send an even number", "audio")
        return np.frombuffer(data, "<i2").astype(np.int16, copy=False)

    def updated(self, change: Any) -> Session:
        """This session with some fields changed; fields that are not named stay.

        Args:
            change: `session` of a `session.update`.

        Raises:
            ApiError: a field is unknown or cannot have that value.
        """
        if not isinstance(change, dict):
            raise bad("session must be an object", "session")
        try:
            session = Session.model_validate(_merged(self.model_dump(), change))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            param = ".".join(("session", *(str(part) for part in first["loc"])))
            if first["type"] == "extra_forbidden":
                raise bad(f"{param} is unknown here; leave it out", param, "unknown_parameter") from None
            raise bad(f"{param}: {first['msg']}", param) from None
        form = session.audio.input.format
        if form.rate is not None and (form.rate == TELEPHONE_RATE) == (form.type == "audio/pcm"):
            raise bad(f"{form.type} at {form.rate} Hz; use PCM at 16000 or 24000", "session.audio.input.format.rate")
        return session

    def shown(self, session_id: str, model: str) -> dict[str, Any]:
        """What holds, as `session.created` and `session.updated` tell it."""
        told = self.model_dump()
        sound = told["audio"]["input"]
        sound["format"]["rate"] = self.rate
        sound["noise_reduction"] = None
        sound["transcription"] |= {"model": model, "delay": None}
        if (turns := sound["turn_detection"]) is not None:
            turns |= {"prefix_padding_ms": round(1000 * PADDING_S), "silence_duration_ms": round(1000 * MIN_PAUSE_S)}
            turns |= {"create_response": None, "interrupt_response": None, "idle_timeout_ms": None}
        return {"id": session_id, "object": "realtime.transcription_session", **told}

    def settings(self, scheduler: Scheduler) -> LiveSettings:
        """What a live session does by it.

        Raises:
            ApiError: the model was not trained for what is asked.
        """
        asked, turns = self.transcription, self.audio.input.turn_detection
        where = "session.audio.input.transcription"
        codes = ",".join(asked.languages or ()) or asked.language or AUTO
        params: list[tuple[str, dict[str, Any]]] = [
            ("languages" if asked.languages else "language", {"language": codes}),
            ("prompt", {"initial_prompt": asked.prompt or None}),
            ("keywords", {"hotwords": ", ".join(asked.keywords or ()) or None}),
        ]
        options: dict[str, Any] = {"steps": asked.steps, "seed": asked.seed, "start": asked.start}
        for name, fields in params:  # one after the other, so that the error names the field
            options |= fields
            try:
                DecodeOptions(**options).check(scheduler.model)
            except AsrError as error:
                raise bad(str(error), f"{where}.{name}") from None
        include = self.include or ()
        return LiveSettings(
            decode=scheduler.decode_chunk,
            options=TranscribeOptions(
                decode=DecodeOptions(**options),
                sampling_rate=self.rate,
                vad_onset=turns.threshold if turns else TranscribeOptions.vad_onset,
            ),
            turns=turns is not None,
            partial="transcript.partial" in include,
            lag="transcript.lag" in include,
            logprobs="item.input_audio_transcription.logprobs" in include,
        )


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`old` with the values of `new` in their places, at every depth."""
    merged = dict(old)
    for key, value in new.items():
        both = isinstance(value, dict) and isinstance(old.get(key), dict)
        merged[key] = _merged(old[key], value) if both else value
    return merged


def _mu_law() -> NDArray[np.int16]:
    """Samples (256,) of all bytes in ITU-T G.711's mu-law."""
    code = ~np.arange(256) & 0xFF
    size = ((((code & 0x0F) << 3) + 0x84) << ((code >> 4) & 7)) - 0x84
    return np.where(code & 0x80, -size, size).astype(np.int16)


def _a_law() -> NDArray[np.int16]:
    """Samples (256,) of all bytes in ITU-T G.711's A-law."""
    code = np.arange(256) ^ 0x55
    exponent, mantissa = (code >> 4) & 7, (code & 0x0F) << 4
    size = np.where(exponent == 0, mantissa + 8, (mantissa + 0x108) << np.maximum(exponent - 1, 0))
    return np.where(code & 0x80, size, -size).astype(np.int16)


DECODERS = {"audio/pcmu": _mu_law(), "audio/pcma": _a_law()}
