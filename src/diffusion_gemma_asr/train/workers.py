"""Data-parallel training: several processes, each with a share of a step's micro-batches.

    torchrun --nproc_per_node 2 -m diffusion_gemma_asr train RECIPE

Every worker has all weights (the experts aside, see shard.py), and gradients are summed, so the result equals that of one
process up to rounding. On a CPU two workers with one thread each are faster than one with two: the layers of small models
parallelise badly.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

TIMEOUT = timedelta(hours=4)  # of waiting for a worker that transcribes the dev lists, or encodes its share


def join_workers(device: torch.device) -> torch.device:
    """Joins the process group, if torchrun has started this process.

    Tensors go by NCCL on GPUs, by gloo on CPUs.

    Args:
        device: to compute on; for "cuda" without an index each worker uses the GPU with torchrun's LOCAL_RANK as index.

    Returns:
        the device of this worker.
    """
    if device.type == "cuda":
        device = device if device.index is not None else torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group(timeout=TIMEOUT)
    return device


def workers() -> int:
    """The number of workers."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The index of this worker; 0 writes all files."""
    return dist.get_rank() if dist.is_initialized() else 0


def wait_for_all() -> None:
    """A barrier: returns once every worker has called it."""
    if workers() > 1:
        dist.barrier()


def from_first(value: float) -> float:
    """The value that worker 0 has."""
    if workers() == 1:
        return value
    told = torch.tensor([value if rank() == 0 else 0.0], dtype=torch.float64)
    dist.all_reduce(told)
    return float(told)


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """All-reduces gradients: every worker gets the sum over all; a missing gradient counts as zero."""
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
    """compute(rows), shared among the workers: each computes some rows, and all get the whole result.

    Args:
        compute: (n, ...) → (n, ...); must treat rows independently.
        rows: (N, ...), the same in every worker.
    """
    if workers() == 1:
        return compute(rows)
    results = torch.zeros_like(rows)
    share = slice(rank(), None, workers())
    if len(rows[share]):
        results[share] = compute(rows[share])
    dist.all_reduce(results)
    return results
