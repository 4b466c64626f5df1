"""Configurations of small DiffusionGemmas with the architecture of the real one: sliding and full attention, experts."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import DiffusionGemmaConfig, PreTrainedTokenizerBase


@dataclass(frozen=True)
class BackboneShape:
    """The sizes of a small DiffusionGemma."""

    hidden: int  # width of embeddings and hidden states
    layers: int
    heads: int  # query heads
    head_dim: int  # in sliding layers; full layers have twice as much
    intermediate: int  # width of the dense feed-forward block
    experts: int
    top_k: int  # experts per token
    expert_intermediate: int  # width of an expert
    turning: float = 1.0  # share of a head's components in sliding layers that turn with the position
    kv_heads: int | None = None  # key/value heads; None is half of the query heads in sliding layers, a quarter in full ones


def small_config(tokenizer: PreTrainedTokenizerBase, shape: BackboneShape) -> DiffusionGemmaConfig:
    """The configuration of a small text backbone.

    As in the 26B model every sixth layer has full attention, with heads twice as wide and half as many key/value heads. The
    vision tower, which the architecture requires, is a dummy of one layer of width 8.

    Args:
        tokenizer: of the backbone.
        shape: its sizes.
    """
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "layer_types": _layer_types(shape.layers),
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads or shape.heads // 2,
        "head_dim": shape.head_dim,
        "global_head_dim": 2 * shape.head_dim,
        "num_global_key_value_heads": shape.kv_heads or max(1, shape.heads // 4),
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
    if shape.turning < 1:
        text["rope_parameters"] = {
            "sliding_attention": {
                "rope_type": "proportional",
                "partial_rotary_factor": shape.turning,
                "rope_theta": 10_000.0,
            },
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
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
    """Full attention in the last layer and every sixth before it, sliding attention in the others."""
    return ["sliding_attention" if (layers - i) % 6 != 1 else "full_attention" for i in range(layers)]
