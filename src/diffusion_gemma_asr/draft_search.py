"""The drafts of a model with a speller and a language model: all its ears propose transcripts, and together they judge them.

Characters spell words that no dictionary has (spelled_beam.py); phonemes and a dictionary know how words are written that
sound alike (lexicon_beam.py); audio tokens were heard by the rest of the projector (beam.py). A language model that reads
whole sentences, where there is one, then reads the best of them (recurrent_lm.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from heapq import nlargest
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from .beam import NEVER
from .ctc import DraftToken, lm_head_scores, scores
from .lexicon import Lexicon
from .lexicon_beam import LexiconSearch
from .ngram import LM_WEIGHT, TOKEN_BONUS
from .spelled_beam import SPACE, WIDTH, SpelledSearch, columns_of, placed
from .speller import Alphabet, Spelling, Spellings
from .token_scores import Tokens, TokenScores, is_unspaced

if TYPE_CHECKING:
    from .model import DiffusionGemmaASR


class Weights(NamedTuple):
    """Factors on what CTC says of a transcript, by its phonemes, its characters and its audio tokens, the nats that each
    word costs which the dictionary lacks, and the factors on what the model of word classes, the language model of tokens
    and that of sentences say."""

    phonemes: float
    characters: float
    slots: float
    unknown: float = 0.0
    classes: float = 0.0
    language: float = 1.0
    sentences: float = 0.0


WEIGHTS = Weights(0.7, 0.5, 0.2, 4.0, 0.5)
FINAL_WEIGHTS = Weights(1.0, 0.2, 0.05, 6.0, 0.4, 0.2, 1.0)  # where a model reads sentences (benchmarks/draft_search.py)
SPELLED_WEIGHTS = Weights(0.0, 0.7, 0.5)  # where there are no phonemes
FINALISTS = 12  # transcripts that it reads
BY_PHONEMES, BY_CHARACTERS = 50, 3  # transcripts of each search that are judged, where there are both
NARROW = 40  # width of the search over characters, where there are phonemes
MARGIN = 2  # frames around a word's characters in which its phonemes may be


class Evidence(NamedTuple):
    """What there is to say of a transcript, in nats: CTC's log-probabilities by phonemes, characters and audio tokens, how
    many words the dictionary lacks, the log-probability of its words' classes, what the language model of tokens adds, and
    the log-probability of the sentence, 0 if no model has read it."""

    phonemes: float
    characters: float
    slots: float
    unknown: int
    classes: float
    language: float
    sentence: float = 0.0

    def weighed(self, weights: Weights) -> float:
        """The transcript's score."""
        heard = weights.phonemes * self.phonemes + weights.characters * self.characters + weights.slots * self.slots
        known = weights.classes * self.classes + weights.language * self.language + weights.sentences * self.sentence
        return heard + known - weights.unknown * self.unknown


def spelled_drafts(
    model: DiffusionGemmaASR, heard: Spellings, frame_lengths: Tensor, slots: Tensor, slot_lengths: Tensor
) -> list[list[DraftToken]]:
    """Drafts of what a model's speller heard in frame_lengths (B,) frames.

    With a language model: the best of the transcripts that searches over its characters, its phonemes and what CTC hears in
    the audio tokens (B, S, H) find, where all of these and the language model count; without: what the likeliest characters
    spell.
    """
    search = model.search
    if search is None:
        texts = model.alphabet.read(heard.characters, frame_lengths)
    else:
        found = judged_transcripts(model, heard, frame_lengths, slots, slot_lengths)
        weights = best_weights(search, heard)
        texts = [model.text(likeliest(rows, weights)) for rows in found]
    written = [model.prompts.target(text)[:-1] for text in texts]  # without the end of the turn
    per_slot, clips = model.projector.frames_per_slot, _clips(heard, frame_lengths)
    return [placed(tokens, clip.characters, model.alphabet, per_slot) for tokens, clip in zip(written, clips, strict=True)]


def judged_transcripts(
    model: DiffusionGemmaASR, heard: Spellings, frame_lengths: Tensor, slots: Tensor, slot_lengths: Tensor
) -> list[dict[Tokens, Evidence]]:
    """The transcripts of each clip that a model with a language model finds, and what there is to say of them: the best ones
    where a model reads whole sentences; the arguments are those of `spelled_drafts`."""
    search = model.search
    assert search is not None
    lm = replace(search.language.model, weight=LM_WEIGHT, bonus=TOKEN_BONUS)
    others = model.hear(slots).draft(slot_lengths, model.blank, lm)
    head = model.backbone.lm_head_weight, model.backbone.softcap
    found = []
    for clip, row, n, other in zip(_clips(heard, frame_lengths), slots, slot_lengths.tolist(), others, strict=True):
        proposed = search.propose(clip, tuple(token.id for token in other))
        by_slots = lm_head_scores(row[:n], *head, list(proposed), model.blank)
        found.append(search.judge(clip, proposed, by_slots))
    return search.read(found) if best_weights(search, heard).sentences else found


def best_weights(search: DraftSearch, heard: Spellings) -> Weights:
    """How much each counts where there is what this search has and a speller heard."""
    if heard.phonemes is None:
        return SPELLED_WEIGHTS
    return WEIGHTS if search.language.model.recurrent is None else FINAL_WEIGHTS


def likeliest(judged: dict[Tokens, Evidence], weights: Weights) -> Tokens:
    """The transcript of the highest score."""
    tokens, _ = max(judged.items(), key=lambda item: item[1].weighed(weights))
    return tokens


