"""4-bit and 8-bit backbones: the experts' weights are stored small, and unpacked layer by layer.

Of the real backbone's 25.8 billion parameters 88 % are expert matrices, fused into three-dimensional
tensors. The usual switch (`quantization_config` in transformers) replaces `nn.Linear` modules alone and
would leave exactly these at 16 bits. So here the experts are packed, and nothing else: attention, where
LoRA sits, and the embeddings, which CTC reads, stay as they are. By count that makes 19 GB of 52 in 4 bits
and 30 GB in 8 (bfloat16, bitsandbytes). The two stacks share each packed tensor, as they share the weights.

With fp8 nothing is unpacked where a GPU multiplies 8-bit floats: `model/experts.py` then rounds what goes into the experts
as well. It needs no library; the extra `quantization` installs those of the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from ..errors import CheckpointError
from ..model.experts import FP8_ALIGNMENT, FP8_EXPERTS, to_fp8

EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")  # (experts, out, in) each
BNB_BLOCK_SIZE = 64  # neighbouring weights that share one scale, bitsandbytes
TORCHAO_GROUP_SIZE = 32  # the same along a row, torchao; it must divide the row

Packed = tuple[Tensor, nn.Module]  # the packed weight (of bytes), and the module whose forward unpacks it


@dataclass(frozen=True)
class Quantizer:
    """One way to pack a weight: `pack` takes floats and returns them packed, with the module that unpacks.

    `experts` names an implementation of the experts that reads packed weights, see model/experts.py; None is any.
    """

    name: str
    pack: Callable[[Tensor], Packed]
    experts: str | None = None


def find_quantizer(name: str) -> Quantizer:
    """The quantizer of that name: bnb-4bit, bnb-8bit, torchao-int4, torchao-int8 or fp8.

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
    return Quantizer(name, lambda weight: packer(functions, weight, bits), FP8_EXPERTS if name == "fp8" else None)


def quantize_experts(model: PreTrainedModel, quantizer: Quantizer, device: str | torch.device) -> None:
    """Pack every expert weight of a model in place, one tensor at a time on `device`.

    Packed weights unpack in each forward pass. To train LoRA beside them (as QLoRA does), call
    `Backbone.recompute_experts` next: the backward pass would otherwise hold the unpacked weights of all layers.

    Args:
        model: on the CPU in its final dtype; experts are three-dimensional and named as in EXPERT_WEIGHTS. It is that of a
            `Backbone`, which chooses how experts answer when it is made.
        quantizer: from `find_quantizer`.
        device: where packing runs and the packed tensors stay.

    Raises:
        CheckpointError: the experts are packed already, or the quantizer cannot pack matrices of their shape.
    """
    done: dict[int, Packed] = {}  # tied weights are packed once; ids are unique while `experts` holds the weights
    experts = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if name in EXPERT_WEIGHTS and parameter.dim() == 3
    ]
    if not experts:
        raise CheckpointError("there are no experts to pack, or they are packed already; load the backbone anew")
    for module, name, parameter in experts:
        if id(parameter) not in done:
            packed, unpack = quantizer.pack(parameter.detach().to(device))
            done[id(parameter)] = nn.Parameter(packed, requires_grad=False), unpack
        weight, unpack = done[id(parameter)]
        setattr(module, name, weight)
        # "unsafe" allows a change of shape and dtype
        parametrize.register_parametrization(module, name, unpack, unsafe=True)
    if quantizer.experts is not None:
        model.set_experts_implementation(quantizer.experts)


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


class _Fp8Unpack(nn.Module):
    """8-bit floats times the scale of their row."""

    scale: Tensor  # (E, O) float32

    def __init__(self, scale: Tensor, like: Tensor):
        super().__init__()
        self.dtype = like.dtype
        self.register_buffer("scale", scale, persistent=False)

    @torch.no_grad()
    def forward(self, packed: Tensor) -> Tensor:
        return packed.to(self.dtype) * self.scale[..., None].to(self.dtype)


def _pack_fp8(functions: ModuleType, weight: Tensor, bits: int) -> Packed:
    if any(size % FP8_ALIGNMENT for size in weight.shape[1:]):
        raise CheckpointError(
            f"fp8 wants experts of a multiple of {FP8_ALIGNMENT} rows and columns, not of {tuple(weight.shape[1:])}; "
            "use bnb-4bit or bnb-8bit"
        )
    packed, scale = to_fp8(weight)
    return packed, _Fp8Unpack(scale, weight)


# name → library, the module with its functions, our packer, bits
_PACKERS = {
    "bnb-4bit": ("bitsandbytes", "bitsandbytes.functional", _pack_bitsandbytes, 4),
    "bnb-8bit": ("bitsandbytes", "bitsandbytes.functional", _pack_bitsandbytes, 8),
    "torchao-int4": ("torchao", "torchao.quantization.quant_primitives", _pack_torchao, 4),
    "torchao-int8": ("torchao", "torchao.quantization.quant_primitives", _pack_torchao, 8),
    "fp8": ("torch", "torch", _pack_fp8, 8),
}
QUANTIZATIONS = tuple(_PACKERS)
