"""The training loop of all stages: warm-up and cosine schedule, clipping, one JSON line per step, exact resumption.

All randomness of a step is seeded by (seed, step), and batches are a function of the step, so a resumed run passes through
the same states as an uninterrupted one. Under torchrun several processes share the micro-batches of each step (workers.py).
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from ..errors import CheckpointError, RecipeError
from ..files import whole_file, write_whole
from ..strict import require
from .muon import MuonWithAdamW
from .workers import from_first, rank, sum_gradients, wait_for_all, workers

Metrics = dict[str, float]
LossOf = Callable[[int, int], tuple[Tensor, Metrics]]
"""(step, index of a micro-batch in the step) → (loss to minimise, figures for the log)."""
Optimizer = torch.optim.Optimizer | MuonWithAdamW

STATE, LOG = "state.pt", "log.jsonl"


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """The optimiser, its schedule (linear warm-up, then cosine), and the intervals of evaluation and saving."""

    steps: int  # optimiser steps, at most
    minutes: float | None = (
        None  # of training, at most: the schedule then ends with them; such a run cannot be repeated exactly
    )
    accumulation: int = 1  # forward passes in one optimiser step
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: see muon.py
    lr: float = 1.5e-4  # peak learning rate
    lr_shares: dict[str, float] | None = None  # of `lr`, for parameters whose names begin so; AdamW alone
    betas: tuple[float, float] = (0.95, 0.99)
    weight_decay: float = 0.0
    warmup_steps: int = 0  # steps over which the rate rises linearly from 0 to `lr`
    min_lr_ratio: float = 0.0  # the cosine ends at this share of `lr`
    clip: float = 1.0  # largest norm of the gradient
    seed: int = 0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the computation; trained weights stay float32
    eval_every: int = 500  # steps between evaluations
    save_every: int = 500  # steps between saved states, from which an interrupted run resumes

    def __post_init__(self) -> None:
        for key in ("steps", "accumulation", "eval_every", "save_every"):
            require(getattr(self, key) >= 1, f"train.{key}", getattr(self, key), "at least 1")
        for key in ("warmup_steps", "seed", "weight_decay"):
            require(getattr(self, key) >= 0, f"train.{key}", getattr(self, key), "at least 0")
        require(self.minutes is None or self.minutes > 0, "train.minutes", self.minutes, "above 0")
        for key in ("lr", "clip"):
            require(getattr(self, key) > 0, f"train.{key}", getattr(self, key), "above 0")
        require(self.optimizer in ("adamw", "muon"), "train.optimizer", self.optimizer, "adamw or muon")
        for name, share in (self.lr_shares or {}).items():
            require(share >= 0, f"train.lr_shares.{name}", share, "at least 0")
        if self.lr_shares and self.optimizer == "muon":
            raise RecipeError("'train.lr_shares' is set, but Muon has one rate for all: leave out 'train.optimizer: muon'")
        require(self.warmup_steps <= self.steps, "train.warmup_steps", self.warmup_steps, "at most train.steps")
        require(0 <= self.min_lr_ratio <= 1, "train.min_lr_ratio", self.min_lr_ratio, "from 0 to 1")
        require(all(0 <= beta < 1 for beta in self.betas), "train.betas", self.betas, "at least 0 and below 1")


def learning_rate(step: int, options: LoopOptions, spent: float = 0.0) -> float:
    """The learning rate of a step: linear warm-up, then cosine to `min_lr_ratio` of the peak.

    Args:
        step: counts from 0.
        options: of the schedule.
        spent: share of the run's minutes that are over.
    """
    if step < options.warmup_steps:
        return options.lr * (step + 1) / options.warmup_steps
    progress = min(1.0, max(spent, (step - options.warmup_steps) / max(1, options.steps - options.warmup_steps)))
    low = options.lr * options.min_lr_ratio
    return low + (options.lr - low) * 0.5 * (1 + math.cos(math.pi * progress))


def step_seed(seed: int, step: int, micro: int = 0) -> int:
    """The seed of all randomness in one micro-batch of a step."""
    return (seed * 1_000_003 + step) * 64 + micro


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype to compute in; "auto" is bfloat16 on GPUs that support it, else float32: few CPUs have fast bfloat16."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def run(
    trained: Mapping[str, nn.Parameter],
    loss_of: LossOf,
    folder: str | Path,
    options: LoopOptions,
    evaluate: Callable[[int], Metrics] | None = None,
    settings: Mapping[str, str] | None = None,
    assist: Callable[[], None] | None = None,
) -> None:
    """Trains until `options.steps`, resuming from `folder/state.pt` if it exists.

    Only the worker of rank 0 evaluates and writes; the log has the figures of that worker. A step with a gradient that is
    not finite leaves the weights unchanged; it is reported, and "skipped" in its line of the log counts such steps.

    Args:
        trained: the parameters to train, by name (float32 master weights).
        loss_of: the loss of a micro-batch; torch's global generator is seeded before each call.
        folder: gets state.pt (weights, optimiser, step, settings) and log.jsonl (one object per step).
        options: of optimiser and schedule.
        evaluate: called every `eval_every` steps and at the end; its figures go to log.jsonl under "evaluation".
        settings: fingerprints of what the run depends on, by name (fingerprint.py); must equal those of a saved state.
        assist: what the other workers call while the first one evaluates.

    Raises:
        CheckpointError: the saved state is damaged, or belongs to other parameters or settings.
        RecipeError: the number of micro-batches is not a multiple of the number of workers.
    """
    if options.accumulation % workers():
        raise RecipeError(f"accumulation {options.accumulation} for {workers()} workers: make it a multiple of them")
    first = rank() == 0
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parameters = list(trained.values())
    optimizer = make_optimizer(trained, options)
    step, skipped, seconds = _resume(folder / STATE, trained, optimizer, settings or {})
    wait_for_all()  # all have read the state before rank 0 overwrites it
    log = _truncate_log(folder / LOG, step) if first else Path(os.devnull)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True, quiet=not first)
    if step:
        console.print(f"going on behind step {step} of {options.steps}, from {folder / STATE}")
    saved, spent = step, _spent(seconds, options)
    try:
        with Progress(*columns, console=console, disable=not first) as bar, log.open("a", encoding="utf-8") as lines:
            task = bar.add_task("training", total=options.steps, completed=step)
            while step < options.steps and spent < 1:
                began = time.perf_counter()
                record = _one_step(step, parameters, optimizer, loss_of, options, spent)
                seconds += time.perf_counter() - began
                step, spent = step + 1, _spent(seconds, options)
                if record["grad_norm"] is None:
                    skipped += 1
                    record["skipped"] = skipped
                    console.print(f"step {step}: the gradient is not finite, so the step is skipped ({skipped} so far)")
                last = step == options.steps or spent >= 1
                if step % options.eval_every == 0 or last:
                    if first and evaluate is not None:
                        record["evaluation"] = _finite(evaluate(step))
                    elif not first and assist is not None:
                        assist()
                print(json.dumps(record), file=lines, flush=True)
                if first and (step % options.save_every == 0 or last):
                    weights = {name: p.detach() for name, p in trained.items()}
                    state = {"step": step, "weights": weights, "optimizer": optimizer.state_dict()}
                    state |= {"settings": dict(settings or {}), "skipped": skipped, "seconds": seconds}
                    with whole_file(folder / STATE) as part:
                        torch.save(state, part)
                    saved = step
                bar.update(task, completed=step, description=f"loss {record['loss']}")
    except KeyboardInterrupt:
        kept = f"what was learnt up to step {saved} is kept, and the same command goes on from there"
        console.print(f"interrupted at step {step}: {kept if saved else 'nothing was saved yet'}")
        raise


def make_optimizer(trained: Mapping[str, nn.Parameter], options: LoopOptions) -> Optimizer:
    """The optimiser that the options name; Muon orthogonalises in the dtype of `compute_dtype`."""
    if options.optimizer == "muon":
        device = next(iter(trained.values())).device
        dtype = compute_dtype(options.dtype, device)
        return MuonWithAdamW(trained, options.lr, options.betas, options.weight_decay, dtype)
    groups: dict[float, list[nn.Parameter]] = {}
    for start in options.lr_shares or {}:
        if not any(name.startswith(start) for name in trained):
            raise RecipeError(f"'train.lr_shares': nothing that is trained begins with {start!r}")
    for name, parameter in trained.items():
        share = next((share for start, share in (options.lr_shares or {}).items() if name.startswith(start)), 1.0)
        groups.setdefault(share, []).append(parameter)
    shared = [{"params": group, "share": share} for share, group in groups.items()]
    return torch.optim.AdamW(shared, lr=options.lr, betas=options.betas, weight_decay=options.weight_decay)


def _spent(seconds: float, options: LoopOptions) -> float:
    """The share of the run's minutes that are over, by the first worker's clock; 0 without such a limit."""
    return 0.0 if options.minutes is None else from_first(seconds / (60 * options.minutes))


def _one_step(
    step: int, parameters: list[nn.Parameter], optimizer: Optimizer, loss_of: LossOf, options: LoopOptions, spent: float
) -> dict[str, Any]:
    """One optimiser step; returns its record for the log, in which "grad_norm" is None if the step was skipped."""
    start = time.perf_counter()
    lr = learning_rate(step, options, spent)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("share", 1.0)
    total = 0.0
    figures: dict[str, list[float]] = {}
    share = range(rank(), options.accumulation, workers())  # micro-batches of this worker
    for micro in share:
        torch.manual_seed(step_seed(options.seed, step, micro))
        loss, metrics = loss_of(step, micro)
        (loss / options.accumulation).backward()
        total += loss.item() / len(share)
        for name, value in metrics.items():
            figures.setdefault(name, []).append(value)
    sum_gradients(parameters)
    norm = float(nn.utils.clip_grad_norm_(parameters, options.clip))
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    record: dict[str, Any] = {"step": step + 1, "loss": round(total, 5)}
    record |= {name: round(sum(values) / len(values), 5) for name, values in figures.items()}
    record |= {"lr": lr, "grad_norm": round(norm, 4), "seconds": round(time.perf_counter() - start, 3)}
    return _finite(record)


def _finite(record: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces infinity and NaN, which JSON lacks, by None."""
    return {name: value if math.isfinite(value) else None for name, value in record.items()}


