"""Drafts: a transcript that is heard before anything is denoised, from which canvases take their length or their first
text."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .ctc import DraftToken, collapse
from .head import Head
from .lengths import length_mask


class Encoded(NamedTuple):
    """Clips as the model hears them.

    Attributes:
        frames: (B, F, D), the frozen encoder's output, zeros behind each end.
        frame_lengths: (B,) long, frames that hold sound.
        slots: (B, S, H), the projector's output: audio tokens in the backbone's space, zeros behind each end.
        slot_lengths: (B,) long.
        acoustic: (B, S, H), those that prompts hold in their place, see `AudioProjector.prompted`; None: none.
    """

    frames: Tensor
    frame_lengths: Tensor
    slots: Tensor
    slot_lengths: Tensor
    acoustic: Tensor | None = None

    @property
    def prompted(self) -> Tensor:
        """(B, S, H), the audio tokens that prompts hold."""
        return self.slots if self.acoustic is None else self.acoustic

    def pick(self, rows: list[int]) -> Encoded:
        """Some of the clips."""
        acoustic = None if self.acoustic is None else self.acoustic[rows]
        return Encoded(self.frames[rows], self.frame_lengths[rows], self.slots[rows], self.slot_lengths[rows], acoustic)


class Heard(NamedTuple):
    """What CTC hears in the audio tokens of clips.

    Attributes:
        drafts: of each clip, its tokens, with the slots where they are heard and their probabilities.
        blank: (B, S) log-probability of the blank; 0 behind each end.
    """

    drafts: list[list[DraftToken]]
    blank: Tensor


class GreedyCtc:
    """The most probable symbol of each slot, straight through the backbone's output head.

    Args:
        head: of the backbone.
        blank: id of the CTC blank.
    """

    def __init__(self, head: Head, blank: int):
        self.head, self.blank = head, blank

    def drafts(self, encoded: Encoded) -> list[list[DraftToken]]:
        """A draft of each clip."""
        return self.hear(encoded).drafts

    def hear(self, encoded: Encoded) -> Heard:
        """What it hears in clips."""
        return self.of_slots(encoded.slots, encoded.slot_lengths)

    @torch.no_grad()
    def of_slots(self, slots: Tensor, slot_lengths: Tensor) -> Heard:
        """What it hears in audio tokens (B, S, H) with slot_lengths (B,), in the head's own precision."""
        used = length_mask(slot_lengths, slots.shape[1])
        with torch.autocast(slots.device.type, enabled=False):
            parts = self.head.best_beside(slots[used].to(self.head.weight.dtype), self.blank)  # (N,) each
        best, log_probs, blank = (part.new_zeros(used.shape).masked_scatter_(used, part) for part in parts)
        return Heard(collapse(best, log_probs, slot_lengths, self.blank), blank)
