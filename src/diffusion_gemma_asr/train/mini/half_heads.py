"""Half of the heads of a layer, and an attention of a listener's that they are to be: its queries, keys and values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .fitting import READ_RIDGE, carried, few_products, few_values, least_squares, reading
from .listener import Attention


@dataclass(frozen=True)
class HeadPlaces:
    """What the components of a head are for.

    Attributes:
        turning: (F, 2) pairs that turn with the position.
        speeds: (F,) theirs.
        content: (R,) those of the listener's queries and keys.
        still: one in which queries alone, and one in which keys alone are constant, so that norms change little.
        mark: one in which both are constant.
        values: (d,) those of the listener's values.
    """

    turning: Tensor
    speeds: Tensor
    content: Tensor
    still: tuple[int, int]
    mark: int
    values: Tensor

    @classmethod
    def of(cls, speeds: Tensor, inner: int, joined: bool) -> HeadPlaces:
        """The places in heads whose pairs turn by `speeds` (width / 2,), for a listener's of `inner` components.

        Args:
            joined: whether keys and values are one projection, twice as wide.
        """
        half, count = len(speeds), int((speeds > 0).sum())
        pairs = torch.stack([torch.arange(half), torch.arange(half) + half], 1)
        rest = pairs[count:].flatten()
        values = rest[-inner:] if joined else torch.arange(inner)
        if joined:
            rest = rest[:-inner]
        return cls(pairs[:count], speeds[:count], rest[:-3], (int(rest[-3]), int(rest[-2])), int(rest[-1]), values)


class HalfOfHeads:
    """Half of a layer's heads, and an attention of the listener's that they are to be.

    Args:
        attention: the listener's.
        inputs: (N, H), our states that queries read; states: (N, D), the listener's.
        read: (M, H), our states that keys and values read; read_states: (M, D), the listener's, None where its keys and
            values (M, D) are given.
    """

    def __init__(
        self,
        attention: Attention,
        inputs: Tensor,
        states: Tensor,
        read: Tensor,
        read_states: Tensor | None,
        keys: Tensor | None = None,
        values: Tensor | None = None,
    ):
        self.attention, self.heads, self.inputs, self.read = attention, attention.heads, inputs, read
        split = (attention.heads, -1)
        queries, self.query_one = reading(inputs, states)
        per_head = attention.q_proj.out_features // attention.heads
        scale = per_head**-0.5  # Gemma does not divide the products
        self.theirs_q = scale * attention.q_proj(states).unflatten(1, split)
        self.query_map = scale * carried(attention.q_proj, queries, self.query_one).unflatten(0, split)
        if read_states is not None:
            found, self.key_one = reading(read, read_states)
            keys, values = attention.k_proj(read_states), attention.v_proj(read_states)
            key_map = carried(attention.k_proj, found, self.key_one)
        else:
            assert keys is not None and values is not None
            self.key_one = least_squares(read, torch.ones(len(read), 1), READ_RIDGE)
            key_map = least_squares(read, keys, READ_RIDGE)
        self.theirs_k, self.theirs_v = keys.unflatten(1, split), values.unflatten(1, split)
        self.key_map = key_map.unflatten(0, split)

    def products(self, head: int, count: int) -> tuple[Tensor, Tensor]:
        """Maps (count, H) of our states to queries and keys, whose products are closest to the listener's."""
        mean = self.theirs_k[:, head].mean(0)  # softmax does not see what all keys have in common
        to_query, to_key = few_products(self.theirs_q[:, head], self.theirs_k[:, head] - mean, count)
        return to_query @ self.query_map[head], to_key @ (self.key_map[head] - mean[:, None] * self.key_one)

    def value(self, head: int) -> tuple[Tensor, Tensor]:
        """The map (d, H) of our states to values, the last of them constant, so that their norm hardly changes them; and
        what writes of them what the listener writes, (D, d)."""
        size = self.theirs_v.shape[2]
        out = self.attention.out_proj.weight[:, head * size : (head + 1) * size]
        values = self.theirs_v[:, head]
        to_few, written = few_values(values, out)
        few = values @ to_few.T
        constant = (2 * few.square().sum(1).mean()).sqrt()
        norm = ((few.square().sum(1).mean() + constant**2) / size).sqrt()
        found = torch.cat([least_squares(self.read, few, READ_RIDGE), constant * self.key_one]) / norm
        return found, torch.cat([written * norm, written.new_zeros(len(written), 1)], 1)
