"""train/loop.py: schedule, accumulation, log, and that a killed run ends where an unbroken one does."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from diffusion_gemma_asr.errors import CheckpointError, RecipeError
from diffusion_gemma_asr.train.loop import LoopOptions, Metrics, learning_rate, run, step_seed

OPTIONS = LoopOptions(steps=14, lr=0.2, warmup_steps=3, save_every=4, evaluate_every=5, accumulation=2)


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

    def run(self, folder: Path, options: LoopOptions = OPTIONS) -> Regression:
        run(self.trained, self.loss_of, folder, options, self.evaluate)
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


def assert_same_run(folder: Path, other: Path) -> None:
    """Bit for bit: weights, the optimiser's moments, step, and every line of the log."""
    a, b = (torch.load(path / "state.pt", weights_only=True) for path in (folder, other))
    assert a["step"] == b["step"] and a["weights"].keys() == b["weights"].keys()
    for name, weight in a["weights"].items():
        assert torch.equal(weight, b["weights"][name]), name
    for one, another in zip(*(state["optimizer"].get("parts", [state["optimizer"]]) for state in (a, b)), strict=True):
        for index, moments in one["state"].items():
            for name, value in moments.items():
                assert torch.equal(value, another["state"][index][name]), name
    assert read_log(folder) == read_log(other)


# -- schedule ----------------------------------------------------------------------------------------------


def test_learning_rate_rises_linearly_then_falls_as_a_cosine() -> None:
    options = LoopOptions(steps=110, lr=0.5, warmup_steps=10, min_lr_ratio=0.1)
    rates = [learning_rate(step, options) for step in range(111)]
    assert rates[:10] == pytest.approx([0.05 * (step + 1) for step in range(10)])
    assert rates[10] == max(rates) == 0.5
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[60] == pytest.approx((0.5 + 0.05) / 2)  # half-way
    assert rates[35] == pytest.approx(0.05 + 0.45 * (1 + math.cos(math.pi / 4)) / 2)
    assert rates[110] == pytest.approx(0.05) == learning_rate(500, options)


def test_learning_rate_without_warm_up_or_without_an_end() -> None:
    assert learning_rate(0, LoopOptions(steps=10, lr=0.5, warmup_steps=0)) == 0.5
    only_warmup = LoopOptions(steps=4, lr=0.5, warmup_steps=4)
    assert [learning_rate(step, only_warmup) for step in range(4)] == [0.125, 0.25, 0.375, 0.5]


def test_seeds_are_never_shared() -> None:
    triples = [(seed, step, micro) for seed in range(3) for step in range(50) for micro in range(64)]
    assert len({step_seed(*triple) for triple in triples}) == len(triples)


# -- an unbroken run ---------------------------------------------------------------------------------------


def test_the_log_has_one_line_a_step(tmp_path: Path) -> None:
    model = Regression().run(tmp_path)
    records = read_log(tmp_path)
    assert [record["step"] for record in records] == list(range(1, 15))
    assert [record["step"] for record in records if "evaluation" in record] == [5, 10, 14]
    assert records[-1]["evaluation"] == model.evaluate(14)
    assert [record["lr"] for record in records] == [learning_rate(step, OPTIONS) for step in range(14)]
    assert {"loss", "largest", "grad_norm"} <= records[0].keys()
    assert records[-1]["loss"] < 0.8 * records[0]["loss"]  # it learns
    assert model.steps == [(step, micro) for step in range(14) for micro in range(2)]


def test_the_same_seed_gives_the_same_run_and_another_another(tmp_path: Path) -> None:
    Regression().run(tmp_path / "a")
    torch.randn(7)  # whatever was drawn before
    Regression().run(tmp_path / "b")
    assert_same_run(tmp_path / "a", tmp_path / "b")
    other = Regression().run(tmp_path / "c", replace(OPTIONS, seed=1))
    assert not torch.equal(other.weights()["weight"], Regression().run(tmp_path / "a").weights()["weight"])


