"""Transcripts in the forms of OpenAI's API."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fastapi.responses import JSONResponse, PlainTextResponse, Response

from ..denoise.clip import Shown
from ..languages import LANGUAGES
from ..transcribe.results import Segment, Transcript
from ..transcribe.subtitles import srt, vtt
from .fields import Asked
from .requests import TokenLogprobs


def answer(transcript: Transcript, asked: Asked, logprobs: Sequence[TokenLogprobs]) -> Response:
    """A whole transcript as it was asked for.

    Args:
        logprobs: of each segment, where they are wanted.
    """
    if asked.response_format == "text":
        return PlainTextResponse(transcript.text + "\n")
    if asked.response_format == "srt":
        return PlainTextResponse(srt(transcript))
    if asked.response_format == "vtt":
        return PlainTextResponse(vtt(transcript), media_type="text/vtt")
    if asked.response_format == "verbose_json":
        return JSONResponse(_verbose(transcript, asked))
    more = {"logprobs": [entry for part in logprobs for entry in logprob_list(part)]} if asked.logprobs else {}
    return JSONResponse({"text": transcript.text, **spoken(transcript.segments), **usage(transcript.duration), **more})


def _verbose(transcript: Transcript, asked: Asked) -> dict[str, Any]:
    language = LANGUAGES.get(transcript.language, "")
    content: dict[str, Any] = {
        "task": "transcribe",
        "language": "chinese" if transcript.language == "zh" else language.lower(),  # as OpenAI's API calls it
        "duration": round(transcript.duration, 3),
        "text": transcript.text,
    }
    if asked.segments:
        content["segments"] = [_segment(segment) for segment in transcript.segments]
    if asked.words:
        content["words"] = [word for segment in transcript.segments for word in words(segment)]
    return content | usage(transcript.duration)


def _segment(segment: Segment) -> dict[str, Any]:
    return {
        "id": segment.id,
        "seek": round(100 * segment.start),  # in frames of 10 ms, as openai/whisper counts
        "start": round(segment.start, 3),
        "end": round(segment.end, 3),
        "text": segment.text,
        "tokens": list(segment.tokens),
        "temperature": 0.0,
        "avg_logprob": segment.avg_logprob,
        "compression_ratio": segment.compression_ratio,
        "no_speech_prob": segment.no_speech_prob,
    } | _channel(segment)


def _channel(segment: Segment) -> dict[str, Any]:
    """`channel`: from 0, where each is transcribed on its own."""
    return {} if segment.channel is None else {"channel": segment.channel}


def words(segment: Segment) -> list[dict[str, Any]]:
    """The words of a segment, where their times were asked for."""
    return [{"word": word.word.strip(), "start": word.start, "end": word.end} for word in segment.words or ()]


def spoken(segments: Sequence[Segment]) -> dict[str, Any]:
    """`languages`: those of the segments, in order of their first one."""
    return {"languages": [{"code": code} for code in dict.fromkeys(segment.language for segment in segments)]}


def usage(duration: float) -> dict[str, Any]:
    """`usage`: seconds of sound."""
    return {"usage": {"type": "duration", "seconds": round(duration, 3)}}


def logprob_list(pieces: TokenLogprobs) -> list[dict[str, Any]]:
    """`logprobs`."""
    return [{"token": text, "bytes": list(text.encode()), "logprob": value} for text, value in pieces]


def segment_event(segment: Segment) -> dict[str, Any]:
    """A segment with its times, for streams of verbose_json; OpenAI sends such events for speakers."""
    event = {
        "type": "transcript.text.segment",
        "id": f"seg_{segment.id}",
        "start": round(segment.start, 3),
        "end": round(segment.end, 3),
        "text": segment.text,
        "language": segment.language,
    } | _channel(segment)
    return event | ({} if segment.words is None else {"words": words(segment)})


def canvas_event(chunk: int, step: int, shown: Sequence[Shown]) -> dict[str, Any]:
    """What is on the canvas of a chunk behind a step; step -1 is the draft."""
    tokens = [{"text": piece.text, "confidence": round(piece.confidence, 4)} for piece in shown]
    return {"type": "canvas.step", "chunk": chunk, "step": step, "tokens": tokens}


def as_json(content: dict[str, Any]) -> str:
    """In one line."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))
