"""A Whisper decoder of its own on a frozen encoder's frames: the yardstick, same ear and same data, token after token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, WhisperConfig, WhisperForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from ..errors import RecipeError

MAX_TOKENS = 256  # that the decoder has positions for, begin and end included


class WhisperDecoder(nn.Module):
    """The decoder half of a Whisper without language tokens.

    Args:
        symbols: size of the vocabulary (V).
        frame_size: width of an encoder frame; Whisper's decoder is as wide.
        width, layers, heads, ffn, dropout: of the decoder.
        begin, end, pad: token ids.

    Raises:
        RecipeError: width is not frame_size.
    """

    def __init__(
        self, symbols: int, frame_size: int, width: int, layers: int, heads: int, ffn: int, dropout: float,
        begin: int, end: int, pad: int,
    ):  # fmt: skip
        super().__init__()
        if width != frame_size:
            raise RecipeError(f"a Whisper decoder is as wide as its encoder's frames: set decoder.width to {frame_size}")
        self.begin, self.end = begin, end
        config = WhisperConfig(
            vocab_size=symbols, d_model=width, encoder_layers=0, decoder_layers=layers, decoder_attention_heads=heads,
            decoder_ffn_dim=ffn, dropout=dropout, pad_token_id=pad, bos_token_id=begin, eos_token_id=end,
            decoder_start_token_id=begin, max_target_positions=MAX_TOKENS, suppress_tokens=[], begin_suppress_tokens=[],
        )  # fmt: skip
        self.model = WhisperForConditionalGeneration(config)
        self.model.model.encoder = nn.Identity()  # the frames come from elsewhere

    def loss(self, frames: Tensor, frame_lengths: Tensor, targets: Sequence[Sequence[int]]) -> Tensor:
        """Cross-entropy a token, the end included; what pads short rows of frames is zeros, as when it decodes."""
        rows = [torch.tensor([self.begin, *row[: MAX_TOKENS - 2], self.end]) for row in targets]
        tokens = nn.utils.rnn.pad_sequence(rows, True, -100)  # (B, L)
        hidden = self.model.model.decoder(
            input_ids=tokens[:, :-1].clamp(min=0), encoder_hidden_states=frames
        ).last_hidden_state
        logits = self.model.proj_out(hidden)  # (B, L-1, V)
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=-100)

    @torch.no_grad()
    def decode(self, frames: Tensor, frame_lengths: Tensor, generators: Sequence[torch.Generator]) -> list[list[int]]:
        """Token ids of B clips, greedily, without begin and end; nothing is drawn."""
        written = write_from_frames(self.model, frames)[:, 1:].tolist()
        return [row[: row.index(self.end)] if self.end in row else row for row in written]

    def passes(self, row: Sequence[int]) -> int:
        """One a token, the end included."""
        return len(row) + 1


def write_from_frames(model: WhisperForConditionalGeneration, frames: Tensor) -> Tensor:
    """Greedy token ids (B, L) of a Whisper without language tokens, from its encoder's frames (B, F, D), F at most 1500."""
    # Whisper's own generate() wants language tokens and 30 s; the plain one takes any encoder output.
    return GenerationMixin.generate(
        model, encoder_outputs=BaseModelOutput(last_hidden_state=frames), num_beams=1, do_sample=False,
        max_new_tokens=min(frames.shape[1], model.config.max_target_positions - 2),
    )  # fmt: skip
