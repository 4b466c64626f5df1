"""4-bit and 8-bit backbones: the experts' weights are stored small and unpacked layer by layer.

Of the real backbone's 25.8 billion parameters 88 % are expert matrices, fused into three-dimensional
tensors. The usual switch (`quantization_config` in transformers) replaces `nn.Linear` modules alone and
would leave exactly these at 16 bits. So here the experts are packed, and nothing else: attention, where
LoRA sits, and the embeddings, which CTC reads, stay as they are. By count that makes 19 GB of 52 in 4 bits
and 30 GB in 8 (bfloat16, bitsandbytes). The two stacks share each packed tensor, as they share the weights.

The extra `quantization` installs both libraries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import CheckpointError

EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")  # (experts, out, in) each
BNB_BLOCK_SIZE = 64  # neighbouring weights that share one scale, bitsandbytes
TORCHAO_GROUP_SIZE = 32  # the same along a row, torchao; it must divide the row

Packed = tuple[Tensor, nn.Module]  # the packed weight (uint8), and the module whose forward unpacks it


@dataclass(frozen=True)
class Quantizer:
    """One way to pack a weight: `pack` takes floats and returns them packed, with the module that unpacks."""

    name: str
    pack: Callable[[Tensor], Packed]


def find_quantizer(name: str) -> Quantizer:
    """The quantizer of that name: bnb-4bit, bnb-8bit, torchao-int4 or torchao-int8.

    Raises:
        CheckpointError: there is no such name, or its library is not installed; the message says what to
        install.
    """
    if name not in _PACKERS:
        raise CheckpointError(f"quantization '{name}' is unknown; choose one of {', '.join(QUANTIZATIONS)}")
    library, module, packer, bits = _PACKERS[name]
    try:
        functions = import_module(module)
    except ImportError as error:
        raise CheckpointError(
            f"quantization '{name}' needs {library}, which cannot be imported ({error}); "
            "install it with: pip install 'diffusion-gemma-asr[quantization]'"
        ) from None
    return Quantizer(name, lambda weight: packer(functions, weight, bits))


def quantize_experts(model: nn.Module, quantizer: Quantizer, device: str | torch.device) -> None:
    """Pack every expert weight of a model in place, one tensor at a time on `device`.

    Packed weights unpack in each forward pass. To train LoRA beside them (as QLoRA does), call
    `Backbone.recompute_experts` next: the backward pass would otherwise hold the unpacked weights of all layers.

    Args:
        model: on the CPU in its final dtype; experts are three-dimensional and named as in EXPERT_WEIGHTS.
        quantizer: from `find_quantizer`.
        device: where packing runs and the packed tensors stay.
    """
    done: dict[int, Packed] = {}  # tied weights are packed once; ids are unique while `experts` holds the weights
    experts = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if name in EXPERT_WEIGHTS and parameter.dim() == 3
    ]
    for module, name, parameter in experts:
        if id(parameter) not in done:
            packed, unpack = quantizer.pack(parameter.detach().to(device))
            done[id(parameter)] = nn.Parameter(packed, requires_grad=False), unpack
        weight, unpack = done[id(parameter)]
        setattr(module, name, weight)
        # "unsafe" allows a change of shape and dtype
        parametrize.register_parametrization(module, name, unpack, unsafe=True)


class _BitsAndBytesUnpack(nn.Module):
    """Packed NF4 or 8-bit blocks back to floats; NF4 is the grid of QLoRA (Dettmers et al., 2023)."""

    absmax: Tensor
    code: Tensor

    def __init__(self, functions: ModuleType, absmax: Tensor, code: Tensor, like: Tensor, bits: int):
        super().__init__()
        self.functions, self.bits, self.shape, self.dtype = functions, bits, like.shape, like.dtype
        self.register_buffer("absmax", absmax, persistent=False)  # one scale a block
        self.register_buffer("code", code, persistent=False)  # the grid: 16 or 256 values

    @torch.no_grad()
    def forward(self, packed: Tensor) -> Tensor:
        state = self.functions.QuantState(
            absmax=self.absmax, code=self.code, shape=torch.Size([self.shape.numel()]), dtype=self.dtype,
            blocksize=BNB_BLOCK_SIZE, quant_type="nf4",
        )  # fmt: skip
        unpack = self.functions.dequantize_4bit if self.bits == 4 else self.functions.dequantize_blockwise
        return unpack(packed, state).view(self.shape)


def _pack_bitsandbytes(functions: ModuleType, weight: Tensor, bits: int) -> Packed:
    flat = weight.flatten()  # version 0.50 unpacks wrongly on CPUs where a block goes on from one row into the next
    if bits == 4:
        packed, state = functions.quantize_4bit(flat, blocksize=BNB_BLOCK_SIZE, quant_type="nf4")
    else:
        packed, state = functions.quantize_blockwise(flat, blocksize=BNB_BLOCK_SIZE)
    return packed, _BitsAndBytesUnpack(functions, state.absmax, state.code, weight, bits)


class _AffineUnpack(nn.Module):
    """`(q - zero) * scale` per group of a row; two 4-bit numbers share a byte."""

    scale: Tensor
    zero: Tensor

    def __init__(self, functions: ModuleType, scale: Tensor, zero: Tensor, like: Tensor, bits: int):
        super().__init__()
        self.functions, self.bits, self.dtype = functions, bits, like.dtype
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("zero", zero, persistent=False)

    @torch.no_grad()
    def forward(self, packed: Tensor) -> Tensor:
        if self.bits == 4:
            packed = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)  # (E, O, I/2) → (E, O, I)
        block = (1, 1, TORCHAO_GROUP_SIZE)
        return self.functions.dequantize_affine(
            packed, block, self.scale, self.zero, torch.uint8, 0, 2**self.bits - 1, output_dtype=self.dtype
        )


def _pack_torchao(functions: ModuleType, weight: Tensor, bits: int) -> Packed:
    if weight.shape[-1] % TORCHAO_GROUP_SIZE:
        raise CheckpointError(
            f"torchao packs groups of {TORCHAO_GROUP_SIZE} weights, but an expert has rows of "
            f"{weight.shape[-1]}; use bnb-4bit or bnb-8bit"
        )
    block, top = (1, 1, TORCHAO_GROUP_SIZE), 2**bits - 1
    scale, zero = functions.choose_qparams_affine(
        weight, functions.MappingType.ASYMMETRIC, block, torch.uint8, 0, top, zero_point_dtype=torch.uint8
    )
    packed = functions.quantize_affine(weight, block, scale, zero, torch.uint8, 0, top)
    if bits == 4:
        packed = packed[..., ::2] | packed[..., 1::2] << 4  # (E, O, I) → (E, O, I/2)
    return packed, _AffineUnpack(functions, scale, zero, weight, bits)


# name → library, the module with its functions, our packer, bits
_PACKERS = {
    "bnb-4bit": ("bitsandbytes", "bitsandbytes.functional", _pack_bitsandbytes, 4),
    "bnb-8bit": ("bitsandbytes", "bitsandbytes.functional", _pack_bitsandbytes, 8),
    "torchao-int4": ("torchao", "torchao.quantization.quant_primitives", _pack_torchao, 4),
    "torchao-int8": ("torchao", "torchao.quantization.quant_primitives", _pack_torchao, 8),
}
QUANTIZATIONS = tuple(_PACKERS)
