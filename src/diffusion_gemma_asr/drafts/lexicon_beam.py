"""The words that a speller's phonemes, a pronouncing dictionary and a language model of tokens find together.

Prefix beam search (Hannun et al. 2014, arXiv 1408.2873) in which a transcript grows by phonemes along the dictionary,
as along a tree whose branches are the phonemes that some word goes on with. Where words end, each of those that sound
so goes on as a transcript of its own: the language model knows "sont" from "son", and where one word ends and the next
begins. Until then a word counts as the most frequent one that begins so (look-ahead: Ortmanns, Eiden, Ney and Coenen
1997).
"""

from __future__ import annotations

from heapq import nlargest
from typing import NamedTuple

from .beam import NEVER, either
from .lexicon import Lexicon
from .speller import Spelling
from .token_scores import REMEMBERED, Tokens, TokenScores, is_unspaced

WIDTH = 100  # transcripts that are kept after each frame
LEAST = -5.0  # nats; phonemes that are less likely in a frame are not tried there
BEHIND = 16.0  # nats; transcripts so much worse than the best one are dropped


class Sounded(NamedTuple):
    """A transcript: its tokens, its log-probability by its phonemes, and its score with the language model, in nats."""

    tokens: Tokens
    heard: float
    score: float


class _Written(NamedTuple):
    """The complete words of a transcript: their tokens and score; of those, what stands before the last run of unspaced
    characters, and that run, since its tokens depend on it as a whole."""

    tokens: Tokens = ()
    score: float = 0.0
    before: Tokens = ()
    before_score: float = 0.0
    run: str = ""


class _Branch(NamedTuple):
    """A place in the dictionary: the entries from low to high are alike in their first `depth` phonemes, those from low to
    ended have no more; promise: the most that any of them adds to the score, whatever stands before it."""

    low: int
    high: int
    depth: int
    ended: int
    promise: float


class _Prefix:
    """A transcript's beginning: complete words, and how the next one begins.

    phoneme: the class of its last one; language: what words and beginning count; children: by the class that follows; ends:
    the transcripts that end the word here.
    """

    __slots__ = ("branch", "children", "ends", "language", "phoneme", "written")

    def __init__(self, phoneme: int, written: _Written, branch: _Branch):
        self.phoneme, self.written, self.branch = phoneme, written, branch
        self.language = written.score + branch.promise
        self.children: dict[int, _Prefix | None] = {}
        self.ends: list[_Prefix] = []


Beams = dict[_Prefix, tuple[float, float]]  # log-probabilities of all paths that end in a blank, and in the last phoneme


