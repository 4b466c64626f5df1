"""Canvases under way: many rows are denoised together, each at a step of its own.

Rows may be added and dropped between any two steps, and each has its own options. The output head is read a few
positions at a time (`predict`), so that no (B, C, V) logits are ever made. Every row draws from its own generator the
numbers that the plain loop (`steps.denoise`) would draw, and ends as it would end alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from ..memory import of_device
from ..model.backbone import Backbone
from ..model.head import Head
from ..model.lengths import length_mask
from ..model.prefill import Prefill
from .steps import DenoiseOptions, accept, pick, should_stop, temperature_at

FLOOR = -60.0  # nats below the peak; what is less likely counts for nothing, and subnormal numbers are slow
# Positions of canvases denoised, or of prompts read, at once, padding included. On a CPU two rows together are as fast as
# eight, and rows of unlike lengths cost padding.
BLOCK = {"cpu": 512, "cuda": 1 << 62}


@dataclass(frozen=True)
class Job:
    """One canvas to denoise.

    Attributes:
        canvas: (C,) long, ids that it starts with.
        generator: of all that is drawn for it from now on, on the device of the canvas.
        slots: (n, H) audio tokens under the canvas's first n positions: what CTC finds likely in them conditions the first
            pass, and their logits are added in every pass. None: nothing.
        share: of the canvas's own hidden states that counts at the places of `slots`.
        expected: gives what is added at the canvas's first positions for its text. None: nothing.
    """

    canvas: Tensor
    generator: torch.Generator
    slots: Tensor | None = None
    share: float = 1.0
    expected: Expectation | None = None

    def write_under(self, row: Tensor, best: Tensor | None) -> None:
        """Writes what is added to the canvas's own hidden states in a pass to `row` (C, H), which holds the audio tokens, or
        what this wrote for an earlier pass; `best` (C,) is the arg-max canvas of the pass before, None in the first, where a
        canvas of noise has no text to go by."""
        if self.expected is None or (best is None and self.slots is None):
            return
        states = self.expected(self.canvas if best is None else best).to(row)
        row[: len(states)] = states if self.slots is None else self.slots + states


class Finished(NamedTuple):
    """What became of a job.

    Attributes:
        canvas: (C,) long, the last arg-max canvas.
        logprobs: (C,) float32, nats, of its tokens at temperature 1.
        steps: passes used.
    """

    canvas: Tensor
    logprobs: Tensor
    steps: int


Expectation = Callable[[Tensor], Tensor]
"""Takes an aligned canvas (C,); gives hidden states (n, H) that are added to those of its first n positions."""

OnCanvas = Callable[[int, int, Tensor, Tensor], None]
"""Takes a job's number, its step, its arg-max canvas (C,) and the entropy (C,), nats, of each position."""


class Prediction(NamedTuple):
    """What a pass says of N positions.

    Attributes:
        drawn: (N,) long, a token drawn from the prediction.
        best: (N,) long, the most probable token.
        entropy: (N,) float32, nats.
        soft: (N, H), the mean row of the output head, which the next pass is conditioned on.
        logprob: (N,) float32, nats, of the most probable token at temperature 1; empty unless it was asked for.
    """

    drawn: Tensor
    best: Tensor
    entropy: Tensor
    soft: Tensor
    logprob: Tensor


