"""A language model that reads whole sentences: long short-term memories over tokens, to judge transcripts that were found.

Counted sequences (ngram.py) end after a few tokens. Whether an ending that nobody hears is in place ("les castors ... sont
allés") a word at the sentence's beginning may tell. Such a model is too slow to search with; a few dozen transcripts of one
clip, most of whose beginnings are the same, it reads at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import CheckpointError, first_line
from ..model.packing import unpack


class SentenceLM(nn.Module):
    """Log-probabilities of tokens by all those before them in a sentence.

    The last layer is as wide as the embeddings, which are the matrix of its logits too (Press and Wolf 2017).

    Args:
        vocab_size: tokens have smaller ids.
        width: of the embeddings.
        hidden: of the layers before the last.
        layers: how many, at least 1.
        bos, eos: what stands before and behind a sentence.
    """

    def __init__(self, vocab_size: int, width: int, hidden: int, layers: int, bos: int, eos: int):
        super().__init__()
        self.bos, self.eos = bos, eos
        self.embedding = nn.Embedding(vocab_size, width)
        widths = [width, *[hidden] * (layers - 1), width]
        self.layers = nn.ModuleList(nn.LSTM(before, after, batch_first=True) for before, after in pairwise(widths))
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        nn.init.normal_(self.embedding.weight, std=width**-0.5)

    def logits(self, states: Tensor) -> Tensor:
        """(..., vocab_size) of the last layer's outputs (..., width)."""
        return F.linear(states, self.embedding.weight, self.bias)

    @torch.inference_mode()
    def scores(self, sentences: Sequence[Sequence[int]]) -> list[float]:
        """Log-probabilities of sentences of token ids and of their ends, in nats. Equal beginnings are read once."""
        totals = [0.0] * len(sentences)
        reading = list(range(len(sentences)))  # the sentences that are as long as what was read
        at = [0] * len(sentences)  # of each of these, which of the different beginnings it has
        tokens = torch.tensor([self.bos])
        states: list[tuple[Tensor, Tensor]] | None = None
        place = 0
        while reading:
            outputs, states = self._step(tokens, states)
            logprobs = self.logits(outputs).log_softmax(-1)
            nexts = [sentences[i][place] if place < len(sentences[i]) else self.eos for i in reading]
            for i, value in zip(reading, logprobs[at, nexts].tolist(), strict=True):
                totals[i] += value
            grown = zip(reading, at, nexts, strict=True)
            longer = [(i, (node, token)) for i, node, token in grown if place < len(sentences[i])]
            numbers = {pair: number for number, pair in enumerate(dict.fromkeys(pair for _, pair in longer))}
            reading, at = [i for i, _ in longer], [numbers[pair] for _, pair in longer]
            parents = torch.tensor([node for node, _ in numbers], dtype=torch.long)
            tokens = torch.tensor([token for _, token in numbers], dtype=torch.long)
            states = [(h[:, parents], c[:, parents]) for h, c in states]
            place += 1
        return totals

    def _step(
        self, tokens: Tensor, states: list[tuple[Tensor, Tensor]] | None
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Reads one more token (N,) behind each of N beginnings: the last layer's outputs (N, width), and all states."""
        rows = self.embedding(tokens)[:, None]
        found = []
        for number, layer in enumerate(self.layers):
            rows, state = layer(rows, None if states is None else states[number])
            found.append(state)
        return rows[:, 0], found

    @classmethod
    def load(cls, path: str | Path) -> SentenceLM:
        """Reads a .safetensors file, frozen.

        Raises:
            CheckpointError: the file is missing, damaged, or another's.
        """
        try:
            with safe_open(path, "pt") as file:
                sizes = {name: int(value) for name, value in (file.metadata() or {}).items()}
                packed = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            model = cls(**sizes)
            model.load_state_dict(unpack(packed))
        except (OSError, SafetensorError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{path} cannot be read as a recurrent language model ({first_line(error)}); fetch or save it again"
            ) from error
        return model.requires_grad_(False).eval()
