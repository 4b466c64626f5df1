"""Published configurations of the real frozen parts, to count and build them without a download.

Sources: `config.json` of google/diffusiongemma-26B-A4B-it, openai/whisper-small and
openai/whisper-large-v3. Only what differs from the defaults of transformers' configuration classes is
written down.
"""

from __future__ import annotations

import torch
from transformers import DiffusionGemmaConfig, WhisperConfig


def diffusiongemma_26b() -> DiffusionGemmaConfig:
    """google/diffusiongemma-26B-A4B-it: 25.8 billion parameters, about 4 billion active for a token."""
    text = {
        "vocab_size": 262_144,
        "hidden_size": 2816,
        "intermediate_size": 2112,
        "moe_intermediate_size": 704,
        "num_hidden_layers": 30,  # five sliding, one full, five times over
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "num_global_key_value_heads": 2,  # full layers: fewer and wider heads; their values are the keys
        "global_head_dim": 512,
        "num_experts": 128,
        "top_k_experts": 8,
        "sliding_window": 1024,
        "max_position_embeddings": 262_144,
        "final_logit_softcapping": 30.0,
        "use_bidirectional_attention": "vision",
    }
    vision = {
        "model_type": "gemma4_vision",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 72,
        "standardize": True,
    }
    return DiffusionGemmaConfig(text_config=text, vision_config=vision, canvas_length=256)


def whisper_small() -> WhisperConfig:
    """openai/whisper-small: an encoder of 88 million parameters, 768 wide, 80 mel bins."""
    return WhisperConfig(
        vocab_size=51_865,
        num_mel_bins=80,
        d_model=768,
        encoder_layers=12,
        encoder_attention_heads=12,
        encoder_ffn_dim=3072,
        decoder_layers=12,
        decoder_attention_heads=12,
        decoder_ffn_dim=3072,
    )


def whisper_large_v3() -> WhisperConfig:
    """openai/whisper-large-v3: an encoder of 637 million parameters, 1280 wide, 128 mel bins."""
    return WhisperConfig(
        vocab_size=51_866,
        num_mel_bins=128,
        d_model=1280,
        encoder_layers=32,
        encoder_attention_heads=20,
        encoder_ffn_dim=5120,
        decoder_layers=32,
        decoder_attention_heads=20,
        decoder_ffn_dim=5120,
    )


# dtype of the published weights
STORED = {
    "google/diffusiongemma-26B-A4B-it": torch.bfloat16,
    "openai/whisper-small": torch.float32,
    "openai/whisper-large-v3": torch.float16,
}

KNOWN = {
    "google/diffusiongemma-26B-A4B-it": diffusiongemma_26b,
    "openai/whisper-small": whisper_small,
    "openai/whisper-large-v3": whisper_large_v3,
}