def test_a_finished_run_is_left_alone_and_gives_its_weights_back(tmp_path: Path) -> None:
    first = Regression().run(tmp_path)
    log = (tmp_path / "log.jsonl").read_bytes()
    again = Regression().run(tmp_path)
    assert again.steps == [] and (tmp_path / "log.jsonl").read_bytes() == log
    assert all(torch.equal(value, first.weights()[name]) for name, value in again.weights().items())


def test_accumulation_equals_the_bigger_batch(tmp_path: Path) -> None:
    x = torch.randn(20, 8, 4, generator=torch.Generator().manual_seed(1))

    def train(folder: Path, accumulation: int) -> dict[str, Tensor]:
        model = Regression()

        def loss_of(step: int, micro: int) -> tuple[Tensor, Metrics]:
            rows = x[step].chunk(accumulation)[micro]
            loss = (rows @ model.trained["weight"] + model.trained["bias"] - 1).square().mean()
            return loss, {"twice": 2 * loss.item()}

        run(model.trained, loss_of, folder, replace(OPTIONS, steps=20, accumulation=accumulation))
        return model.weights()

    whole, parts = train(tmp_path / "whole", 1), train(tmp_path / "parts", 4)
    for name, weight in whole.items():
        torch.testing.assert_close(parts[name], weight, rtol=1e-4, atol=1e-5)
    for a, b in zip(read_log(tmp_path / "whole"), read_log(tmp_path / "parts"), strict=True):
        assert a == pytest.approx(b, abs=2e-4)
        assert a["twice"] == pytest.approx(2 * a["loss"], abs=2e-5)


def test_the_gradient_is_clipped_and_its_norm_logged_before(tmp_path: Path) -> None:
    """Adam's first moment after one step is (1 - beta1) times the clipped gradient."""
    parameter = nn.Parameter(torch.zeros(2))
    options = LoopOptions(steps=1, lr=0.1, clip=0.5, betas=(0.9, 0.98))
    run(
        {"w": parameter},
        lambda step, micro: ((parameter * torch.tensor([30.0, 40.0])).sum(), {}),
        tmp_path,
        options,
    )
    assert read_log(tmp_path)[0]["grad_norm"] == 50.0
    moment = torch.load(tmp_path / "state.pt", weights_only=True)["optimizer"]["state"][0]["exp_avg"]
    torch.testing.assert_close(moment, 0.1 * torch.tensor([0.3, 0.4]))


@pytest.mark.parametrize("factor", [math.inf, math.nan])
def test_a_step_whose_gradient_is_not_finite_changes_nothing(tmp_path: Path, factor: float) -> None:
    model, seen = Regression(), list[dict[str, Tensor]]()

    def loss_of(step: int, micro: int) -> tuple[Tensor, Metrics]:
        seen.append(model.weights())
        loss, metrics = model.loss_of(step, micro)
        return (loss * factor if step == 5 else loss), metrics

    run(model.trained, loss_of, tmp_path, replace(OPTIONS, accumulation=1))
    assert all(torch.equal(seen[5][name], seen[6][name]) for name in seen[5])
    assert not torch.equal(seen[6]["weight"], seen[7]["weight"])
    assert all(bool(value.isfinite().all()) for value in model.weights().values())
    records = read_log(tmp_path)  # JSON has no NaN: the line has null
    assert len(records) == 14 and records[5]["loss"] is None and records[5]["grad_norm"] is None


# -- a broken run ------------------------------------------------------------------------------------------


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train_until_killed(folder: Path, where: str, at: int) -> None:
    """Trains in `folder` and is killed: computing a loss, evaluating, or in the middle of saving."""
    model = Regression()
    loss_of, evaluate, save = model.loss_of, model.evaluate, torch.save

    def dying_loss(step: int, micro: int) -> tuple[Tensor, Metrics]:
        if where == "loss" and (step, micro) == (at, 1):
            die()
        return loss_of(step, micro)

    def dying_evaluate(step: int) -> Metrics:
        if where == "evaluation" and step == at:
            die()
        return evaluate(step)

    def dying_save(state: dict[str, Any], path: Path) -> None:
        save(state, path)
        if where == "saving" and state["step"] == at:
            Path(path).write_bytes(Path(path).read_bytes()[:500])
            die()

    with patch.object(torch, "save", dying_save):
        run(model.trained, dying_loss, folder, OPTIONS, dying_evaluate)


