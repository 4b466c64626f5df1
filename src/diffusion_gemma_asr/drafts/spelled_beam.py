"""The words that a speller's characters and a language model of tokens find together: prefix beam search over characters.

Transcripts grow by characters, each with its log-probability under CTC (Hannun et al. 2014, arXiv 1408.2873). A word counts
in the language model, by the tokens that the tokenizer makes of it, as soon as a space ends it; until then it counts by the
tokens that begin as it does, without its context. Where words are not spaced, as in Chinese, every character counts at once.
Scores are weighed as in beam.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from heapq import nlargest
from itertools import islice
from typing import NamedTuple

import numpy as np

from .beam import NEVER, either
from .speller import Alphabet, Spelling, text_of
from .token_scores import REMEMBERED, Tokens, TokenScores, is_unspaced

WIDTH = 100  # transcripts that are kept after each frame
LEAST = -5.0  # nats; characters that are less likely in a frame are not tried there
BEHIND = 10.0  # nats; transcripts so much worse than the best one are dropped
SPACE = "▁"


class Spelled(NamedTuple):
    """A transcript: its tokens, and its score in nats."""

    tokens: Tokens
    score: float


class _Prefix:
    """A transcript's beginning: a node of the tree of all that are tried.

    character: the class of its last one; children: by class; tokens, scored: of its complete words, and their language
    score; word: the characters behind them; language: `scored` and what the word counts so far.
    """

    __slots__ = ("character", "children", "language", "scored", "tokens", "word")

    def __init__(self, character: int, tokens: Tokens, scored: float, word: tuple[str, ...], language: float):
        self.character, self.tokens, self.scored, self.word, self.language = character, tokens, scored, word, language
        self.children: dict[int, _Prefix] = {}


class SpelledSearch:
    """The search for the transcripts of one model.

    Args:
        alphabet: what the classes are.
        language: what words count.
        width: transcripts that are kept after each frame.
    """

    def __init__(self, alphabet: Alphabet, language: TokenScores, width: int = WIDTH):
        self.characters, self.language, self.model, self.width = alphabet.characters, language, language.model, width
        self._space = self.characters.index(SPACE)
        self._unspaced = [is_unspaced(character) for character in self.characters]
        self._heads = self._count_heads()
        self._least, self._longest = min(self._heads.values()), max(map(len, self._heads))
        self._forget()

    def _forget(self) -> None:
        """Begins the memories anew; whoever still works with an old one keeps it."""
        self._promises: dict[str, float] = {}
        self._words: dict[str, float] = {}

    def best(self, heard: Spelling) -> list[Spelled]:
        """The transcripts found in one clip, without a batch dimension, the best one first."""
        self.language.tidy()
        if max(len(self._promises), len(self._words)) > REMEMBERED:
            self._forget()
        beams: dict[_Prefix, tuple[float, float]] = {_Prefix(0, (), 0.0, (), 0.0): (0.0, NEVER)}
        for row, values, silent in zip(*(part.tolist() for part in heard), strict=True):
            likely = [(found, value) for found, value in zip(row, values, strict=True) if found and value > LEAST]
            if likely:
                beams = self._step(beams, likely, silent)
            else:
                beams = {prefix: (either(*paths) + silent, NEVER) for prefix, paths in beams.items()}
        return self._ended(beams)

    def _step(
        self, beams: dict[_Prefix, tuple[float, float]], heard: list[tuple[int, float]], silent: float
    ) -> dict[_Prefix, tuple[float, float]]:
        values = dict(heard)
        totals = {prefix: either(*paths) for prefix, paths in beams.items()}
        least = max(total + prefix.language for prefix, total in totals.items()) + max(silent, heard[0][1]) - BEHIND
        grown: list[tuple[_Prefix, int, float]] = []
        for prefix, (blank, _) in beams.items():
            total, language, last = totals[prefix], prefix.language, prefix.character
            for found, value in heard:
                path = (blank if found == last else total) + value
                if path + language > least:
                    grown.append((prefix, found, path))
        self._grow([(prefix, found) for prefix, found, _ in grown if found not in prefix.children])
        after = {
            prefix: (totals[prefix] + silent, token + values.get(prefix.character, NEVER))
            for prefix, (_, token) in beams.items()
        }
        for prefix, found, path in grown:
            child = prefix.children[found]
            old = after.get(child)
            after[child] = (NEVER, path) if old is None else (old[0], either(old[1], path))
        totals = {prefix: either(*paths) + prefix.language for prefix, paths in after.items()}
        kept = nlargest(self.width, totals, key=totals.__getitem__)
        return {prefix: after[prefix] for prefix in kept if totals[prefix] > totals[kept[0]] - BEHIND}

    def _grow(self, wanted: list[tuple[_Prefix, int]]) -> None:
        """Makes children, the language scores of all looked up at once."""
        scored: list[Tokens] = []
        for prefix, found in wanted:
            if found == self._space:
                scored.append(self._of(prefix, prefix.word))
            else:
                scored.append(self._of(prefix, (*prefix.word, self.characters[found])) if self._unspaced[found] else ())
        added = self.language.scores([(prefix.tokens, tokens) for (prefix, _), tokens in zip(wanted, scored, strict=True)])
        begun = [found != self._space and not self._unspaced[found] for _, found in wanted]
        words = [(*prefix.word, self.characters[found]) for prefix, found in wanted]
        promised = iter(self._promised(["".join(word) for word, promising in zip(words, begun, strict=True) if promising]))
        for (prefix, found), tokens, score, word, promising in zip(wanted, scored, added, words, begun, strict=True):
            language = prefix.scored + score
            if found == self._space:
                child = _Prefix(found, (*prefix.tokens, *tokens), language, (), language)
            else:
                language += next(promised) if promising else 0.0
                child = _Prefix(found, prefix.tokens, prefix.scored, word, language)
            prefix.children[found] = child

    def _ended(self, beams: dict[_Prefix, tuple[float, float]]) -> list[Spelled]:
        words = [self._of(prefix, prefix.word) for prefix in beams]
        added = self.language.scores(
            [(prefix.tokens, (*word, self.model.eos)) for prefix, word in zip(beams, words, strict=True)]
        )
        found: dict[Tokens, float] = {}
        for (prefix, paths), word, score in zip(beams.items(), words, added, strict=True):
            tokens, total = (*prefix.tokens, *word), either(*paths) + prefix.scored + score - self.model.bonus
            found[tokens] = either(found.get(tokens, NEVER), total)
        return sorted((Spelled(*item) for item in found.items()), key=lambda item: -item.score)

    def _of(self, prefix: _Prefix, word: tuple[str, ...]) -> Tokens:
        """The tokens of a word behind the complete ones of a prefix."""
        text = text_of(word)
        return self.language.tokens(text, not prefix.tokens) if text else ()

    def _count_heads(self) -> dict[str, float]:
        """How likely tokens are that begin with a string, in nats and without context, by that string."""
        size = self.model.lm.vocab_size
        likely = np.exp(self.model.lm.logprobs([()] * size, range(size)))
        found: dict[str, float] = {}
        pieces = self.language.tokenizer.convert_ids_to_tokens(range(size))
        for piece, probability in zip(pieces, likely.tolist(), strict=True):
            for end in range(1, len(piece) + 1):
                found[piece[:end]] = found.get(piece[:end], 0.0) + probability
        return {head: math.log(probability) for head, probability in found.items()}

    def _promised(self, words: Sequence[str]) -> list[float]:
        """What words that begin so may add to the score, whatever stands before them: the best that some tokens and the
        beginning of one more come to."""
        promises, alone = self._promises, self._words
        new = [word for word in dict.fromkeys(words) if word not in promises]
        ends = {word: range(max(1, len(word) - self._longest), len(word)) for word in new}  # where the last token may begin
        ways = {word: [end for end in ends[word] if word[end:] in self._heads] for word in new}
        self._weigh({word[:end] for word, found in ways.items() for end in found} - alone.keys(), alone)
        weight, bonus = self.model.weight, self.model.bonus
        for word in new:
            found = [alone[word[:end]] + weight * self._heads[word[end:]] + bonus for end in ways[word]]
            if SPACE + word in self._heads:
                found.append(weight * self._heads[SPACE + word] + bonus)
            promises[word] = max(found, default=2 * (weight * self._least + bonus))
        return [promises[word] for word in words]

    def _weigh(self, words: set[str], known: dict[str, float]) -> None:
        """Learns what the tokens of words add to the score without what stands before them."""
        if not words:
            return
        rows = [self.language.tokens(word, True) for word in sorted(words)]
        contexts = [row[:i] for row in rows for i in range(len(row))]
        logprobs = self.model.lm.logprobs(contexts, [token for row in rows for token in row]).tolist()
        taken = iter(logprobs)
        for word, row in zip(sorted(words), rows, strict=True):
            known[word] = self.model.weight * sum(islice(taken, len(row))) + self.model.bonus * len(row)
