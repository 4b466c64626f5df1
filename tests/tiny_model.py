"""A tiny whole model on the checkpoints of tiny.py, and sound and LoRA weights to feed it, for tests only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tiny
import torch

from diffusion_gemma_asr.checkpoint.parts import load_backbone, load_encoder, load_tokenizer
from diffusion_gemma_asr.model.backbone import Backbone
from diffusion_gemma_asr.model.config import BackboneConfig, EncoderConfig
from diffusion_gemma_asr.model.encoder import AcousticEncoder
from diffusion_gemma_asr.model.lengths import strided_length
from diffusion_gemma_asr.model.model import DiffusionGemmaASR
from diffusion_gemma_asr.model.projector import AudioProjector

if TYPE_CHECKING:
    from diffusion_gemma_asr.train.objective import SpeechBatch

RANK = 4
LANGUAGES = ("en", "de", "fr", "es", "hi", "zh")


def clips(lengths: Sequence[int], seed: int = 0) -> list[np.ndarray]:
    """Noise whose colour drifts, float32, of so many samples: no two frames are alike."""
    rng = np.random.default_rng(seed)
    sounds = []
    for n in lengths:
        white = rng.standard_normal(n + 1)
        tilt = np.sin(np.arange(n) / 900 + rng.uniform(0, 6))
        sounds.append((0.1 * (white[1:] + tilt * white[:-1])).astype(np.float32))
    return sounds


def tiny_backbone(folder: Path) -> Backbone:
    """The backbone of `folder`, without LoRA."""
    return load_backbone(BackboneConfig(str(folder)))


def loud_encoder(folder: Path) -> AcousticEncoder:
    """The encoder of `folder`, its weights so loud that every frame depends on the sound."""
    encoder = load_encoder(EncoderConfig(str(folder)))
    generator = torch.Generator().manual_seed(0)
    for parameter in encoder.encoder.parameters():
        if parameter.dim() >= 2 and parameter is not encoder.encoder.embed_positions.weight:
            fan_in = parameter[0].numel()
            parameter.data = torch.randn(parameter.shape, generator=generator) * fan_in**-0.5
    return encoder


def lively_lora(backbone: Backbone, seed: int = 0, stack: str = "") -> None:
    """Draw both factors of the LoRA matrices whose name holds `stack` (new LoRA has B = 0: does nothing)."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in backbone.model.named_parameters():
        if "lora_" in name and stack in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)


def tiny_model(whisper_folder: Path, backbone_folder: Path, *, lora: bool = True, **settings: Any) -> DiffusionGemmaASR:
    """Encoder, new projector, backbone with lively LoRA, in eval mode; the same on every call.

    Args:
        whisper_folder, backbone_folder: of the session's fixtures.
        lora: put LoRA of rank RANK on the backbone.
        **settings: fields of `ModelConfig`; it knows all languages, cannot find them, and reads no context otherwise.
    """
    config = tiny.model_config(whisper_folder, backbone_folder, **{"languages": LANGUAGES} | settings)
    backbone = load_backbone(config.backbone)
    if lora:
        backbone.add_lora(RANK, 2 * RANK)
        lively_lora(backbone)
    encoder = loud_encoder(whisper_folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        scale = backbone.embedding_scale()
        projector = AudioProjector(config.projector, encoder.hidden_size, backbone.hidden_size, scale)
    return DiffusionGemmaASR(config, encoder, projector, backbone, load_tokenizer(config.backbone)).eval()


def speech_batch(
    model: DiffusionGemmaASR, texts: Sequence[str], frame_lengths: Sequence[int], margin: int = 3
) -> SpeechBatch:
    """Random frames with transcripts, padded as the training pads them."""
    from diffusion_gemma_asr.train.objective import SpeechBatch, text_batch  # what tests of the core do not need

    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(n, model.encoder.hidden_size, generator=generator) for n in frame_lengths]
    slots = [strided_length(n) for n in frame_lengths]
    targets = [model.prompts.target(text) for text in texts]
    text = text_batch(model.prompts, slots, targets, ["en"] * len(texts), margin)
    frames = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (B, F, D)
    return SpeechBatch(frames, torch.tensor(frame_lengths), text)
