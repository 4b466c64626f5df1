"""Two ways through the same denoising: canvas batch by canvas batch as the paper's loop goes, and a queue that never waits.

`run_reference` is the plain one: rows with canvases of one length are denoised together, all of them until the slowest has
stopped. `run_fast` keeps a fixed number of rows busy: a row that has stopped leaves, the next one in the queue takes its
place (continuous batching, Yu et al. 2022, "Orca"), rows are at steps of their own, and lm_head is read slice by slice
(lm_head.py). Both draw the same numbers for a clip and so write the same transcript.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from .denoise import DenoiseOptions, accept, denoise, sample_by_inversion, should_stop, temperature_at
from .draft_prior import Prior, Raised
from .encoder import length_mask
from .lm_head import logprobs_of, predict

if TYPE_CHECKING:
    from .backbone import Backbone, Prefill

REFILL = 0.25  # share of the rows that must be free before others are read in: few prompts at a time are slow to read

OnStep = Callable[[int, Tensor, Tensor], None]


@dataclass(frozen=True)
class Job:
    """One canvas to denoise: ids (C,) that it starts with, the generator of all that is drawn for it from now on, and a
    prior (C, K); of the jobs that are run together all have one, of the same K, or none has."""

    canvas: Tensor
    generator: torch.Generator
    prior: Prior | None = None


class Finished(NamedTuple):
    """A job's last arg-max canvas (C,), the log-probabilities (C,) of its tokens at temperature 1, and the passes used."""

    canvas: Tensor
    logprobs: Tensor
    steps: int


ReadPrompts = Callable[[Sequence[int]], "Prefill"]
"""Reads the prompts of the jobs with these indices."""


@torch.no_grad()
def run_reference(
    backbone: Backbone, jobs: Sequence[Job], read: ReadPrompts, options: DenoiseOptions, rows: int,
    on_step: OnStep | None = None,
) -> Iterator[tuple[int, Finished]]:  # fmt: skip
    """Denoises jobs, those with canvases of one length together, at most `rows` at once.

    Args:
        on_step: called after every step with its number, from 1, the arg-max canvases of the batch and their entropy (B, C);
            before the first one with 0, what the canvases start with, and infinity.

    Yields:
        (index of the job, what became of it).
    """
    groups: dict[int, list[int]] = {}
    for index, job in enumerate(jobs):
        groups.setdefault(len(job.canvas), []).append(index)
    batches = [group[i : i + rows] for group in groups.values() for i in range(0, len(group), rows)]
    for batch in batches:
        canvas = torch.stack([jobs[index].canvas for index in batch])
        generators = [jobs[index].generator for index in batch]
        if on_step is not None:
            on_step(0, canvas, torch.full(canvas.shape, torch.inf))
        priors = [prior for index in batch if (prior := jobs[index].prior) is not None]
        denoiser = Raised(backbone, Prior(*map(torch.stack, zip(*priors, strict=True)))) if priors else backbone
        found = denoise(denoiser, read(batch), canvas, options, generators, on_step, sample_by_inversion)
        for row, index in enumerate(batch):
            yield index, Finished(found.canvas[row], found.logprobs[row], int(found.steps[row]))


@dataclass(frozen=True)
class _Rows:
    """Jobs under way, one a row: everything that belongs to them.

    jobs: R indices; lengths (R,) positions of each canvas; canvas, best (R, C) long, behind each length nothing of
    meaning; soft (R, C, H), see `Backbone.denoise_hidden_from_soft`; step (R,) passes used; unchanged (R,) long, for how
    many of them `best` has been what it is; prior (R, C, K), K = 0 without one.
    """

    jobs: list[int]
    prefill: Prefill
    lengths: Tensor
    canvas: Tensor
    best: Tensor
    soft: Tensor
    step: Tensor
    unchanged: Tensor
    prior: Prior

    @classmethod
    def new(cls, indices: list[int], jobs: Sequence[Job], prefill: Prefill, backbone: Backbone) -> _Rows:
        canvas = pad_sequence([jobs[index].canvas for index in indices], batch_first=True)
        lengths = torch.tensor([len(jobs[index].canvas) for index in indices], device=canvas.device)
        dtype = backbone.lm_head_weight.dtype
        soft = torch.zeros(*canvas.shape, backbone.hidden_size, dtype=dtype, device=canvas.device)
        none = torch.zeros_like(lengths)
        priors = [prior for index in indices if (prior := jobs[index].prior) is not None]
        if priors:
            prior = Prior(*(pad_sequence(list(part), batch_first=True) for part in zip(*priors, strict=True)))
        else:
            prior = Prior(canvas[..., None][..., :0], soft[..., :0].float())
        return cls(indices, prefill, lengths, canvas, torch.full_like(canvas, -1), soft, none, none, prior)

    def keep(self, rows: list[int]) -> _Rows:
        """Some of them, cut to what they need."""
        at = torch.tensor(rows, device=self.canvas.device)
        size = int(self.lengths[at].max())
        prefill = self.prefill.keep(at, int(self.prefill.lengths[at].max()))
        canvases = self.canvas[at, :size], self.best[at, :size], self.soft[at, :size]
        own = [self.jobs[row] for row in rows]
        prior = Prior(*(part[at, :size] for part in self.prior))
        return _Rows(own, prefill, self.lengths[at], *canvases, self.step[at], self.unchanged[at], prior)

    def join(self, other: _Rows) -> _Rows:
        """Both."""
        size = max(self.canvas.shape[1], other.canvas.shape[1])

        def joined(a: Tensor, b: Tensor) -> Tensor:  # (R, C, ...)
            behind = (0, 0) * (a.dim() - 2)
            return torch.cat([F.pad(x, (*behind, 0, size - x.shape[1])) for x in (a, b)])

        canvases = joined(self.canvas, other.canvas), joined(self.best, other.best), joined(self.soft, other.soft)
        counts = torch.cat([self.step, other.step]), torch.cat([self.unchanged, other.unchanged])
        lengths = torch.cat([self.lengths, other.lengths])
        prior = Prior(*map(joined, self.prior, other.prior))
        return _Rows(self.jobs + other.jobs, self.prefill.join(other.prefill), lengths, *canvases, *counts, prior)


