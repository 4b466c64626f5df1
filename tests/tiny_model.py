"""A tiny whole model on the checkpoints of tiny.py, and sound and LoRA weights to feed it, for tests only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

from diffusion_gemma_asr.backbone import Backbone
from diffusion_gemma_asr.encoder import AcousticEncoder
from diffusion_gemma_asr.model import DiffusionGemmaASR
from diffusion_gemma_asr.objective import SpeechBatch, text_batch
from diffusion_gemma_asr.projector import AudioProjector, output_length

RANK = 4


def clips(lengths: Sequence[int], seed: int = 0) -> list[np.ndarray]:
    """Noise whose colour drifts, float32, of so many samples: no two frames are alike."""
    rng = np.random.default_rng(seed)
    found = []
    for n in lengths:
        white = rng.standard_normal(n + 1)
        tilt = np.sin(np.arange(n) / 900 + rng.uniform(0, 6))
        found.append((0.1 * (white[1:] + tilt * white[:-1])).astype(np.float32))
    return found


def loud_encoder(folder: Path) -> AcousticEncoder:
    """The encoder of `folder`, its weights so loud that every frame depends on the sound."""
    encoder = AcousticEncoder.from_pretrained(folder)
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


def tiny_model(whisper_folder: Path, backbone_folder: Path, *, lora: bool = True) -> DiffusionGemmaASR:
    """Encoder, new projector, backbone with lively LoRA, in eval mode; the same on every call."""
    backbone = Backbone.from_pretrained(backbone_folder)
    if lora:
        backbone.add_lora(RANK, 2 * RANK)
        lively_lora(backbone)
    encoder = loud_encoder(whisper_folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        projector = AudioProjector(encoder.hidden_size, backbone.hidden_size, 24, backbone.embedding_scale())
    tokenizer = AutoTokenizer.from_pretrained(backbone_folder)
    return DiffusionGemmaASR(encoder, projector, backbone, tokenizer).eval()


def speech_batch(
    model: DiffusionGemmaASR, texts: Sequence[str], frame_lengths: Sequence[int], margin: int = 3
) -> SpeechBatch:
    """Random frames with transcripts, padded as the training pads them."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(n, model.encoder.hidden_size, generator=generator) for n in frame_lengths]
    slots = [output_length(n) for n in frame_lengths]
    targets = [model.prompts.target(text) for text in texts]
    text = text_batch(model.prompts, slots, targets, ["en"] * len(texts), margin)
    frames = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (B, F, D)
    return SpeechBatch(frames, torch.tensor(frame_lengths), text)