def predict(hidden: Tensor, head: Head, temperature: Tensor, uniform: Tensor, logprobs: bool = False) -> Prediction:
    """Reads predictions off hidden states.

    Args:
        hidden: (N, H) of the decoder.
        head: of the backbone.
        temperature: (N,) that divides the logits.
        uniform: (N,) in [0, 1), which decide the draws.
        logprobs: whether to compute `logprob`.
    """

    def of(hidden: Tensor, temperature: Tensor, uniform: Tensor) -> Prediction:
        logits = head.logits(hidden)
        peak, best = logits.max(-1, keepdim=True)
        below = logits.sub_(peak)  # (n, V), at most 0
        logprob = -below.logsumexp(-1) if logprobs else below.new_empty(0)
        scaled = below.div_(temperature[:, None]).clamp_(min=FLOOR)
        weights = scaled.exp()
        total = weights.sum(-1)
        entropy = total.log() - torch.linalg.vecdot(weights, scaled) / total
        soft = (weights.to(head.weight.dtype) @ head.weight) / total[:, None].to(head.weight.dtype)
        return Prediction(pick(weights, uniform), best[:, 0], entropy, soft, logprob)

    parts = head.over_chunks(of, hidden, temperature, uniform)
    return Prediction(*(torch.cat(column) for column in zip(*parts, strict=True)))


class _Limits(NamedTuple):
    """The options of R rows as tensors (R,), under the names of `DenoiseOptions`."""

    entropy_bound: Tensor
    stability_threshold: Tensor
    confidence_threshold: Tensor

    @classmethod
    def of(cls, options: Sequence[DenoiseOptions], device: torch.device) -> _Limits:
        return cls(*(torch.tensor([getattr(one, name) for one in options], device=device) for name in cls._fields))


@dataclass(frozen=True)
class _Rows:
    """Jobs under way, one a row, and everything that belongs to them.

    Attributes:
        jobs: R numbers, by which the caller knows them.
        given: what they are.
        options: of each.
        steps: passes that each has used.
        limits: of the options.
        prefill: of their prompts.
        lengths: (R,) long, positions of each canvas.
        canvas, best: (R, C) long, behind each length nothing of meaning.
        soft, slots, share: (R, C, H) twice and (R, C), see `Backbone.denoise_hidden_from_soft`.
        unchanged: (R,) long, for how many steps `best` has been what it is.
    """

    jobs: list[int]
    given: list[Job]
    options: list[DenoiseOptions]
    steps: list[int]
    limits: _Limits
    prefill: Prefill
    lengths: Tensor
    canvas: Tensor
    best: Tensor
    soft: Tensor
    slots: Tensor
    share: Tensor
    unchanged: Tensor

    @classmethod
    def new(
        cls,
        numbers: list[int],
        jobs: Sequence[Job],
        options: Sequence[DenoiseOptions],
        prefill: Prefill,
        backbone: Backbone,
    ) -> _Rows:
        canvas = pad_sequence([job.canvas for job in jobs], batch_first=True)
        lengths = torch.tensor([len(job.canvas) for job in jobs], device=canvas.device)
        dtype = backbone.lm_head_weight.dtype
        soft, slots = (torch.zeros(*canvas.shape, backbone.hidden_size, dtype=dtype, device=canvas.device) for _ in range(2))
        share = torch.ones(canvas.shape, device=canvas.device)
        for row, job in enumerate(jobs):
            if job.slots is not None:
                slots[row, : len(job.slots)] = job.slots
                share[row, : len(job.slots)] = job.share
                soft[row, : len(job.slots)] = backbone.head.mean_rows(job.slots)
        return cls(
            jobs=numbers,
            given=list(jobs),
            options=list(options),
            steps=[0] * len(jobs),
            limits=_Limits.of(options, canvas.device),
            prefill=prefill,
            lengths=lengths,
            canvas=canvas,
            best=torch.full_like(canvas, -1),
            soft=soft,
            slots=slots,
            share=share,
            unchanged=torch.zeros_like(lengths),
        )

    def keep(self, rows: list[int]) -> _Rows:
        """Some of them, cut to what they need; all as they are."""
        if len(rows) == len(self.jobs):
            return self
        at = torch.tensor(rows, device=self.canvas.device)
        size = int(self.lengths[at].max())
        return _Rows(
            jobs=[self.jobs[row] for row in rows],
            given=[self.given[row] for row in rows],
            options=[self.options[row] for row in rows],
            steps=[self.steps[row] for row in rows],
            limits=_Limits(*(values[at] for values in self.limits)),
            prefill=self.prefill.keep(at, int(self.prefill.lengths[at].max())),
            lengths=self.lengths[at],
            canvas=self.canvas[at, :size],
            best=self.best[at, :size],
            soft=self.soft[at, :size],
            slots=self.slots[at, :size],
            share=self.share[at, :size],
            unchanged=self.unchanged[at],
        )

    def join(self, other: _Rows) -> _Rows:
        """Both."""
        size = max(self.canvas.shape[1], other.canvas.shape[1])

        def joined(a: Tensor, b: Tensor) -> Tensor:  # (R, C, ...)
            behind = (0, 0) * (a.dim() - 2)
            return torch.cat([F.pad(x, (*behind, 0, size - x.shape[1])) for x in (a, b)])

        return _Rows(
            jobs=self.jobs + other.jobs,
            given=self.given + other.given,
            options=self.options + other.options,
            steps=self.steps + other.steps,
            limits=_Limits(*(torch.cat(pair) for pair in zip(self.limits, other.limits, strict=True))),
            prefill=self.prefill.join(other.prefill),
            lengths=torch.cat([self.lengths, other.lengths]),
            canvas=joined(self.canvas, other.canvas),
            best=joined(self.best, other.best),
            soft=joined(self.soft, other.soft),
            slots=joined(self.slots, other.slots),
            share=joined(self.share, other.share),
            unchanged=torch.cat([self.unchanged, other.unchanged]),
        )


