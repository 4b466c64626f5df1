"""The frozen parts of a model: encoder, backbone and tokenizer by name, loaded strictly.

What transformers only warns about is an error here: it fills weights that a checkpoint lacks with random numbers, and lets a
damaged file's exception through. A frozen part with random weights would transcribe nonsense without a word of explanation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoTokenizer,
    DiffusionGemmaConfig,
    DiffusionGemmaForBlockDiffusion,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    WhisperConfig,
    WhisperFeatureExtractor,
)
from transformers.models.whisper.modeling_whisper import WhisperDecoder, WhisperEncoder
from transformers.utils import logging

from ..errors import CheckpointError, first_line
from ..model.backbone import Backbone
from ..model.config import BackboneConfig, EncoderConfig
from ..model.encoder import AcousticEncoder
from ..model.head import Head
from ..model.packing import is_packed, unpack
from ..strict import is_path
from .known_configs import KNOWN
from .quantization import find_quantizer, quantize_experts

HEADS = ("lm_head.weight", "model.decoder.embed_tokens.weight", "model.encoder.language_model.embed_tokens.weight")  # tied
WHOLE = r"^(model\.)?(encoder|audio_tower)\."  # of an encoder's names in a whole model, not in the encoder alone
WHOLE_DECODER = r"^model\.decoder\."
ENCODERS = "a Whisper, or a Qwen3-ASR in transformers' layout"
WEIGHTS = "model.safetensors"  # of a folder in the layout of a hub repository


def read_config(
    name_or_path: str | Path, *, revision: str | None = None, local_files_only: bool = False
) -> PreTrainedConfig:
    """The configuration of a frozen part: `config.json` of a folder or a hub repository.

    Raises:
        CheckpointError: there is no such folder or repository, or its config.json cannot be read.
    """
    _check_folder(name_or_path)
    try:
        return AutoConfig.from_pretrained(name_or_path, revision=revision, local_files_only=local_files_only)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"cannot read the configuration of {name_or_path}: {first_line(error)}") from None


def source_config(source: EncoderConfig | BackboneConfig) -> PreTrainedConfig:
    """The configuration of a frozen part: as published if known here, else from its folder or the hub."""
    if source.name in KNOWN and source.revision is None:
        return KNOWN[source.name]()
    return read_config(source.name, revision=source.revision)


def load_encoder(
    source: EncoderConfig,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    local_files_only: bool = False,
) -> AcousticEncoder:
    """The encoder of a Whisper or Qwen3-ASR checkpoint (hub name or folder, with or without its decoder), frozen.

    Raises:
        CheckpointError: the checkpoint cannot be found or read.
    """
    where: dict[str, Any] = {"revision": source.revision, "local_files_only": local_files_only}
    config = audio_config(read_config(source.name, **where))
    kind: type[AcousticEncoder] = AcousticEncoder
    options: dict[str, Any] = {"dtype": dtype, "key_mapping": {WHOLE: ""}, **where}
    if _is_qwen(config):
        from ..model.qwen_encoder import Qwen3ASREncoder, QwenEncoder  # transformers has it since 5.2x

        kind = QwenEncoder
        encoder = load_pretrained(Qwen3ASREncoder, source.name, "encoder", config=config, **options)
    else:
        encoder = load_pretrained(WhisperEncoder, source.name, "encoder", **options)
    return kind(encoder, load_extractor(source, local_files_only), source.silence_s).to(device).eval().requires_grad_(False)


def load_decoder(name: str) -> PreTrainedModel:
    """The decoder of a whole Whisper (hub name or folder), in float32: what a projector's decoder layers begin as.

    Raises:
        CheckpointError: the checkpoint cannot be found or read.
    """
    return load_pretrained(WhisperDecoder, name, "decoder", key_mapping={WHOLE_DECODER: ""}, dtype=torch.float32)


def new_encoder(config: PreTrainedConfig, name: str) -> AcousticEncoder:
    """An encoder with random weights, of any kind that `load_encoder` knows.

    Raises:
        CheckpointError: the configuration of `name` is of another kind.
    """
    config = audio_config(config)
    if _is_qwen(config):
        from ..model.qwen_encoder import QwenEncoder

        return QwenEncoder.from_config(config)
    if not isinstance(config, WhisperConfig):
        raise CheckpointError(f"{name} is a {config.model_type}; the encoder must be {ENCODERS}")
    return AcousticEncoder.from_config(config)


def load_extractor(source: EncoderConfig, local_files_only: bool = False) -> WhisperFeatureExtractor:
    """What makes an encoder's log-mel spectrograms.

    Raises:
        CheckpointError: the encoder has none that can be read.
    """
    where: dict[str, Any] = {"revision": source.revision, "local_files_only": local_files_only}
    config = audio_config(read_config(source.name, **where))
    if _is_qwen(config):  # Qwen's own pads to 30 s and to whole seconds
        return WhisperFeatureExtractor(feature_size=config.num_mel_bins)
    try:
        return WhisperFeatureExtractor.from_pretrained(source.name, **where)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read the features of {source.name}: {first_line(error)}") from error


def audio_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of a configuration that describes the acoustic encoder.

    Raises:
        CheckpointError: it is a Qwen3-ASR's in the layout of its authors, which transformers does not read.
    """
    if config.model_type == "qwen3_asr" and hasattr(config, "thinker_config"):
        raise CheckpointError(
            f"{config.name_or_path} is in the layout of Qwen's own package; give the repository whose name ends in -hf"
        )
    return config.audio_config if config.model_type == "qwen3_asr" else config


