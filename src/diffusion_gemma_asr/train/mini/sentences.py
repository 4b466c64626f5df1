"""Sentences without sound: which files they come from, and how they are sampled."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...data.batches import Mixture, tempered
from ...model.prompt import PromptBuilder
from ..loop import LoopOptions
from .tokenizer import kept_sentences, read_sentences


@dataclass(frozen=True, kw_only=True)
class SentenceData:
    """Files of sentences, and their sampling."""

    text: tuple[Path, ...]  # files CODE.txt with a sentence of that language per line, or manifests
    max_tokens: int  # of a transcript; longer sentences are left out
    exclude: tuple[Path, ...] = ()  # such files, whose sentences are left out
    temperature: float = 1.0  # T: a language's sampling weight is its sentences ** (1 / T)
    joined: float = 0.0  # share of the sentences that are joined with following ones


@dataclass(frozen=True, kw_only=True)
class TextData(SentenceData):
    """Training and dev sentences."""

    dev: dict[str, Path]  # a file of sentences by language code, for evaluation
    dev_count: int  # sentences of each language to evaluate on

    def dev_sentences(self) -> dict[str, list[str]]:
        """The sentences to evaluate on, by language."""
        return {code: read_sentences([path])[code][: self.dev_count] for code, path in self.dev.items()}


@dataclass(frozen=True, kw_only=True)
class TextTrain(LoopOptions):
    """The loop's options, and the size of batches of sentences."""

    batch_size: int  # sentences in a batch at most
    batch_tokens: int  # transcript tokens in a batch at most, padding included


@dataclass(frozen=True)
class Sentences:
    """Sentences as a canvas is to hold them.

    Attributes:
        targets: token ids of each, with its end of turn.
        languages: code of each.
        sizes: sentences of each language, in the order in which the languages stand.
    """

    targets: list[list[int]] = field(default_factory=list)
    languages: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def mixture(self, data: SentenceData, batch_tokens: int, batch_size: int, seed: int) -> Mixture:
        """Samples batches of at most so many tokens, padding included, and so many sentences."""
        shares = tempered(self.sizes, data.temperature)
        return Mixture(self.sizes, shares, [len(target) for target in self.targets], batch_tokens, batch_size, seed)


def read_targets(data: SentenceData, prompts: PromptBuilder, seed: int) -> Sentences:
    """Reads the sentences of all files, language after language.

    Args:
        data: files and sampling.
        prompts: of the tokenizer.
        seed: of which sentences are joined.

    Raises:
        DataError: a file cannot be read.
    """
    sentences = Sentences()
    for code, lines in kept_sentences(data.text, data.exclude).items():
        targets = [prompts.target(line) for line in lines]
        fitting = [target for target in targets if len(target) <= data.max_tokens]
        sentences.targets.extend(joined(fitting, data.joined, data.max_tokens, random.Random(seed)))
        sentences.languages.extend([code] * len(fitting))
        sentences.sizes.append(len(fitting))
    return sentences


def joined(targets: Sequence[list[int]], share: float, most: int, rng: random.Random) -> list[list[int]]:
    """Extends a share of the targets with following ones, since utterances may be longer than a sentence.

    Args:
        targets: sentences, each with its end of turn.
        share: probability of extending a target, to a random length.
        most: tokens of a result at most.
        rng: of all draws.

    Returns:
        as many targets, in order.
    """
    rows = []
    for first, target in enumerate(targets):
        length, row = (rng.randint(1, most) if rng.random() < share else 0), target
        for following in targets[first + 1 : first + 20]:
            if len(row) >= length or len(row) + len(following) - 1 > most:
                break
            row = [*row[:-1], *following]
        rows.append(row)
    return rows


def random_rows(count: int, length: int, tokens: Sequence[int], end: int, rng: random.Random) -> list[list[int]]:
    """So many rows, at least one, of 1 to `length` of these tokens, each with the token `end` behind it."""
    return [[*rng.choices(tokens, k=rng.randint(1, length)), end] for _ in range(max(1, count))]