def _resume(
    path: Path, trained: Mapping[str, nn.Parameter], optimizer: Optimizer, settings: Mapping[str, str]
) -> tuple[int, int, float]:
    """Loads a saved state, if there is one; returns its step, the number of skipped steps and the seconds so far."""
    if not path.exists():
        return 0, 0, 0.0
    remedy = "give the run another folder, or delete this one to start again"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        weights, moments, step = state["weights"], state["optimizer"], state["step"]
    except Exception:  # what is no pickle makes the unpickler raise anything
        raise CheckpointError(f"{path} is damaged or was cut short; delete it to train from the start") from None
    saved = state.get("settings", settings)  # version 0.1.0 did not write them
    if changed := sorted(name for name in {*saved, *settings} if saved.get(name) != settings.get(name)):
        changes = [f"{name} was {saved.get(name, 'absent')}, is {settings.get(name, 'absent')}" for name in changed[:3]]
        raise CheckpointError(f"{path} was made with other settings ({', '.join(changes)}); {remedy}")
    load_weights(trained, weights, path)
    try:
        optimizer.load_state_dict(moments)
    except (KeyError, ValueError, TypeError):
        raise CheckpointError(f"{path} was made with another optimizer; {remedy}") from None
    return step, state.get("skipped", 0), state.get("seconds", 0.0)


def load_weights(trained: Mapping[str, nn.Parameter | Tensor], weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Copies saved weights into parameters of the same names and shapes.

    Args:
        trained: parameters to overwrite, by name.
        weights: saved values, by name.
        source: of the weights, for error messages.

    Raises:
        CheckpointError: a name or a shape differs.
    """
    if differing := sorted(trained.keys() ^ weights.keys()):
        raise CheckpointError(
            f"{source}: made for other parameters ({len(differing)} names differ, first {differing[0]}); "
            "give the run another folder, or delete this one to start again"
        )
    for name, parameter in trained.items():
        if parameter.shape != weights[name].shape:
            raise CheckpointError(f"{source}: {name} is {tuple(weights[name].shape)} there, {tuple(parameter.shape)} here")
        parameter.data.copy_(weights[name])


def _truncate_log(path: Path, step: int) -> Path:
    """Drops the log lines after `step`, the last saved one, so that each step is logged once; returns the path."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # without an unfinished last line
        write_whole(path, "".join(line + "\n" for line in lines if json.loads(line)["step"] <= step))
    return path
