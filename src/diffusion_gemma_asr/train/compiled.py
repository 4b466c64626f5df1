"""The backbone's layers compiled, for training: fused elementwise operations save a CPU a third of the time.

Compiling takes minutes, once for each kind of shape, so that it is for runs of an hour or more. The projector is left
alone: torch compiles the gradient of a convolution anew for every length, and its layers were a tenth faster at best.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..model.backbone import Backbone
from ..model.prefill import read_layer, write_layer

Compiler = Callable[[Callable[..., Any]], Callable[..., Any]]
KINDS = 64  # graphs of one function at most: layers differ in their attention, calls in shapes of 1, masks and gradients


def default_compiler() -> Compiler:
    """torch's, with shapes that may change."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, KINDS)
    return partial(torch.compile, dynamic=True)


def compile_layers(backbone: Backbone, compiler: Compiler | None = None) -> None:
    """Has this backbone run compiled layers.

    Args:
        backbone: to be trained.
        compiler: of a function; None is `default_compiler`.
    """
    compiler = compiler or default_compiler()
    backbone.read_layer, backbone.write_layer = compiler(read_layer), compiler(write_layer)
