"""Tiny checkpoints in exactly the layout of the real ones, written with random weights into a folder.

The real weights are tens of gigabytes; these take a fraction of a second to write and to load, and they
have the same file names, key names, configuration keys and special tokens:

- `write_backbone`: as google/diffusiongemma-26B-A4B-it
- `write_whisper`: as openai/whisper-small (80 mel bins) or openai/whisper-large-v3 (128)

`build_model` joins two such folders into a model with a random adapter.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import (
    DiffusionGemmaConfig,
    DiffusionGemmaForBlockDiffusion,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from diffusion_gemma_asr.checkpoint.parts import load_backbone, load_encoder, load_tokenizer
from diffusion_gemma_asr.model.config import BackboneConfig, EncoderConfig, LoraConfig, ModelConfig, ProjectorConfig
from diffusion_gemma_asr.model.model import DiffusionGemmaASR
from diffusion_gemma_asr.model.projector import AudioProjector

SENTENCES = (
    "the quick brown fox jumps over the lazy dog",
    "she sells sea shells by the sea shore",
    "transcribe the speech in english.",
    "Transcribe this audio. Context words: Ada, Turing.",
    "it's a pleasure to meet you, how do you do?",
    "seven eight nine ten, and then we start again.",
    "user\nmodel\nthe weather is fine and the night is young",
)

# Special tokens of the published tokenizer. The small ids are the real ones; the others stand at the end of
# the vocabulary in the real order (really 255999, 256000, 258880, 258881, 258882 and 258883).
LOW_SPECIAL_TOKENS = {
    "<pad>": 0,
    "<eos>": 1,
    "<bos>": 2,
    "<unk>": 3,
    "<mask>": 4,
    "<|tool_response>": 50,
    "<|turn>": 105,
    "<turn|>": 106,
}
HIGH_SPECIAL_TOKENS = ("<|image>", "<|audio>", "<|image|>", "<|audio|>", "<image|>", "<audio|>")

VOCAB_SIZE = 420
HIDDEN_SIZE = 32
EXPERTS = 6  # of which two answer: too few to ask all of them (model/experts.py)
CANVAS_LENGTH = 32


def write_tokenizer(folder: Path) -> Tokenizer:
    """Write `tokenizer.json` and `tokenizer_config.json`, as Gemma's: BPE, byte fallback, "▁" for spaces."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab, merges = _vocabulary()
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = [*LOW_SPECIAL_TOKENS, *HIGH_SPECIAL_TOKENS]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", LOW_SPECIAL_TOKENS["<bos>"])]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {
        "audio_token": "<|audio|>",
        "boa_token": "<|audio>",
        "eoa_token": "<audio|>",
        "image_token": "<|image|>",
        "boi_token": "<|image>",
        "eoi_token": "<image|>",
        "sot_token": "<|turn>",
        "eot_token": "<turn|>",
    }
    _write_json(
        folder / "tokenizer_config.json",
        {
            "backend": "tokenizers",
            "tokenizer_class": "GemmaTokenizer",
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "mask_token": "<mask>",
            "padding_side": "left",
            "model_max_length": 1000000000000000019884624838656,
            "model_specific_special_tokens": named,
            **named,
        },
    )
    return tokenizer


def write_backbone(folder: Path, *, hidden_size: int = HIDDEN_SIZE, layers: int = 6, seed: int = 0) -> Path:
    """Write a backbone folder: config, sharded weights with their index, tokenizer, generation defaults.

    Args:
        folder: where to write; made if missing.
        hidden_size: width of the token rows (really 2816).
        layers: a multiple of 3; the last of every three (really of every six) has full attention.
        seed: of the random weights.

    Returns:
        `folder`, which `load_backbone(BackboneConfig(name=str(folder)))` loads.
    """
    write_tokenizer(folder)
    published = _backbone_config(hidden_size, layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DiffusionGemmaForBlockDiffusion(DiffusionGemmaConfig(**published))
        _enliven(model)
    model.save_pretrained(folder, max_shard_size="100KB")
    # transformers now writes `per_layer_config`; the published file has the two `global` keys it grew from
    config = json.loads((folder / "config.json").read_text())
    config["text_config"].pop("per_layer_config", None)
    for key in ("global_head_dim", "num_global_key_value_heads"):
        config["text_config"][key] = published["text_config"][key]
    _write_json(folder / "config.json", config)
    _write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": 2,
            "pad_token_id": 0,
            "eos_token_id": [1, 106, 50],
            "max_new_tokens": 256,
            "max_denoising_steps": 48,
            "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.1},
            "t_max": 0.8,
            "t_min": 0.4,
            "stability_threshold": 1,
            "confidence_threshold": 0.005,
        },
    )
    return folder


