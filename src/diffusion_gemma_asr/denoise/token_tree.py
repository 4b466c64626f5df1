"""Several continuations of one beginning, or of a few, read in one pass: they are a tree, in which a token sees those that
lead to it, so that what they have in common is read once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..model.backbone import Backbone
from ..model.prefill import Prefill


class Tree(NamedTuple):
    """Rows of tokens as a tree. Its places are the beginnings of rows; the first is empty.

    Attributes:
        tokens: N, the last of each beginning but the first.
        before: N, the place of the beginning without it.
        paths: of each row, the places of its beginnings but the first.
    """

    tokens: list[int]
    before: list[int]
    paths: list[list[int]]

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> Tree:
        """The tree of some rows, of which some may be empty or alike."""
        places: dict[tuple[int, int], int] = {}  # by the place before and the token
        tree = cls([], [], [])
        for row in rows:
            path, place = [], 0
            for token in row:
                if (place, token) not in places:
                    tree.tokens.append(token)
                    tree.before.append(place)
                    places[place, token] = len(tree.tokens)
                place = places[place, token]
                path.append(place)
            tree.paths.append(path)
        return tree

    @property
    def ends(self) -> list[int]:
        """The place of each whole row."""
        return [path[-1] if path else 0 for path in self.paths]

    def seen(self) -> Tensor:
        """(N, N) bool: which tokens each one sees, itself among them."""
        seen = torch.eye(len(self.tokens) + 1, dtype=torch.bool)
        for place, before in enumerate(self.before, 1):
            seen[place] |= seen[before]
        return seen[1:, 1:]


class TreeReading(NamedTuple):
    """What the backbone makes of R rows behind each of K beginnings.

    Attributes:
        said: K lists of R log-probabilities, nats.
        ended: the same of an end behind each row; zeros where that was not asked for.
        prefill: K rows, with all tokens of the tree behind each beginning.
        size: positions of the cache before the tree.
        hidden: (K, N + 1, H), what predicts a token behind each place.
        paths: see `Tree`.
    """

    said: list[list[float]]
    ended: list[list[float]]
    prefill: Prefill
    size: int
    hidden: Tensor
    paths: list[list[int]]

    def behind(self, beginning: int, row: int) -> tuple[Prefill, Tensor]:
        """One beginning with one row behind it: its cache, and the hidden state (1, H) that predicts what follows."""
        read, path = self.prefill.visible[beginning, : self.size].nonzero().flatten(), self.paths[row]
        positions = torch.cat([read, torch.tensor(path, dtype=torch.long, device=read.device) + (self.size - 1)])
        last = self.hidden[beginning, path[-1] if path else 0]
        return self.prefill.pick(beginning, positions), last[None]


@torch.no_grad()
def read_tree(
    backbone: Backbone, rows: Sequence[Sequence[int]], prefill: Prefill, last: Tensor, end: int | None = None
) -> TreeReading:
    """Reads rows behind beginnings.

    Args:
        backbone: that reads.
        rows: R lists of tokens.
        prefill: K rows, the beginnings, in a cache that may be used again.
        last: (K, H), hidden states at their ends.
        end: the token that ends a transcript, if its log-probability behind each row is wanted.
    """
    tree, count, size = Tree.of(rows), len(last), prefill.visible.shape[1]
    hidden = last[:, None]  # (K, 1, H)
    if tree.tokens:
        ids = torch.tensor([tree.tokens], device=last.device).expand(count, -1)  # (K, N)
        prefill, behind = backbone.extend(backbone.embed(ids), prefill, tree.seen().to(last.device))
        hidden = torch.cat([hidden, behind], 1)  # (K, N + 1, H)
    ends = [] if end is None else tree.ends
    predicting, predicted = [*tree.before, *ends], [*tree.tokens, *([end] * len(ends))]
    states = sorted(set(predicting))  # tokens that go on from one beginning share its normaliser, which costs most
    row = {place: at for at, place in enumerate(states)}
    columns = torch.tensor([predicted], dtype=torch.long, device=last.device).expand(count, -1)
    everywhere = torch.ones(count, len(states), dtype=torch.bool, device=last.device)
    by_state = backbone.head.log_probs(hidden[:, states], columns, everywhere)  # (K, states, tokens)
    scores = by_state[:, [row[place] for place in predicting], range(len(predicted))]
    said, ended = [], []
    for found in scores.tolist():
        totals = [0.0]
        for before, score in zip(tree.before, found, strict=False):
            totals.append(totals[before] + score)
        said.append([totals[place] for place in tree.ends])
        ended.append(found[len(tree.tokens) :] if ends else [0.0] * len(rows))
    return TreeReading(said, ended, prefill, size, hidden, tree.paths)
