"""Checkpoints: the trained adapter alone, and by name the frozen parts that it was trained on.

A checkpoint is a folder, or a hub repository, of these files:

- `adapter.safetensors`: the projector and the LoRA matrices, keys `projector.*` and `lora.*`
- `config.json`: a `ModelConfig`
- `preprocessor_config.json`: the encoder's own, for transformers' pipeline alone
- `README.md`: the model card

Names of frozen parts are hub names or folders; a relative folder starts from the checkpoint.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeVar

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import AsrError, CheckpointError, first_line
from ..memory import give_back_memory
from ..model.config import BackboneConfig, EncoderConfig, ModelConfig
from ..model.int8 import capabilities, int8_available, use_int8
from ..model.model import DiffusionGemmaASR
from ..model.packing import unpack
from ..model.projector import AudioProjector
from ..strict import is_path, resolve_source
from .config_file import CONFIG, read_config_file
from .parts import check_backbone, check_encoder, load_backbone, load_encoder, load_tokenizer
from .quantization import find_quantizer

PRESETS = Path(__file__).resolve().parents[1] / "presets"
DEFAULT_MODEL = "mini"  # the one that transcribes where none is named
BUNDLED = {DEFAULT_MODEL: None, "base": "openai/whisper-base"}  # inside the package: one checkpoint, and the encoder to use
ADAPTER = "adapter.safetensors"
DTYPES = ("float32", "bfloat16", "float16")
INT8 = "int8"
DTYPE_HELP = (
    f"auto (the model's own; on a processor encoder and projector in what it is fastest at), {', '.join(DTYPES)} or {INT8}."
)
# The rows that go into the output of Whisper's attention hold single numbers far above all others; the projector's first
# layer says in which dtype it computes.
NOT_INT8 = frozenset({"out_proj", "linear"})

Part = TypeVar("Part", EncoderConfig, BackboneConfig)


def load_checkpoint(
    name_or_path: str | Path = DEFAULT_MODEL,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    quantization: str | None = None,
    encoder: str | Path | None = None,
    backbone: str | Path | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    merge_lora: bool = True,
) -> DiffusionGemmaASR:
    """Loads a checkpoint with the frozen parts that it names, ready to transcribe.

    Shapes are compared before any large file is read or fetched.

    Args:
        name_or_path: "mini", which travels inside the package, or "base", the same with the encoder that its own was trained
            on from; a checkpoint folder; or a hub repository. A folder that is called mini itself is "./mini".
        device: of torch; "auto" is the first CUDA device, else Apple's GPU, else the processor.
        dtype: of all weights, one of DTYPES or torch's own; None is that of the frozen parts while training; "int8" has
            encoder and projector in 8 bits, on a processor, and all else in float32; "auto" is as None, but encoder and
            projector are in bfloat16 on processors that are fast at it, and in 8 bits on other x86 processors.
        quantization: None, or 4 and 8 bits for the backbone's experts (`quantization.QUANTIZATIONS`).
        encoder, backbone: folder or hub name to use in place of the one that the checkpoint names.
        revision: of the checkpoint's repository: branch, tag or commit.
        local_files_only: never ask the network.
        merge_lora: add LoRA into the attention's weights, which is faster; False keeps it apart, to be trained or saved.

    Raises:
        CheckpointError: something is missing, damaged, or does not fit; one line says what, and what to do.
        AsrError: there is no such device or dtype.
    """
    if quantization is not None:
        find_quantizer(quantization)  # before minutes of reading
    device, chosen_dtype = choose_device(device), choose_dtype(dtype)
    int8 = hears_in_int8(dtype, device)
    folder = find_checkpoint(name_or_path, revision, local_files_only)
    encoder = encoder or BUNDLED.get(str(name_or_path))
    config = with_sources(read_config_file(folder), folder, encoder, backbone)
    adapter = read_adapter(folder)
    check_encoder(config.encoder, config.encoder, local_files_only)
    check_backbone(config.backbone, config.backbone, local_files_only)
    tokenizer = load_tokenizer(config.backbone, local_files_only)
    dtype_ = chosen_dtype or getattr(torch, config.dtype)
    hearing_dtype = torch.bfloat16 if dtype == "auto" and device.type == "cpu" and fast_bfloat16() else dtype_
    loaded_encoder = load_encoder(config.encoder, dtype=hearing_dtype, device=device, local_files_only=local_files_only)
    if int8:
        use_int8(loaded_encoder, NOT_INT8)
    with torch.device("meta"):
        projector = AudioProjector(config.projector, loaded_encoder.hidden_size, int(config.backbone.width or 0))
    fill_projector(projector, _under(adapter, "projector."), folder / ADAPTER)
    projector = projector.to(device, hearing_dtype)
    if int8:
        use_int8(projector, NOT_INT8)
    lora = _under(adapter, "lora.")
    del adapter
    loaded_backbone = load_backbone(
        config.backbone, dtype=dtype_, device=device, quantization=quantization, local_files_only=local_files_only
    )
    loaded_backbone.add_lora(**asdict(config.lora))
    loaded_backbone.load_lora_state_dict(lora)
    if merge_lora:
        loaded_backbone.merge_lora()
    model = DiffusionGemmaASR(config, loaded_encoder, projector, loaded_backbone, tokenizer)
    give_back_memory()  # what files were read into
    return model.requires_grad_(False).eval()


def with_sources(
    config: ModelConfig, folder: Path, encoder: str | Path | None = None, backbone: str | Path | None = None
) -> ModelConfig:
    """A checkpoint's config with the places of its frozen parts: hub names or absolute folders.

    Args:
        config: as the checkpoint in `folder` has it.
        encoder, backbone: folder or hub name to use in place of the one that it names.
    """

    def placed(part: Part, override: str | Path | None) -> Part:
        if override is not None:
            return replace(part, name=resolve_source(str(override), Path.cwd()), revision=None)
        return replace(part, name=resolve_source(part.name, folder))

    return replace(config, encoder=placed(config.encoder, encoder), backbone=placed(config.backbone, backbone))


def load_adapter(model: DiffusionGemmaASR, folder: str | Path, projector_alone: bool = False) -> None:
    """Fills a model's projector and LoRA with those of a checkpoint.

    The projector's scale stays the model's own, since it belongs to the backbone.

    Args:
        model: with projector and LoRA of the shapes in the checkpoint.
        folder: of `save_checkpoint`, or one whose adapter holds a projector alone; LoRA then stays as it is.
        projector_alone: leave the checkpoint's LoRA aside, which belongs to another backbone, or does nothing yet.

    Raises:
        CheckpointError: the folder is no checkpoint, or a tensor is missing, left over or of another shape.
    """
    adapter = load_projector(model.projector, folder)
    lora = _under(adapter, "lora.")
    if lora and not projector_alone:
        model.backbone.load_lora_state_dict(lora)


def load_projector(projector: AudioProjector, folder: str | Path) -> dict[str, Tensor]:
    """Fills a projector, whose scale stays, with a checkpoint's, whose adapter is returned; raises as `load_adapter`."""
    adapter = read_adapter(folder)
    fill_projector(projector, _under(adapter, "projector.") | {"scale": projector.scale}, Path(folder) / ADAPTER)
    return adapter