@torch.no_grad()
def run_fast(
    backbone: Backbone, jobs: Sequence[Job], read: ReadPrompts, options: DenoiseOptions, rows: int
) -> Iterator[tuple[int, Finished]]:
    """Denoises jobs, the longest canvases first, `rows` at once as long as there are so many.

    Yields:
        (index of the job, what became of it), as they finish.
    """
    waiting = deque(sorted(range(len(jobs)), key=lambda index: -len(jobs[index].canvas)))
    heats = torch.tensor([temperature_at(left, options) for left in range(options.steps, 0, -1)], device=backbone.device)
    active: _Rows | None = None
    while waiting or active is not None:
        free = rows - (0 if active is None else len(active.jobs))
        if waiting and (active is None or free >= REFILL * rows):
            fresh = [waiting.popleft() for _ in range(min(free, len(waiting)))]
            added = _Rows.new(fresh, jobs, read(fresh), backbone)
            active = added if active is None else active.join(added)
        assert active is not None
        active, finished = _step(backbone, active, jobs, options, heats)
        yield from finished


def _step(
    backbone: Backbone, now: _Rows, jobs: Sequence[Job], options: DenoiseOptions, heats: Tensor
) -> tuple[_Rows | None, list[tuple[int, Finished]]]:
    """One pass: the rows that go on (None: there are none), and those that have stopped."""
    lengths = now.lengths.tolist()
    used = length_mask(now.lengths, now.canvas.shape[1])  # (R, C)
    hidden = backbone.denoise_hidden_from_soft(now.canvas, now.lengths, now.prefill, now.soft)[used]  # (N, H)
    uniform, noise = _draw(backbone, [jobs[index].generator for index in now.jobs], lengths)
    weight, softcap = backbone.lm_head_weight, backbone.softcap
    prior = Prior(*(part[used] for part in now.prior))  # (N, K)
    found = predict(hidden, weight, softcap, heats[now.step].repeat_interleave(now.lengths), uniform, prior)

    entropy = torch.full(now.canvas.shape, torch.inf, device=hidden.device).masked_scatter(used, found.entropy)
    accepted = accept(entropy, options.entropy_bound)[used]
    canvas = now.canvas.masked_scatter(used, torch.where(accepted, found.drawn, noise))
    best = now.best.masked_scatter(used, found.best)
    soft = now.soft.masked_scatter(used[..., None], found.soft)
    step = now.step + 1
    unchanged = torch.where((best == now.best).all(-1), now.unchanged + 1, 0)
    mean_entropy = entropy.where(used, 0.0).sum(-1) / now.lengths
    stopped = should_stop(unchanged, mean_entropy, options) | (step == options.steps)
    after = _Rows(now.jobs, now.prefill, now.lengths, canvas, best, soft, step, unchanged, now.prior)
    places = stopped.nonzero().flatten().tolist()
    if not places:
        return after, []

    ends = stopped.repeat_interleave(now.lengths)  # (N,)
    logprobs = logprobs_of(hidden[ends], weight, softcap, found.best[ends], Prior(*(part[ends] for part in prior)))
    sizes = [lengths[row] for row in places]
    own = zip(found.best[ends].split(sizes), logprobs.split(sizes), strict=True)
    steps = step.tolist()
    finished = [(now.jobs[row], Finished(*pair, steps[row])) for row, pair in zip(places, own, strict=True)]
    going = (~stopped).nonzero().flatten().tolist()
    return (after.keep(going) if going else None), finished


def _draw(backbone: Backbone, generators: Sequence[torch.Generator], lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Numbers in [0, 1) and vocabulary ids for the positions of each row, from its own generator: (N,) each."""
    uniform, noise = [], []
    for generator, n in zip(generators, lengths, strict=True):
        uniform.append(torch.rand(n, generator=generator, device=backbone.device))
        noise.append(torch.randint(backbone.vocab_size, (n,), generator=generator, device=backbone.device))
    return torch.cat(uniform), torch.cat(noise)
