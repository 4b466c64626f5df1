"""Configurations of small DiffusionGemmas in the real one's shape: sliding and full layers, few global heads,
experts."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import DiffusionGemmaConfig, PreTrainedTokenizerBase


@dataclass(frozen=True)
class BackboneShape:
    """The sizes of a small DiffusionGemma."""

    hidden: int  # width of a token row
    layers: int
    heads: int
    head_dim: int  # twice as wide in the layers that see everything
    intermediate: int  # of the feed-forward part that all tokens share
    experts: int
    top_k: int  # experts that a token uses
    expert_intermediate: int


def small_config(tokenizer: PreTrainedTokenizerBase, shape: BackboneShape) -> DiffusionGemmaConfig:
    """A text backbone for `tokenizer`; its vision tower, which the architecture demands, has one layer of width 8.

    As in the 26B model every sixth layer sees everything with heads twice as wide and half as many key/value heads.
    """
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "layer_types": _layer_types(shape.layers),
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads // 2,
        "head_dim": shape.head_dim,
        "global_head_dim": 2 * shape.head_dim,
        "num_global_key_value_heads": max(1, shape.heads // 4),
        "num_experts": shape.experts,
        "top_k_experts": shape.top_k,
        "moe_intermediate_size": shape.expert_intermediate,
        "sliding_window": 1024,
        "max_position_embeddings": 4096,
        "use_bidirectional_attention": "vision",
        "final_logit_softcapping": 30.0,
        "initializer_range": shape.hidden**-0.5,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<turn|>")],
        "bos_token_id": tokenizer.bos_token_id,
    }
    vision = {
        "model_type": "gemma4_vision",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "patch_size": 4,
        "position_embedding_size": 4,
    }
    unused = len(tokenizer) - 1
    return DiffusionGemmaConfig(
        text_config=text,
        vision_config=vision,
        canvas_length=64,
        initializer_range=shape.hidden**-0.5,
        image_token_id=unused,
        boi_token_id=unused,
        eoi_token_id=unused,
    )


def _layer_types(layers: int) -> list[str]:
    """Five sliding layers to one full one; the last is always full."""
    kinds = ["sliding_attention" if (i + 1) % 6 else "full_attention" for i in range(layers)]
    return [*kinds[:-1], "full_attention"]
