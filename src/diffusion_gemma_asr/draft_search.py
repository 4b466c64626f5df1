"""The drafts of a model with a speller and a language model: all its ears propose transcripts, and together they judge them.

Characters spell words that no dictionary has (spelled_beam.py); phonemes and a dictionary know how words are written that
sound alike (lexicon_beam.py); audio tokens were heard by the rest of the projector (beam.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from .beam import NEVER
from .ctc import DraftToken, lm_head_scores, scores
from .lexicon import Lexicon
from .lexicon_beam import LexiconSearch
from .ngram import LM_WEIGHT, TOKEN_BONUS
from .spelled_beam import SPACE, SpelledSearch, columns_of, placed
from .speller import Alphabet, Spelling, Spellings
from .token_scores import Tokens, TokenScores, is_unspaced

if TYPE_CHECKING:
    from .model import DiffusionGemmaASR

CHARACTERS, SLOTS = 0.7, 0.5  # weights of what CTC says of a transcript that was found: by characters, by audio tokens
WITH_PHONEMES = 0.3, 0.3  # the same where phonemes count as well
PHONEMES = 0.7
PROPOSED = 30  # transcripts of a search that are judged
MARGIN = 2  # frames around a word's characters in which its phonemes may be
UNKNOWN = -8.0  # nats for each word that the dictionary lacks, which is taken to sound as it was heard


def spelled_drafts(
    model: DiffusionGemmaASR, heard: Spellings, frame_lengths: Tensor, slots: Tensor, slot_lengths: Tensor
) -> list[list[DraftToken]]:
    """Drafts of what a model's speller heard in frame_lengths (B,) frames.

    With a language model: the best of the transcripts that searches over its characters, its phonemes and what CTC hears in
    the audio tokens (B, S, H) find, where all of these and the language model count; without: what the likeliest characters
    spell.
    """
    clips = [heard.clip(row, n) for row, n in enumerate(frame_lengths.tolist())]
    search = model.search
    if search is None:
        texts = model.alphabet.read(heard.characters, frame_lengths)
    else:
        lm = replace(search.language.model, weight=LM_WEIGHT, bonus=TOKEN_BONUS)
        others = model.hear(slots).draft(slot_lengths, model.blank, lm)
        texts = []
        for clip, row, n, other in zip(clips, slots, slot_lengths.tolist(), others, strict=True):
            found = search.propose(clip, tuple(token.id for token in other))
            head = model.backbone.lm_head_weight, model.backbone.softcap
            by_slots = lm_head_scores(row[:n], *head, list(found), model.blank)
            texts.append(model.text(search.choose(clip, found, by_slots)))
    written = [model.prompts.target(text)[:-1] for text in texts]  # without the end of the turn
    per_slot = model.projector.frames_per_slot
    return [placed(tokens, clip.characters, model.alphabet, per_slot) for tokens, clip in zip(written, clips, strict=True)]


class DraftSearch:
    """The searches of one model, which share what the language model says.

    Args:
        alphabet: of the characters.
        language: what words count.
        lexicon: of the phonemes; None: the speller writes none.
    """

    def __init__(self, alphabet: Alphabet, language: TokenScores, lexicon: Lexicon | None):
        self.alphabet, self.language, self.lexicon = alphabet, language, lexicon
        self.spelled = SpelledSearch(alphabet, language)
        self.sounded = None if lexicon is None else LexiconSearch(lexicon, language)

    def propose(self, heard: Spellings, other: Tokens) -> dict[Tokens, float | None]:
        """Transcripts of one clip, one more among them, and their log-probabilities by phonemes where these found them."""
        found: dict[Tokens, float | None] = {}
        if self.sounded is not None and heard.phonemes is not None:
            found |= {one.tokens: one.heard for one in self.sounded.best(heard.phonemes)[:PROPOSED]}
        for tokens in (*(one.tokens for one in self.spelled.best(heard.characters)), other):
            found.setdefault(tokens, None)
        return found

    def choose(self, heard: Spellings, found: dict[Tokens, float | None], by_slots: Sequence[float]) -> Tokens:
        """The transcript that is likeliest by phonemes, characters, audio tokens and the language model together."""
        transcripts = list(found)
        by_characters = scores(*columns_of(heard.characters, [self.alphabet.spell(tokens) for tokens in transcripts]))
        characters, slots = (CHARACTERS, SLOTS) if heard.phonemes is None else WITH_PHONEMES
        totals = [
            characters * max(a, NEVER) + slots * max(b, NEVER) + language
            for a, b, language in zip(by_characters, by_slots, self.language.whole(transcripts), strict=True)
        ]
        if heard.phonemes is not None:
            for i, tokens in enumerate(transcripts):
                known = found[tokens]
                totals[i] += PHONEMES * (self._sounding(heard, tokens) if known is None else known)
        return transcripts[max(range(len(totals)), key=totals.__getitem__)]

    def _sounding(self, heard: Spellings, tokens: Tokens) -> float:
        """The log-probability of a transcript by its phonemes, each word said in the way that fits best."""
        assert self.lexicon is not None and heard.phonemes is not None
        text = self.language.tokenizer.decode(tokens, skip_special_tokens=True)
        words = [(k, part) for k, word in enumerate(text.split()) for part in (word if is_unspaced(word[0]) else [word])]
        ways = [self.lexicon.pronunciations(word) for _, word in words]
        unknown = [i for i, found in enumerate(ways) if not found]
        if unknown:
            spans = self._spans(heard.characters, tokens)
            for i in unknown:
                ways[i] = [_likeliest(heard.phonemes, *spans.get(words[i][0], (0, 0)))]
        first = [found[0] for found in ways]
        swaps = [(i, way) for i, found in enumerate(ways) for way in found[1:]]
        rows = [first, *([*first[:i], way, *first[i + 1 :]] for i, way in swaps)]
        base, *others = scores(*columns_of(heard.phonemes, [[ord(c) for c in "".join(row)] for row in rows]))
        gains: dict[int, tuple[float, str]] = {}
        for (i, way), score in zip(swaps, others, strict=True):
            if score > max(base, gains.get(i, (NEVER, ""))[0]):
                gains[i] = score, way
        best = [gains[i][1] if i in gains else way for i, way in enumerate(first)]
        if len(gains) > 1:
            (base,) = scores(*columns_of(heard.phonemes, [[ord(c) for c in "".join(best)]]))
        elif gains:
            base = next(iter(gains.values()))[0]
        return max(base, NEVER) + UNKNOWN * len(unknown)

    def _spans(self, heard: Spelling, tokens: Tokens) -> dict[int, tuple[int, int]]:
        """The frames in which each word of a transcript is spelled, by its number."""
        found: dict[int, tuple[int, int]] = {}
        number = -1
        for token in placed(tokens, heard, self.alphabet, 1):
            (piece,) = self.language.tokenizer.convert_ids_to_tokens([token.id])
            if piece.startswith(SPACE) or number < 0:
                number += 1
            found[number] = (found[number][0] if number in found else token.start, token.end)
        return found


def _likeliest(heard: Spelling, start: int, end: int) -> str:
    """The phonemes that are likeliest in the frames from start to end of one clip, and some around, as a pronunciation."""
    frames = heard.ids[max(0, start - MARGIN) : end + MARGIN, 0].tolist()
    return "".join(chr(found) for found, before in zip(frames, [0, *frames], strict=False) if found and found != before)