def _clips(heard: Spellings, frame_lengths: Tensor) -> list[Spellings]:
    return [heard.clip(row, n) for row, n in enumerate(frame_lengths.tolist())]


class DraftSearch:
    """The searches of one model, which share what the language model says.

    Args:
        alphabet: of the characters.
        language: what words count.
        lexicon: of the phonemes; None: the speller writes none.
    """

    def __init__(self, alphabet: Alphabet, language: TokenScores, lexicon: Lexicon | None):
        self.alphabet, self.language, self.lexicon = alphabet, language, lexicon
        self.spelled = SpelledSearch(alphabet, language, WIDTH if lexicon is None else NARROW)
        self.sounded = None if lexicon is None else LexiconSearch(lexicon, language)

    def propose(self, heard: Spellings, other: Tokens) -> dict[Tokens, float | None]:
        """Transcripts of one clip, one more among them, and their log-probabilities by phonemes where these found them."""
        found: dict[Tokens, float | None] = {}
        spelled = [one.tokens for one in self.spelled.best(heard.characters)]
        if self.sounded is not None and heard.phonemes is not None:
            found |= {one.tokens: one.heard for one in self.sounded.best(heard.phonemes)[:BY_PHONEMES]}
            spelled = spelled[:BY_CHARACTERS]
        for tokens in (*spelled, other):
            found.setdefault(tokens, None)
        return found

    def judge(
        self, heard: Spellings, proposed: dict[Tokens, float | None], by_slots: Sequence[float]
    ) -> dict[Tokens, Evidence]:
        """What there is to say of the transcripts that were proposed of one clip, of which the slots say by_slots."""
        rows = list(proposed)
        by_characters = scores(*columns_of(heard.characters, [self.alphabet.spell(tokens) for tokens in rows]))
        model = self.language.model.classes
        classes = [0.0] * len(rows)
        if model is not None:
            classes = model.scores([[word for _, word in self._words(tokens)] for tokens in rows])
        found = {}
        for row in zip(rows, by_characters, by_slots, classes, self.language.whole(rows), strict=True):
            tokens, by_character, by_slot, by_class, language = row
            sounding, unknown = proposed[tokens], 0
            if sounding is None:
                sounding, unknown = self.sounding(heard, tokens)
            found[tokens] = Evidence(sounding, max(by_character, NEVER), max(by_slot, NEVER), unknown, by_class, language)
        return found

    def read(self, judged: Sequence[dict[Tokens, Evidence]]) -> list[dict[Tokens, Evidence]]:
        """The best transcripts of each clip, and what the model that reads whole sentences says of them as well. It reads
        those of all clips at once: most of its time goes into fetching its weights."""
        model = self.language.model.recurrent
        assert model is not None
        best = [dict(nlargest(FINALISTS, rows.items(), key=lambda item: item[1].weighed(WEIGHTS))) for rows in judged]
        different = list({tokens: None for rows in best for tokens in rows})
        scores = dict(zip(different, model.scores(different), strict=True))
        return [{tokens: row._replace(sentence=scores[tokens]) for tokens, row in rows.items()} for rows in best]

    def _words(self, tokens: Tokens) -> list[tuple[int, str]]:
        """The words of a transcript, and which one between spaces each is; unspaced characters are words of their own."""
        text = self.language.tokenizer.decode(tokens, skip_special_tokens=True)
        return [(k, part) for k, word in enumerate(text.split()) for part in (word if is_unspaced(word[0]) else [word])]

    def sounding(self, heard: Spellings, tokens: Tokens) -> tuple[float, int]:
        """The log-probability of a transcript by its phonemes, each word said in the way that fits best, and how many of its
        words the dictionary lacks: these are taken to sound as was heard where their characters are. 0 without phonemes."""
        if self.lexicon is None or heard.phonemes is None:
            return 0.0, 0
        words = self._words(tokens)
        ways = [self.lexicon.pronunciations(word) for _, word in words]
        unknown = [i for i, found in enumerate(ways) if not found]
        if unknown:
            spans = self._spans(heard.characters, tokens)
            for i in unknown:
                ways[i] = [_likeliest(heard.phonemes, *spans.get(words[i][0], (0, 0)))]
        best = [found[0] for found in ways]
        swaps = [(i, way) for i, found in enumerate(ways) for way in found[1:]]
        rows = [best, *([*best[:i], way, *best[i + 1 :]] for i, way in swaps)]
        base, *others = _sounds(heard.phonemes, rows)
        gains: dict[int, tuple[float, str]] = {}
        for (i, way), score in zip(swaps, others, strict=True):
            if score > max(base, gains.get(i, (NEVER, ""))[0]):
                gains[i] = score, way
        if gains:
            (base,) = _sounds(heard.phonemes, [[gains[i][1] if i in gains else way for i, way in enumerate(best)]])
        return max(base, NEVER), len(unknown)

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


def _sounds(heard: Spelling, rows: Sequence[Sequence[str]]) -> list[float]:
    """Log-probabilities of transcripts, given by their words' pronunciations, in one clip."""
    return scores(*columns_of(heard, [[ord(phoneme) for phoneme in "".join(row)] for row in rows]))


def _likeliest(heard: Spelling, start: int, end: int) -> str:
    """The phonemes that are likeliest in the frames from start to end of one clip, and some around, as a pronunciation."""
    frames = heard.ids[max(0, start - MARGIN) : end + MARGIN, 0].tolist()
    return "".join(chr(found) for found, before in zip(frames, [0, *frames], strict=False) if found and found != before)
