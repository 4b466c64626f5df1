"""The decoder that both diffusion baselines share: a bidirectional transformer over a canvas, which hears by
cross-attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..encoder import length_mask
from ..noise import Generators, draw_groups


class CanvasDecoder(nn.Module):
    """Predicts every position of a canvas from all of it and from the frames of a frozen encoder.

    Args:
        symbols: what a position may hold (V).
        frame_size: width of an encoder frame.
        width, layers, heads, ffn, dropout: of the transformer (pre-norm, GELU).
        max_length: positions that a canvas may have.
        timed: whether it is told the noise level.
    """

    def __init__(
        self, symbols: int, frame_size: int, width: int, layers: int, heads: int, ffn: int, dropout: float,
        max_length: int = 1024, timed: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.embed = nn.Embedding(symbols, width)
        self.positions = nn.Embedding(max_length, width)
        nn.init.normal_(self.embed.weight, std=width**-0.5)
        nn.init.normal_(self.positions.weight, std=width**-0.5)
        self.hear = nn.Linear(frame_size, width)
        self.unheard = nn.Parameter(torch.zeros(width))  # stands for the frames of a row that must not hear
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)) if timed else None
        layer = nn.TransformerDecoderLayer(width, heads, ffn, dropout, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerDecoder(layer, layers, nn.LayerNorm(width))

    def forward(
        self,
        canvas: Tensor,
        canvas_lengths: Tensor,
        frames: Tensor,
        frame_lengths: Tensor,
        level: Tensor | None = None,
        heard: Tensor | None = None,
    ) -> Tensor:
        """Logits of every position.

        Args:
            canvas: (B, C) long; canvas_lengths (B,) positions in use.
            frames: (B, F, frame_size); frame_lengths (B,).
            level: (B,) noise level in [0, 1], where the decoder is timed.
            heard: (B,) bool, rows that hear their frames; None: all do.

        Returns:
            (B, C, V) float32.
        """
        x = self.embed(canvas) + self.positions.weight[: canvas.shape[1]]
        if self.time is not None:
            assert level is not None
            x = x + self.time(sinusoids(level, x.shape[-1]))[:, None]
        memory = self.hear(frames)
        if heard is not None:
            memory = torch.where(heard[:, None, None], memory, self.unheard)
        x = self.layers(
            x,
            memory,
            tgt_key_padding_mask=~length_mask(canvas_lengths, canvas.shape[1]),
            memory_key_padding_mask=~length_mask(frame_lengths, frames.shape[1]),
        )
        return x @ self.embed.weight.T


def draw_rows(probs: Tensor, lengths: Tensor, generators: Generators, beyond: int) -> Tensor:
    """Draws a symbol for every position in use, so that a row with its own generator does not depend on its batch.

    Args:
        probs: (B, C, V); lengths (B,) positions in use.
        generators: one a row.
        beyond: what stands behind each length.

    Returns:
        (B, C) long.
    """
    drawn = torch.full(probs.shape[:2], beyond)
    for rows, generator in draw_groups(len(probs), generators):
        n = int(lengths[rows])
        drawn[rows, :n] = torch.multinomial(probs[rows, :n].flatten(0, 1), 1, generator=generator).view(1, n)
    return drawn


def sinusoids(level: Tensor, width: int) -> Tensor:
    """(B,) values in [0, 1] → (B, width) sines and cosines of 1 to 1000 periods."""
    frequencies = 2 * math.pi * 1000 ** torch.linspace(0, 1, width // 2, device=level.device)
    angles = level[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
