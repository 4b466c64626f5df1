"""What a checkpoint knows of words beside its weights: the language models of drafts, and the pronouncing dictionary."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from .beam import DraftLM
from .lexicon import Lexicon
from .ngram import NgramLM
from .prompt import sentence_ends
from .recipe import LmRecipe
from .recurrent_lm import RecurrentLM
from .word_classes import ClassLM

LM = "ngram.npz"  # the draft's language model
CLASSES = "classes.npz"  # that of word classes
RECURRENT = "recurrent.safetensors"  # that of whole sentences
LEXICON = "lexicon.npz"  # the pronouncing dictionary of a speller's phonemes


def describe_language_files(lm: DraftLM | None, lexicon: Lexicon | None) -> LmRecipe:
    """What config.json says of a model's files."""
    dictionary = None if lexicon is None else LEXICON
    if lm is None:
        return LmRecipe(lexicon=dictionary)
    classes, recurrent = None if lm.classes is None else CLASSES, None if lm.recurrent is None else RECURRENT
    return LmRecipe(LM, lm.weight, lm.bonus, classes, recurrent, dictionary)


def save_language_files(lm: DraftLM | None, lexicon: Lexicon | None, folder: Path) -> None:
    """Writes those that there are."""
    if lm is not None:
        lm.lm.save(folder / LM)
        if lm.classes is not None:
            lm.classes.save(folder / CLASSES)
        if lm.recurrent is not None:
            lm.recurrent.save(folder / RECURRENT)
    if lexicon is not None:
        lexicon.save(folder / LEXICON)


def load_lm(entry: LmRecipe, folder: Path, tokenizer: PreTrainedTokenizerBase) -> DraftLM | None:
    """The language model of drafts that a recipe or a config.json names, its path taken from `folder`; None: it names none.

    Raises:
        CheckpointError: it cannot be read.
    """
    if entry.file is None:
        return None
    classes = None if entry.classes is None else ClassLM.load(folder / entry.classes)
    recurrent = None if entry.recurrent is None else RecurrentLM.load(folder / entry.recurrent)
    ends = sentence_ends(tokenizer)
    return DraftLM(NgramLM.load(folder / entry.file), *ends, entry.weight, entry.bonus, classes, recurrent)


def load_lexicon(entry: LmRecipe, folder: Path) -> Lexicon | None:
    """The pronouncing dictionary that a recipe or a config.json names, its path taken from `folder`; None: it names none.

    Raises:
        CheckpointError: it cannot be read.
    """
    return None if entry.lexicon is None else Lexicon.load(folder / entry.lexicon)
