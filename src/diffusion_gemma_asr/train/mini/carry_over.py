"""A small backbone's layers filled with those of a listener (listener.py): a Whisper's decoder carried over.

The two differ: Whisper has biases, LayerNorm in front of a block and plain feed-forward blocks; Gemma has rotations, no
biases, RMSNorm on both sides of a block, on queries, keys and values, and gated feed-forward blocks. They are alike all the
same:

- a linear function of a hidden state can be 1 everywhere, which stands in for biases and for gates: token rows have one
  channel in common (acoustic_tokens.py), and most of a deeper state is the same at every token anyway;
- norms behind a block divide by nearly the same at every token, and so only scale;
- a head's components that rotate are constant but for the rotation, which gives a listener's waves; the others hold content.

Layer after layer, each map is found by least squares between what this backbone and the listener make of the same
utterances, so that the next layer mends what the last one missed. The first half of the heads is the listener's
self-attention, the second half its cross-attention, whose keys and values come straight from audio tokens (text_layers.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import CheckpointError
from ...model.backbone import Backbone
from ...model.lengths import length_mask
from ...model.prompt import PromptBuilder
from .acoustic_tokens import AcousticTokens, HeardUtterance
from .fitting import carried, centred, channel_scales, kept_variance, least_squares, reading, unit
from .half_heads import HalfOfHeads, HeadPlaces
from .listener import Listener, ListenerLayer
from .text_layers import TextLayers, text_rows

MARK = 7.0  # product of queries and keys in the component that join_audio.py tells audio and text apart by
WRITE_RIDGE = 1e-2  # of maps that write to them, which stay near the decoder's own
QUIET = 1e-3  # size of what the decoder has no counterpart for: experts
LEAST_GAIN = 0.01  # of a channel in a norm, the mean being 1
ROWS = 64  # utterances in a batch
STILL = 1.5  # mean square of queries and keys with what is constant in them, the largest head's without it being 1
EVERYWHERE = 0.01  # weight of a token that a head of the decoder's does not attend to
WAVE_RIDGE = 1e-3  # of the functions of the distance


@dataclass(frozen=True)
class LayerStates:
    """What a layer of the listener makes of N tokens, and of M acoustic ones.

    Attributes:
        attending, sounding: (N, D), what its self- and its cross-attention read.
        between: (N, D), hidden states behind both.
        feeding: (N, D), what its feed-forward block reads.
        end: (N, D), hidden states behind the layer.
        keys, values: (M, D) of its cross-attention.
    """

    attending: Tensor
    sounding: Tensor
    between: Tensor
    feeding: Tensor
    end: Tensor
    keys: Tensor
    values: Tensor


@torch.no_grad()
def listener_states(listener: Listener, utterances: Sequence[HeardUtterance]) -> tuple[list[LayerStates], Tensor]:
    """The states of every layer, and what goes into the head, (N, D): of what each utterance's tokens are written from."""
    seen: list[dict[str, list[Tensor]]] = [{} for _ in listener.layers]
    last, begun = [], listener.starts.shape[1] - 1
    for tokens, text, language in utterances:
        states = listener.embed(torch.tensor([text], dtype=torch.long), torch.tensor([language]))
        heard = torch.ones(1, 1, 1, len(tokens), dtype=torch.bool)
        for layer, found in zip(listener.layers, seen, strict=True):
            between = layer.attend(states, tokens[None], heard)
            made = {
                "attending": layer.self_attn_layer_norm(states)[0, begun:],
                "sounding": layer.encoder_attn_layer_norm(states)[0, begun:],
                "between": between[0, begun:],
                "feeding": layer.final_layer_norm(between)[0, begun:],
                "keys": layer.encoder_attn.k_proj(tokens),
                "values": layer.encoder_attn.v_proj(tokens),
            }
            states = layer.feed(between)
            for key, value in (made | {"end": states[0, begun:]}).items():
                found.setdefault(key, []).append(value)
        last.append(listener.layer_norm(states)[0, begun:])
    return [LayerStates(**{key: torch.cat(parts) for key, parts in found.items()}) for found in seen], torch.cat(last)