def read_adapter(folder: str | Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint's adapter.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = Path(folder) / ADAPTER
    if not path.is_file():
        raise CheckpointError(f"{path.parent} is no checkpoint: it has no {path.name}")
    try:
        return unpack(load_file(path))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({first_line(error)}); fetch or save it again") from error


def fill_projector(projector: AudioProjector, saved: dict[str, Tensor], path: Path) -> None:
    """Fills a projector with saved tensors, or where it is on the device "meta", makes it of them; `path` is their file.

    Raises:
        CheckpointError: a tensor is missing, left over or of another shape.
    """
    wanted = projector.state_dict()
    if odd := sorted(saved.keys() ^ wanted.keys()):
        raise CheckpointError(
            f"{path} does not hold this projector: {len(odd)} names differ, first projector.{odd[0]}; fetch or save it again"
        )
    for key, value in wanted.items():
        if saved[key].shape != value.shape:
            raise CheckpointError(
                f"{path}: projector.{key} is {tuple(saved[key].shape)}, but {CONFIG} asks for {tuple(value.shape)}; "
                "the two are of different checkpoints"
            )
    projector.load_state_dict(saved, assign=projector.linear.weight.is_meta)


def find_checkpoint(name_or_path: str | Path, revision: str | None = None, local_files_only: bool = False) -> Path:
    """The folder of a checkpoint; a hub repository is fetched into the hub's cache first.

    Args:
        name_or_path, revision, local_files_only: see `load_checkpoint`.

    Raises:
        CheckpointError: there is no such checkpoint, or it cannot be fetched.
    """
    if str(name_or_path) in BUNDLED:
        folder = PRESETS / DEFAULT_MODEL
        if not (folder / CONFIG).is_file():
            raise CheckpointError(f"the bundled model {name_or_path} is missing from {folder}; reinstall the package")
        return folder
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if is_path(str(name_or_path)) or len(folder.parts) != 2:
        raise CheckpointError(
            f"{name_or_path}: no such checkpoint; give {' or '.join(BUNDLED)}, an existing folder, or a hub repository "
            "(owner/name)"
        )
    try:
        return Path(snapshot_download(str(name_or_path), revision=revision, local_files_only=local_files_only))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{name_or_path} is no folder here and cannot be fetched from the hub: {first_line(error)}"
        ) from error


def choose_device(device: str | torch.device) -> torch.device:
    """What "auto" means here; anything else is taken at its word.

    Raises:
        AsrError: there is no such device.
    """
    if str(device) == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:  # an assertion where torch was built without CUDA
        reason = first_line(error)
        raise AsrError(f"device {device} cannot be used ({reason}); give auto, cpu, cuda, cuda:1 or mps") from None


def choose_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Torch's dtype of that name; None for None and "auto", float32 for "int8", which is of some layers alone.

    Raises:
        AsrError: it is none of DTYPES.
    """
    if not isinstance(dtype, str):
        return dtype
    if dtype == "auto":
        return None
    if dtype == INT8:
        return torch.float32
    if dtype not in DTYPES:
        raise AsrError(f"dtype {dtype} is not known; give auto or one of {', '.join((*DTYPES, INT8))}")
    chosen: torch.dtype = getattr(torch, dtype)
    return chosen


def fast_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 faster than float32: twice as fast with AVX-512 BF16, more with AMX."""
    told = capabilities()
    return bool(told.get("avx512_bf16") or told.get("amx_bf16"))


def hears_in_int8(dtype: str | torch.dtype | None, device: torch.device) -> bool:
    """Whether encoder and projector are to be in 8 bits: where asked for, or by "auto" where nothing is faster.

    Raises:
        AsrError: it is asked for where it cannot be.
    """
    possible = device.type == "cpu" and int8_available()
    if dtype == INT8 and not possible:
        raise AsrError(f"dtype {INT8} is for x86 processors; give auto or one of {', '.join(DTYPES)}")
    return possible and (dtype == INT8 or (dtype == "auto" and not fast_bfloat16()))


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, by the rest of their names."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
