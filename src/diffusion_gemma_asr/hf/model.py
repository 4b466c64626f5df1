"""Configuration and model for transformers' Auto classes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..checkpoint.config_file import MODEL_TYPE
from ..checkpoint.load import find_checkpoint, load_checkpoint
from ..checkpoint.save import save_checkpoint
from ..denoise.decode import decode, draft_clips
from ..denoise.options import DecodeOptions
from ..errors import AsrError
from ..model.model import DiffusionGemmaASR
from ..strict import from_options
from ..transcribe.recognizer import Recognizer

# Arguments that the Auto classes and the pipeline pass to every model; ignored here.
_INTERNAL = ("_from_auto", "_from_pipeline", "adapter_kwargs", "trust_remote_code", "code_revision")
_OPTIONS = ("quantization", "encoder", "backbone", "merge_lora")  # options of load_checkpoint with the same name here


class DiffusionGemmaASRConfig(PreTrainedConfig):
    """A checkpoint's config.json, with its keys as attributes; documented in `model.config.ModelConfig`."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As for every configuration, except that options of the model's from_pretrained do not overwrite its keys.

        `encoder` and `backbone` are both: keys of the configuration, and options to load other parts.
        """
        return_unused = kwargs.pop("return_unused_kwargs", False)
        options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
        config, unused = super().from_dict(config_dict, return_unused_kwargs=True, **kwargs)
        return (config, unused | options) if return_unused else config


class DiffusionGemmaASRForSpeechSeq2Seq(PreTrainedModel):
    """Our model with the methods that transformers expects.

    Use `from_pretrained`: a configuration alone cannot create the frozen parts.

    Args:
        config: of the checkpoint.
        asr: the wrapped model.
    """

    config_class = DiffusionGemmaASRConfig
    main_input_name = "input_features"
    input_modalities = ("audio",)

    def __init__(self, config: DiffusionGemmaASRConfig, asr: DiffusionGemmaASR):
        super().__init__(config)
        self.asr = asr

    @property
    def recognizer(self) -> Recognizer:
        """The recogniser that `diffusion_gemma_asr.load` returns, for recordings of any length."""
        return Recognizer(self.asr)

    @classmethod
    def _from_config(cls, config: DiffusionGemmaASRConfig, **kwargs: Any) -> DiffusionGemmaASRForSpeechSeq2Seq:
        raise AsrError("a configuration holds no weights; load the checkpoint with from_pretrained(folder)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        config: DiffusionGemmaASRConfig | None = None,
        dtype: str | torch.dtype | None = None,
        device_map: str | int | torch.device | Mapping[str, Any] | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        **kwargs: Any,
    ) -> DiffusionGemmaASRForSpeechSeq2Seq:
        """Loads a checkpoint with the frozen parts that it names.

        Args:
            pretrained_model_name_or_path: checkpoint folder, hub repository, or the name of a bundled model.
            config: of the same checkpoint; None reads it.
            dtype: of all weights; None and "auto" use the checkpoint's.
            device_map: one device for all parts, such as "cuda:0"; "auto" is the first accelerator, None the CPU.
            revision: branch, tag or commit of the checkpoint's repository.
            local_files_only: whether to use only downloaded files.
            **kwargs: `quantization`, `encoder`, `backbone`, `merge_lora`; see `checkpoint.load.load_checkpoint`.

        Raises:
            CheckpointError: a file is missing, damaged, or does not match the others.
            AsrError: an option is unknown, or there is no such device or dtype.
        """
        if kwargs.pop("token", None) is not None:
            raise AsrError("token is no option of this model; give the token by `hf auth login` or HF_TOKEN")
        options = {name: value for name, value in kwargs.items() if name not in _INTERNAL}
        if unknown := sorted(options.keys() - set(_OPTIONS)):
            known = ", ".join(("dtype", "device_map", "revision", "local_files_only", *_OPTIONS))
            raise AsrError(f"{unknown[0]} is no option of this model; give {known}")
        folder = find_checkpoint(pretrained_model_name_or_path, revision, local_files_only)
        asr = load_checkpoint(
            folder,
            device="cpu" if device_map is None else _one_device(device_map),
            dtype=None if dtype == "auto" else dtype,
            local_files_only=local_files_only,
            **options,
        )
        model = cls(config or cls.config_class.from_pretrained(folder), asr).eval()
        if device_map is not None:
            model.hf_device_map = {"": asr.device}  # keeps the pipeline from moving the model
        return model

    @property
    def device(self) -> torch.device:
        """The device of the backbone."""
        return self.asr.device

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Writes a checkpoint: the adapter, and the names of the frozen parts.

        Args:
            save_directory: folder of the checkpoint.

        Raises:
            CheckpointError: LoRA was merged (load with merge_lora=False to save again), or the folder is not writable.
        """
        save_checkpoint(self.asr, save_directory)

    @torch.no_grad()
    def generate(self, input_features: Tensor, attention_mask: Tensor | None = None, **named: Any) -> Tensor:
        """Transcribes clips of at most 30 s.

        Args:
            input_features: (B, bins, T) log-mel from the processor, a frame per 10 ms.
            attention_mask: (B, T), 0 for padding; None is no padding.
            **named: fields of `DecodeOptions`: language, steps, seed, start, ...

        Returns:
            (B, L) token ids without special tokens, padded on the right with the pad token.

        Raises:
            AsrError: an option is unknown, has an impossible value, or the model was not trained for it.
        """
        options = from_options(DecodeOptions, named)
        asr, (rows, _, frames) = self.asr, input_features.shape
        options.check(asr)
        lengths = torch.full((rows,), frames) if attention_mask is None else attention_mask.sum(1).long()
        encoded = asr.project(*asr.encoder(input_features.to(asr.device), lengths.to(asr.device)))
        decoded = decode(asr, draft_clips(asr, encoded), options, batch_size=rows)
        ids = [torch.tensor(row.tokens, dtype=torch.long, device=asr.device) for row in decoded]
        return torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=asr.prompts.special["pad"])


def _one_device(device_map: str | int | torch.device | Mapping[str, Any]) -> str | torch.device:
    """The device of a device_map; raises AsrError if it has several."""
    devices = set(device_map.values()) if isinstance(device_map, Mapping) else {device_map}
    if len(devices) != 1:
        raise AsrError(f"device_map names {len(devices)} devices; this model stands on one: give for instance 'cuda:0'")
    device = devices.pop()
    return torch.device(device) if isinstance(device, int) else device