def exit_code(target: Callable[..., None], *arguments: object) -> int | None:
    """What a process ended with that did nothing but call `target`."""
    context = multiprocessing.get_context("forkserver")  # forks before torch has started any thread
    context.set_forkserver_preload(["diffusion_gemma_asr.train.loop"])
    process = context.Process(target=target, args=arguments)
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.skipif(os.name != "posix", reason="kill -9")
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(tmp_path: Path) -> None:
    Regression().run(tmp_path / "whole")
    folder = tmp_path / "broken"
    # Before the first save; on the way to the next (step 6 is lost); while it is written; behind it.
    for where, at in (("loss", 2), ("loss", 6), ("saving", 8), ("evaluation", 10)):
        assert exit_code(train_until_killed, folder, where, at) == -signal.SIGKILL
        done = len(read_log(folder))
        assert done == {("loss", 2): 2, ("loss", 6): 6, ("saving", 8): 8, ("evaluation", 10): 9}[where, at]
    resumed = Regression().run(folder)
    assert resumed.steps[0] == (8, 0)
    assert_same_run(tmp_path / "whole", folder)


def test_muon_learns_and_resumes_to_the_same_state(tmp_path: Path) -> None:
    options = replace(OPTIONS, optimizer="muon", steps=60, lr=0.5, evaluate_every=18)
    Regression().run(tmp_path / "whole", options)
    losses = [record["loss"] for record in read_log(tmp_path / "whole")]
    assert losses[-1] < losses[0] / 20
    broken = Regression()
    with patch.object(broken, "evaluate", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        broken.run(tmp_path / "broken", options)  # last saved at step 16
    resumed = Regression().run(tmp_path / "broken", options)
    assert resumed.steps[0] == (16, 0)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_an_unknown_optimizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="optimizer 'adam': choose adamw, muon or muon-bfloat16"):
        Regression().run(tmp_path, replace(OPTIONS, optimizer="adam"))


@pytest.mark.parametrize(
    "half", ['{"step": 13, "lo', '{"step": 13, "loss": 1.0, "evaluation": {"bias": 1.0}']
)
def test_a_log_line_that_a_kill_cut_short_is_dropped(tmp_path: Path, half: str) -> None:
    options = replace(OPTIONS, evaluate_every=100)
    Regression().run(tmp_path, replace(options, steps=12))
    with (tmp_path / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(half)
    Regression().run(tmp_path, options)
    assert [record["step"] for record in read_log(tmp_path)] == list(range(1, 15))


def test_a_kill_while_the_log_is_shortened_loses_no_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Regression().run(tmp_path, replace(OPTIONS, steps=8))
    write_text = Path.write_text

    def dying_write(path: Path, text: str, encoding: str) -> int:
        write_text(path, text[: len(text) // 2], encoding=encoding)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", dying_write)
    with pytest.raises(KeyboardInterrupt):
        Regression().run(tmp_path)
    monkeypatch.undo()
    Regression().run(tmp_path)
    assert [record["step"] for record in read_log(tmp_path)] == list(range(1, 15))


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    Regression().run(tmp_path)
    state = (tmp_path / "state.pt").read_bytes()
    renamed, resized = Regression(), Regression()
    renamed.trained["slope"] = renamed.trained.pop("weight")
    with pytest.raises(CheckpointError, match=r"state\.pt: made for other parameters .*2 names.*slope"):
        run(renamed.trained, renamed.loss_of, tmp_path, OPTIONS)
    resized.trained["bias"] = nn.Parameter(torch.zeros(1))
    with pytest.raises(CheckpointError, match=r"state\.pt: bias is \(3,\) there, \(1,\) here"):
        run(resized.trained, resized.loss_of, tmp_path, OPTIONS)
    assert (tmp_path / "state.pt").read_bytes() == state and len(read_log(tmp_path)) == 14
