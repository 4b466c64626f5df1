"""What a prompt leaves behind for the canvas, and how a layer of DiffusionGemma reads one and writes the other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from inspect import signature, unwrap
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import DiffusionGemmaDecoderModel

_KEYWORDS = signature(unwrap(DiffusionGemmaDecoderModel.forward)).parameters
CACHE = "cache" if "cache" in _KEYWORDS else "past_key_values"  # its name until transformers 5.23


@dataclass(frozen=True)
class Prefill:
    """What the encoder leaves behind for the canvas.

    cache: keys and values (B, kv_heads, P, head_dim) of every layer; visible (B, P) bool: cache positions the canvas
    may read; lengths (B,) long: prompt tokens; at (B,) long: position of the canvas's first token, None where it continues
    behind the prompt.
    """

    cache: Cache | FilledCache
    visible: Tensor
    lengths: Tensor
    at: Tensor | None = None

    @property
    def first(self) -> Tensor:
        """(B,) long, the position of the canvas's first token."""
        return self.lengths if self.at is None else self.at

    def under_slots(self, slot_mask: Tensor) -> Prefill:
        """The same for aligned canvases, which have the positions of the audio tokens; slot_mask (B, P) bool."""
        return replace(self, at=slot_mask.int().argmax(1))

    def keep(self, rows: Tensor, size: int) -> Prefill:
        """Some rows (k,) long, the first `size` positions of the cache."""
        layers = [(keys[rows, :, :size], values[rows, :, :size]) for keys, values in self.layers()]
        return Prefill(FilledCache(layers), self.visible[rows, :size], self.lengths[rows], self.first[rows])

    def pick(self, row: int, positions: Tensor) -> Prefill:
        """One row, with these positions (n,) of the cache alone, in their order: a prompt of n tokens."""
        layers = [(keys[row : row + 1, :, positions], values[row : row + 1, :, positions]) for keys, values in self.layers()]
        device = self.visible.device
        visible = torch.ones(1, len(positions), dtype=torch.bool, device=device)
        return Prefill(FilledCache(layers), visible, torch.tensor([len(positions)], device=device))

    def join(self, other: Prefill) -> Prefill:
        """The rows of both; the shorter cache is padded."""
        size = max(self.visible.shape[1], other.visible.shape[1])

        def joined(a: Tensor, b: Tensor) -> Tensor:  # (B, heads, P, head_dim)
            return torch.cat([F.pad(x, (0, 0, 0, size - x.shape[2])) for x in (a, b)])

        pairs = zip(self.layers(), other.layers(), strict=True)
        layers = [(joined(k, k2), joined(v, v2)) for (k, v), (k2, v2) in pairs]
        visible = torch.cat([F.pad(x, (0, size - x.shape[1])) for x in (self.visible, other.visible)])
        return Prefill(
            FilledCache(layers), visible, torch.cat([self.lengths, other.lengths]), torch.cat([self.first, other.first])
        )

    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of every layer."""
        return [(layer.keys, layer.values) for layer in self.cache.layers]


class FilledCache:
    """Keys and values that the decoder reads: what it needs of a transformers Cache."""

    is_compileable = False

    def __init__(self, layers: list[tuple[Tensor, Tensor]]):
        self.layers = [CacheLayer(keys, values) for keys, values in layers]


class CacheLayer(NamedTuple):
    """Keys and values (B, kv_heads, P, head_dim) of a layer."""

    keys: Tensor
    values: Tensor


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


def read_layer(layer: nn.Module, hidden: Tensor, rotary: Any, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A layer of the encoder over prompts → hidden states, keys, values.

    There is no mask: within the window causal attention is plain, and padding stands behind everything real.
    """
    kept = _Kept()
    hidden = layer(hidden, position_embeddings=rotary, attention_mask=None, position_ids=positions, **{CACHE: kept})
    return hidden, kept.keys, kept.values


def write_layer(
    layer: nn.Module, hidden: Tensor, rotary: Any, mask: Tensor | None, positions: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """A layer of the decoder over canvases, behind the encoder's keys and values → hidden states."""
    cache = _Given(keys, values)
    return layer(hidden, position_embeddings=rotary, attention_mask=mask, position_ids=positions, **{CACHE: cache})