class LexiconSearch:
    """The search for the transcripts of one model.

    Args:
        lexicon: the words.
        language: what they count.
        width: transcripts that are kept after each frame.
    """

    def __init__(self, lexicon: Lexicon, language: TokenScores, width: int = WIDTH):
        self.lexicon, self.language, self.width = lexicon, language, width
        self._promises = language.model.weight * lexicon.frequency
        self._root = _Branch(0, len(lexicon.said), 0, 0, 0.0)
        self._branches: dict[tuple[int, int, int, int], _Branch | None] = {}

    def best(self, heard: Spelling) -> list[Sounded]:
        """The transcripts found in one clip, without a batch dimension, the best first; none if all end inside a word."""
        self.language.tidy()
        if len(self._branches) > REMEMBERED:
            self._branches = {}
        beams: Beams = {_Prefix(0, _Written(), self._root): (0.0, NEVER)}
        for row, values, silent in zip(*(part.tolist() for part in heard), strict=True):
            likely = [(found, value) for found, value in zip(row, values, strict=True) if found and value > LEAST]
            if likely:
                beams = self._step(beams, likely, silent)
            else:
                beams = {prefix: (either(*paths) + silent, NEVER) for prefix, paths in beams.items()}
        return self._ended(beams)

    def _step(self, beams: Beams, heard: list[tuple[int, float]], silent: float) -> Beams:
        values = dict(heard)
        totals = {prefix: either(*paths) for prefix, paths in beams.items()}
        least = max(total + prefix.language for prefix, total in totals.items()) + max(silent, heard[0][1]) - BEHIND
        grown: list[tuple[_Prefix, float]] = []
        new: list[_Prefix] = []
        for prefix, (blank, _) in beams.items():
            total, language, last, children = totals[prefix], prefix.language, prefix.phoneme, prefix.children
            for found, value in heard:
                path = (blank if found == last else total) + value
                if path + language > least:
                    if found not in children:
                        branch = self._narrowed(prefix.branch, found)
                        child = None if branch is None else _Prefix(found, prefix.written, branch)
                        children[found] = child
                        if child is not None and child.branch.ended > child.branch.low:
                            new.append(child)
                    child = children[found]
                    if child is not None:
                        grown.append((child, path))
        self._end_words(new)
        after = {
            prefix: (totals[prefix] + silent, last + values.get(prefix.phoneme, NEVER))
            for prefix, (_, last) in beams.items()
        }
        for child, path in grown:
            for prefix in (child, *child.ends):
                if path + prefix.language > least:
                    old = after.get(prefix)
                    after[prefix] = (NEVER, path) if old is None else (old[0], either(old[1], path))
        totals = {prefix: either(*paths) + prefix.language for prefix, paths in after.items()}
        kept = nlargest(self.width, totals, key=totals.__getitem__)
        return {prefix: after[prefix] for prefix in kept if totals[prefix] > totals[kept[0]] - BEHIND}

    def _narrowed(self, branch: _Branch, found: int) -> _Branch | None:
        key = branch.low, branch.high, branch.depth, found
        if key not in self._branches:
            low, high = self.lexicon.narrowed(*key)
            depth, said = branch.depth + 1, self.lexicon.said
            ended = next((i for i in range(low, high) if len(said[i]) > depth), high)
            promise = float(self._promises[low:high].max()) if low < high else 0.0
            self._branches[key] = _Branch(low, high, depth, ended, promise) if low < high else None
        return self._branches[key]

    def _end_words(self, prefixes: list[_Prefix]) -> None:
        """Finds the transcripts that end their words in these places, the language scores of all looked up at once."""
        places = [(prefix, prefix.branch) for prefix in prefixes]
        ending = [(prefix, word) for prefix, at in places for word in self.lexicon.words[at.low : at.ended]]
        grown: list[tuple[Tokens, float, str, Tokens]] = []  # what stays, its score, the run of characters, tokens behind
        for prefix, word in ending:
            written = prefix.written
            if is_unspaced(word):
                before, score, run = written.before, written.before_score, written.run + word
            else:
                before, score, run = written.tokens, written.score, ""
            grown.append((before, score, run, self.language.tokens(run or word, not before)))
        added = self.language.scores([(before, tokens) for before, _, _, tokens in grown])
        for (prefix, _), (before, score, run, tokens), gain in zip(ending, grown, added, strict=True):
            whole = (*before, *tokens)
            total = score + gain - self.language.model.bonus * len(tokens)
            kept = (before, score, run) if run else (whole, total, "")
            prefix.ends.append(_Prefix(prefix.phoneme, _Written(whole, total, *kept), self._root))

    def _ended(self, beams: Beams) -> list[Sounded]:
        whole = [(prefix.written, either(*paths)) for prefix, paths in beams.items() if prefix.branch.depth == 0]
        endings = self.language.endings([written.tokens for written, _ in whole])
        found: dict[Tokens, Sounded] = {}
        for (written, heard), ending in zip(whole, endings, strict=True):
            old = found.get(written.tokens)
            heard = heard if old is None else either(old.heard, heard)
            found[written.tokens] = Sounded(written.tokens, heard, heard + written.score + ending)
        return sorted(found.values(), key=lambda one: -one.score)
