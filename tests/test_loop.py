"""train/loop.py: schedule, accumulation, log, and that a killed run ends where an unbroken one does."""

from __future__ import annotations

import itertools
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
from regression import OPTIONS, Regression, read_log
from torch import Tensor, nn

from diffusion_gemma_asr.data.manifest import Utterance
from diffusion_gemma_asr.errors import CheckpointError, RecipeError
from diffusion_gemma_asr.train import fingerprint
from diffusion_gemma_asr.train.loop import LoopOptions, Metrics, compute_dtype, learning_rate, run, step_seed


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


def test_minutes_that_are_over_bring_the_end_of_the_schedule() -> None:
    options = LoopOptions(steps=110, lr=0.5, warmup_steps=10, min_lr_ratio=0.1)
    assert learning_rate(20, options, 0.5) == pytest.approx(learning_rate(60, options))
    assert learning_rate(20, options, 0.01) == learning_rate(20, options)
    assert learning_rate(5, options, 0.9) == learning_rate(5, options)  # it still warms up
    assert learning_rate(20, options, 1.2) == pytest.approx(0.05)


def test_a_run_ends_with_its_minutes_and_goes_on_with_what_is_left(tmp_path: Path) -> None:
    """By a clock that ticks once, half a second, each time it is read."""
    with patch("time.perf_counter", side_effect=(0.5 * tick for tick in itertools.count())):
        limited = replace(OPTIONS, steps=1000, minutes=0.25)
        model = Regression().run(tmp_path / "whole", limited)
        records = read_log(tmp_path / "whole")
        assert 5 < len(records) < 20 and "evaluation" in records[-1]
        assert records[-1]["lr"] < 0.2 * OPTIONS.lr
        assert Regression().run(tmp_path / "whole", limited).steps == []
        first = Regression().run(tmp_path / "parts", replace(limited, minutes=0.1))
        rest = Regression().run(tmp_path / "parts", limited)
    assert len(first.steps) > 0 and len(first.steps) + len(rest.steps) == len(model.steps)


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
    assert [record["step"] for record in records if "skipped" in record] == [6]