def write_whisper(
    folder: Path, *, width: int = 16, mel_bins: int = 80, encoder_only: bool = False, seed: int = 0, **sizes: int
) -> Path:
    """Write a Whisper folder: config, feature extractor, `model.safetensors`.

    Args:
        folder: where to write; made if missing.
        width: d_model (really 768 or 1280); a multiple of 4.
        mel_bins: 80 as whisper-small, 128 as whisper-large-v3.
        encoder_only: keep the `model.encoder.` keys alone, as distributions without a decoder do.
        seed: of the random weights.
        **sizes: of `WhisperConfig`, in place of those here.

    Returns:
        `folder`, which `load_encoder(EncoderConfig(name=str(folder)))` loads.
    """
    shape = {"vocab_size": 64, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 2}
    shape |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 2 * width, "decoder_ffn_dim": 2 * width}
    config = WhisperConfig(
        **shape | sizes,
        num_mel_bins=mel_bins,
        d_model=width,
        pad_token_id=60,
        bos_token_id=60,
        eos_token_id=60,
        decoder_start_token_id=61,
        begin_suppress_tokens=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = WhisperForConditionalGeneration(config)
    model.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=mel_bins).save_pretrained(folder)
    if encoder_only:
        weights = load_file(folder / "model.safetensors")
        kept = {key: value for key, value in weights.items() if key.startswith("model.encoder.")}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def model_config(encoder: Path, backbone: Path, *, scaled: bool = True, **settings: Any) -> ModelConfig:
    """The config of a tiny model on two folders, with a small projector and LoRA of rank 4.

    Args:
        encoder, backbone: folders of `write_whisper` and `write_backbone`.
        scaled: of the projector.
        **settings: other fields of `ModelConfig`, in place of those given here.
    """
    given = {
        "name": "tiny",
        "encoder": EncoderConfig(str(encoder)),
        "backbone": BackboneConfig(str(backbone)),
        "projector": ProjectorConfig(hidden_size=24, scaled=scaled),
        "lora": LoraConfig(rank=4, alpha=8),
        "languages": ("en", "de"),
    }
    return ModelConfig(**given | settings)


def build_model(config: ModelConfig, seed: int = 0) -> DiffusionGemmaASR:
    """The model of `config`, as after training: no LoRA matrix is zero, so a lost one shows in the logits."""
    encoder, backbone = load_encoder(config.encoder), load_backbone(config.backbone)
    backbone.add_lora(**asdict(config.lora))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        scale = backbone.embedding_scale()
        projector = AudioProjector(config.projector, encoder.hidden_size, backbone.hidden_size, scale)
        for matrix in backbone.lora_state_dict().values():
            matrix.normal_(std=0.2)
    return DiffusionGemmaASR(config, encoder, projector, backbone, load_tokenizer(config.backbone)).eval()


def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token to id, and the merges: special tokens, 256 bytes, the letters of SENTENCES, then merges."""
    learner = Tokenizer(BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_next")
    letters = len(set("".join(SENTENCES)))
    special = len(LOW_SPECIAL_TOKENS) + len(HIGH_SPECIAL_TOKENS)
    learner.train_from_iterator(
        SENTENCES, BpeTrainer(vocab_size=VOCAB_SIZE - 256 - special, min_frequency=1, show_progress=False)
    )
    learnt = json.loads(learner.to_str())["model"]
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += sorted(learnt["vocab"], key=learnt["vocab"].__getitem__)
    assert len(learnt["vocab"]) > letters, "the vocabulary leaves no room for merges"
    taken = set(LOW_SPECIAL_TOKENS.values())
    free = (index for index in range(VOCAB_SIZE) if index not in taken)
    vocab = LOW_SPECIAL_TOKENS | {piece: next(free) for piece in [*pieces, *HIGH_SPECIAL_TOKENS]}
    assert len(vocab) == VOCAB_SIZE, f"{len(vocab)} tokens instead of {VOCAB_SIZE}"
    return vocab, [(left, right) for left, right in learnt["merges"]]


def _backbone_config(hidden_size: int, layers: int) -> dict[str, Any]:
    """The published `config.json`, key by key, with small numbers."""
    assert layers % 3 == 0, "two sliding layers and a full one, repeated"
    return {
        "boi_token_id": VOCAB_SIZE - 6,
        "image_token_id": VOCAB_SIZE - 4,
        "eoi_token_id": VOCAB_SIZE - 2,
        "eos_token_id": [1, 106],
        "canvas_length": CANVAS_LENGTH,
        "text_config": {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": hidden_size,
            "intermediate_size": 48,
            "num_hidden_layers": layers,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * (layers // 3),
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "global_head_dim": 16,
            "num_global_key_value_heads": 1,
            "num_experts": EXPERTS,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
            "sliding_window": 1024,
            "max_position_embeddings": 262144,
            "final_logit_softcapping": 30.0,
            "use_bidirectional_attention": "vision",
        },
        "vision_config": {
            "model_type": "gemma4_vision",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "position_embedding_size": 16,
            "standardize": True,
        },
    }


@torch.no_grad()
def _enliven(model: DiffusionGemmaForBlockDiffusion) -> None:
    """Make random weights loud enough that a mistake anywhere shows in the logits (initial ones are 0.02)."""
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and "vision" not in name:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