def _is_qwen(config: PreTrainedConfig) -> bool:
    return config.model_type == "qwen3_asr_encoder"


def load_backbone(
    source: BackboneConfig,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    quantization: str | None = None,
    local_files_only: bool = False,
) -> Backbone:
    """A DiffusionGemma checkpoint from a hub name or a folder, frozen.

    Args:
        quantization: None, or one of `quantization.QUANTIZATIONS`, which pack the experts in 4 or 8 bits.

    Raises:
        CheckpointError: the checkpoint is missing, incomplete or damaged, or the quantisation package is missing.
    """
    quantizer = None if quantization is None else find_quantizer(quantization)
    where = {"revision": source.revision, "local_files_only": local_files_only}
    model = load_pretrained(DiffusionGemmaForBlockDiffusion, source.name, "backbone", dtype=dtype, **where)
    backbone = Backbone(model)
    if quantizer is not None:
        quantize_experts(backbone.model, quantizer, device)
    return backbone.to(device).eval().requires_grad_(False)


def load_head(source: BackboneConfig) -> Head:
    """The output head of a backbone that is on this machine, without its layers: one tensor of many gigabytes.

    Raises:
        CheckpointError: the backbone is not here, or damaged.
    """
    config = read_config(source.name, revision=source.revision, local_files_only=True)
    folder = Path(source.name)
    try:
        if not folder.is_dir():
            folder = Path(snapshot_download(source.name, revision=source.revision, local_files_only=True))
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                name = next((name for name in HEADS if name in file.keys()), None)  # noqa: SIM118
                if name is not None:
                    weight = unpack(load_file(path))[name] if is_packed(path) else file.get_tensor(name)
                    return Head(weight, config.text_config.final_logit_softcapping)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"cannot read the head of {source.name}: {first_line(error)}") from error
    raise CheckpointError(f"{source.name} has no output head in its .safetensors files here; fetch it")


def load_tokenizer(source: BackboneConfig, local_files_only: bool = False) -> PreTrainedTokenizerBase:
    """The backbone's tokenizer.

    Raises:
        CheckpointError: the backbone has none that can be read.
    """
    try:
        return AutoTokenizer.from_pretrained(source.name, revision=source.revision, local_files_only=local_files_only)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"cannot read the tokenizer of {source.name}: {first_line(error)}") from error


