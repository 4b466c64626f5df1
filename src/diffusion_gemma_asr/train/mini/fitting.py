"""How decoder_backbone.py finds maps: least squares, products of fewer components, and what a head's components are for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

READ_RIDGE = 1e-3  # of maps that read hidden states, as a share of each input's square


@dataclass(frozen=True)
class Places:
    """What the components of a head are for.

    Attributes:
        turning: (F, 2) pairs that turn fastest with the position.
        speeds: (F,) theirs.
        content: (R,) those of the decoder's queries and keys.
        still: one in which queries alone, and one in which keys alone are constant, so that norms change little.
        values: (d,) those of the decoder's values.
    """

    turning: Tensor
    speeds: Tensor
    content: Tensor
    still: tuple[int, int]
    values: Tensor

    @classmethod
    def of(cls, speeds: Tensor, inner: int, joined: bool) -> Places:
        """The places in heads whose pairs turn by `speeds` (width / 2,), for a decoder's of `inner` components.

        Args:
            joined: whether keys and values are one projection, twice as wide.
        """
        half = len(speeds)
        order = speeds.argsort(descending=True, stable=True)
        pairs = torch.stack([order, order + half], 1)
        count = inner // 4
        rest = pairs[count : 2 * count].flatten()
        values = pairs[2 * count :].flatten() if joined else torch.arange(inner)
        return cls(pairs[:count], speeds[order[:count]], rest[:-2], (int(rest[-2]), int(rest[-1])), values)


def few_products(queries: Tensor, keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Two maps (R, d) to fewer components, whose products come closest to those of queries and keys (N, d)."""

    def root(values: Tensor) -> tuple[Tensor, Tensor]:  # of the mean square, and its inverse
        squares, axes = torch.linalg.eigh(values.T @ values / len(values))
        squares = squares.clamp_min(1e-6 * squares.max()).sqrt()
        return axes * squares @ axes.T, axes / squares @ axes.T

    (query_root, query_inverse), (key_root, key_inverse) = root(queries), root(keys)
    left, sizes, right = torch.linalg.svd(query_root @ key_root)
    weights = sizes[:count, None].sqrt()
    return weights * (left[:, :count].T @ query_inverse), weights * (right[:count] @ key_inverse)


def few_values(values: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """A map (d - 1, d) of values (N, d) to one component less, and what writes of these (H, d - 1) nearly what `out` (H, d)
    writes of the values. Components that write more are larger, but only by the fourth root."""
    squares, axes = torch.linalg.eigh(values.T @ values / len(values))
    root = axes * squares.clamp_min(1e-9 * float(squares.max())).sqrt()
    turned, sizes, _ = torch.linalg.svd(root.T @ (out.T @ out) @ root)
    turned, sizes = turned[:, :-1], sizes[:-1].clamp_min(1e-9) ** 0.25
    sizes = sizes / sizes.square().mean().sqrt()
    return sizes[:, None] * (turned.T @ torch.linalg.inv(root)), out @ root @ turned / sizes


def least_squares(inputs: Tensor, outputs: Tensor, ridge: float, near: Tensor | None = None) -> Tensor:
    """The map W (B, A) for which inputs (N, A) @ W.T comes closest to outputs (N, B), and which stays close to `near`."""
    gram = inputs.T @ inputs
    squares = gram.diagonal()
    gram = gram + torch.diag(ridge * (squares + 1e-4 * squares.mean()))
    rest = outputs if near is None else outputs - inputs @ near.T
    found = torch.linalg.solve(gram, inputs.T @ rest).T
    return found if near is None else near + found


def unit(states: Tensor) -> Tensor:
    """(N, H), each of root mean square 1, as an RMSNorm without weights makes it."""
    return states * (states.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def centred(states: Tensor) -> Tensor:
    """Without the mean over the channels, which LayerNorm does not see."""
    return states - states.mean(-1, keepdim=True)


def channel_scales(states: Tensor, target: Tensor) -> Tensor:
    """(H,) factors by which states (N, H) come closest to the target."""
    return (states * target).sum(0) / states.square().sum(0)


def kept_variance(found: Tensor, target: Tensor) -> float:
    """The share of the target's (N, H) variance over tokens that is found."""
    missed = found - target
    return 1 - float((missed - missed.mean(0)).square().sum() / (target - target.mean(0)).square().sum())


def reading(inputs: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """The maps that make of our normed hidden states (N, H) the decoder's (D, H), and 1 (1, H)."""
    found = least_squares(inputs, torch.cat([theirs, theirs.new_ones(len(theirs), 1)], 1), READ_RIDGE)
    return found[:-1], found[-1:]


def carried(linear: nn.Linear, states: Tensor, one: Tensor) -> Tensor:
    """The map (out, H) that makes of our hidden states what `linear` makes of the decoder's; see `reading`."""
    return linear.weight @ states if linear.bias is None else linear.weight @ states + linear.bias[:, None] * one
