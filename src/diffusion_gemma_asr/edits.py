"""Canvases that correct a draft in place: every token of the draft has its position, and between them there is room.

A denoiser predicts all positions at once. If the draft stood on the canvas without gaps, one wrong word too many would
move all that follows, each position would be torn between two tokens, and words would come twice. Here a token that is too
many becomes a blank, a missing one is written into a gap, and nothing moves. Editing a CTC hypothesis with slots for
insertions is the idea of NLE (arXiv 2603.08397).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

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
    drafts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], ending: tuple[int, int], blank: int, length: int,
    leads: Sequence[Sequence[int]] | None = None,
) -> EditCanvases:  # fmt: skip
    """Lays drafts out and aligns their targets.

    Args:
        drafts, targets: ids of each row without their end.
        leads: what stands before each target and in no draft (see `TextBatch`): blanks are shown there. None: nothing.
        ending: the end of the transcript, which follows the layout, and what fills the rest of the canvas.
        length: the fewest positions of a canvas; longer layouts make it longer.
    """
    leads = leads or [[]] * len(drafts)
    layouts = [edit_layout(draft, blank) for draft in drafts]
    size = max([length, *(len(lead) + len(row) + 2 for lead, row in zip(leads, layouts, strict=True))])
    shown = torch.full((len(layouts), size), ending[1])
    clean = shown.clone()
    fits = torch.zeros(len(layouts), dtype=torch.bool)
    for i, (lead, layout, target) in enumerate(zip(leads, layouts, targets, strict=True)):
        if (aligned := align_edits(target, layout, blank)) is not None:
            fits[i] = True
            size = len(lead) + len(layout) + 1
            shown[i, :size] = torch.tensor([*[blank] * len(lead), *layout, ending[0]])
            clean[i, :size] = torch.tensor([*lead, *aligned, ending[0]])
    return EditCanvases(shown, clean, fits)
