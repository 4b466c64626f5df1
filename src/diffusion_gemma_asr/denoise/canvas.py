"""Canvases: random tokens, the corruption of a transcript, and a draft laid out so that it can be corrected in place.

Pure functions. Noise replaces a token by a uniformly random vocabulary id (there is no mask token), as in Schiff et al.,
"Simple Guidance Mechanisms for Discrete Diffusion Models" (arXiv 2412.10193, UDLM): with alpha_t = 1 - t, a position of x_t
is kept with probability alpha_t and drawn uniformly otherwise.

A denoiser predicts all positions at once. If a draft stood on the canvas without gaps, one wrong word too many would move
all that follows, each position would be torn between two tokens, and words would come twice. So every token of a draft has
its position, and between them there is room: a token that is too many becomes a blank, a missing one is written into a gap,
and nothing moves. Editing a CTC hypothesis with slots for insertions is the idea of NLE (arXiv 2603.08397).

Those canvases are packed: they hold the transcript, one token behind another, and only what the backbone has understood
so far tells it which audio token a position belongs to. An aligned canvas has a position for each audio token of the prompt,
under that audio token's own position: it holds the token heard there, or a blank, and as in CTC a token at several
neighbouring positions is one. Noise then has to become text where the sound is.
The idea of denoising alignments is that of Imputer (Chan et al. 2020, arXiv 2002.08926) and Align-Refine (Chi et al. 2021,
arXiv 2010.14233). A model is trained for one of the two (`ModelConfig.canvas`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np
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
        t: (B,) or (B, C) in [0, 1], the noise level of each row or position.
        vocab_size: replacements are drawn from [0, vocab_size).
        generator: on the device of x0.
        mask: (B, C) bool, the positions that may change; all when None.

    Returns:
        (B, C) long.
    """
    replaced = torch.rand(x0.shape, generator=generator, device=x0.device) < (t[:, None] if t.ndim == 1 else t)  # (B, C)
    if mask is not None:
        replaced &= mask
    noise = uniform_canvas(len(x0), x0.shape[1], vocab_size, generator, x0.device)
    return torch.where(replaced, noise, x0)


def aligned_layout(tokens: Sequence[int], spans: Sequence[tuple[int, int]], slots: int, blank: int) -> list[int]:
    """A canvas with a position for each audio token of the prompt: tokens at all places of their spans, blanks elsewhere."""
    row = [blank] * slots
    for token, (start, end) in zip(tokens, spans, strict=True):
        row[start:end] = [token] * (end - start)
    return row


def token_starts(canvas: Sequence[int], blank: int) -> list[int]:
    """The places of an aligned canvas at which its tokens begin: as in CTC, a token at neighbouring places is one."""
    return [i for i, token in enumerate(canvas) if token != blank and not (i and token == canvas[i - 1])]


def without_ends(canvas: Sequence[int], blank: int, ends: Collection[int]) -> list[int]:
    """What stands at the places of audio tokens on an aligned canvas, which ends behind them: ends there are blanks."""
    return [blank if token in ends else token for token in canvas]


def write_canvas(rows: Sequence[Sequence[int]], length: int, eos: int) -> Tensor:
    """(B, length) canvases that hold `rows` from their first position on, cut at `length`, then end of sequence."""
    canvas = torch.full((len(rows), length), eos)
    for i, row in enumerate(rows):
        canvas[i, : len(row)] = torch.tensor(row[:length], dtype=torch.long)
    return canvas


SPARE = 3  # gaps behind the last token, for what the draft did not hear to the end


class EditCanvases(NamedTuple):
    """Pairs of canvases to learn corrections from.

    shown: (B, C) long, they hold drafts; corrected: (B, C) long, what they have to become; usable: (B,) bool, False where
    the target does not fit into its draft's layout, and both rows hold nothing but filling. So does every last column.
    """

    shown: Tensor
    corrected: Tensor
    usable: Tensor


def edit_layout(draft: Sequence[int], blank: int) -> list[int]:
    """The draft with a blank before and behind each token, and SPARE more at the end: 2 n + 1 + SPARE positions."""
    row = [blank] * (2 * len(draft) + 1 + SPARE)
    row[1 : 2 * len(draft) : 2] = draft
    return row


def align_edits(target: Sequence[int], layout: Sequence[int], blank: int) -> list[int] | None:
    """What the layout has to become: the target's tokens in order, blanks elsewhere, with the fewest edits.

    A token of the layout that stays costs nothing; one that is replaced or blanked, and one that is written into a gap,
    each cost 1. Of equally cheap ways the one is taken that writes tokens earliest, from the last token on.

    Args:
        target: ids without the end of the transcript, none of them the blank.
        layout: from `edit_layout`, of M positions.

    Returns:
        M ids; None where the target has more than M tokens.
    """
    size, count = len(layout), len(target)
    if count > size:
        return None
    symbols = np.asarray(layout)
    dropped = np.concatenate([[0], np.cumsum(symbols != blank)])  # (M + 1,) tokens of the layout before each position
    best = np.zeros((count + 1, size + 1))  # cost of the first j tokens, the last of them at position m - 1, less the ...
    best[0, 1:] = np.inf  # ... tokens dropped up to there; nothing is placed before position 0
    for j, token in enumerate(target, 1):
        here = np.where(symbols == token, 0.0, 1.0)
        reached = np.minimum.accumulate(best[j - 1])[:-1]  # (M,) the best end before each position
        best[j, 0] = np.inf
        best[j, 1:] = here + reached + dropped[:-1] - dropped[1:]
    row = [blank] * size
    end = size + 1
    for j in range(count, 0, -1):
        end = int(np.argmin(best[j, :end]))
        row[end - 1] = target[j - 1]
    return row


def edit_canvases(
    drafts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], ending: tuple[int, int], blank: int, length: int
) -> EditCanvases:  # fmt: skip
    """Lays drafts out and aligns their targets.

    Args:
        drafts, targets: ids of each row without their end.
        ending: the end of the transcript, which follows the layout, and what fills the rest of the canvas.
        length: the fewest positions of a canvas; longer layouts make it longer.
    """
    layouts = [edit_layout(draft, blank) for draft in drafts]
    size = max([length, *(len(row) + 2 for row in layouts)])
    shown = torch.full((len(layouts), size), ending[1])
    clean = shown.clone()
    fits = torch.zeros(len(layouts), dtype=torch.bool)
    for i, (layout, target) in enumerate(zip(layouts, targets, strict=True)):
        if (aligned := align_edits(target, layout, blank)) is not None:
            fits[i] = True
            shown[i, : len(layout) + 1] = torch.tensor([*layout, ending[0]])
            clean[i, : len(layout) + 1] = torch.tensor([*aligned, ending[0]])
    return EditCanvases(shown, clean, fits)
