"""The experts in shares: each worker holds a part of every layer's, and gathers the rest when the layer needs it.

Nine in ten of a real backbone's weights are experts, which are frozen. FSDP2 shards them alone; all else, what is trained
included, is whole in every worker, so that gradients are summed, and states and checkpoints written, as without shares.

A layer is gathered by all workers at once. So all must run the backbone equally often: `skip_pass` stands in for a pass that
this worker has no use for, and while one worker evaluates, `leading` tells the others, in `follow`, when to stand in.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from ..model.backbone import Backbone
from .workers import workers


def shard_experts(backbone: Backbone, device: torch.device) -> None:
    """Shards the experts among the workers, layer by layer; nothing where there is one worker.

    Args:
        backbone: frozen, the same in all workers; may be on the CPU, of which nothing but a layer is then moved at a time.
        device: where the shares are to be, and layers are gathered.
    """
    if workers() == 1:
        return
    mesh = init_device_mesh(device.type, (workers(),))
    for experts in backbone.share_experts():
        fully_shard(experts, mesh=mesh, reshard_after_forward=True)  # by default a root would stay whole


def skip_pass(backbone: Backbone) -> None:
    """Takes part in gathering the layers of one pass that other workers may run; nothing where experts are whole."""
    for experts in backbone.experts:
        if isinstance(experts, FSDPModule):
            experts.unshard()
            experts.reshard()


@contextmanager
def leading(backbone: Backbone) -> Iterator[None]:
    """Every pass inside the block is announced to the other workers, which are in `follow` meanwhile."""
    if not isinstance(backbone.experts[0], FSDPModule):
        yield
        return

    def announce(*_: Any) -> None:
        dist.broadcast(torch.ones(1), 0)

    hook = backbone.experts[0].register_forward_pre_hook(announce, prepend=True)  # before FSDP's, which gathers
    try:
        yield
    finally:
        hook.remove()
        dist.broadcast(torch.zeros(1), 0)


def follow(backbone: Backbone) -> None:
    """Takes part in the passes of the first worker until its `leading` ends; returns at once where experts are whole."""
    if not isinstance(backbone.experts[0], FSDPModule):
        return
    while True:
        another = torch.zeros(1)
        dist.broadcast(another, 0)
        if not another:
            return
        skip_pass(backbone)
