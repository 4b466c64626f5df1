"""The speller: a second, finer CTC beside the audio tokens, which writes single characters.

How a word is spelled follows from how it sounds by rules that a few hours of speech teach; which of thousands of tokens it
is made of has to be learnt token by token. So where a recipe asks for it the projector has a branch that spells the
encoder's frames in characters. Its words, searched with a language model (spelled_beam.py), are the draft in place of the
audio tokens' own. CTC over characters beside coarser units: Sanabria and Metze 2018, arXiv 1807.07104.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from ..errors import DataError
from ..model.ctc import DraftToken, collapse, forced_align, numbered
from ..model.slot_layers import SlotLayers
from .beam import heard_columns

STRIDE = 2  # encoder frames of one position of the layers
TOP = 12  # characters a frame that a search looks at
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class Spelling(NamedTuple):
    """What is likely in each frame: ids (B, F, K) long of classes, the likeliest first, and logprobs (B, F, K); blank
    (B, F), the log-probability of the blank."""

    ids: Tensor
    logprobs: Tensor
    blank: Tensor

    def clip(self, row: int, frames: int) -> Spelling:
        """One row's own frames, without the batch dimension, on the processor."""
        return Spelling(*(part[row, :frames].cpu() for part in self))


class Spellings(NamedTuple):
    """What a speller hears: its characters, and its phonemes, if it writes these."""

    characters: Spelling
    phonemes: Spelling | None

    def clip(self, row: int, frames: int) -> Spellings:
        """See `Spelling.clip`."""
        phonemes = None if self.phonemes is None else self.phonemes.clip(row, frames)
        return Spellings(self.characters.clip(row, frames), phonemes)


class Alphabet:
    """The characters of a tokenizer: its tokens of one character, and those of one byte, which spell what has no token.

    Class 0 is the CTC blank.

    Attributes:
        characters: what each class spells, as the tokenizer writes it: "▁" is a space; "" is the blank.
        classes: the class of each character.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        special = set(tokenizer.all_special_ids)
        pieces = [(piece, token) for piece, token in vocabulary if token not in special]
        self.characters = ["", *(piece for piece, _ in pieces if len(piece) == 1 or _BYTE.fullmatch(piece))]
        self.classes = {character: i for i, character in enumerate(self.characters) if i}
        self._spelled = {token: self._classes_of(piece) for piece, token in pieces}

    def __len__(self) -> int:
        return len(self.characters)

    def _classes_of(self, piece: str) -> list[int]:
        if piece in self.classes:
            return [self.classes[piece]]
        return [self.classes[character] for character in piece if character in self.classes]

    def spell(self, tokens: Iterable[int]) -> list[int]:
        """The classes that spell tokens, special ones left out."""
        return [found for token in tokens for found in self._spelled.get(token, ())]

    def read(self, heard: Spelling, lengths: Tensor) -> list[str]:
        """What the likeliest path of each row spells; lengths (B,) frames."""
        rows = collapse(heard.ids[..., 0], heard.logprobs[..., 0], lengths, blank=0)
        return [text_of([self.characters[found.id] for found in row]) for row in rows]


class Speller(nn.Module):
    """Encoder frames → logits of characters for every frame, and of phonemes.

    Args:
        input_size: width of an encoder frame.
        classes: size of the alphabet.
        phonemes: classes of the second head, which writes phonemes (lexicon.py); 0: there is none.
        layers, width: of `SlotLayers`, at half the frames' rate.
    """

    def __init__(self, input_size: int, classes: int, layers: int, width: int, phonemes: int = 0):
        super().__init__()
        self.deep = SlotLayers(input_size, width, width, layers, STRIDE)
        nn.init.xavier_uniform_(self.deep.out_proj.weight)  # nothing stands beside these layers
        self.head = nn.Linear(width, classes)
        self.phonemes = nn.Linear(width, phonemes) if phonemes else None

    def forward(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits of characters (B, F, classes) and of phonemes (B, F, phonemes), if it writes these.

        Args:
            frames: (B, F, input_size), of which lengths (B,) hold sound.
        """
        x = F.gelu(self.deep(frames, lengths))
        return self.head(x), None if self.phonemes is None else self.phonemes(x)

    @torch.no_grad()
    def hear(self, frames: Tensor, lengths: Tensor) -> Spellings:
        """What is likely in frames as `forward` takes them."""
        characters, phonemes = self(frames, lengths)
        return Spellings(_likely(characters), None if phonemes is None else _likely(phonemes))


def _likely(logits: Tensor) -> Spelling:
    logprobs = logits.float().log_softmax(-1)
    best, ids = logprobs.topk(min(TOP, logprobs.shape[-1]))
    return Spelling(ids, best, logprobs[..., 0])


def text_of(characters: Sequence[str]) -> str:
    """What characters of an alphabet spell together; bytes that are no whole character are left out."""
    found = bytearray()
    for character in characters:
        found += bytes([int(character[3:5], 16)]) if _BYTE.fullmatch(character) else character.encode()
    return found.decode(errors="ignore").replace("▁", " ").strip()


def placed(tokens: Sequence[int], heard: Spelling, alphabet: Alphabet, frames_per_slot: int) -> list[DraftToken]:
    """A transcript's tokens as a draft: where the characters of each are heard, and how likely they are there on average.

    Neighbours may share a slot. Characters that do not fit into the frames are left out from the end on.

    Args:
        tokens: ids.
        heard: one clip, without a batch dimension.
        alphabet: what the classes are.
        frames_per_slot: frames of one audio token.
    """
    spelled = [alphabet.spell([token]) for token in tokens]
    spans = None
    while spans is None:
        columns, rows = columns_of(heard, spelled)
        try:
            spans = forced_align(columns, [found for row in rows for found in row], 0)
        except DataError:
            spelled.pop()
    draft = []
    for token, row in zip(tokens, spelled, strict=False):
        own, spans = spans[: len(row)], spans[len(row) :]
        if own:
            start, end = own[0].start // frames_per_slot, -(-own[-1].end // frames_per_slot)
            draft.append(DraftToken(token, start, end, sum(math.exp(span.logprob) for span in own) / len(own)))
    return draft


def columns_of(heard: Spelling, spelled: Sequence[Sequence[int]]) -> tuple[torch.Tensor, list[list[int]]]:
    """Log-probabilities (F, K) of the classes that occur in rows, the blank's first, and the rows in numbers of columns."""
    classes, rows = numbered(spelled, 0)
    return heard_columns(heard.ids.numpy(), heard.logprobs.numpy(), heard.blank.numpy(), classes), rows
