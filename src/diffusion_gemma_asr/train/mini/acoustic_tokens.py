"""Token rows and audio tokens of a backbone that is to begin as a listener: one channel of theirs is constant, and tells
them apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .fitting import unit
from .listener import Listener

CONSTANT = 0.2  # what all token rows have in their last channel; about the largest component of a row
SILENT_SHARE = 0.6  # of an audio token's square that does not depend on the sound, in the last channel


class HeardUtterance(NamedTuple):
    """An utterance to fit maps to: acoustic tokens (n, D) of the listener, tokens, the language's number."""

    tokens: Tensor
    text: list[int]
    language: int


def with_constant(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Token rows (V, H) in other axes: the last one, along which they varied least, is the same for all.

    A head whose hidden states have nothing in that channel (the last norm and the projector see to it) gives the same
    logits as before, but for what is lost there.

    Returns:
        the rows, and the symmetric (H, H) that maps states to the new axes.
    """
    _, axes = torch.linalg.eigh(rows.double().T @ rows.double())
    mirror = axes[:, 0].clone()
    mirror[-1] -= 1
    mirror /= mirror.norm()
    turn = (torch.eye(len(mirror), dtype=torch.double) - 2 * mirror[:, None] * mirror).to(rows.dtype)
    turned = rows @ turn
    turned[:, -1] = CONSTANT
    return turned, turn


@dataclass(frozen=True)
class AcousticTokens:
    """A listener's acoustic tokens in a backbone's axes, without their mean; in the last channel they are all the same.

    Attributes:
        mean: (D,) of the listener's; size: of what is left, root of the mean square.
        turn: (H, H), see `with_constant`.
    """

    mean: Tensor
    size: Tensor
    turn: Tensor

    @classmethod
    def of(cls, utterances: Sequence[HeardUtterance], turn: Tensor) -> AcousticTokens:
        """As those of some utterances are on average."""
        every = torch.cat([utterance.tokens for utterance in utterances])
        mean = every.mean(0)
        return cls(mean, ((every - mean) @ turn)[:, :-1].square().sum(1).mean().sqrt(), turn)

    def unit(self, tokens: Tensor) -> Tensor:
        """(M, D) of the listener's → (M, H) of root mean square 1."""
        made = ((tokens - self.mean) @ self.turn) * self.loudness
        made[:, -1] = -(SILENT_SHARE**0.5)
        return unit(made)

    @torch.no_grad()
    def projection(self, listener: Listener) -> nn.Conv1d:
        """The projector's map of frames to them."""
        theirs, stride = listener.acoustic, listener.stride
        made = nn.Conv1d(theirs.in_channels, theirs.out_channels, stride, stride)
        assert made.bias is not None and theirs.bias is not None
        made.weight.copy_(torch.einsum("oik,oh->hik", theirs.weight, self.turn) * self.loudness)
        made.bias.copy_(((theirs.bias - self.mean) @ self.turn) * self.loudness)
        made.weight[-1], made.bias[-1] = 0.0, -(SILENT_SHARE**0.5)
        return made

    @property
    def loudness(self) -> Tensor:
        """Factor on what depends on the sound."""
        return (1 - SILENT_SHARE) ** 0.5 / self.size