def load_pretrained(
    model_class: type[PreTrainedModel], name_or_path: str | Path, part: str, **options: Any
) -> PreTrainedModel:
    """`model_class.from_pretrained(name_or_path, **options)`, but with every weight in its place or an error. A folder may
    hold packed weights (model/packing.py), as those inside the package do.

    Weights that the class has no place for are left out in silence: a Whisper's decoder, when its encoder
    is loaded.

    Args:
        part: "encoder", "decoder" or "backbone", for messages.

    Raises:
        CheckpointError: the checkpoint is not found, incomplete, damaged, or of another model; in one line.
    """
    _check_folder(name_or_path)
    try:
        with _quiet():
            weights = Path(name_or_path) / WEIGHTS
            if weights.is_file() and is_packed(weights):
                options |= {"config": model_class.config_class.from_pretrained(name_or_path)}
                options |= {"state_dict": unpack(load_file(weights))}
                model, report = model_class.from_pretrained(None, output_loading_info=True, **options)
                if model.can_generate():
                    model.generation_config = type(model.generation_config).from_pretrained(name_or_path)
            else:
                model, report = model_class.from_pretrained(name_or_path, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"cannot load the {part} {name_or_path}: {first_line(error)}") from error
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(
            f"the {part} {name_or_path} is incomplete: {len(missing)} weights are missing, "
            f"first {missing[0]}; fetch it again, and check that it is a {model_class.__name__}"
        )
    return model


def _check_folder(name_or_path: str | Path) -> None:
    """A better message than transformers' own ("not a valid repository") for what can only be a folder."""
    folder = Path(name_or_path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder}: no config.json; give a folder in the layout of a hub repository")
    elif is_path(str(name_or_path)):
        raise CheckpointError(f"{folder}: no such folder; check the name, or make this part first")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' report of left-out weights; what matters in it becomes an error. And without its progress bar,
    which a small model shows for a blink; a large one is waited for at the download."""
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def check_encoder(entry: EncoderConfig, source: EncoderConfig, local_files_only: bool) -> None:
    """Compares an encoder with the one that a checkpoint's `entry` was trained for, before anything large is read.

    Raises:
        CheckpointError: they differ.
    """
    actual = audio_config(read_config(source.name, revision=source.revision, local_files_only=local_files_only))
    if not isinstance(actual, WhisperConfig) and not _is_qwen(actual):
        raise CheckpointError(f"the encoder {source.name} is a {actual.model_type}; it must be {ENCODERS}")
    if (actual.d_model, actual.num_mel_bins) != (entry.width, entry.mel_bins):
        raise CheckpointError(
            f"the adapter was trained for an encoder {entry.width} wide with {entry.mel_bins} mel bins "
            f"({entry.name}), but {source.name} is {actual.d_model} wide with {actual.num_mel_bins}; "
            "load the one it was trained with"
        )


def check_backbone(entry: BackboneConfig, source: BackboneConfig, local_files_only: bool) -> None:
    """Compares a backbone with the one that a checkpoint's `entry` was trained for, before anything large is read.

    Raises:
        CheckpointError: they differ.
    """
    config = read_config(source.name, revision=source.revision, local_files_only=local_files_only)
    if not isinstance(config, DiffusionGemmaConfig):
        kind = config.model_type
        raise CheckpointError(f"the backbone {source.name} is a {kind}; it must be a DiffusionGemma")
    text = config.text_config
    actual = (text.hidden_size, text.num_hidden_layers, text.vocab_size)
    trained = (entry.width, entry.layers, entry.vocab_size)
    if actual != trained:
        raise CheckpointError(
            "the adapter was trained for a backbone {} wide with {} layers and a vocabulary of {} ".format(*trained)
            + f"({entry.name}), but {source.name} is "
            + "{} wide with {} layers and {}; load the one it was trained with".format(*actual)
        )
