"""A DiffusionGemma's layers over text alone, half of whose heads look at audio tokens as they come from the projector.

In the model itself audio tokens go through all layers, as every token of a prompt does, which is most of the work: there
are three times as many of them as there is text. A backbone that begins as a Whisper's decoder first learns without that
(hearing.py), and then takes its audio tokens through the layers (join_audio.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import apply_rotary_pos_emb

from ...model.backbone import Backbone
from ...model.lengths import length_mask
from ...model.prompt import PromptBuilder


class TextRows(NamedTuple):
    """Prompts without their audio tokens, and transcripts behind them.

    Attributes:
        ids: (B, T) long; positions: (B, T) long, what they have with the audio tokens in place.
        real: (B, T) bool, no padding.
        after: (B, T) bool, behind the audio; the other tokens do not hear it.
        spoken: (B, T) bool, from which the transcript's tokens and its end are written.
        starts: (B,) long, the position of the first audio token.
    """

    ids: Tensor
    positions: Tensor
    real: Tensor
    after: Tensor
    spoken: Tensor
    starts: Tensor


def text_rows(
    prompts: PromptBuilder, counts: Sequence[int], languages: Sequence[str], targets: Sequence[Sequence[int]]
) -> TextRows:
    """Rows for utterances of so many audio tokens, in these languages, with targets of `PromptBuilder.target`."""
    audio, rows = prompts.special["audio"], []
    for count, language, target in zip(counts, languages, targets, strict=True):
        prompt = prompts.row(count, language)
        first = prompt.index(audio)
        text = [(token, place) for place, token in enumerate(prompt) if token != audio]
        text += [(token, len(prompt) + place) for place, token in enumerate(target[:-1])]
        rows.append((text, first, len(target)))
    size = max(len(text) for text, _, _ in rows)
    ids, positions = (torch.zeros(len(rows), size, dtype=torch.long) for _ in range(2))
    lengths, spoken = torch.tensor([len(text) for text, _, _ in rows]), torch.tensor([n for _, _, n in rows])
    for row, (text, _, _) in enumerate(rows):
        ids[row, : len(text)], positions[row, : len(text)] = torch.tensor(text).T
    starts = torch.tensor([first for _, first, _ in rows])
    real = length_mask(lengths, size)
    ending = real & ~length_mask(lengths - spoken, size)
    return TextRows(ids, positions, real, real & (positions > starts[:, None]), ending, starts)


class Turned(NamedTuple):
    """The rotations of a batch, for one kind of layer: of text and of audio tokens."""

    text: tuple[Tensor, Tensor]
    audio: tuple[Tensor, Tensor]

    def pick(self, rows: slice) -> Turned:
        """Some of the rows."""
        return Turned(*((cos[rows], sin[rows]) for cos, sin in self))


class TextLayers(nn.Module):
    """The layers, and beside them what the second half of their heads finds in audio tokens.

    Args:
        backbone: each of whose heads has keys and values of its own.

    Attributes:
        keys, values: maps (heads / 2 * head_dim, H) of audio tokens, layer by layer; where a layer makes keys and values
            by one map, there is none for values.
    """

    keys: Any  # layer by layer
    values: Any

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone = backbone
        width, half = backbone.hidden_size, backbone.config.num_attention_heads // 2
        owns = [layer.self_attn for layer in self.encoder.layers]
        self.keys = nn.ModuleList(nn.Linear(width, half * own.head_dim, bias=False) for own in owns)
        self.values = nn.ModuleList(
            nn.Identity() if own.v_proj is None else nn.Linear(width, half * own.head_dim, bias=False) for own in owns
        )

    @property
    def encoder(self) -> Any:
        """The backbone's encoder."""
        return self.backbone.model.model.encoder.language_model

    def rotations(self, rows: TextRows, size: int) -> dict[str, Turned]:
        """By kind of layer; `size` audio tokens a row."""
        places = rows.starts[:, None] + torch.arange(size, device=rows.starts.device)
        like = self.backbone.lm_head_weight
        turn = self.encoder.rotary_emb
        return {
            kind: Turned(turn(like, rows.positions, kind), turn(like, places, kind))
            for kind in dict.fromkeys(self.backbone.config.layer_types)
        }

    def layer(self, index: int, hidden: Tensor, turned: Turned, tokens: Tensor, heard: Tensor, after: Tensor) -> Tensor:
        """One layer.

        Args:
            index: of the layer.
            hidden: (B, T, H).
            turned: of the batch.
            tokens: (B, S, H) audio tokens of root mean square 1; heard (B, S) bool: real ones.
            after: (B, T) bool, see `TextRows`.

        Returns:
            (B, T, H).
        """
        layer = self.encoder.layers[index]
        own, half = layer.self_attn, self.backbone.config.num_attention_heads // 2
        split = (-1, own.head_dim)

        def ready(raw: Tensor, norm: nn.Module, turn: tuple[Tensor, Tensor] | None) -> Tensor:  # (B, heads, n, head_dim)
            states = norm(raw.unflatten(-1, split))
            return (states if turn is None else apply_rotary_pos_emb(states, *turn, unsqueeze_dim=2)).transpose(1, 2)

        read = layer.input_layernorm(hidden)
        queries = ready(own.q_proj(read), own.q_norm, turned.text)
        raw, sound = own.k_proj(read)[..., : half * own.head_dim], self.keys[index](tokens)
        raw_values, sound_values = raw, sound
        if own.v_proj is not None:
            raw_values, sound_values = own.v_proj(read)[..., : half * own.head_dim], self.values[index](tokens)
        written = F.scaled_dot_product_attention(
            queries[:, :half],
            ready(raw, own.k_norm, turned.text),
            ready(raw_values, own.v_norm, None),
            is_causal=True,
            scale=1.0,
        )
        said = F.scaled_dot_product_attention(
            queries[:, half:],
            ready(sound, own.k_norm, turned.audio),
            ready(sound_values, own.v_norm, None),
            attn_mask=heard[:, None, None],
            scale=1.0,
        )
        both = torch.cat([written, said * after[:, None, :, None]], 1).transpose(1, 2).flatten(2)
        hidden = hidden + layer.post_attention_layernorm(own.o_proj(both))
        dense = layer.post_feedforward_layernorm_1(layer.mlp(layer.pre_feedforward_layernorm(hidden)))
        flat = hidden.flatten(0, 1)
        _, weights, chosen = layer.router(flat)
        routed = layer.experts(layer.pre_feedforward_layernorm_2(flat), chosen, weights).view_as(hidden)
        return hidden + layer.post_feedforward_layernorm(dense + layer.post_feedforward_layernorm_2(routed))

    def forward(self, rows: TextRows, tokens: Tensor, counts: Tensor) -> Tensor:
        """The last hidden states (B, T, H) of rows that hear audio tokens (B, S, H), counts (B,) of them."""
        tokens = F.rms_norm(tokens, tokens.shape[-1:])
        heard, turned = length_mask(counts, tokens.shape[1]), self.rotations(rows, tokens.shape[1])
        hidden = self.backbone.embed(rows.ids)
        for index, kind in enumerate(self.backbone.config.layer_types):
            hidden = self.layer(index, hidden, turned[kind], tokens, heard, rows.after)
        return self.encoder.norm(hidden)
