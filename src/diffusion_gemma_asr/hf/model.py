"""Our model as transformers' Auto classes hand it out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..checkpoint.config_file import MODEL_TYPE, upgraded
from ..checkpoint.load import find_checkpoint, load_checkpoint
from ..checkpoint.save import save_checkpoint
from ..denoise.decode import DecodeOptions, decode, draft_clips
from ..errors import AsrError
from ..model.model import DiffusionGemmaASR
from ..strict import from_options
from ..transcribe.recognizer import Recognizer

# what the Auto classes and the pipeline pass to every model, and nothing depends on here
_INTERNAL = ("_from_auto", "_from_pipeline", "adapter_kwargs", "trust_remote_code", "code_revision")
_OPTIONS = ("quantization", "encoder", "backbone", "merge_lora")  # of load_checkpoint, beside those with other names


class DiffusionGemmaASRConfig(PreTrainedConfig):
    """A checkpoint's config.json, its keys as attributes; `model.config.ModelConfig` says what they mean."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As of every configuration, but `encoder` and `backbone` among the keywords do not change it: they are options of
        the model's from_pretrained, which name parts to load in place of the checkpoint's own."""
        if config_dict.get("format") == 1:
            config_dict = upgraded(config_dict)
        wanted = kwargs.pop("return_unused_kwargs", False)
        options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
        config, unused = super().from_dict(config_dict, return_unused_kwargs=True, **kwargs)
        return (config, unused | options) if wanted else config


class DiffusionGemmaASRForSpeechSeq2Seq(PreTrainedModel):
    """Our model with the methods that transformers expects.

    Made by `from_pretrained`: a checkpoint names the frozen parts, and a configuration alone does not make them.

    Args:
        config: the checkpoint's.
        asr: the model itself.
    """

    config_class = DiffusionGemmaASRConfig
    main_input_name = "input_features"
    input_modalities = ("audio",)

    def __init__(self, config: DiffusionGemmaASRConfig, asr: DiffusionGemmaASR):
        super().__init__(config)
        self.asr = asr

    @property
    def recognizer(self) -> Recognizer:
        """What `diffusion_gemma_asr.load` returns: it transcribes recordings of any length."""
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
        """Load a checkpoint with the frozen parts that it names.

        Args:
            pretrained_model_name_or_path: checkpoint folder, hub repository, or the name of a bundled model.
            config: of the same checkpoint; None reads it.
            dtype: of all weights; None and "auto" leave it to the checkpoint.
            device_map: one device for the whole, such as "cuda:0"; "auto" is the first accelerator, None the processor.
            revision, local_files_only: of the checkpoint's repository.
            **kwargs: `quantization`, `encoder`, `backbone`, `merge_lora`; see `checkpoint.load.load_checkpoint`.

        Raises:
            CheckpointError: something is missing, damaged, or does not fit.
            AsrError: an option is unknown, or names no device or dtype.
        """
        if kwargs.pop("token", None) is not None:
            raise AsrError("token is no option of this model; give the token by `hf auth login` or HF_TOKEN")
        options = {name: value for name, value in kwargs.items() if name not in _INTERNAL}
        if odd := sorted(options.keys() - set(_OPTIONS)):
            known = ", ".join(("dtype", "device_map", "revision", "local_files_only", *_OPTIONS))
            raise AsrError(f"{odd[0]} is no option of this model; give {known}")
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
            model.hf_device_map = {"": asr.device}  # tells the pipeline not to move it
        return model

    @property
    def device(self) -> torch.device:
        """Where the backbone is."""
        return self.asr.device

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write a checkpoint of ours: the adapter, and the names of the frozen parts.

        Raises:
            CheckpointError: LoRA was merged (load with merge_lora=False to save again), its drafts are searched, or the
                folder is not writable.
        """
        save_checkpoint(self.asr, save_directory)

    @torch.no_grad()
    def generate(self, input_features: Tensor, attention_mask: Tensor | None = None, **named: Any) -> Tensor:
        """Transcribes clips of at most 30 s, as the processor makes them.

        Args:
            input_features: (B, bins, T) log-mel, a frame per 10 ms.
            attention_mask: (B, T), 1 where there is sound; None is everywhere.
            **named: fields of `DecodeOptions`: language, steps, seed, start, ...

        Returns:
            (B, L) token ids without special tokens, padded at the end with the pad token.

        Raises:
            AsrError: an option is unknown, has an impossible value, or the model was not trained for it.
        """
        options = from_options(DecodeOptions, named)
        asr, (rows, _, frames) = self.asr, input_features.shape
        options.check(asr.config)
        lengths = torch.full((rows,), frames) if attention_mask is None else attention_mask.sum(1).long()
        encoded = asr.project(*asr.encoder(input_features.to(asr.device), lengths.to(asr.device)))
        decoded = decode(asr, draft_clips(asr, encoded, options), options, batch_size=rows)
        ids = [torch.tensor(row.tokens, dtype=torch.long, device=asr.device) for row in decoded]
        return torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=asr.prompts.special["pad"])


def _one_device(device_map: str | int | torch.device | Mapping[str, Any]) -> str | torch.device:
    """The device of a device_map that puts everything on one."""
    devices = set(device_map.values()) if isinstance(device_map, Mapping) else {device_map}
    if len(devices) != 1:
        raise AsrError(f"device_map names {len(devices)} devices; this model stands on one: give for instance 'cuda:0'")
    device = devices.pop()
    return torch.device(device) if isinstance(device, int) else device
