"""Several processes that train one model, each on its share of a step's micro-batches.

    torchrun --nproc_per_node 2 -m diffusion_gemma_asr train RECIPE

On a processor two workers of one thread each get further than one of two: a small model's layers are too small to be cut.
Every worker holds all weights; gradients are summed, so that the result is that of one process, but for rounding.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

PATIENCE = timedelta(hours=4)  # the others wait so long for one that transcribes the dev lists, or encodes its share


def join_workers(device: torch.device) -> torch.device:
    """Joins the other workers, if torchrun has started this process.

    They talk by the device's own backend: NCCL on GPUs, gloo on processors.

    Args:
        device: where to compute; of "cuda" without a number each worker takes the GPU that torchrun's LOCAL_RANK numbers.

    Returns:
        where this worker computes.
    """
    if device.type == "cuda":
        device = device if device.index is not None else torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group(dist.get_default_backend_for_device(device), timeout=PATIENCE)
    return device


def workers() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which one this is; 0 writes all files."""
    return dist.get_rank() if dist.is_initialized() else 0


def wait_for_all() -> None:
    """Returns once every worker has come here."""
    if workers() > 1:
        dist.barrier()


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Gives every worker the sum of all workers' gradients; where a worker has none it counts as zero."""
    if workers() == 1:
        return
    gradients = []
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        gradients.append(p.grad)
    joined = nn.utils.parameters_to_vector(gradients)
    dist.all_reduce(joined)
    nn.utils.vector_to_parameters(joined, gradients)


def shared_rows(compute: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """compute(rows), which treats every row on its own and keeps its shape: each worker computes some, and all get all."""
    if workers() == 1:
        return compute(rows)
    results = torch.zeros_like(rows)
    share = slice(rank(), None, workers())
    if len(rows[share]):
        results[share] = compute(rows[share])
    dist.all_reduce(results)
    return results
