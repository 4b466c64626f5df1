"""A recogniser after TransFusion (Baas et al. 2022, arXiv 2210.07677): uniform diffusion over characters, on frozen frames.

Multinomial diffusion (Hoogeboom et al. 2021, arXiv 2102.05379): 200 levels from the transcript to random characters; the
decoder guesses the clean characters at any level, and 200 draws from the posterior lead back. With classifier-free
guidance each pass runs twice, once without hearing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..encoder import length_mask
from ..noise import draw_groups
from ..objective import write_canvas
from .canvas_decoder import CanvasDecoder, draw_rows

LEVELS = 200
GUIDANCE = 1.5
UNHEARD = 0.1  # share of training rows that do not hear
FRAMES_PER_CHARACTER = 2  # a canvas has a position for every 40 ms
END = 0  # the character that fills the canvas behind the transcript


class CharacterDiffusion(nn.Module):
    """Characters under multinomial diffusion.

    Args:
        decoder: timed; its symbols are the characters (K).
    """

    kept: Tensor

    def __init__(self, decoder: CanvasDecoder):
        super().__init__()
        self.decoder = decoder
        self.register_buffer("kept", cosine_schedule(LEVELS), persistent=False)  # (LEVELS + 1,)

    def canvas_length(self, frame_lengths: Tensor) -> Tensor:
        """(B,) positions for clips of so many 20 ms frames."""
        return frame_lengths // FRAMES_PER_CHARACTER + FRAMES_PER_CHARACTER

    def loss(self, frames: Tensor, frame_lengths: Tensor, targets: Sequence[Sequence[int]]) -> Tensor:
        """The variational bound, a level drawn a row: KL of the posterior with the guessed characters from that with the
        right ones, nats a position, times LEVELS."""
        lengths = self.canvas_length(frame_lengths)
        cut = [row[:n] for row, n in zip(targets, lengths.tolist(), strict=True)]
        clean = write_canvas(cut, int(lengths.max()), END)
        level = torch.randint(1, LEVELS + 1, (len(clean),), device=clean.device)
        symbols = self.decoder.embed.num_embeddings
        noise = torch.randint(symbols, clean.shape, device=clean.device)
        noisy = torch.where(torch.rand(clean.shape, device=clean.device) < self.kept[level][:, None], clean, noise)
        heard = torch.rand(len(clean), device=clean.device) >= UNHEARD
        logits = self.decoder(noisy, lengths, frames, frame_lengths, level / LEVELS, heard)
        right = self.posterior(noisy, F.one_hot(clean, symbols).float(), level)
        guessed = self.posterior(noisy, logits.softmax(-1), level)
        divergence = F.kl_div(guessed.clamp(min=1e-20).log(), right, reduction="none").sum(-1)  # (B, C)
        inside = length_mask(lengths, clean.shape[1])
        return LEVELS * ((divergence * inside).sum(1) / lengths).mean()

    def posterior(self, noisy: Tensor, clean: Tensor, level: Tensor) -> Tensor:
        """q(x at level - 1 | x at level, x_0 ~ clean): noisy (B, C), clean (B, C, K), level (B,) → (B, C, K)."""
        symbols = clean.shape[-1]
        before = self.kept[level - 1][:, None, None]
        stays = self.kept[level][:, None, None] / before
        now = F.one_hot(noisy, symbols) * stays + (1 - stays) / symbols
        found = now * (clean * before + (1 - before) / symbols)
        return found / found.sum(-1, keepdim=True)

    @torch.no_grad()
    def decode(
        self, frames: Tensor, frame_lengths: Tensor, generators: Sequence[torch.Generator], guidance: float = GUIDANCE
    ) -> list[list[int]]:
        """Characters up to the first END of B clips with a generator each, in LEVELS passes (twice that with guidance)."""
        lengths = self.canvas_length(frame_lengths)
        size, symbols = int(lengths.max()), self.decoder.embed.num_embeddings
        canvas = torch.zeros(len(lengths), size, dtype=torch.long)
        for rows, generator in draw_groups(len(canvas), generators):
            n = int(lengths[rows])
            canvas[rows, :n] = torch.randint(symbols, (1, n), generator=generator)
        deaf = torch.zeros(len(canvas), dtype=torch.bool)
        for step in range(LEVELS, 0, -1):
            level = torch.full((len(canvas),), step)
            logits = self.decoder(canvas, lengths, frames, frame_lengths, level / LEVELS)
            if guidance:
                without = self.decoder(canvas, lengths, frames, frame_lengths, level / LEVELS, deaf)
                logits = (1 + guidance) * logits - guidance * without
            probs = self.posterior(canvas, logits.softmax(-1), level)
            canvas = draw_rows(probs, lengths, generators, END)
        found = [row[:n] for row, n in zip(canvas.tolist(), lengths.tolist(), strict=True)]
        return [row[: row.index(END)] if END in row else row for row in found]

    def passes(self, row: Sequence[int]) -> int:
        """Of the decoder for any clip, guidance included."""
        return 2 * LEVELS


def cosine_schedule(levels: int, offset: float = 0.008) -> Tensor:
    """(levels + 1,) probabilities that a symbol is still itself at each level, 1 at level 0 (Nichol & Dhariwal 2021)."""
    angles = (torch.arange(levels + 1, dtype=torch.float64) / levels + offset) / (1 + offset) * math.pi / 2
    kept = angles.cos() ** 2
    return (kept / kept[0]).clamp(min=1e-5, max=1.0).float()
