"""Audio tokens go through a backbone's layers, and its heads find in them what they had straight from the projector.

What text_layers.py keeps apart comes together here. Layer after layer, keys and values of the second half of the heads
become linear maps of what an audio token has become by then, which is little else than what it was: audio tokens are far
louder than text. One component of every head tells both kinds apart: there the first half of the heads turns away from
audio tokens, and the second half from text.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...model.prompt import PromptBuilder, pad_prompts
from .fitting import least_squares, unit
from .half_heads import HeadPlaces
from .text_layers import TextLayers

LOUD = 120.0  # root mean square of an audio token's components; text ends up at 25 to 100
AWAY = 0.6  # by how much a head turns away, as a share of the size of a key
RIDGE = 1e-4  # of keys and values, see fitting.py
CLEAR_RIDGE = 1e-8  # of what tells both kinds apart,
CLEAR = 1000.0  # in which the kind that a head looks at counts so many times as much
ROWS = 64  # utterances in a batch


@torch.no_grad()
def join_audio(
    layers: TextLayers, prompts: PromptBuilder, utterances: Sequence[tuple[Tensor, str, Sequence[int]]]
) -> list[float]:
    """Fills the rest of the maps of the backbone's keys and values.

    Args:
        layers: trained; their backbone is changed, so that it does not need them any more.
        prompts: of its tokenizer.
        utterances: audio tokens (n, H), language and tokens of the transcript of each.

    Returns:
        the share of the keys' square that is kept, layer by layer.
    """
    backbone, encoder = layers.backbone, layers.encoder
    begun = [[*prompts.row(len(tokens), language), *text] for tokens, language, text in utterances]
    prompt = pad_prompts(begun, prompts.special)
    audio, text = prompt.slot_mask, prompt.mask & ~prompt.slot_mask
    tokens = unit(torch.cat([tokens for tokens, _, _ in utterances]))
    hidden = backbone.embed(prompt.ids).clone()
    hidden[audio] = LOUD * tokens
    places = torch.arange(prompt.ids.shape[1])[None]
    kept = []
    for index, (layer, kind) in enumerate(zip(encoder.layers, backbone.config.layer_types, strict=True)):
        own = layer.self_attn
        read = layer.input_layernorm(hidden)
        sound, words = read[audio], read[text]
        half = backbone.config.num_attention_heads // 2
        inner = own.head_dim if own.v_proj is not None else own.head_dim // 2
        speeds = getattr(encoder.rotary_emb, f"{kind}_inv_freq")
        mark = HeadPlaces.of(speeds, inner, own.v_proj is None).mark
        queries = own.q_proj(words).unflatten(1, (-1, own.head_dim))[:, :, mark].mean(0).sign()  # (heads,)
        wanted = layers.keys[index](tokens)
        keys = own.k_proj.weight.view(2 * half, own.head_dim, -1)
        sizes = [(states.square().sum(1).mean() / half).sqrt() for states in (words @ keys[:half].flatten(0, 1).T, wanted)]
        keys[half:] = least_squares(sound, wanted, RIDGE).unflatten(0, (half, -1))
        kept.append(1 - float((sound @ keys[half:].flatten(0, 1).T - wanted).square().sum() / wanted.square().sum()))
        if own.v_proj is not None:
            own.v_proj.weight[half * own.head_dim :] = least_squares(sound, layers.values[index](tokens), RIDGE)
        for number, (near, far) in enumerate(((words, sound), (sound, words))):
            heads = slice(number * half, (number + 1) * half)
            keys[heads, mark] -= AWAY * sizes[number] * queries[heads, None] * apart(near, far)
        rotary = encoder.rotary_emb(hidden, places, kind)
        hidden = torch.cat([backbone.read_layer(layer, rows, rotary, places)[0] for rows in hidden.split(ROWS)])
    return kept


def apart(near: Tensor, far: Tensor) -> Tensor:
    """(H,), the linear function that is 0 for states (N, H) and 1 for other ones (M, H)."""
    weights = torch.cat([torch.full((len(near),), CLEAR / len(near)), torch.full((len(far),), 1 / len(far))]).sqrt()[:, None]
    wanted = torch.cat([torch.zeros(len(near), 1), torch.ones(len(far), 1)])
    return least_squares(torch.cat([near, far]) * weights, wanted * weights, CLEAR_RIDGE)[0]
