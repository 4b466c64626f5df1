"""Audio tokens of spoken words, from which those of sentences that nobody has spoken are put together.

Speech with transcripts is scarce, text is not. A backbone that learns to read from both knows more words and sentences than
were ever recorded. The audio tokens of a sentence are cut out of those of utterances, in pieces as long as possible, so that
they are as blurred, wrong and missing as the projector makes them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

MOST = 32  # places that are remembered of each token, and of each pair of tokens

Place = tuple[int, int]
"""An utterance, and a token in it."""


class SlotBank:
    """Utterances cut into tokens.

    Args:
        embeddings: (V, H) rows of the vocabulary at the scale of audio tokens; stand in for tokens that nobody says.
        seed: of which places are remembered where there are too many.
    """

    def __init__(self, embeddings: Tensor, seed: int = 0):
        self.embeddings = embeddings
        self._tokens: list[list[int]] = []
        self._slots: list[Tensor] = []  # (n, H) of each utterance
        self._cuts: list[list[int]] = []  # where in it each token begins, and where the last one ends
        self._places: dict[tuple[object, ...], list[Place]] = {}
        self._seen: dict[tuple[object, ...], int] = {}
        self._rng = random.Random(seed)

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def known(self) -> list[int]:
        """The tokens that somebody says."""
        return sorted(key[0] for key in self._places if len(key) == 1)  # type: ignore[misc]

    def add(self, language: str, tokens: Sequence[int], slots: Tensor, ends: Sequence[int]) -> None:
        """Remembers an utterance.

        Args:
            language: code.
            tokens: of its transcript, at least one.
            slots: (n, H) of its audio tokens, those of a prompt.
            ends: how many of them there are up to the end of each token.
        """
        utterance = len(self._tokens)
        self._tokens.append(list(tokens))
        self._slots.append(slots.clone())
        self._cuts.append([0, *ends[:-1], len(slots)])
        for at, token in enumerate(tokens):
            keys: list[tuple[object, ...]] = [(token,), (language, token)]
            if at + 1 < len(tokens):
                keys.append((language, token, tokens[at + 1]))
            for key in keys:
                self._remember(key, (utterance, at))

    def _remember(self, key: tuple[object, ...], place: Place) -> None:
        """Keeps a random MOST of all places of a key."""
        self._seen[key] = self._seen.get(key, 0) + 1
        places = self._places.setdefault(key, [])
        if len(places) < MOST:
            places.append(place)
        elif (index := self._rng.randrange(self._seen[key])) < MOST:
            places[index] = place

    def draw(self, language: str, tokens: Sequence[int], rng: random.Random) -> Tensor:
        """Puts together the audio tokens of a sentence.

        Each piece is cut where it was said in the same language before the same next token, or else in the same language, or
        else anywhere; it goes on for as long as the utterance says what the sentence does.

        Args:
            language: code.
            tokens: of the sentence.
            rng: of all draws.

        Returns:
            (n, H); n may be 0.
        """
        pieces: list[Tensor] = []
        at = 0
        while at < len(tokens):
            keys = [(language, *tokens[at : at + 2]), (language, tokens[at]), (tokens[at],)]
            places = next((self._places[key] for key in keys if key in self._places), None)
            if places is None:
                pieces.append(self.embeddings[tokens[at]][None])
                at += 1
                continue
            utterance, start = rng.choice(places)
            said, end = self._tokens[utterance], start + 1
            while end < len(said) and at + end - start < len(tokens) and said[end] == tokens[at + end - start]:
                end += 1
            cuts = self._cuts[utterance]
            pieces.append(self._slots[utterance][cuts[start] : cuts[end]])
            at += end - start
        return torch.cat(pieces) if pieces else self.embeddings[:0]
