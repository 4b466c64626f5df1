"""What a language model of tokens adds to transcripts that grow by words: each thing is looked up once."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

from .beam import DraftLM

REMEMBERED = 200_000  # entries at which what was looked up is forgotten

Tokens = tuple[int, ...]


class TokenScores:
    """The language model of drafts, for searches that spell words.

    Args:
        tokenizer: spells words in tokens.
        model: the language model of these tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, model: DraftLM):
        self.tokenizer, self.model = tokenizer, model
        self._between = "" if self._encode("a a") == 2 * self._encode("a") else " "  # belongs to a word behind others
        self._forget()

    def _forget(self) -> None:
        """Begins the memories anew; whoever still works with an old one keeps it."""
        self._tokens: dict[str, Tokens] = {}  # of a word
        self._known: dict[tuple[Tokens, int], float] = {}  # scores

    def tidy(self) -> None:
        """Forgets what was looked up if it has become too much; not while a search goes on."""
        if max(len(self._tokens), len(self._known)) > REMEMBERED:
            self._forget()

    def tokens(self, word: str, first: bool) -> Tokens:
        """The tokens of a word, which is the first of its transcript or not."""
        text = word if first else self._between + word
        if text not in self._tokens:
            self._tokens[text] = self._encode(text)
        return self._tokens[text]

    def _encode(self, text: str) -> Tokens:
        return tuple(self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)

    def scores(self, wanted: Sequence[tuple[Tokens, Tokens]]) -> list[float]:
        """What tokens, the second of each pair, add to the score of a transcript behind others."""
        known, reach = self._known, max(1, self.model.reach)
        rows: list[list[tuple[Tokens, int]]] = []
        new: dict[tuple[Tokens, int], None] = {}  # in order
        for before, tokens in wanted:
            context = self.model.context(before) if tokens else ()
            pairs = [((*context, *tokens[:i])[-reach:], token) for i, token in enumerate(tokens)]
            rows.append(pairs)
            new |= {pair: None for pair in pairs if pair not in known}
        if new:
            found = self.model.lm.logprobs([context for context, _ in new], [token for _, token in new])
            known |= zip(new, (self.model.weight * found + self.model.bonus).tolist(), strict=True)
        return [sum(known[pair] for pair in pairs) for pairs in rows]

    def endings(self, transcripts: Sequence[Tokens]) -> list[float]:
        """What the end of each transcript adds to its score."""
        return [score - self.model.bonus for score in self.scores([(tokens, (self.model.eos,)) for tokens in transcripts])]

    def whole(self, transcripts: Sequence[Tokens]) -> list[float]:
        """What the language model adds to the score of each transcript."""
        whole = self.scores([((), (*tokens, self.model.eos)) for tokens in transcripts])
        return [score - self.model.bonus for score in whole]


def is_unspaced(character: str) -> bool:
    """Whether it belongs to a script without spaces between words: Chinese characters."""
    return len(character) == 1 and "\u3400" <= character <= "\u9fff"
