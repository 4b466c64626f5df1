"""The training loop that all stages share: warm-up and cosine, clipping, one JSON line a step, exact resumption.

Everything random in a step is seeded by (seed, step), and batches are a function of the step, so a run that was
killed and resumed goes through the same states as one that was not. Started by torchrun, several processes share the
micro-batches of each step (workers.py).
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from ..errors import CheckpointError, RecipeError
from .muon import MuonWithAdamW
from .workers import rank, sum_gradients, wait_for_all, workers

Metrics = dict[str, float]
Optimizer = torch.optim.Optimizer | MuonWithAdamW


@dataclass(frozen=True)
class LoopOptions:
    """How long and how fast.

    optimizer is "adamw", or "muon" for Muon on the matrices and AdamW on the rest, "muon-bfloat16" where its updates are
    computed in bfloat16; lr is the peak learning rate, reached
    after warmup_steps and brought down by a cosine to lr * min_lr_ratio at `steps`; clip is the largest gradient norm;
    accumulation is the number of micro-batches a step; the *_every are in steps.
    """

    steps: int
    lr: float
    optimizer: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    warmup_steps: int = 100
    min_lr_ratio: float = 0.1
    clip: float = 1.0
    accumulation: int = 1
    seed: int = 0
    save_every: int = 200
    evaluate_every: int = 500


def learning_rate(step: int, options: LoopOptions) -> float:
    """Linear warm-up, then cosine to `min_lr_ratio` of the peak; `step` counts from 0."""
    if step < options.warmup_steps:
        return options.lr * (step + 1) / options.warmup_steps
    progress = min(1.0, (step - options.warmup_steps) / max(1, options.steps - options.warmup_steps))
    low = options.lr * options.min_lr_ratio
    return low + (options.lr - low) * 0.5 * (1 + math.cos(math.pi * progress))


def step_seed(seed: int, step: int, micro: int = 0) -> int:
    """One seed for everything random in one micro-batch of one step."""
    return (seed * 1_000_003 + step) * 64 + micro


def run(
    trained: Mapping[str, nn.Parameter],
    loss_of: Callable[[int, int], tuple[Tensor, Metrics]],
    folder: str | Path,
    options: LoopOptions,
    evaluate: Callable[[int], Metrics] | None = None,
) -> None:
    """Trains until `options.steps`, resuming from `folder/state.pt` where there is one.

    Args:
        trained: the parameters to train, by name (float32 master weights).
        loss_of: (step, micro-batch) → loss to minimise and figures to log. Torch's global generator is seeded before
        the call.
        folder: gets state.pt (weights, optimiser, step) and log.jsonl (one object a step).
        evaluate: called every `evaluate_every` steps and at the end; its figures go to log.jsonl under "evaluation".

    Of several workers the first one alone evaluates and writes, and the log has its figures.

    Raises:
        CheckpointError: the saved state belongs to other parameters.
        RecipeError: a step's micro-batches cannot be shared out among the workers.
    """
    if options.accumulation % workers():
        raise RecipeError(f"accumulation {options.accumulation} for {workers()} workers: make it a multiple of them")
    first = rank() == 0
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parameters = list(trained.values())
    optimizer = make_optimizer(trained, options)
    step = _resume(folder / "state.pt", trained, optimizer)
    wait_for_all()  # nobody has yet to read what the first one writes
    log = _truncate_log(folder / "log.jsonl", step) if first else Path(os.devnull)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not first) as bar, log.open("a", encoding="utf-8") as lines:
        task = bar.add_task("training", total=options.steps, completed=step)
        while step < options.steps:
            record = _one_step(step, parameters, optimizer, loss_of, options)
            step += 1
            done = step == options.steps
            if first and evaluate is not None and (step % options.evaluate_every == 0 or done):
                record["evaluation"] = evaluate(step)
            print(json.dumps(record), file=lines, flush=True)
            if first and (step % options.save_every == 0 or done):
                save_state(folder / "state.pt", step, trained, optimizer)
            bar.update(task, completed=step, description=f"loss {record['loss']}")


def make_optimizer(trained: Mapping[str, nn.Parameter], options: LoopOptions) -> Optimizer:
    """The optimiser that the options name.

    Raises:
        RecipeError: none of that name.
    """
    if options.optimizer in ("muon", "muon-bfloat16"):
        dtype = torch.float32 if options.optimizer == "muon" else torch.bfloat16
        return MuonWithAdamW(trained, options.lr, options.betas, options.weight_decay, dtype)
    if options.optimizer == "adamw":
        return torch.optim.AdamW(trained.values(), lr=options.lr, betas=options.betas, weight_decay=options.weight_decay)
    raise RecipeError(f"optimizer {options.optimizer!r}: choose adamw, muon or muon-bfloat16")


def _one_step(
    step: int,
    parameters: list[nn.Parameter],
    optimizer: Optimizer,
    loss_of: Callable[[int, int], tuple[Tensor, Metrics]],
    options: LoopOptions,
) -> dict[str, Any]:
    start = time.perf_counter()
    lr = learning_rate(step, options)
    for group in optimizer.param_groups:
        group["lr"] = lr
    total = 0.0
    figures: dict[str, float] = {}
    own = range(rank(), options.accumulation, workers())  # micro-batches of this worker
    for micro in own:
        torch.manual_seed(step_seed(options.seed, step, micro))
        loss, metrics = loss_of(step, micro)
        (loss / options.accumulation).backward()
        total += loss.item() / len(own)
        for name, value in metrics.items():
            figures[name] = figures.get(name, 0.0) + value / len(own)
    sum_gradients(parameters)
    norm = float(nn.utils.clip_grad_norm_(parameters, options.clip))
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    record: dict[str, Any] = {"step": step + 1, "loss": round(total, 5)}
    record |= {name: round(value, 5) for name, value in figures.items()}
    record |= {"lr": lr, "grad_norm": round(norm, 4), "seconds": round(time.perf_counter() - start, 3)}
    return {name: value if math.isfinite(value) else None for name, value in record.items()}  # JSON has no NaN


def save_state(path: Path, step: int, trained: Mapping[str, nn.Parameter], optimizer: Optimizer) -> None:
    """Writes weights, optimiser and step; a kill in the middle leaves the state before."""
    part = path.with_suffix(".part")
    weights = {name: p.detach() for name, p in trained.items()}
    torch.save({"step": step, "weights": weights, "optimizer": optimizer.state_dict()}, part)
    part.replace(path)


def _resume(path: Path, trained: Mapping[str, nn.Parameter], optimizer: Optimizer) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    load_weights(trained, state["weights"], path)
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def load_weights(trained: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Copies saved weights into parameters of the same names and shapes.

    Raises:
        CheckpointError: a name or a shape differs.
    """
    if odd := sorted(trained.keys() ^ weights.keys()):
        raise CheckpointError(
            f"{source}: made for other parameters ({len(odd)} names differ, first {odd[0]}); "
            "give the run another folder, or delete this one to start again"
        )
    for name, parameter in trained.items():
        if parameter.shape != weights[name].shape:
            raise CheckpointError(f"{source}: {name} is {tuple(weights[name].shape)} there, {tuple(parameter.shape)} here")
        parameter.data.copy_(weights[name])


def _truncate_log(path: Path, step: int) -> Path:
    """Drops the lines of steps that a kill lost, so that the log holds every step once."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # behind the last line's end: what a kill cut short
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        part = path.with_suffix(".part")
        part.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        part.replace(path)
    return path
