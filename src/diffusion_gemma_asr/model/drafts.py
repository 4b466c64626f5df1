"""Drafts: a transcript that is heard before anything is denoised, from which canvases take their length or their first
text."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .ctc import DraftToken, collapse
from .head import Head


class Encoded(NamedTuple):
    """Clips as the model hears them.

    Attributes:
        frames: (B, F, D), the frozen encoder's output, zeros behind each end.
        frame_lengths: (B,) long, frames that hold sound.
        slots: (B, S, H), the projector's output: audio tokens in the backbone's space, zeros behind each end.
        slot_lengths: (B,) long.
    """

    frames: Tensor
    frame_lengths: Tensor
    slots: Tensor
    slot_lengths: Tensor


class GreedyCtc:
    """The most probable symbol of each slot, straight through the backbone's output head.

    Args:
        head: of the backbone.
        blank: id of the CTC blank.
    """

    def __init__(self, head: Head, blank: int):
        self.head, self.blank = head, blank

    def drafts(self, encoded: Encoded) -> list[list[DraftToken]]:
        """A draft of each clip: its tokens, with the slots where they are heard and their probabilities."""
        return self.of_slots(encoded.slots, encoded.slot_lengths)

    def of_slots(self, slots: Tensor, slot_lengths: Tensor) -> list[list[DraftToken]]:
        """The drafts of audio tokens (B, S, H) with slot_lengths (B,)."""
        best, log_probs = self.head.best(slots)
        return collapse(best, log_probs, slot_lengths, self.blank)
