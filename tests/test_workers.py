"""train/workers.py: two processes share a step's micro-batches and end where one process does."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_loop import OPTIONS, read_log
from torch import Tensor, multiprocessing, nn

from diffusion_gemma_asr.errors import RecipeError
from diffusion_gemma_asr.train.loop import LoopOptions, Metrics, run
from diffusion_gemma_asr.train.workers import join_workers, rank, shared_rows, workers


def train(folder: Path, options: LoopOptions) -> dict[str, Tensor]:
    """A linear map with two heads, each micro-batch of which uses one alone."""
    torch.manual_seed(0)
    x = torch.randn(40, 8, 4)
    trained = {name: nn.Parameter(torch.randn(4, 3)) for name in ("first", "second")}

    def loss_of(step: int, micro: int) -> tuple[Tensor, Metrics]:
        rows = x[step * options.accumulation + micro]
        return (rows @ trained[("first", "second")[micro]] - 1).square().mean(), {"micro": float(micro)}

    run(trained, loss_of, folder, options, lambda step: {"workers": float(workers())})
    return {name: value.detach() for name, value in trained.items()}


def work(number: int, port: int, folder: Path) -> None:
    """One of two processes, as torchrun starts them."""
    os.environ |= {"RANK": str(number), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    assert join_workers(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(RecipeError, match="accumulation 3 for 2 workers"):
        run({}, lambda step, micro: (torch.zeros(()), {}), folder / "odd", replace(OPTIONS, accumulation=3))
    for count in (1, 5):
        rows = torch.randn(count, 3, generator=torch.Generator().manual_seed(count))
        assert torch.equal(shared_rows(lambda some: some * some, rows), rows * rows)
    torch.save(train(folder / "shared", OPTIONS), folder / f"{rank()}.pt")


def test_two_workers_do_what_one_does(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(work, (port, tmp_path), nprocs=2)
    alone = train(tmp_path / "alone", OPTIONS)
    first, second = (torch.load(tmp_path / f"{number}.pt", weights_only=True) for number in (0, 1))
    for name, weight in alone.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], weight, atol=1e-5, rtol=1e-5)
    log = read_log(tmp_path / "shared")
    assert [record["step"] for record in log] == list(range(1, OPTIONS.steps + 1))
    assert {record["micro"] for record in log} == {0.0}  # the first one's
    assert log[-1]["evaluation"] == {"workers": 2}
    assert not (tmp_path / "odd").exists()


def test_alone_a_process_keeps_the_device_it_is_given() -> None:
    assert join_workers(torch.device("cpu")) == torch.device("cpu") and workers() == 1 and rank() == 0


@pytest.mark.gpu
def test_each_worker_has_the_gpu_of_its_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    last = torch.cuda.device_count() - 1
    assert join_workers(torch.device("cuda")) == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", str(last))
    assert join_workers(torch.device("cuda")) == torch.device(f"cuda:{last}")
    assert join_workers(torch.device("cuda:0")) == torch.device("cuda:0")
