"""Large weights in 8 bits on the disk: a scale for each row, and whole numbers from -127 to 127.

For models that travel inside the package. In memory nothing changes: reading gives float32 back, at most a 254th of
each row's largest weight away from what was saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..files import whole_file

SCALES = ".row_scales"  # follows the name of a packed weight
LEAST = 1 << 14  # smaller weights are left as they are
SHORT = 32  # numbers; a scale for each so short a row would take up much of what is saved


def pack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of at least two dimensions and LEAST numbers as int8 of the same shape, and beside them scales (rows,): a row
    is what lies in the last dimension, or in all but the first where that is short, as in convolutions."""
    packed = {}
    for name, tensor in tensors.items():
        if tensor.dim() < 2 or tensor.numel() < LEAST:
            packed[name] = tensor
            continue
        rows = tensor.float().flatten(*((0, -2) if tensor.shape[-1] >= SHORT else (1, -1)))
        scales = rows.abs().amax(1).clamp(min=1e-12) / 127
        packed[name] = (rows / scales[:, None]).round().to(torch.int8).view(tensor.shape)
        packed[name + SCALES] = scales
    return packed


def unpack(packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `pack` was given, in float32 where it was packed. Where nothing was, tensors are as they are; else small ones are
    copies, so that none keeps the file that it was read from in memory."""
    if not any(name.endswith(SCALES) for name in packed):
        return dict(packed)
    tensors = {}
    for name, tensor in packed.items():
        if name.endswith(SCALES):
            continue
        scales = packed.get(name + SCALES)
        if scales is None:
            tensor = tensor.clone()
        else:
            tensor = (tensor.view(len(scales), -1).float() * scales[:, None]).view(tensor.shape)
        tensors[name] = tensor
    return tensors


def pack_file(path: Path) -> None:
    """Packs the weights of a .safetensors file, which is replaced whole, unless they are packed."""
    if is_packed(path):
        return
    with whole_file(path) as part:
        save_file(pack(load_file(path)), part, metadata={"format": "pt"})


def is_packed(path: Path) -> bool:
    """Whether a .safetensors file holds packed weights."""
    with safe_open(path, "pt") as file:
        return any(name.endswith(SCALES) for name in file.keys())  # noqa: SIM118