def check_sizes(backbone: Backbone, listener: Listener) -> None:
    """Compares a backbone's sizes with a listener's.

    Raises:
        CheckpointError: they do not fit.
    """
    config = backbone.config
    sliding = config.per_layer_config[config.layer_types.index("sliding_attention")]
    wanted = {
        "layers": (config.num_hidden_layers, len(listener.layers)),
        "hidden": (config.hidden_size, listener.table.shape[1]),
        "heads": (config.num_attention_heads, 2 * listener.heads),
        "kv_heads": (sliding.num_key_value_heads, 2 * listener.heads),
        "head_dim": (sliding.head_dim, listener.table.shape[1] // listener.heads),
    }
    for key, (given, needed) in wanted.items():
        if given != needed:
            raise CheckpointError(f"to begin as this Whisper's decoder, 'shape.{key}' must be {needed}, not {given}")


class CarryOver:
    """Layers that are filled from the first to the last, and what those filled so far make of utterances.

    Args:
        layers: to fill; the rows of their backbone are there.
        prompts: of the backbone's tokenizer.
        utterances: to fit the maps to.
        languages: codes, by number.
        tokens: how they hear.
        scale: of the backbone's hidden states, the listener's being 1.
    """

    def __init__(
        self,
        layers: TextLayers,
        prompts: PromptBuilder,
        utterances: Sequence[HeardUtterance],
        languages: Sequence[str],
        tokens: AcousticTokens,
        scale: float,
    ):
        self.layers, self.turn, self.scale = layers, tokens.turn, scale
        self.encoder, self.config = layers.encoder, layers.backbone.config
        self.lengths = torch.tensor([len(one.text) + 1 for one in utterances])
        counts = torch.tensor([len(one.tokens) for one in utterances])
        end = prompts.special["end_of_turn"]
        self.rows = text_rows(
            prompts,
            counts.tolist(),
            [languages[one.language] for one in utterances],
            [[*one.text, end] for one in utterances],
        )
        self.heard = length_mask(counts, int(counts.max()))
        self.sound = torch.zeros(*self.heard.shape, layers.backbone.hidden_size)
        self.sound[self.heard] = tokens.unit(torch.cat([one.tokens for one in utterances]))
        self.turned = layers.rotations(self.rows, self.heard.shape[1])
        self.hidden = layers.backbone.embed(self.rows.ids).clone()

    def spoken(self) -> Tensor:
        """(N, H) hidden states that tokens are written from."""
        return self.hidden[self.rows.spoken]

    def run(self, index: int, module: nn.Module | None = None) -> Tensor:
        """What a layer makes of the hidden states, (B, T, H), or what goes into one of its modules, (N, ...) as `spoken`."""
        inputs, outputs = [], []
        turned = self.turned[self.config.layer_types[index]]
        for at in range(0, len(self.hidden), ROWS):
            rows = slice(at, at + ROWS)
            spoken = self.rows.spoken[rows]
            hook = (
                None
                if module is None
                else module.register_forward_pre_hook(lambda _, given, spoken=spoken: inputs.append(given[0][spoken]))
            )
            given = self.hidden[rows], turned.pick(rows), self.sound[rows], self.heard[rows], self.rows.after[rows]
            outputs.append(self.layers.layer(index, *given))
            if hook is not None:
                hook.remove()
        return torch.cat(outputs if module is None else inputs)

    def attention(self, index: int, theirs: ListenerLayer, state: LayerStates) -> None:
        """Fills the attention of a layer with both of a listener's layer."""
        layer = self.encoder.layers[index]
        own, size = layer.self_attn, layer.self_attn.head_dim
        inner = theirs.self_attn.q_proj.out_features // theirs.self_attn.heads
        inputs, sound = (
            self.normed(self.spoken(), layer.input_layernorm, theirs.self_attn_layer_norm),
            self.sound[self.heard],
        )
        speeds = getattr(self.encoder.rotary_emb, f"{self.config.layer_types[index]}_inv_freq")
        places = HeadPlaces.of(speeds, inner, own.v_proj is None)
        written = HalfOfHeads(theirs.self_attn, inputs, state.attending, inputs, state.attending)
        said = HalfOfHeads(theirs.encoder_attn, inputs, state.sounding, sound, None, state.keys, state.values)
        maps = {key: torch.zeros(2 * theirs.self_attn.heads, size, inputs.shape[1]) for key in "qkv"}
        write = torch.zeros(inputs.shape[1], len(maps["q"]), size)
        squares = {key: torch.zeros(len(maps["q"])) for key in "qk"}
        for number, half in enumerate((written, said)):
            for head in range(half.heads):
                place = number * half.heads + head
                query, key = half.products(head, len(places.content))
                maps["q"][place, places.content], maps["k"][place, places.content] = query, key
                if half is written:
                    waves = self.by_distance(half, head, inputs @ query.T, inputs @ key.T, places.speeds)  # (F, 2)
                    loudness = waves.norm(dim=1).clamp_min(1e-6).sqrt()
                    maps["q"][place, places.turning[:, 0]] = loudness[:, None] * half.query_one
                    for side in (0, 1):
                        maps["k"][place, places.turning[:, side]] = (waves[:, side] / loudness)[:, None] * half.key_one
                maps["q"][place, places.mark], maps["k"][place, places.mark] = (
                    MARK**0.5 * one[0] for one in (half.query_one, half.key_one)
                )
                value, out = half.value(head)
                maps["v"][place, places.values] = value
                write[:, place, places.values] = self.scale * self.turn @ centred(out.T).T
        if own.v_proj is None:  # keys and values are one projection
            maps["k"] += maps["v"]
        for name, norm, still in (("q", own.q_norm, places.still[0]), ("k", own.k_norm, places.still[1])):
            for number, half in enumerate((written, said)):
                for head in range(number * half.heads, (number + 1) * half.heads):
                    read = half.inputs if name == "q" else half.read
                    squares[name][head] = (read @ maps[name][head].T).square().sum(1).mean()
            wanted = STILL * squares[name].max()  # of every head alike: one norm serves all
            for number, half in enumerate((written, said)):
                one = half.query_one if name == "q" else half.key_one
                for head in range(number * half.heads, (number + 1) * half.heads):
                    maps[name][head, still] += (wanted - squares[name][head]).sqrt() * one[0]
            norm.weight.fill_((wanted / size) ** 0.5)
        half_rows = len(maps["q"]) // 2 * size
        own.q_proj.weight.copy_(maps["q"].flatten(0, 1))
        for name, linear, beside in (("k", own.k_proj, self.layers.keys), ("v", own.v_proj, self.layers.values)):
            if linear is not None:
                linear.weight.zero_()
                linear.weight[:half_rows] = maps[name].flatten(0, 1)[:half_rows]
                beside[index].weight.copy_(maps[name].flatten(0, 1)[half_rows:])
        target = self.scale * centred(state.between) @ self.turn - self.spoken()
        self.writer(own.o_proj, self.run(index, own.o_proj), target, write.flatten(1), layer.post_attention_layernorm)

    def by_distance(self, half: HalfOfHeads, head: int, queries: Tensor, keys: Tensor, speeds: Tensor) -> Tensor:
        """What the listener's attention depends on beside content, as a function of the distance.

        Args:
            half: self-attention; head: of it.
            queries, keys: (N, R) of ours, without positions.
            speeds: (F,) angles by which pairs of our components turn from one position to the next.

        Returns:
            (F, 2): factors of the cosine and the sine of speed times distance, which are closest to what is missing in our
            logits where the listener attends.
        """
        size = int(self.lengths.max())
        waves_of = half.attention.by_distance(size)[head]
        weights, sums = torch.zeros(size), torch.zeros(size)
        ends = self.lengths.cumsum(0).tolist()
        for start, end in zip([0, *ends], ends, strict=False):
            row, length = slice(start, end), end - start
            causal = torch.ones(length, length, dtype=torch.bool).tril()
            wanted = half.theirs_q[row, head] @ half.theirs_k[row, head].T + waves_of[:length, :length].masked_fill(
                ~causal, 0
            )
            missing = wanted - queries[row] @ keys[row].T
            seen = wanted.masked_fill(~causal, -torch.inf).softmax(1) + EVERYWHERE * causal
            missing = missing - (seen * missing).sum(1, keepdim=True) / seen.sum(1, keepdim=True)  # softmax sees no constant
            distance = torch.arange(length)[:, None] - torch.arange(length)
            weights.index_add_(0, distance[causal], seen[causal])
            sums.index_add_(0, distance[causal], (seen * missing)[causal])
        angles = speeds * torch.arange(size)[:, None]  # (distances, F)
        waves = torch.cat([angles.cos(), angles.sin(), torch.ones(size, 1)], 1) * weights.sqrt()[:, None]
        found = least_squares(waves, (sums / weights.clamp_min(1e-9) * weights.sqrt())[:, None], WAVE_RIDGE)[0, :-1]
        return found.unflatten(0, (2, -1)).T

    def feed_forward(self, index: int, theirs: ListenerLayer, state: LayerStates) -> None:
        """Fills the dense feed-forward block of a layer with those units of the listener's whose output varies most, and one
        that is constant."""
        layer, first, second = self.encoder.layers[index], theirs.fc1, theirs.fc2
        before, mlp = self.run(index, layer.pre_feedforward_layernorm), layer.mlp
        inputs = self.normed(before, layer.pre_feedforward_layernorm, theirs.final_layer_norm)
        active = F.gelu(first(state.feeding))
        weights = centred(second.weight.T)
        varies = (active - active.mean(0)).square().mean(0).sqrt() * weights.norm(dim=1)
        chosen = varies.topk(min(mlp.gate_proj.out_features - 1, len(varies))).indices
        count = len(chosen) + 1
        states, one = reading(inputs, state.feeding)
        mlp.gate_proj.weight[:count] = torch.cat([carried(first, states, one)[chosen], 2 * one])
        mlp.up_proj.weight[:count] = one
        gated = mlp.act_fn(inputs @ mlp.gate_proj.weight[:count].T) * (inputs @ mlp.up_proj.weight[:count].T)
        near = torch.cat([self.scale * (weights[chosen] @ self.turn).T, weights.new_zeros(len(self.turn), 1)], 1)
        layer.post_feedforward_layernorm_1.weight.fill_(1.0)
        layer.post_feedforward_layernorm_2.weight.fill_(QUIET)
        target = self.scale * centred(state.end) @ self.turn - before
        self.writer(mlp.down_proj, gated, target, near, layer.post_feedforward_layernorm)
        size = mlp.down_proj.weight.square().mean().sqrt() * mlp.down_proj.in_features**0.5  # 1 in a new backbone
        mlp.up_proj.weight.mul_(size)
        mlp.down_proj.weight.div_(size)
        self.hidden = self.run(index)

    def normed(self, states: Tensor, norm: Any, theirs: nn.LayerNorm) -> Tensor:
        """What a norm makes of hidden states (N, H), once it favours the channels that a decoder's norm favours: what comes
        next then learns as readily as there."""
        favour = theirs.weight.abs().clamp_min(LEAST_GAIN * theirs.weight.abs().mean()).clone()
        favour[-1] = favour.mean()  # the constant
        norm.weight.copy_(favour / (unit(states) * favour).square().mean().sqrt())
        return unit(states) * norm.weight

    def writer(self, linear: nn.Linear, inputs: Tensor, target: Tensor, near: Tensor, norm: Any) -> None:
        """Fills `linear` and the norm behind it, so that inputs (N, K) become the target (N, H)."""
        sizes = target.square().mean(0).sqrt().clamp_min(1e-4)  # (H,); the norm has them, so that map's rows are alike
        found = least_squares(inputs, target, WRITE_RIDGE, near) / sizes[:, None]
        linear.weight.zero_()
        linear.weight[:, : found.shape[1]] = found
        norm.weight.copy_(channel_scales(unit(inputs @ found.T), target))


@torch.no_grad()
def carry_over(
    listener: Listener,
    layers: TextLayers,
    tokens: AcousticTokens,
    prompts: PromptBuilder,
    utterances: Sequence[HeardUtterance],
    languages: Sequence[str],
    factor: float,
) -> float:
    """Fills a backbone's layers with a listener's.

    Args:
        listener: trained.
        layers: of a backbone with the rows of `with_constant`; are overwritten.
        tokens: how they hear.
        prompts: of the backbone's tokenizer.
        utterances: to fit the maps to; languages: codes, by number.
        factor: see `load_listener`.

    Returns:
        the share of the last hidden states' variance that is kept.

    Raises:
        CheckpointError: the backbone's sizes are not the listener's.
    """
    check_sizes(layers.backbone, listener)
    states, last = listener_states(listener, utterances)
    scale = factor * layers.backbone.hidden_size**0.5
    fit = CarryOver(layers, prompts, utterances, languages, tokens, scale)
    for index, (layer, state) in enumerate(zip(listener.layers, states, strict=True)):
        fit.attention(index, layer, state)
        fit.feed_forward(index, layer, state)
    norm, found, wanted = layers.encoder.norm, unit(fit.spoken()), last / factor @ tokens.turn
    norm.weight.copy_(channel_scales(found, wanted))
    norm.weight[-1] = 0  # token rows have the same there
    return kept_variance((found * norm.weight)[:, :-1], wanted[:, :-1])