def test_skipped_steps_are_named_and_counted_across_a_resumption(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def train(steps: int, bad: set[int]) -> None:
        model = Regression()

        def loss_of(step: int, micro: int) -> tuple[Tensor, Metrics]:
            loss, metrics = model.loss_of(step, micro)
            return (loss * math.inf if step in bad else loss), metrics

        run(model.trained, loss_of, tmp_path, replace(OPTIONS, steps=steps))

    train(8, {2, 5})
    printed = capfd.readouterr()
    assert "step 3: the gradient is not finite, so the step is skipped (1 so far)" in printed.err and not printed.out
    train(12, {9})
    assert "(3 so far)" in capfd.readouterr().err
    assert {r["step"]: r["skipped"] for r in read_log(tmp_path) if "skipped" in r} == {3: 1, 6: 2, 10: 3}


def test_an_evaluation_may_find_infinity(tmp_path: Path) -> None:
    model = Regression()
    run(model.trained, model.loss_of, tmp_path, replace(OPTIONS, steps=1, warmup_steps=0), lambda step: {"rate": math.inf})
    assert read_log(tmp_path)[0]["evaluation"] == {"rate": None}


# -- a broken run ------------------------------------------------------------------------------------------


def test_an_interrupted_run_says_what_is_kept(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def until(at: int) -> None:
        model = Regression()

        def loss_of(step: int, micro: int) -> tuple[Tensor, Metrics]:
            if step == at:
                raise KeyboardInterrupt
            return model.loss_of(step, micro)

        run(model.trained, loss_of, tmp_path, OPTIONS)

    for at, said in ((2, "interrupted at step 2: nothing was saved yet"), (6, "learnt up to step 4 is kept")):
        with pytest.raises(KeyboardInterrupt):
            until(at)
        printed = " ".join(capfd.readouterr().err.split())
        assert said in printed and "going on behind" not in printed
    until(-1)
    assert "going on behind step 4 of 14, from " in " ".join(capfd.readouterr().err.split())


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
    options = replace(OPTIONS, optimizer="muon", steps=60, lr=0.5, eval_every=18)
    Regression().run(tmp_path / "whole", options)
    losses = [record["loss"] for record in read_log(tmp_path / "whole")]
    assert losses[-1] < losses[0] / 20
    broken = Regression()
    with patch.object(broken, "evaluate", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        broken.run(tmp_path / "broken", options)  # last saved at step 16
    resumed = Regression().run(tmp_path / "broken", options)
    assert resumed.steps[0] == (16, 0)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_parameters_named_in_lr_shares_learn_at_their_share_of_the_rate(tmp_path: Path) -> None:
    start = Regression().weights()
    moved = {}
    for share in (0.0, 0.1, 1.0):
        options = replace(OPTIONS, steps=1, warmup_steps=0, weight_decay=0.0, lr_shares={"bi": share})
        weights = Regression().run(tmp_path / str(share), options).weights()
        moved[share] = {name: (weights[name] - start[name]).abs().mean() for name in start}
    assert moved[0.0]["bias"] == 0 and moved[0.0]["weight"] == moved[1.0]["weight"] > 0
    torch.testing.assert_close(moved[0.1]["bias"], 0.1 * moved[1.0]["bias"])
    with pytest.raises(RecipeError, match=r"'train\.lr_shares': nothing that is trained begins with 'bais'"):
        Regression().run(tmp_path / "bais", replace(OPTIONS, lr_shares={"bais": 0.5}))
    with pytest.raises(RecipeError, match=r"'train\.lr_shares' is set, but Muon has one rate for all"):
        replace(OPTIONS, optimizer="muon", lr_shares={"bias": 0.5})
    with pytest.raises(RecipeError, match=r"'train\.lr_shares\.bias' must be at least 0"):
        replace(OPTIONS, lr_shares={"bias": -0.5})


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"'train\.optimizer' must be adamw or muon, found adam"):
        replace(OPTIONS, optimizer="adam")


def test_the_dtype_of_the_computation() -> None:
    cpu = torch.device("cpu")
    assert [compute_dtype(name, cpu) for name in ("auto", "float32", "bfloat16")] == [
        torch.float32,
        torch.float32,
        torch.bfloat16,
    ]


@pytest.mark.parametrize("half", ['{"step": 13, "lo', '{"step": 13, "loss": 1.0, "evaluation": {"bias": 1.0}'])
def test_a_log_line_that_a_kill_cut_short_is_dropped(tmp_path: Path, half: str) -> None:
    options = replace(OPTIONS, eval_every=100)
    Regression().run(tmp_path, replace(options, steps=12))
    with (tmp_path / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(half)
    Regression().run(tmp_path, options)
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


@pytest.mark.parametrize("size", [0, 1000])
def test_a_state_that_was_cut_short_is_named(tmp_path: Path, size: int) -> None:
    Regression().run(tmp_path)
    os.truncate(tmp_path / "state.pt", size)
    with pytest.raises(CheckpointError, match=r"state\.pt is damaged or was cut short; delete it to train from the start"):
        Regression().run(tmp_path)
    (tmp_path / "state.pt").write_text("examples/en.flac")
    with pytest.raises(CheckpointError, match="damaged or was cut short"):
        Regression().run(tmp_path)
    (tmp_path / "state.pt").unlink()
    assert Regression().run(tmp_path).steps[0] == (0, 0)


def test_a_state_with_other_settings_is_refused(tmp_path: Path) -> None:
    Regression().run(tmp_path, settings={"train.lr": "0.2", "data": "a"})
    with pytest.raises(CheckpointError, match=r"state\.pt was made with other settings \(data was a, is b\)"):
        Regression().run(tmp_path, settings={"train.lr": "0.2", "data": "b"})
    with pytest.raises(CheckpointError, match="data was a, is absent"):
        Regression().run(tmp_path, settings={"train.lr": "0.2"})
    assert Regression().run(tmp_path, settings={"train.lr": "0.2", "data": "a"}).steps == []


def test_a_state_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    Regression().run(tmp_path)
    with pytest.raises(CheckpointError, match=r"state\.pt was made with another optimizer"):
        Regression().run(tmp_path, replace(OPTIONS, optimizer="muon"))


# -- fingerprints ------------------------------------------------------------------------------------------


def test_tensors_are_known_by_names_shapes_and_values_whatever_their_precision() -> None:
    weights = {name: p.detach() for name, p in Regression().trained.items()}
    mark = fingerprint.of_tensors(weights)
    assert mark == fingerprint.of_tensors({name: w.bfloat16() for name, w in reversed(weights.items())})
    others = [{"weight": weights["weight"]}, weights | {"bias": torch.ones(3)}, weights | {"bias": torch.zeros(3, 1)}]
    assert len({mark, *map(fingerprint.of_tensors, others)}) == 4


def test_utterances_are_known_by_what_they_say_and_not_by_their_folder() -> None:
    rows = [Utterance(f"/a/{i}.wav", f"text {i}", "en", 1.0) for i in range(3)]
    mark = fingerprint.of_utterances(rows)
    assert mark == fingerprint.of_utterances([replace(u, audio_filepath=f"/b/{i}.wav") for i, u in enumerate(rows)])
    others = [rows[:2], rows[::-1], [*rows[:2], replace(rows[2], text="other")], [*rows[:2], replace(rows[2], offset=0.5)]]
    assert len({mark, *map(fingerprint.of_utterances, others)}) == 5
