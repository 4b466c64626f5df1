"""Systems to evaluate: our models with the denoising decoder or with CTC alone, and the registry of all by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checkpoint.config_file import CONFIG
from ..checkpoint.load import ADAPTER, choose_device, choose_dtype, find_checkpoint, load_checkpoint
from ..denoise.decode import decode_clips
from ..errors import AsrError, AudioError
from ..model.model import DiffusionGemmaASR
from ..transcribe.recognizer import Recognizer
from ..transcribe.recordings import TranscribeOptions
from ..transcribe.results import Transcript
from .baselines.autoregressive import Autoregressive
from .baselines.whisper import Whisper
from .options import EvaluateOptions
from .protocol import Hypothesis, System, fingerprint

CLIP_S = 30.0  # longest input of the encoder


class Diffusion:
    """Our model with `Recognizer.transcribe_many`: voice activity detection, thresholds and fallback included.

    Args:
        model: to evaluate.
        description: of the model, for the settings; see `describe`.
        options: of the transcription; its language is used only with `find_language`.
        find_language: whether the model identifies the language, among those of `options`.
        clips: whether to decode whole clips of at most 30 s, without voice activity detection, thresholds and fallback.
    """

    def __init__(
        self,
        model: DiffusionGemmaASR,
        description: dict[str, Any],
        options: TranscribeOptions,
        find_language: bool = False,
        clips: bool = False,
    ):
        self.model, self.description, self.options = model, description, options
        self.find_language, self.clips = find_language, clips
        self.longest_s = CLIP_S if clips else math.inf
        self.languages = model.config.languages

    def settings(self) -> dict[str, Any]:
        """The model, and all options that affect the texts."""
        options = asdict(self.options)
        decode = options.pop("decode")
        if not self.find_language:
            del decode["language"]
        del options["batch_size"]
        return {"system": "diffusion"} | self.description | {"clips": self.clips} | decode | options

    def transcribe(self, sounds: Sequence[np.ndarray], languages: Sequence[str]) -> list[Hypothesis]:
        """See `System`."""
        if self.clips:
            return self._whole(sounds, languages)
        rows: dict[int, Hypothesis] = {}
        for indices, options in self._groups(languages):
            transcripts = Recognizer(self.model).transcribe_many([sounds[i] for i in indices], options)
            rows |= {i: self._hypothesis(result) for i, result in zip(indices, transcripts, strict=True)}
        return [rows[i] for i in range(len(sounds))]

    def _groups(self, languages: Sequence[str]) -> list[tuple[list[int], TranscribeOptions]]:
        """Splits a batch by transcription options: indices of the sounds, and their options."""
        if self.find_language:
            return [(list(range(len(languages))), self.options)]
        groups = []
        for code in sorted(set(languages)):
            options = replace(self.options, decode=replace(self.options.decode, language=code))
            groups.append(([i for i, language in enumerate(languages) if language == code], options))
        return groups

    def _hypothesis(self, result: Transcript | AudioError) -> Hypothesis:
        """A transcript as a hypothesis; raises an AudioError."""
        if isinstance(result, AudioError):
            raise result
        decoders = sorted({segment.decoder for segment in result.segments})
        language = result.language if self.find_language else None
        steps = sum(segment.steps for segment in result.segments) if result.segments else None
        return Hypothesis(result.text, "+".join(decoders) or "none", steps, language)

    def _whole(self, sounds: Sequence[np.ndarray], languages: Sequence[str]) -> list[Hypothesis]:
        """Decodes whole clips."""
        options, named = self.options, None if self.find_language else languages
        decoded = decode_clips(self.model, sounds, options.decode, batch_size=options.batch_size, languages=named)
        return [
            Hypothesis(row.text, row.decoder, row.steps, row.language if self.find_language else None) for row in decoded
        ]


class CtcGreedy:
    """Greedy CTC on our model's audio tokens with the frozen output head, without the backbone's layers.

    Args:
        model: to evaluate.
        description: of the model, for the settings; see `describe`.
    """

    longest_s = CLIP_S

    def __init__(self, model: DiffusionGemmaASR, description: dict[str, Any]):
        self.model, self.description = model, description
        self.languages = model.config.languages

    def settings(self) -> dict[str, Any]:
        """The model."""
        return {"system": "ctc"} | self.description

    @torch.no_grad()
    def transcribe(self, sounds: Sequence[np.ndarray], languages: Sequence[str]) -> list[Hypothesis]:
        """See `System`; the languages are ignored."""
        drafts = self.model.greedy.drafts(self.model.encode(sounds))
        return [Hypothesis(self.model.text([token.id for token in row]), "ctc", 0) for row in drafts]


def describe(model: DiffusionGemmaASR, name: str, quantization: str | None = None) -> dict[str, Any]:
    """A description of a loaded checkpoint for the settings of a run.

    Args:
        model: from `load_checkpoint`.
        name: the argument of `load_checkpoint`.
        quantization: the argument of `load_checkpoint`.

    Returns:
        name and file hash of the checkpoint, dtype, device and quantization; the encoder's dtype where it has another.
    """
    folder = find_checkpoint(name)
    dtypes = model.backbone.lm_head_weight.dtype, next(model.encoder.parameters()).dtype
    dtype, encoder_dtype = (str(one).removeprefix("torch.") for one in dtypes)
    return ({} if encoder_dtype == dtype else {"encoder_dtype": encoder_dtype}) | {
        "model": name,
        "model_sha256": fingerprint([folder / CONFIG, folder / ADAPTER]),
        "dtype": dtype,
        "device": model.device.type,
        "quantization": quantization,
    }


def _load(options: EvaluateOptions) -> tuple[DiffusionGemmaASR, dict[str, Any]]:
    """Our model, and its description."""
    model = load_checkpoint(
        options.model,
        device=options.device,
        dtype=options.dtype,
        quantization=options.quantization,
        encoder=options.encoder,
    )
    description = describe(model, options.model, options.quantization)
    return model, description | ({"encoder": options.encoder} if options.encoder else {})


def _diffusion(options: EvaluateOptions, out: Path) -> dict[Path, System]:
    model, description = _load(options)
    sweep = options.sweep()
    return {
        out if len(sweep) == 1 else out / f"steps-{count}": Diffusion(
            model, description, transcribe_options, options.find_language, options.clips
        )
        for count, transcribe_options in sweep.items()
    }


def _ctc(options: EvaluateOptions, out: Path) -> dict[Path, System]:
    return {out: CtcGreedy(*_load(options))}


def _autoregressive(options: EvaluateOptions, out: Path) -> dict[Path, System]:
    return {out: Autoregressive(*_load(options))}


def _whisper(options: EvaluateOptions, out: Path) -> dict[Path, System]:
    if options.quantization is not None:
        raise AsrError("quantization packs the experts of a model of ours; leave it out with the system whisper")
    if options.encoder is not None:
        raise AsrError("a Whisper brings its encoder; leave 'encoder' out with the system whisper")
    dtype = choose_dtype(options.dtype) or torch.float32
    return {out: Whisper(options.model, choose_device(options.device), dtype)}


SYSTEMS: dict[str, Callable[[EvaluateOptions, Path], dict[Path, System]]] = {
    "diffusion": _diffusion,
    "ctc": _ctc,
    "autoregressive": _autoregressive,
    "whisper": _whisper,
}


def load_systems(options: EvaluateOptions, out: Path) -> dict[Path, System]:
    """Loads the systems to evaluate: one, or in a sweep one for each number of steps.

    Args:
        options: name of the system, its model and options.
        out: folder of the run or sweep.

    Returns:
        systems by the folders of their runs.

    Raises:
        CheckpointError: the model cannot be loaded.
        AsrError: there is no such device or dtype, or the system does not support an option.
    """
    return SYSTEMS[options.system](options, out)
