"""The whole system as one module: frozen encoder, trained projector, frozen backbone with LoRA. Parts and tensors only:
how a canvas is denoised is in denoise/, how recordings are read in transcribe/, how the module learns in train/."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..errors import AsrError
from ..languages import AUTO
from .backbone import Backbone
from .config import ModelConfig
from .ctc import TokenSpan, align, only, places
from .drafts import Encoded, GreedyCtc, Heard
from .encoder import AcousticEncoder
from .head import Head
from .lengths import each_alone, length_mask
from .prefill import Prefill
from .projector import AudioProjector
from .prompt import PromptBuilder, fill_slots


class DiffusionGemmaASR(nn.Module):
    """Speech in, logits over canvases out.

    Args:
        config: what it is made of and was trained to do.
        encoder, backbone: frozen.
        projector: trained; its widths must fit both.
        tokenizer: the backbone's.
    """

    def __init__(
        self,
        config: ModelConfig,
        encoder: AcousticEncoder,
        projector: AudioProjector,
        backbone: Backbone,
        tokenizer: PreTrainedTokenizerBase,
    ):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.encoder, self.projector, self.backbone = encoder, projector, backbone
        self.prompts = PromptBuilder(tokenizer)
        self.without_sound: dict[Any, Any] = {}  # prompts read once for many clips (denoise/candidates.py)

    @property
    def device(self) -> torch.device:
        """Where the backbone is."""
        return self.backbone.device

    @property
    def head(self) -> Head:
        """The backbone's output head."""
        return self.backbone.head

    @property
    def slot_s(self) -> float:
        """Seconds of sound that one audio token stands for."""
        return self.encoder.frame_s * self.projector.frames_per_slot

    @property
    def blank(self) -> int:
        """The CTC blank: the pad token."""
        return self.prompts.special["pad"]

    @property
    def greedy(self) -> GreedyCtc:
        """Greedy CTC over the slots, which proposes the drafts."""
        return GreedyCtc(self.head, self.blank)

    def trained(self) -> dict[str, nn.Parameter]:
        """What a checkpoint holds and training changes: the projector and the LoRA matrices."""
        return {name: p for name, p in self.named_parameters() if name.startswith("projector.") or "lora_" in name}

    @torch.no_grad()
    def encode(self, audio: Sequence[np.ndarray]) -> Encoded:
        """Clips → encoder frames and audio tokens.

        Args:
            audio: float32 arrays (n,), 16 kHz, at most 30 s each.

        Raises:
            AudioError: a clip is too long or too short for the encoder.
        """
        mel, lengths = self.encoder.features(audio)
        return self.project(*self.encoder(mel.to(self.device), lengths.to(self.device)))

    def project(self, frames: Tensor, frame_lengths: Tensor) -> Encoded:
        """Encoder frames (B, F, D) with frame_lengths (B,) → the same with audio tokens, in the backbone's dtype."""
        frames = frames.to(self.projector.linear.weight.dtype)
        if len(frames) == 1 or frames.device.type != "cpu":
            slots, slot_lengths = self.projector(frames, frame_lengths)
        else:  # one clip at a time, as in the encoder: on a processor a batch gains nothing, and has padding
            rows = (row[:n] for row, n in zip(frames, frame_lengths, strict=True))
            slots, slot_lengths = each_alone(self.projector, rows, frame_lengths)
        dtype, acoustic = self.head.weight.dtype, None
        if self.config.projector.acoustic:
            acoustic = self.projector.prompted(frames, frame_lengths, slots).to(dtype)
        return Encoded(frames, frame_lengths, slots.to(dtype), slot_lengths, acoustic)

    def read_slots(self, slots: Tensor, slot_lengths: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The audio tokens that a prompt holds: all, or those that are not blanks (`ProjectorConfig.skip_blanks`). Acoustic
        ones are all there.

        Most audio tokens of a projector that CTC trained are blanks. Without them a prompt is half as long, and its audio
        tokens follow each other nearly as the tokens of the transcript do.

        Args:
            slots: (B, S, H); slot_lengths: (B,).
            kept: (B, S) bool, those of `read_mask`; None asks it.

        Returns:
            slots (B, S', H), zeros behind each end, and their number (B,).
        """
        if self.config.projector.skip_blanks is None or self.config.projector.acoustic:
            return slots, slot_lengths
        return only(slots, self.read_mask(slots, slot_lengths) if kept is None else kept)

    def read_mask(self, slots: Tensor, slot_lengths: Tensor, heard: Heard | None = None) -> Tensor:
        """Which audio tokens (B, S, H) a prompt or an aligned canvas holds, (B, S) bool, see `read_slots`; `heard`: what CTC
        hears in them, where that is known."""
        used, limit = length_mask(slot_lengths, slots.shape[1]), self.config.projector.skip_blanks
        if limit is None:
            return used
        blank = (heard or self.greedy.of_slots(slots, slot_lengths)).blank
        return used & (blank.exp() < limit)

    def read_prompts(
        self,
        slots: Tensor,
        slot_lengths: Tensor,
        languages: Sequence[str],
        written: Sequence[Sequence[int]] | None = None,
        context: str | Sequence[str] = "",
        kept: Tensor | None = None,
    ) -> tuple[Prefill, Tensor]:
        """Reads prompts, the placeholders overwritten by audio tokens (`read_slots`).

        Args:
            slots: (B, S, H); slot_lengths: (B,).
            languages, written, context: see `PromptBuilder.build`.
            kept: see `read_slots`.

        Returns:
            the cache for the canvas, and the last hidden states (B, P, H); see `Backbone.prefill`.
        """
        slots, slot_lengths = self.read_slots(slots, slot_lengths, kept)
        prompt = self.prompts.build(slot_lengths.tolist(), languages, written, context)
        ids, slot_mask = prompt.ids.to(self.device), prompt.slot_mask.to(self.device)
        embeds = fill_slots(self.backbone.embed(ids), slot_mask, slots, slot_lengths)
        prefill, hidden = self.backbone.prefill(embeds, prompt.mask.to(self.device))
        if self.config.canvas == "aligned":
            prefill = prefill.under_slots(slot_mask)
        return prefill, hidden

    def check_context(self, context: str) -> None:
        """Raises AsrError where a prompt with this context, and the longest clip, is longer than the backbone's window."""
        window = self.backbone.config.sliding_window
        slots = self.projector.output_length(self.encoder.max_frames)
        if context and (tokens := len(self.prompts.row(slots, AUTO, context))) >= window:
            raise AsrError(
                f"with initial_prompt and hotwords a prompt may have {tokens} tokens, and the model reads less than "
                f"{window}; shorten them"
            )

    def align(self, slots: Tensor, tokens: Sequence[int]) -> list[TokenSpan] | None:
        """Where CTC places tokens in the audio tokens (S, H) of one clip; None where they do not fit."""
        return align(self.head, slots, tokens, self.blank)

    def places(self, slots: Tensor, tokens: Sequence[int]) -> list[tuple[int, int]] | None:
        """As `align`, the places [start, end) alone."""
        return places(self.head, slots, tokens, self.blank)

    def text(self, tokens: Sequence[int]) -> str:
        """What token ids spell, special tokens left out."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip()
