"""Configurations of small DiffusionGemmas in the real one's shape: sliding and full layers, few global heads,
experts."""

from __future__ import annotations

from transformers import DiffusionGemmaConfig, PreTrainedTokenizerBase


def small_config(
    tokenizer: PreTrainedTokenizerBase, *, hidden: int, layers: int, heads: int, head_dim: int, intermediate: int,
    experts: int, top_k: int, expert_intermediate: int,
) -> DiffusionGemmaConfig:  # fmt: skip
    """A text backbone for `tokenizer`; its vision tower, which the architecture demands, has one layer of width 8.

    As in the 26B model every sixth layer sees everything with heads twice as wide and half as many key/value heads.
    """
    eos = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<turn|>")]
    text = {
        "vocab_size": len(tokenizer), "hidden_size": hidden, "intermediate_size": intermediate,
        "num_hidden_layers": layers, "layer_types": _layer_types(layers), "num_attention_heads": heads,
        "num_key_value_heads": heads // 2, "head_dim": head_dim, "global_head_dim": 2 * head_dim,
        "num_global_key_value_heads": max(1, heads // 4), "num_experts": experts, "top_k_experts": top_k,
        "moe_intermediate_size": expert_intermediate, "sliding_window": 1024, "max_position_embeddings": 4096,
        "use_bidirectional_attention": "vision", "final_logit_softcapping": 30.0, "initializer_range": hidden**-0.5,
        "pad_token_id": tokenizer.pad_token_id, "eos_token_id": eos, "bos_token_id": tokenizer.bos_token_id,
    }  # fmt: skip
    vision = {
        "model_type": "gemma4_vision", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8, "patch_size": 4,
        "position_embedding_size": 4,
    }  # fmt: skip
    unused = len(tokenizer) - 1
    return DiffusionGemmaConfig(
        text_config=text, vision_config=vision, canvas_length=64, initializer_range=hidden**-0.5,
        image_token_id=unused, boi_token_id=unused, eoi_token_id=unused,
    )  # fmt: skip


def _layer_types(layers: int) -> list[str]:
    """Five sliding layers to one full one; the last is always full."""
    kinds = ["sliding_attention" if (i + 1) % 6 else "full_attention" for i in range(layers)]
    return [*kinds[:-1], "full_attention"]
