"""One denoising step that never waits for the host: fixed shapes, and every decision taken on the device.

A pass of a large backbone is hundreds of kernels, each of a few microseconds: what launches them one by one takes longer
than they do. A step whose shapes and addresses never change is recorded once as a CUDA graph and launched as a whole. So all
that a step reads and writes lies in tensors of a fixed size (`Rows`), and acceptance, new noise, the stop rule and
self-conditioning are computed where the logits are. A row that has stopped keeps its result until it is replaced; the host
learns of it when it has time to (`static_engine.StaticEngine`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..model.backbone import Backbone
from ..model.head import Head
from ..model.lengths import length_mask
from ..model.prefill import FilledCache, Prefill
from .engine import Job, predict
from .steps import DenoiseOptions, accept, should_stop


class Bucket(NamedTuple):
    """A shape: rows, positions of a canvas, positions of a prompt."""

    rows: int
    canvas: int
    prompt: int


@dataclass(frozen=True, eq=False)
class Rows:
    """R rows of C positions behind P positions of prompt; a step changes the tensors in place.

    Attributes:
        canvas, best: (R, C) long.
        soft, slots, share: (R, C, H) twice and (R, C), see `Backbone.denoise_seen`.
        logprobs: (R, C) float32, nats, of `best` at temperature 1.
        entropy: (R, C) float32, nats, of the last pass; infinite behind a row's length.
        uniform: (R, C) float32 in [0, 1), which decide the draws of the next step; the host fills them in.
        noise: (R, C) long, ids for the positions that it does not accept; the host fills them in.
        lengths: (R,) long, positions in use, at least 1.
        running: (R,) bool, False where a row is free or has stopped.
        unchanged: (R,) long, for how many steps `best` has been what it is.
        step: (R,) long, passes used.
        steps: (R,) long, the most.
        t_min, t_span: (R,) float32, the lowest temperature, and how far above it the first is.
        entropy_bound, stability_threshold, confidence_threshold: (R,), of `DenoiseOptions`.
        visible: (R, P) bool, positions of the prompt in use.
        prompt: (R,) long, their number.
        cache: (R, kv_heads, P, head_dim) keys and values of every layer.
    """

    canvas: Tensor
    best: Tensor
    soft: Tensor
    slots: Tensor
    share: Tensor
    logprobs: Tensor
    entropy: Tensor
    uniform: Tensor
    noise: Tensor
    lengths: Tensor
    running: Tensor
    unchanged: Tensor
    step: Tensor
    steps: Tensor
    t_min: Tensor
    t_span: Tensor
    entropy_bound: Tensor
    stability_threshold: Tensor
    confidence_threshold: Tensor
    visible: Tensor
    prompt: Tensor
    cache: FilledCache

    @classmethod
    def empty(cls, bucket: Bucket, backbone: Backbone, layers: list[tuple[Tensor, Tensor]]) -> Rows:
        """Rows that all are free.

        Args:
            bucket: their shape.
            backbone: that will denoise them.
            layers: keys and values of any prompt, whose shapes and dtypes are taken over.
        """
        rows, width, prompt = bucket
        device = backbone.device

        def filled(value: float, *shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.full((rows, *shape), value, dtype=dtype, device=device)

        def like(x: Tensor) -> Tensor:
            return torch.zeros(rows, x.shape[1], prompt, x.shape[3], dtype=x.dtype, device=device)

        return cls(
            canvas=filled(0, width),
            best=filled(-1, width),
            soft=filled(0, width, backbone.hidden_size, dtype=backbone.lm_head_weight.dtype),
            slots=filled(0, width, backbone.hidden_size, dtype=backbone.lm_head_weight.dtype),
            share=filled(1, width, dtype=torch.float32),
            logprobs=filled(0, width, dtype=torch.float32),
            entropy=filled(torch.inf, width, dtype=torch.float32),
            uniform=filled(0, width, dtype=torch.float32),
            noise=filled(0, width),
            lengths=filled(1),
            running=filled(False, dtype=torch.bool),
            unchanged=filled(0),
            step=filled(0),
            steps=filled(1),
            t_min=filled(1, dtype=torch.float32),
            t_span=filled(0, dtype=torch.float32),
            entropy_bound=filled(0, dtype=torch.float32),
            stability_threshold=filled(0),
            confidence_threshold=filled(0, dtype=torch.float32),
            visible=filled(False, prompt, dtype=torch.bool),
            prompt=filled(0),
            cache=FilledCache([(like(keys), like(values)) for keys, values in layers]),
        )

    def put(self, row: int, job: Job, head: Head, options: DenoiseOptions, prefill: Prefill, of: int) -> None:
        """Starts a job in a free row.

        Args:
            row: the free row.
            job: to denoise.
            head: of the backbone.
            options: of it.
            prefill: has its prompt.
            of: the prompt's row there.
        """
        size = min(prefill.visible.shape[1], self.visible.shape[1])  # what the bucket cuts off is padding
        self.visible[row] = False
        self.visible[row, :size] = prefill.visible[of, :size]
        self.prompt[row] = prefill.first[of]
        for mine, (keys, values) in zip(self.cache.layers, prefill.layers(), strict=True):
            mine.keys[row, :, :size] = keys[of, :, :size]
            mine.values[row, :, :size] = values[of, :, :size]
        self.canvas[row, : len(job.canvas)] = job.canvas
        self.best[row] = -1
        self.soft[row] = self.slots[row] = 0
        self.share[row] = 1
        if job.slots is not None:
            self.slots[row, : len(job.slots)] = job.slots
            self.share[row, : len(job.slots)] = job.share
            self.soft[row, : len(job.slots)] = head.mean_rows(job.slots)
        self.lengths[row] = len(job.canvas)
        self.running[row] = True
        self.unchanged[row] = 0
        self.step[row] = 0
        self.steps[row] = options.steps
        self.t_min[row] = options.t_min
        self.t_span[row] = options.t_max - options.t_min
        for name in ("entropy_bound", "stability_threshold", "confidence_threshold"):
            getattr(self, name)[row] = getattr(options, name)

    def copy_rows(self, other: Rows, places: list[tuple[int, int]]) -> None:
        """Takes rows over, by pairs (row there, row here); canvas and prompt of each fit into both shapes."""
        there = torch.tensor([place[0] for place in places], device=self.canvas.device)
        here = torch.tensor([place[1] for place in places], device=self.canvas.device)

        def copy(mine: Tensor, theirs: Tensor, dim: int = 1) -> None:
            size = min(mine.shape[dim], theirs.shape[dim]) if mine.dim() > dim else 0
            picked = theirs.index_select(0, there)
            if mine.dim() > dim:
                mine.narrow(dim, 0, size).index_copy_(0, here, picked.narrow(dim, 0, size))
            else:
                mine.index_copy_(0, here, picked)

        for name, theirs in vars(other).items():
            if name != "cache":
                copy(getattr(self, name), theirs)
        size = min(self.visible.shape[1], other.visible.shape[1])
        self.visible[here, size:] = False
        for mine_layer, their_layer in zip(self.cache.layers, other.cache.layers, strict=True):
            copy(mine_layer.keys, their_layer.keys, 2)
            copy(mine_layer.values, their_layer.values, 2)


@torch.no_grad()
def device_step(backbone: Backbone, head: Head, rows: Rows) -> None:
    """One denoising step of all running rows, in place: what `steps.denoise` does in one round, with the draws in `uniform`
    and `noise`.

    Args:
        backbone: that denoises.
        head: of the backbone; it says how many logits may exist at a time.
        rows: of any shape; the same shape and tensors each time where the step is compiled or recorded.
    """
    count, width = rows.canvas.shape
    used = length_mask(rows.lengths, width)  # (R, C)
    prefill = Prefill(rows.cache, rows.visible, rows.prompt)
    seen = torch.cat([rows.visible, used], 1)  # (R, P + C)
    hidden = backbone.denoise_seen(rows.canvas, seen, prefill, rows.soft, rows.slots, rows.share)
    temperature = rows.t_min + rows.t_span * ((rows.steps - rows.step) / rows.steps)  # (R,)
    heat = temperature[:, None].expand(-1, width).flatten()
    predicted = predict(hidden.flatten(0, 1), head, heat, rows.uniform.flatten(), logprobs=True)

    entropy = predicted.entropy.view(count, width).masked_fill(~used, torch.inf)
    accepted = accept(entropy, rows.entropy_bound[:, None])
    going = rows.running[:, None]
    best = predicted.best.view(count, width).where(used & going, rows.best)
    same = (best == rows.best).all(-1)
    unchanged = torch.where(same, rows.unchanged + 1, 0)
    mean_entropy = entropy.where(used, 0.0).sum(-1) / rows.lengths
    step = rows.step + 1
    stopped = should_stop(unchanged, mean_entropy, rows) | (step >= rows.steps)

    new = torch.where(accepted, predicted.drawn.view(count, width), rows.noise)
    rows.canvas.copy_(new.where(used & going, rows.canvas))
    rows.best.copy_(best)
    rows.logprobs.copy_(predicted.logprob.view(count, width).where(going, rows.logprobs))
    rows.entropy.copy_(entropy.where(going, rows.entropy))
    rows.soft.copy_(predicted.soft.view(rows.soft.shape).where(going[..., None], rows.soft))
    rows.unchanged.copy_(unchanged.where(rows.running, rows.unchanged))
    rows.step.copy_(step.where(rows.running, rows.step))
    rows.running.logical_and_(~stopped)
