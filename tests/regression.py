"""A regression to run the training loop on, and its log; for tests only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_gemma_asr.train.loop import LoopOptions, Metrics, run

OPTIONS = LoopOptions(
    steps=14,
    lr=0.2,
    betas=(0.9, 0.98),
    weight_decay=0.01,
    warmup_steps=3,
    min_lr_ratio=0.1,
    save_every=4,
    eval_every=5,
    accumulation=2,
)


class Regression:
    """Learns a linear map from examples drawn by torch's own generator, as real losses draw their noise."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.trained = {
            "weight": nn.Parameter(torch.randn(4, 3, generator=generator)),
            "bias": nn.Parameter(torch.zeros(3)),
        }
        self.steps: list[tuple[int, int]] = []

    def loss_of(self, step: int, micro: int) -> tuple[Tensor, Metrics]:
        self.steps.append((step, micro))
        x = torch.randn(8, 4)
        y = x @ self.trained["weight"] + self.trained["bias"]
        loss = (y - x[:, :3].cumsum(1)).square().mean()
        return loss, {"largest": float(y.detach().abs().max())}

    def evaluate(self, step: int) -> Metrics:
        torch.randn(step)  # an evaluation may draw; training must not notice
        return {"bias": float(self.trained["bias"].detach().norm())}

    def run(self, folder: Path, options: LoopOptions = OPTIONS, settings: dict[str, str] | None = None) -> Regression:
        run(self.trained, self.loss_of, folder, options, self.evaluate, settings)
        return self

    def weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.trained.items()}


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of log.jsonl, without the times."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line, parse_constant=refuse) for line in lines]
    for record in records:
        assert record.pop("seconds") >= 0
    return records
