"""What CTC heard at each position of a drafted canvas, counted beside the denoiser's prediction.

A canvas that starts from the CTC draft (edits.py) shows one token a position, but not how sure CTC was of it, nor what else
it may have been. Here CTC's log-probabilities at the slot that a position stands for are added to the denoiser's logits, as
hybrid CTC/attention decoding adds them to a decoder's (Watanabe et al. 2017, doi 10.1109/JSTSP.2017.2763455). Training knows
nothing of it: CTC is too sure of what it misses, and a denoiser that was trained beside it learnt to mistrust it everywhere
(docs/results/draft_weight.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .beam import UNHEARD, DraftLM, draft_with_lm
from .ctc import DraftToken, collapse
from .edits import SPARE
from .losses import default_chunk, over_chunks, soft_capped_logits

if TYPE_CHECKING:
    from .backbone import Backbone, Prefill

DRAFT_WEIGHT = 1.0  # of a new model that starts from drafts
TOP = 16  # tokens a position that count; the others are as unlikely as FLOOR
FLOOR = -20.0  # nats; log-probabilities below count as this: a whole vocabulary at it weighs nothing beside a sure token
SURE = 6.0  # nats; see `draft_prior`
NO_SLOT = 12.0  # nats by which a blank is likelier than any other token in a gap that no slot lies in


class Heard(NamedTuple):
    """CTC's likeliest tokens of every slot: ids (B, S, K) long, the likeliest first, and logprobs (B, S, K); blank (B, S),
    the log-probability of the blank."""

    ids: Tensor
    logprobs: Tensor
    blank: Tensor

    def draft(self, lengths: Tensor, blank: int, lm: DraftLM | None = None) -> list[list[DraftToken]]:
        """As `ctc.greedy_draft`; with a language model, what beam search finds (beam.py)."""
        if lm is None:
            return collapse(self.ids[..., 0], self.logprobs[..., 0], lengths, blank)
        ids, logprobs, blanks = self.ids.cpu().numpy(), self.logprobs.float().cpu().numpy(), self.blank.float().cpu().numpy()
        return [
            draft_with_lm(ids[row, :n], logprobs[row, :n], blanks[row, :n], blank, lm)
            for row, n in enumerate(lengths.tolist())
        ]


class Prior(NamedTuple):
    """ids (..., C, K) long: tokens whose logits at that position are raised by gains (..., C, K) nats, at least 0."""

    ids: Tensor
    gains: Tensor

    def raised(self, logits: Tensor) -> Tensor:
        """Logits (..., C, V) with the gains added, a new tensor."""
        return logits.scatter_add(-1, self.ids, self.gains.to(logits.dtype))


class Raised:
    """A denoiser whose logits a prior (B, C, K) raises; see `denoise.Denoiser`."""

    def __init__(self, backbone: Backbone, prior: Prior):
        self.backbone, self.prior, self.vocab_size = backbone, prior, backbone.vocab_size

    def denoise_logits(self, canvas: Tensor, prefill: Prefill, self_conditioning: Tensor | None = None) -> Tensor:
        """See `denoise.Denoiser.denoise_logits`."""
        return self.prior.raised(self.backbone.denoise_logits(canvas, prefill, self_conditioning))


@torch.no_grad()
def hear(slots: Tensor, weight: Tensor, softcap: float, blank: int) -> Heard:
    """Reads slots (B, S, H) with lm_head (V, H), a part at a time."""

    def top_of(weight: Tensor, slots: Tensor) -> tuple[Tensor, ...]:
        logprobs = soft_capped_logits(slots, weight, softcap).log_softmax(-1)  # (n, V)
        best, ids = logprobs.topk(min(TOP, logprobs.shape[-1]))
        return ids, best, logprobs[:, blank]

    parts = over_chunks(top_of, default_chunk(weight.shape[0]), weight, slots.flatten(0, 1))
    ids, logprobs, blanks = (torch.cat(column) for column in zip(*parts, strict=True))
    return Heard(*(part.view(*slots.shape[:2], *part.shape[1:]) for part in (ids, logprobs, blanks)))


def draft_prior(
    heard: Heard, draft: Sequence[DraftToken], lead: int, size: int, blank: int, weight: float, lm: DraftLM | None = None,
    spelled: bool = False,
) -> Prior:  # fmt: skip
    """What was heard at the positions of a canvas that holds a draft as `edits.edit_layout` lays it out.

    A token's position takes the slot of its run where it is likeliest, a gap the slot where the blank is least likely; in a
    gap without a slot, and in the spare ones, a blank is expected. Nothing is known before and behind the layout. Where a
    language model took part in the draft, what a token brings among the draft's others counts too at the tokens' positions.

    Args:
        heard: of one clip's own slots, without a batch dimension.
        draft: as `Heard.draft` gives it.
        lead: positions before the layout.
        size: C, positions of the canvas; what does not fit is cut off.
        weight: factor on the log-probabilities.
        lm: the draft's language model.
        spelled: whether the draft is a speller's (speller.py) and not the slots' own. Its tokens then count as SURE more
            likely than anything that the slots are certain of, and a blank is expected in every gap.
    """
    blanks = heard.blank.tolist()
    slots, end = [-2] * lead, 0  # of each position; -1: none, but a blank is expected; -2: nothing is known
    for token in draft:
        slots += [_least(blanks, end, token.start), _loudest(heard, token)]
        end = token.end
    slots += [_least(blanks, end, len(blanks)), *[-1] * SPARE]
    slots += [-2] * (size - len(slots))
    chosen = torch.tensor(slots[:size], device=heard.ids.device)  # (C,)
    at = chosen.clamp(min=0)
    ids, logprobs = heard.ids[at], heard.logprobs[at].float()  # (C, K) each
    if lm is not None:
        written = [token.id for token in draft]
        for i, place in enumerate(range(lead + 1, min(size, lead + 2 * len(draft)), 2)):
            brought = torch.from_numpy(lm.gains(written[:i], written[i + 1 :], ids[place].tolist())).to(logprobs)
            logprobs[place] += torch.where(ids[place] == blank, 0.0, brought)
    gains = logprobs.clamp(min=FLOOR) - FLOOR
    gains[chosen < 0] = 0.0
    nothing = chosen == -1
    if spelled:
        nothing[lead : lead + 2 * len(draft) + 1 : 2] = True
        for token, place in zip(draft, range(lead + 1, size, 2), strict=False):
            own = (ids[place] == token.id).long()
            column = int(own.argmax()) if own.any() else -1  # of those there, the least likely one gives way
            ids[place, column], gains[place, column] = token.id, SURE - FLOOR
        gains[nothing] = 0.0
    ids[nothing, 0], gains[nothing, 0] = blank, NO_SLOT
    return Prior(ids, weight * gains)


def _loudest(heard: Heard, token: DraftToken) -> int:
    """The slot of a token's run in which it is likeliest."""
    own = heard.ids[token.start : token.end] == token.id
    return token.start + int(heard.logprobs[token.start : token.end].masked_fill(~own, UNHEARD).amax(-1).argmax())


def _least(values: Sequence[float], start: int, end: int) -> int:
    """Where in [start, end) the least value is; -1 where that is empty."""
    return min(range(start, end), key=values.__getitem__, default=-1)