class Engine:
    """Canvases under way on one backbone, in blocks of rows of like lengths.

    Args:
        backbone: that denoises them.
        on_canvas: called for every job when it is added, with step 0 and infinite entropies, and after each of its steps.
    """

    def __init__(self, backbone: Backbone, on_canvas: OnCanvas | None = None):
        self.backbone, self.on_canvas = backbone, on_canvas
        self._head, self._largest = backbone.head, of_device(BLOCK, backbone.device)
        self._blocks: list[_Rows] = []

    def __len__(self) -> int:
        """Canvases under way."""
        return sum(len(block.jobs) for block in self._blocks)

    @torch.no_grad()
    def add(self, numbers: Sequence[int], jobs: Sequence[Job], options: Sequence[DenoiseOptions], prefill: Prefill) -> None:
        """Adds jobs between two steps.

        Args:
            numbers: by which the caller knows them, none of them under way.
            jobs, options: one each.
            prefill: of their prompts, in this order.
        """
        if self.on_canvas is not None:
            for number, job in zip(numbers, jobs, strict=True):
                self.on_canvas(number, 0, job.canvas, torch.full((len(job.canvas),), torch.inf))
        added = _Rows.new(list(numbers), jobs, options, prefill, self.backbone)
        for rows in in_blocks(added.lengths.tolist(), self._largest):
            block = added.keep(rows)
            for at, other in enumerate(self._blocks):
                size = max(block.canvas.shape[1], other.canvas.shape[1])
                if size * (len(block.jobs) + len(other.jobs)) <= self._largest:
                    self._blocks[at] = other.join(block)
                    break
            else:
                self._blocks.append(block)

    def drop(self, numbers: Collection[int]) -> None:
        """Jobs that nobody waits for any more leave their rows at once."""
        left = [(block, [row for row, number in enumerate(block.jobs) if number not in numbers]) for block in self._blocks]
        self._blocks = [block.keep(rows) for block, rows in left if rows]

    @torch.no_grad()
    def step(self) -> list[tuple[int, Finished]]:
        """One denoising step of all canvases under way; gives those that have stopped, which leave."""
        blocks, self._blocks, finished = self._blocks, [], []
        for block in blocks:
            left, done = self._step(block)
            finished += done
            if left is not None:
                self._blocks.append(left)
        return finished

    def _step(self, now: _Rows) -> tuple[_Rows | None, list[tuple[int, Finished]]]:
        """One step of a block: what is left of it, if anything, and what has stopped."""
        lengths = now.lengths.tolist()
        used = length_mask(now.lengths, now.canvas.shape[1])  # (R, C)
        for row, (job, step) in enumerate(zip(now.given, now.steps, strict=True)):
            job.write_under(now.slots[row], now.best[row] if step else None)
        hidden = self.backbone.denoise_hidden_from_soft(
            now.canvas, now.lengths, now.prefill, now.soft, now.slots, now.share
        )[used]  # (N, H)
        uniform, noise = _draw(self.backbone, [job.generator for job in now.given], lengths)
        heat = [temperature_at(one.steps - step, one) for one, step in zip(now.options, now.steps, strict=True)]
        temperature = torch.tensor(heat, device=hidden.device).repeat_interleave(now.lengths)
        predicted = predict(hidden, self._head, temperature, uniform)

        entropy = torch.full(now.canvas.shape, torch.inf, device=hidden.device).masked_scatter(used, predicted.entropy)
        accepted = accept(entropy, now.limits.entropy_bound[:, None])[used]
        best = now.best.masked_scatter(used, predicted.best)
        steps = [step + 1 for step in now.steps]
        unchanged = torch.where((best == now.best).all(-1), now.unchanged + 1, 0)
        mean_entropy = entropy.where(used, 0.0).sum(-1) / now.lengths
        last = torch.tensor([step == one.steps for step, one in zip(steps, now.options, strict=True)], device=hidden.device)
        stopped = should_stop(unchanged, mean_entropy, now.limits) | last
        if self.on_canvas is not None:
            for row, number in enumerate(now.jobs):
                self.on_canvas(number, steps[row], best[row, : lengths[row]], entropy[row, : lengths[row]])
        block = replace(
            now,
            canvas=now.canvas.masked_scatter(used, torch.where(accepted, predicted.drawn, noise)),
            best=best,
            soft=now.soft.masked_scatter(used[..., None], predicted.soft),
            steps=steps,
            unchanged=unchanged,
        )
        places = stopped.nonzero().flatten().tolist()
        if not places:
            return block, []

        ends = stopped.repeat_interleave(now.lengths)  # (N,)
        tokens = predicted.best[ends]
        logprobs = self._head.token_log_probs(hidden[ends], tokens)
        sizes = [lengths[row] for row in places]
        parts = zip(places, tokens.split(sizes), logprobs.split(sizes), strict=True)
        finished = [(now.jobs[row], Finished(canvas, values, steps[row])) for row, canvas, values in parts]
        left = (~stopped).nonzero().flatten().tolist()
        return block.keep(left) if left else None, finished

    def close(self) -> None:
        """Gives up what is under way."""
        self._blocks = []


def in_blocks(lengths: Sequence[int], largest: int) -> list[list[int]]:
    """Rows of such lengths in blocks of at most `largest` positions with padding, one row at least; where they are too many
    for one block, the longest first."""
    rows = range(len(lengths))
    if max(lengths, default=0) * len(lengths) <= largest:
        return [list(rows)]
    blocks: list[list[int]] = []
    for row in sorted(rows, key=lambda row: -lengths[row]):
        if blocks and lengths[blocks[-1][0]] * (len(blocks[-1]) + 1) <= largest:
            blocks[-1].append(row)
        else:
            blocks.append([row])
    return blocks


def _draw(backbone: Backbone, generators: Sequence[torch.Generator], lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Numbers in [0, 1) and vocabulary ids for the positions of each row, from its own generator: (N,) each."""
    uniform, noise = [], []
    for generator, n in zip(generators, lengths, strict=True):
        uniform.append(torch.rand(n, generator=generator, device=backbone.device))
        noise.append(torch.randint(backbone.vocab_size, (n,), generator=generator, device=backbone.device))
    return torch.cat(uniform), torch.cat(noise)
