"""Large weights in 8 bits on the disk: a scale for each row, and whole numbers from -127 to 127.

For adapters that travel inside the package. In memory nothing changes: reading gives float32 back, at most a 254th of
each row's largest weight away from what was saved.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

SCALES = ".row_scales"  # follows the name of a packed weight
LEAST = 1 << 14  # smaller weights are left as they are


def pack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of at least two dimensions and LEAST numbers as int8 of the same shape, and beside them scales (rows,)."""
    packed = {}
    for name, tensor in tensors.items():
        if tensor.dim() < 2 or tensor.numel() < LEAST:
            packed[name] = tensor
            continue
        rows = tensor.float().flatten(1)
        scales = rows.abs().amax(1).clamp(min=1e-12) / 127
        packed[name] = (rows / scales[:, None]).round().to(torch.int8).view(tensor.shape)
        packed[name + SCALES] = scales
    return packed


def unpack(packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `pack` was given, in float32 where it was packed; other tensors as they are."""
    found = {}
    for name, tensor in packed.items():
        if name.endswith(SCALES):
            continue
        scales = packed.get(name + SCALES)
        found[name] = tensor if scales is None else (tensor.flatten(1).float() * scales[:, None]).view(tensor.shape)
    return found
