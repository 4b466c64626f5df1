"""A small tokenizer of the tokens that Whisper writes, and the rows that it writes them by.

The layers of a Whisper decoder (model/decoder_layers.py) know how to point to Whisper's own tokens, thousands of which no
small corpus of speech ever shows them. So a small backbone has these tokens, as many as its text needs, and its head has
Whisper's rows for them. A language whose characters Whisper spells in bytes keeps tokens of its own.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor

from ...checkpoint.parts import load_decoder, load_tokenizer
from ...errors import CheckpointError, first_line
from ...model.config import BackboneConfig
from ...model.packing import unpack
from ...model.prompt import LANGUAGES, instruction
from ..decoder_start import SPACE, readable

# Whisper's rule for what a token may span, but that Chinese characters stand alone, and vowel signs with their letters.
PIECES = r"\p{Han}|'s|'t|'re|'ve|'m|'ll|'d|▁?[\p{L}\p{M}&&[^\p{Han}]]+|▁?\p{N}+|▁?[^\s\p{L}\p{M}\p{N}▁]+|▁+|\s+"
ROW_RMS = 0.06  # of a row's components: an audio token as loud as a token then reaches logits of 30, DiffusionGemma's bound
Parts = dict[str, tuple[str, str]]
"""The two tokens that each token is merged from, in the order of the merges."""


@dataclass(frozen=True)
class WhisperTokens:
    """What a Whisper writes.

    Attributes:
        numbers: of its tokens that hold whole characters, as text with SPACE for a space, by falling frequency.
        parts: of those of more than one character.
        rows: (V, D) of its output.
    """

    numbers: dict[str, int]
    parts: Parts
    rows: Tensor

    def needed(self, sentences: Mapping[str, Sequence[str]], count: int) -> list[str]:
        """The tokens that text needs most, each language counting the same, with all that they are merged from and those
        that prompts need."""
        whole = plain_bpe(self.parts, {character for token in self.numbers for character in token if len(token) == 1})
        shares: Counter[str] = Counter()
        for lines in sentences.values():
            found = Counter(chain.from_iterable(piece.tokens for piece in whole.encode_batch(list(lines))))
            total = sum(found.values())
            shares.update({token: number / total for token, number in found.items()})
        prompts = [instruction(name) for name in (*LANGUAGES.values(), None)] + ["user", "model", *LANGUAGES]
        wanted = dict.fromkeys(token for token, _ in shares.most_common(count))
        wanted |= dict.fromkeys(chain.from_iterable(piece.tokens for piece in whole.encode_batch(prompts)))
        kept: set[str] = set()
        left = list(wanted)
        while left:
            token = left.pop()
            if token not in kept:
                kept.add(token)
                left += self.parts.get(token, ())
        return [token for token in self.parts if token in kept]


def load_whisper_tokens(name: str) -> WhisperTokens:
    """The tokens of a whole Whisper, a hub repository or a folder.

    Raises:
        CheckpointError: there is no such Whisper.
    """
    state = json.loads(load_tokenizer(BackboneConfig(name)).backend_tokenizer.to_str())["model"]
    texts = readable(state["vocab"])
    numbers = {text: state["vocab"][token] for token, text in texts.items()}
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in state["merges"]]
    told = {texts[a + b]: (texts[a], texts[b]) for a, b in merges if {a, b, a + b} <= texts.keys()}
    return WhisperTokens(numbers, parts_of(numbers, told), load_decoder(name).embed_tokens.weight.data)


def parts_of(tokens: Iterable[str], told: Mapping[str, tuple[str, str]]) -> Parts:
    """What tokens are merged from.

    Args:
        tokens: in the order in which they were made.
        told: what some of them are merged from. Others were, from parts of characters: for these it is the longest
            beginning whose rest is a token too, and those that have none are left out.
    """
    found: Parts = {}
    for token in tokens:
        cuts = [told[token]] if token in told else []
        cuts += [(token[:at], token[at:]) for at in range(len(token) - 1, 0, -1)]
        cut = next((cut for cut in cuts if all(len(part) == 1 or part in found for part in cut)), None)
        if cut is not None:
            found[token] = cut
    return found


def plain_bpe(parts: Parts, alphabet: Iterable[str]) -> Tokenizer:
    """A tokenizer of characters and what can be merged from them; no special tokens, no bytes."""
    characters = {*alphabet, SPACE, *(part for cut in parts.values() for part in cut if len(part) == 1)}
    vocabulary = {token: number for number, token in enumerate([*sorted(characters), *parts])}
    return prepared(Tokenizer(models.BPE(vocabulary, [*parts.values()])))


def prepared(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer, with Whisper's rule for what a token may span."""
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), "isolated")
    return tokenizer


def with_tokens(whisper: WhisperTokens, kept: Sequence[str], own: Tokenizer, first: Sequence[str]) -> Tokenizer:
    """A tokenizer of Whisper's tokens and those of another one.

    Args:
        whisper: whose tokens there are.
        kept: of these, with all that they are merged from.
        own: the other tokenizer. Of its tokens, those stay that hold none of the characters of Whisper's.
        first: tokens that `own` begins with, special ones and bytes.
    """
    state = json.loads(own.to_str())["model"]
    characters = sorted({character for token in kept for character in token})
    taken = {*characters} - {SPACE}
    others = {token for token in own.get_vocab() if token not in first and not {*token} & taken}
    tokens = dict.fromkeys([*first, SPACE, *characters, *kept, *sorted(others)])
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [*(whisper.parts[token] for token in kept), *((a, b) for a, b in state["merges"] if a + b in others)]
    model = models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    return prepared(Tokenizer(model))


def rows_for(tokens: Mapping[str, int], whisper: WhisperTokens, seed: int = 0) -> Tensor:
    """The rows (V, D) of a head for numbered tokens: Whisper's where it has the token, random ones like them elsewhere.

    What all of Whisper's rows have in common, five sixths of their square, is taken off: it adds the same to all logits.
    """
    theirs = whisper.rows[[*whisper.numbers.values()]]
    mean, deviation = theirs.mean(0), theirs.std(0)
    found = deviation * torch.randn(len(tokens), len(mean), generator=torch.Generator().manual_seed(seed))
    for token, number in tokens.items():
        if token in whisper.numbers:
            found[number] = whisper.rows[whisper.numbers[token]] - mean
    return found * (ROW_RMS / found.square().mean().sqrt())


def read_rows(path: Path, shape: Sequence[int]) -> Tensor:
    """The rows (V, H) that the stage `tokenizer` wrote.

    Args:
        path: of the file.
        shape: that the recipe's backbone wants.

    Raises:
        CheckpointError: there is no such file, or its rows are of other tokens or of another width.
    """
    try:
        rows = unpack(load_file(path))["rows"]
    except (OSError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{path}: no rows of tokens there ({first_line(error)}); run the stage 'tokenizer'") from None
    if rows.shape != tuple(shape):
        raise CheckpointError(f"{path}: {tuple(rows.shape)} rows and columns, where the recipe has {tuple(shape)}")
    return rows.float()
