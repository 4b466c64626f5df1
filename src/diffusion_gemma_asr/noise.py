"""Uniform-state noise on token canvases: the prior, the corruption of a transcript, and who draws from what.

Pure functions. Noise replaces a token by a uniformly random vocabulary id (there is no mask token), as in
Schiff et al., "Simple Guidance Mechanisms for Discrete Diffusion Models" (arXiv 2412.10193, UDLM): with
alpha_t = 1 - t, a position of x_t is kept with probability alpha_t and drawn uniformly otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None
"""Where random numbers come from: one generator for the batch (None: torch's default one), or one per row.

With one generator per row a row's draws do not depend on the other rows of its batch. Generators live on the
device of the tensors they fill.
"""


def draw_groups(batch: int, generator: Generators) -> Iterator[tuple[slice, torch.Generator | None]]:
    """Say which rows of a batch draw together, and from which generator.

    Args:
        batch: number of rows.
        generator: one for all rows, or a sequence of one per row.

    Returns:
        (rows, generator) pairs that cover the batch in order: one pair, or `batch` pairs of one row each.

    Raises:
        ValueError: a sequence whose length is not `batch`.
    """
    if generator is None or isinstance(generator, torch.Generator):
        yield slice(0, batch), generator
        return
    if len(generator) != batch:
        raise ValueError(f"{len(generator)} generators for {batch} rows: pass one per row, or a single one")
    for row, own in enumerate(generator):
        yield slice(row, row + 1), own


def uniform_canvas(
    batch: int, length: int, vocab_size: int, generator: Generators, device: torch.device | str = "cpu"
) -> Tensor:
    """Draw canvases from the prior: every position a uniformly random vocabulary id.

    Args:
        batch, length: shape of the result, B rows of C positions.
        vocab_size: ids are drawn from [0, vocab_size).
        generator: on `device`; one for the batch or one per row.
        device: where the canvas is made.

    Returns:
        (B, C) long.
    """
    canvas = torch.empty(batch, length, dtype=torch.long, device=device)
    for rows, own in draw_groups(batch, generator):
        canvas[rows] = torch.randint(vocab_size, canvas[rows].shape, generator=own, device=device)
    return canvas


def sample_t(batch: int, generator: torch.Generator | None, eps: float = 1e-3, device: torch.device | str = "cpu") -> Tensor:
    """Draw a noise level per example, uniform on [eps, 1): eps keeps every example a little noisy.

    Returns:
        (B,) float32 on `device`, which is also the generator's.
    """
    return eps + (1 - eps) * torch.rand(batch, generator=generator, device=device)


def q_xt(x0: Tensor, t: Tensor, vocab_size: int, generator: torch.Generator | None, mask: Tensor | None = None) -> Tensor:
    """Corrupt clean canvases to noise level t: draw from q(x_t | x_0) of uniform-state diffusion.

    Each position is replaced with probability t by an id drawn from the whole vocabulary; the draw may happen
    to be the clean id. At t = 0 nothing changes, at t = 1 the result is the prior.

    Args:
        x0: (B, C) long, clean ids.
        t: (B,) in [0, 1], the noise level of each row.
        vocab_size: replacements are drawn from [0, vocab_size).
        generator: on the device of x0.
        mask: (B, C) bool, the positions that may change; all when None.

    Returns:
        (B, C) long.
    """
    replaced = torch.rand(x0.shape, generator=generator, device=x0.device) < t[:, None]  # (B, C)
    if mask is not None:
        replaced &= mask
    noise = uniform_canvas(len(x0), x0.shape[1], vocab_size, generator, x0.device)
    return torch.where(replaced, noise, x0)
