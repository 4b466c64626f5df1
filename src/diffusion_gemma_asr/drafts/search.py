"""Searches for drafts that a checkpoint may ask for in its config.json, in place of greedy CTC.

`beam`: CTC over the slots and an n-gram model, prefix beam search. `phonemes`: searches over phonemes, along a
pronouncing dictionary, and over characters propose transcripts, and a recurrent language model rescores the best (n-best
rescoring). Drafts of either are the transcript: the small denoisers that they were made for do not better them.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from heapq import nlargest
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import CheckpointError, RecipeError
from ..model.ctc import DraftToken, scores
from ..model.drafter import Encoded
from ..model.model import DiffusionGemmaASR
from ..model.prompt import sentence_ends
from ..strict import from_mapping
from .beam import NEVER, DraftLM, draft_with_lm
from .lexicon import Lexicon
from .lexicon_beam import LexiconSearch
from .ngram import NgramLM
from .sentences import SentenceLM
from .spelled_beam import SpelledSearch
from .speller import Alphabet, Speller, Spelling, Spellings, columns_of, placed
from .token_scores import Tokens, TokenScores, is_unspaced

TOP = 16  # tokens a slot that the beam search looks at
BY_PHONEMES, BY_CHARACTERS = 50, 3  # transcripts of each search that are ranked
CHARACTER_WIDTH = 40  # of the search over characters, which only has to find words that the dictionary lacks


@dataclass(frozen=True)
class Weights:
    """Factors on what is known of a transcript, in nats; its score is their weighted sum."""

    phonemes: float = 0.0  # CTC's log-probability of its phonemes
    characters: float = 0.0  # CTC's log-probability of its characters
    ngram: float = 0.0  # what the n-gram model adds
    sentences: float = 0.0  # the recurrent model's log-probability
    unknown: float = 0.0  # taken off for each word that the dictionary lacks


@dataclass(frozen=True)
class SearchConfig:
    """The `drafter` section of a config.json."""

    kind: Literal["beam", "phonemes"]
    ngram: str  # file of the n-gram model, beside config.json
    weight: float  # factor on its log-probabilities in the search
    bonus: float  # nats added for each token, without which short transcripts would win
    lexicon: str | None = None  # phonemes: file of the pronouncing dictionary
    sentences: str | None = None  # phonemes: file of the recurrent language model
    layers: int = 0  # phonemes: of the speller
    width: int = 0  # phonemes: of the speller
    rescored: int = 12  # phonemes: transcripts that the recurrent language model reads
    ranking: Weights = field(default_factory=Weights)  # phonemes: by which these are chosen
    rescoring: Weights = field(default_factory=Weights)  # phonemes: by which the best is chosen

    def files(self) -> tuple[str, ...]:
        """Names of its files beside config.json."""
        return tuple(file for file in (self.ngram, self.lexicon, self.sentences) if file is not None)


class BeamDrafter:
    """Prefix beam search over the slots' tokens with an n-gram model.

    Args:
        model: whose slots are read.
        config: of the search.
        folder: that holds its files.
    """

    trusted = True

    def __init__(self, model: DiffusionGemmaASR, config: SearchConfig, folder: Path):
        self.config, self.folder = config, folder
        self.head, self.blank = model.head, model.blank
        self.lm = _ngram(config, folder, model.tokenizer)

    @torch.no_grad()
    def drafts(self, encoded: Encoded) -> list[list[DraftToken]]:
        """See `Drafter.drafts`."""

        def top_of(slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logprobs = self.head.logits(slots).log_softmax(-1)  # (n, V)
            best, ids = logprobs.topk(min(TOP, logprobs.shape[-1]))
            return ids, best, logprobs[:, self.blank]

        drafts = []
        for slots, n in zip(encoded.slots, encoded.slot_lengths.tolist(), strict=True):
            parts = self.head.over_chunks(top_of, slots[:n])
            ids, logprobs, blanks = (torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True))
            drafts.append(draft_with_lm(ids, logprobs, blanks, self.blank, self.lm))
        return drafts

    def save(self, folder: Path) -> None:
        """Copies its files into another folder."""
        _copy(self.config, self.folder, folder)


class _Evidence(NamedTuple):
    """What is known of a transcript, under the names of `Weights`."""

    phonemes: float
    characters: float
    ngram: float
    unknown: int

    def score(self, weights: Weights, sentence: float = 0.0) -> float:
        heard = weights.phonemes * self.phonemes + weights.characters * self.characters
        return heard + weights.ngram * self.ngram + weights.sentences * sentence - weights.unknown * self.unknown


class PhonemeDrafter:
    """N-best rescoring: searches over phonemes along a pronouncing dictionary and over characters propose transcripts,
    all of them are ranked, and the best are rescored by a model of whole sentences.

    Args:
        model: whose frames are read.
        config: of the search.
        folder: that holds its files.
        speller: layers over the encoder's frames that write characters and phonemes.
    """

    trusted = True

    def __init__(self, model: DiffusionGemmaASR, config: SearchConfig, folder: Path, speller: Speller):
        assert config.lexicon is not None and config.sentences is not None
        self.config, self.folder, self.speller = config, folder, speller
        self.alphabet, self.tokenizer = Alphabet(model.tokenizer), model.tokenizer
        self.text, self.target = model.text, model.prompts.target
        self.frames_per_slot = model.projector.frames_per_slot
        self.language = TokenScores(model.tokenizer, _ngram(config, folder, model.tokenizer))
        self.lexicon = Lexicon.load(folder / config.lexicon)
        self.by_phonemes = LexiconSearch(self.lexicon, self.language)
        self.by_characters = SpelledSearch(self.alphabet, self.language, CHARACTER_WIDTH)
        self.sentences = SentenceLM.load(folder / config.sentences)

    @torch.no_grad()
    def drafts(self, encoded: Encoded) -> list[list[DraftToken]]:
        """See `Drafter.drafts`."""
        spellings = self.speller.hear(encoded.frames, encoded.frame_lengths)
        clips = [spellings.clip(row, n) for row, n in enumerate(encoded.frame_lengths.tolist())]
        ranked = [self._ranked(clip) for clip in clips]
        different = list({tokens: None for rows in ranked for tokens in rows})
        sentence = dict(zip(different, self.sentences.scores(different), strict=True))
        drafts = []
        for clip, rows in zip(clips, ranked, strict=True):
            best = max(rows, key=lambda tokens: rows[tokens].score(self.config.rescoring, sentence[tokens]))
            tokens = self.target(self.text(best))[:-1]  # without the end of the turn
            drafts.append(placed(tokens, clip.characters, self.alphabet, self.frames_per_slot))
        return drafts

    def _ranked(self, clip: Spellings) -> dict[Tokens, _Evidence]:
        """The best transcripts of one clip, and what is known of them."""
        assert clip.phonemes is not None
        sound: dict[Tokens, tuple[float, int]] = {}  # log-probability of the phonemes, words that the dictionary lacks
        for sounded in self.by_phonemes.best(clip.phonemes)[:BY_PHONEMES]:
            sound[sounded.tokens] = sounded.heard, 0
        for spelled in self.by_characters.best(clip.characters)[:BY_CHARACTERS]:
            if spelled.tokens not in sound:
                sound[spelled.tokens] = self._sound(clip.phonemes, spelled.tokens)
        rows = list(sound)
        characters = scores(*columns_of(clip.characters, [self.alphabet.spell(tokens) for tokens in rows]))
        evidence = {
            tokens: _Evidence(sound[tokens][0], max(spelled, NEVER), ngram, sound[tokens][1])
            for tokens, spelled, ngram in zip(rows, characters, self.language.whole(rows), strict=True)
        }
        best = nlargest(self.config.rescored, rows, key=lambda tokens: evidence[tokens].score(self.config.ranking))
        return {tokens: evidence[tokens] for tokens in best}

    def _sound(self, phonemes: Spelling, tokens: Tokens) -> tuple[float, int]:
        """The log-probability of a transcript by its phonemes, each word in its most frequent pronunciation, and how many of
        its words the dictionary lacks: with any of these it is taken to sound as was heard."""
        ways = [self.lexicon.pronunciations(word) for word in _words(self.text(tokens))]
        if unknown := sum(not way for way in ways):
            return float(torch.maximum(phonemes.logprobs[:, 0], phonemes.blank).sum()), unknown
        (score,) = scores(*columns_of(phonemes, [[ord(phoneme) for way in ways for phoneme in way[0]]]))
        return max(score, NEVER), 0

    def save(self, folder: Path) -> None:
        """Copies its files into another folder; the speller's weights are with the projector's."""
        _copy(self.config, self.folder, folder)


def read_search_config(section: dict[str, Any]) -> SearchConfig:
    """The `drafter` section of a config.json.

    Raises:
        CheckpointError: a key is unknown, missing, or has an impossible value.
    """
    try:
        config = from_mapping(SearchConfig, section)
    except RecipeError as error:
        raise CheckpointError(f"drafter: {error}") from None
    if config.kind == "phonemes" and None in (config.lexicon, config.sentences):
        raise CheckpointError("drafter: a search over phonemes needs lexicon and sentences")
    return config


def load_drafter(
    model: DiffusionGemmaASR, section: dict[str, Any], folder: Path, tensors: dict[str, Tensor]
) -> BeamDrafter | PhonemeDrafter:
    """The search that a checkpoint asks for.

    Args:
        model: that it is for.
        section: `drafter` of its config.json.
        folder: of the checkpoint.
        tensors: weights of the speller by name, where it has one.

    Raises:
        CheckpointError: a file or a tensor is missing, damaged, or does not fit.
    """
    config = read_search_config(section)
    if config.kind == "beam":
        return BeamDrafter(model, config, folder)
    phonemes = len(tensors.get("phonemes.bias", ()))
    characters = len(tensors.get("head.bias", ()))
    speller = Speller(model.encoder.hidden_size, characters, config.layers, config.width, phonemes)
    try:
        speller.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{folder}: the speller does not fit: {str(error).splitlines()[-1].strip()}") from None
    return PhonemeDrafter(model, config, folder, speller.to(model.device).eval().requires_grad_(False))


def _ngram(config: SearchConfig, folder: Path, tokenizer: PreTrainedTokenizerBase) -> DraftLM:
    return DraftLM(NgramLM.load(folder / config.ngram), *sentence_ends(tokenizer), config.weight, config.bonus)


def _copy(config: SearchConfig, source: Path, target: Path) -> None:
    for file in config.files():
        shutil.copyfile(source / file, target / Path(file).name)


def _words(text: str) -> list[str]:
    """The words of a text; characters of a script without spaces are words of their own."""
    return [part for word in text.split() for part in (word if is_unspaced(word[0]) else [word])]
