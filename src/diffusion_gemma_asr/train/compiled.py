"""The backbone's layers compiled, for training: fused elementwise operations save a CPU a third of the time.

Compiling takes minutes, once for each kind of shape, so that it is for runs of an hour or more. The projector is left
alone: torch compiles the gradient of a convolution anew for every length, and its layers were a tenth faster at best.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..model.backbone import CACHE, Backbone, CacheLayer, FilledCache, Prefill

Compiler = Callable[[Callable[..., Any]], Callable[..., Any]]
KINDS = 64  # graphs of one function at most: layers differ in their attention, calls in shapes of 1, masks and gradients


class _Kept:
    """A cache of one layer that keeps what it is given."""

    keys: Tensor
    values: Tensor

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        self.keys, self.values = keys, values
        return keys, values


class _Given:
    """A cache of one layer that has been filled, under whatever index the layer asks for."""

    is_compileable = False

    def __init__(self, keys: Tensor, values: Tensor):
        self.layers = self
        self.layer = CacheLayer(keys, values)

    def __getitem__(self, index: int) -> CacheLayer:
        return self.layer


def _read(layer: nn.Module, hidden: Tensor, rotary: Any, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A layer of the encoder → hidden states, keys, values."""
    kept = _Kept()
    hidden = layer(hidden, position_embeddings=rotary, attention_mask=None, position_ids=positions, **{CACHE: kept})
    return hidden, kept.keys, kept.values


def _write(
    layer: nn.Module, hidden: Tensor, rotary: Any, mask: Tensor | None, positions: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """A layer of the decoder over a canvas, behind the encoder's keys and values."""
    cache = _Given(keys, values)
    return layer(hidden, position_embeddings=rotary, attention_mask=mask, position_ids=positions, **{CACHE: cache})


def default_compiler() -> Compiler:
    """torch's, with shapes that may change."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, KINDS)
    return partial(torch.compile, dynamic=True)


def compile_layers(backbone: Backbone, compiler: Compiler | None = None) -> None:
    """Lets `prefill` and `denoise_hidden` of this backbone run compiled layers.

    Args:
        backbone: to be trained.
        compiler: of a function; None is `default_compiler`.
    """
    compiler = compiler or default_compiler()
    read, write = compiler(_read), compiler(_write)
    encoder, decoder = backbone.model.model.encoder.language_model, backbone.model.model.decoder
    kinds = backbone.config.layer_types

    def prefill(embeds: Tensor, mask: Tensor, lengths: Tensor | None = None) -> tuple[Prefill, Tensor]:
        size = embeds.shape[1]
        if size >= backbone.config.sliding_window:
            raise ValueError(f"a prompt of {size} tokens; the backbone's window is {backbone.config.sliding_window}")
        lengths = mask.sum(1) if lengths is None else lengths
        positions = torch.arange(size, device=embeds.device)[None]
        rotary = {kind: encoder.rotary_emb(embeds, positions, kind) for kind in encoder.unique_layer_types}
        hidden, filled = embeds, []
        for layer, kind in zip(encoder.layers, kinds, strict=True):
            hidden, keys, values = read(layer, hidden, rotary[kind], positions)
            filled.append((keys, values))
        visible = torch.arange(size, device=embeds.device) < lengths[:, None]
        return Prefill(FilledCache(filled), visible, lengths), encoder.norm(hidden)

    def denoise_hidden(canvas: Tensor, prefill: Prefill, self_conditioning: Tensor | None = None) -> Tensor:
        hidden = decoder.embed_tokens(canvas)
        soft = torch.zeros_like(hidden)
        if self_conditioning is not None:
            share = self_conditioning.softmax(-1, dtype=torch.float32).to(backbone.lm_head_weight.dtype)
            soft = share @ decoder.embed_tokens.weight * decoder.embed_tokens.embed_scale.to(hidden.dtype)
        hidden = decoder.self_conditioning(hidden, soft)
        batch, length = canvas.shape
        seen = torch.cat([prefill.visible, prefill.visible.new_ones(batch, length)], 1)  # (B, P + C)
        mask = None if bool(seen.all()) else seen[:, None, None, :].expand(-1, 1, length, -1)
        positions = prefill.first[:, None] + torch.arange(length, device=canvas.device)
        rotary = {kind: decoder.rotary_emb(hidden, positions, kind) for kind in decoder.unique_layer_types}
        for layer, kind, (keys, values) in zip(decoder.layers, kinds, prefill.layers(), strict=True):
            hidden = write(layer, hidden, rotary[kind], mask, positions, keys, values)
        return decoder.norm(hidden)

    backbone.prefill = prefill  # type: ignore[method-assign]
    backbone.denoise_hidden = denoise_hidden  # type: ignore[method-assign]
