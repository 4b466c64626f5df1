"""The fields of a transcription request: read from a form and checked one by one, so that an error names the wrong one."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from starlette.datastructures import FormData, UploadFile

from ..denoise.options import DEFAULT_STEPS, MAX_SEED, DecodeOptions
from ..errors import AsrError
from ..model.model import DiffusionGemmaASR
from ..strict import suggest
from ..transcribe.recordings import TranscribeOptions
from .errors import ApiError

Format: TypeAlias = Literal["json", "text", "srt", "vtt", "verbose_json"]

MAX_STEPS = 1000
MAX_CONTEXT = 4000  # characters of prompt and keywords together
TEXT, NUMBER, INTEGER, FLAG = {"type": "string"}, {"type": "number"}, {"type": "integer"}, {"type": "boolean"}
LIST = {"type": "array", "items": TEXT}
FIELDS: dict[str, tuple[dict[str, Any], str]] = {  # name: (schema, what it does)
    "file": ({"type": "string", "format": "binary"}, "The recording, in any format that FFmpeg reads."),
    "model": (TEXT, "One of /v1/models; whisper-1 and OpenAI's other names mean the default one."),
    "language": (TEXT, "The language spoken, by code or name; auto: one that the model knows."),
    "languages[]": (LIST, "The language is one of these."),
    "prompt": (TEXT, "Text that came before; for models that were trained to read it."),
    "keywords[]": (LIST, "Words that may occur; for models that were trained to read them."),
    "response_format": ({**TEXT, "enum": list(get_args(Format)), "default": "json"}, "Form of the answer."),
    "timestamp_granularities[]": ({"type": "array", "items": {**TEXT, "enum": ["segment", "word"]}}, "For verbose_json."),
    "include[]": ({"type": "array", "items": {**TEXT, "enum": ["logprobs", "canvas"]}}, "logprobs: json; canvas: streams."),
    "chunking_strategy": (TEXT, 'auto, or {"type": "server_vad", "threshold": 0.5}.'),
    "temperature": ({**NUMBER, "default": 0}, "Of the first denoising step, falling to half of it; 0: the model's."),
    "stream": ({**FLAG, "default": False}, "Answer with server-sent events."),
    "steps": ({**INTEGER, "default": DEFAULT_STEPS}, "Denoising steps at most. Not in OpenAI's API."),
    "seed": ({**INTEGER, "default": 0}, "Of the random draws. Not in OpenAI's API."),
    "start": ({**TEXT, "enum": ["noise", "draft", "ctc"]}, "What canvases start with. Not in OpenAI's API."),
}  # fmt: skip
LISTS = {name.removesuffix("[]") for name in FIELDS if name.endswith("[]")}
CANNOT = {  # what OpenAI's API knows and this server does not
    "known_speaker_names": "speakers are not told apart here; leave it out",
    "known_speaker_references": "speakers are not told apart here; leave it out",
}
VAD = ("type", "threshold", "prefix_padding_ms", "silence_duration_ms")


@dataclass(frozen=True)
class Asked:
    """What a client wants.

    Attributes:
        file: the recording.
        model: as it named it.
        response_format: see OpenAI's documentation.
        stream: whether the answer comes as server-sent events.
        words, segments: whether verbose_json lists them.
        logprobs: whether those of the tokens are wanted.
        canvas: whether `canvas.step` events are wanted.
        options: how to transcribe.
        language_field: that said which language.
    """

    file: UploadFile
    model: str
    response_format: Format
    stream: bool
    words: bool
    segments: bool
    logprobs: bool
    canvas: bool
    options: TranscribeOptions
    language_field: str

    def check(self, model: DiffusionGemmaASR) -> None:
        """Raises ApiError if the model was not trained for what is asked, or the context is too long for it."""
        decode, code = self.options.decode, model.config.languages[0]
        for param, options in (
            (self.language_field, DecodeOptions(language=decode.language)),
            ("prompt", DecodeOptions(language=code, initial_prompt=decode.initial_prompt)),
            ("keywords", DecodeOptions(language=code, hotwords=decode.hotwords)),
        ):
            try:
                options.check(model)
            except AsrError as error:
                raise ApiError(400, str(error), param=param) from None


def read_fields(form: FormData) -> Asked:
    """What a form asks for. Raises ApiError where a field is unknown, missing or has an impossible value."""
    fields = _Fields(form)
    file = fields.file()
    response_format = fields.choice("response_format", get_args(Format), "json")
    stream = fields.flag("stream")
    granularities = fields.choices("timestamp_granularities", ("segment", "word"))
    include = fields.choices("include", ("logprobs", "canvas"))
    if granularities and response_format != "verbose_json":
        _refuse("timestamp_granularities", "they are for response_format verbose_json; ask for that, or leave them out")
    if stream and response_format in ("srt", "vtt"):
        _refuse("response_format", f"{response_format} cannot be streamed; ask for json, text or verbose_json")
    if "logprobs" in include and response_format != "json":
        _refuse("include", "logprobs are for response_format json; ask for that, or leave them out")
    if "canvas" in include and not stream:
        _refuse("include", "canvas is for streams; send stream=true as well")
    words = "word" in granularities
    options = fields.transcribe_options(words or response_format in ("srt", "vtt"))
    return Asked(
        file=file,
        model=fields.text("model"),
        response_format=response_format,
        stream=stream,
        words=words,
        segments="segment" in granularities or not words,
        logprobs="logprobs" in include,
        canvas="canvas" in include,
        options=options,
        language_field="languages" if fields.texts("languages") else "language",
    )


def _refuse(param: str, message: str) -> None:
    raise ApiError(400, message if message.startswith(param) else f"{param}: {message}", param=param)


class _Fields:
    """The fields of a form by name, lists without their brackets."""

    def __init__(self, form: FormData):
        self._values: dict[str, list[str | UploadFile]] = {}
        self._vad: dict[str, str] = {}
        known = [name.removesuffix("[]") for name in FIELDS]
        for name, value in form.multi_items():
            plain = name.removesuffix("[]")
            if name.startswith("chunking_strategy[") and name.endswith("]") and isinstance(value, str):
                self._vad[name[len("chunking_strategy[") : -1]] = value
                continue
            if plain in CANNOT:
                _refuse(plain, CANNOT[plain])
            if plain not in known:
                hint = suggest(plain, known) or f"; known are {', '.join(known)}"
                raise ApiError(400, f"{name[:80]!r} is no field of a transcription{hint}", param=name[:80])
            self._values.setdefault(plain, []).append(value)
        for name, values in self._values.items():
            if len(values) > 1 and name not in LISTS:
                _refuse(name, f"given {len(values)} times; give it once")

    def file(self) -> UploadFile:
        value = self._values.get("file", [None])[0]
        if not isinstance(value, UploadFile):
            raise ApiError(400, "file is missing: send the recording as a file of a multipart form", param="file")
        return value

    def text(self, name: str) -> str:
        """The value of a field; empty where it is not there."""
        (value,) = self._values.get(name, [""])
        if not isinstance(value, str):
            _refuse(name, "is text, not a file")
        return str(value).strip()

    def texts(self, name: str) -> list[str]:
        values = self._values.get(name, [])
        if not all(isinstance(value, str) for value in values):
            _refuse(name, "is text, not a file")
        return [text for value in values if (text := str(value).strip())]

    def choices(self, name: str, among: Sequence[str]) -> list[str]:
        values = self.texts(name)
        for value in values:
            if value not in among:
                _refuse(name, f"{value[:80]!r} is not possible; choose {' or '.join(among)}")
        return values

    def choice(self, name: str, among: Sequence[str], default: Any) -> Any:
        value = self.text(name)
        if value and value not in among:
            _refuse(name, f"{value[:80]!r} is not possible here; choose one of {', '.join(among)}")
        return value or default

    def flag(self, name: str) -> bool:
        return bool(self.choice(name, ("true", "false", "True", "False", "1", "0"), "false") in ("true", "True", "1"))

    def number(self, name: str, default: float, least: float, most: float) -> float:
        try:
            value = float(self.text(name) or default)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            _refuse(name, f"{self.text(name)[:80]!r} is not possible; give a number from {least:g} to {most:g}")
        return value

    def integer(self, name: str, default: int, least: int, most: int) -> int:
        text = self.text(name) or str(default)
        value = int(text) if text.lstrip("-").isdecimal() and len(text) < 20 else least - 1
        if not least <= value <= most:
            _refuse(name, f"{text[:80]!r} is not possible; give a whole number from {least} to {most}")
        return value

    def transcribe_options(self, words: bool) -> TranscribeOptions:
        """How to transcribe."""
        language, languages = self.text("language"), self.texts("languages")
        if language and languages and language not in languages:
            _refuse("language", f"{language[:80]!r} is none of languages[]; give one of the two")
        prompt, keywords = self.text("prompt"), ", ".join(self.texts("keywords"))
        if len(prompt) + len(keywords) > MAX_CONTEXT:
            _refuse("prompt" if prompt else "keywords", f"more than {MAX_CONTEXT} characters; send fewer")
        temperature = self.number("temperature", 0.0, 0.0, 1.0)
        decode = {
            "initial_prompt": prompt or None,
            "hotwords": keywords or None,
            "steps": self.integer("steps", DEFAULT_STEPS, 1, MAX_STEPS),
            "seed": self.integer("seed", 0, 0, MAX_SEED - 1),
            "start": self.choice("start", ("noise", "draft", "ctc"), None),
            "t_max": max(temperature, 0.01) if temperature else None,
            "t_min": max(temperature, 0.01) / 2 if temperature else None,
        }
        try:
            decoding = DecodeOptions(language=language or ",".join(languages) or "auto", **decode)
            _ = decoding.codes
        except AsrError as error:
            raise ApiError(400, str(error), param="languages" if languages and not language else "language") from None
        return TranscribeOptions(decode=decoding, word_timestamps=words, vad_onset=self._threshold())

    def _threshold(self) -> float:
        """Of voice activity detection, from `chunking_strategy`."""
        given: dict[str, Any] = dict(self._vad)
        text = self.text("chunking_strategy")
        if text and text != "auto":
            try:
                given |= json.loads(text)
            except (ValueError, TypeError):
                _refuse("chunking_strategy", f"{text[:80]!r} is not possible; send auto or an object of type server_vad")
        for name in given:
            if name not in VAD:
                _refuse("chunking_strategy", f"{name[:80]!r} is not known; known are {', '.join(VAD)}")
        if given and given.get("type", "server_vad") not in ("server_vad", "auto"):
            _refuse("chunking_strategy", "type must be server_vad")
        for name in VAD[2:]:
            if name in given:
                _refuse("chunking_strategy", f"{name} cannot be chosen here; leave it out")
        try:
            threshold = float(given.get("threshold", TranscribeOptions.vad_onset))
        except (TypeError, ValueError):
            threshold = math.nan
        if not 0.0 < threshold < 1.0:
            _refuse("chunking_strategy", "threshold must be a probability between 0 and 1")
        return threshold
