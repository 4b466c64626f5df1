"""What canvases look like while the denoiser is trained: noise, known beginnings, drafts, and its own next canvases."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..denoise.canvas import EditCanvases, q_xt, sample_t
from ..denoise.steps import accept, renoise, sample_by_inversion
from .recipe import LossRecipe


class NoisyCanvases(NamedTuple):
    """What the denoiser is given and what it has to make of it.

    Attributes:
        noisy, clean: (B, C) long.
        drafted: (B,) bool, rows that started from a draft.
    """

    noisy: Tensor
    clean: Tensor
    drafted: Tensor


def noisy_canvases(
    clean: Tensor,
    vocab_size: int,
    options: LossRecipe,
    drafts: EditCanvases | None = None,
    generator: torch.Generator | None = None,
) -> NoisyCanvases:
    """Draws the corrupted canvases of a batch, and their targets.

    A row is the transcript at a noise level t ~ U(eps, 1), or pure noise with probability `full_noise`, or with probability
    `known_start` clean up to a random place and noise behind it, as canvases are while they settle from their beginning on.
    With probability `draft_share` it is instead the draft, if that is usable, corrupted at level t / 4.

    Args:
        clean: (B, C) long, transcripts.
        vocab_size: noise is uniform over so many tokens.
        options: the probabilities.
        drafts: canvases (B, C') of drafts, C' >= C; None starts no row from a draft.
        generator: on the device of `clean`; None is torch's default.

    Returns:
        canvases of C positions, with drafts of C'.
    """
    t = sample_t(len(clean), generator, device=clean.device)
    pure = torch.rand(t.shape, generator=generator, device=t.device) < options.full_noise
    levels = torch.where(pure, 1.0, t)
    if drafts is None:
        noisy = q_xt(clean, _with_starts(levels, clean, options.known_start, generator), vocab_size, generator)
        return NoisyCanvases(noisy, clean, torch.zeros_like(pure))
    shown, corrected, usable = drafts
    filling = corrected[:, -1:].expand(-1, corrected.shape[1] - clean.shape[1])
    clean = torch.cat([clean, filling], dim=1)  # (B, C')
    noisy = q_xt(clean, _with_starts(levels, clean, options.known_start, generator), vocab_size, generator)
    drafted = (torch.rand(t.shape, generator=generator, device=t.device) < options.draft_share) & usable
    noisy = torch.where(drafted[:, None], q_xt(shown, t / 4, vocab_size, generator), noisy)
    return NoisyCanvases(noisy, torch.where(drafted[:, None], corrected, clean), drafted)


def _with_starts(levels: Tensor, clean: Tensor, share: float, generator: torch.Generator | None) -> Tensor:
    """Noise levels (B,), or where a share of the rows has a known start, (B, C); see `noisy_canvases`."""
    if share == 0:
        return levels
    chosen = torch.rand(levels.shape, generator=generator, device=levels.device) < share
    lengths = (clean != clean[:, -1:]).sum(1)  # without the filling
    known = torch.rand(levels.shape, generator=generator, device=levels.device) * lengths
    behind = torch.arange(clean.shape[1], device=clean.device) >= known[:, None]  # (B, C)
    return torch.where(chosen[:, None], behind.to(levels.dtype), levels[:, None])


def draw_temperature(generator: torch.Generator | None, device: torch.device | str = "cpu") -> float:
    """Draws the temperature of a denoising step: 0.1 to 0.8, the range of decoding, uniform in its logarithm."""
    return 0.1 * 8 ** float(torch.rand((), generator=generator, device=device))


@torch.no_grad()
def one_step(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Samples, accepts and renoises the canvas as a denoising step does.

    The entropy bound is drawn for the batch: 0.1 to 10 nats, the range of decoding, uniform in its logarithm.

    Args:
        logits: (B, C, V), divided by the temperature.
        generator: on the device of `logits`; None is torch's default.

    Returns:
        (B, C) long, the next canvas.
    """
    bound = 0.1 * 100 ** float(torch.rand((), generator=generator, device=logits.device))
    drawn, entropy = sample_by_inversion(logits, generator)
    return renoise(drawn, accept(entropy, bound), logits.shape[-1], generator)
