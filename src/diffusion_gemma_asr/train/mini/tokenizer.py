"""A small Gemma-like tokenizer: byte-pair encoding over words with a leading space mark, bytes for everything else.

Languages count alike, however much text there is of each: the words of all are weighed so that their bytes come to the same
number. In Mandarin, which has no spaces, each character is a token: longer ones are rare in speech.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ...data.manifest import read_manifest
from ...data.text import plain_text, speakable
from ...errors import DataError
from ...model.prompt import LANGUAGES, SPECIAL_TOKENS, instruction
from ...strict import require
from ..workers import rank, wait_for_all

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
FIRST_WORD_TOKEN = len(SPECIAL_TOKENS) + 1 + len(BYTES)  # behind the special tokens, <unk> and the bytes


@dataclass(frozen=True)
class TokenizerRecipe:
    """The stage `tokenizer`."""

    stage: Literal["tokenizer"]
    name: str  # of the run's folder, which gets tokenizer.json
    text: tuple[Path, ...]  # files CODE.txt with a sentence of that language a line, and manifests
    vocab_size: int = 6144
    alphabet: int = 2765  # single characters that get a token, the most frequent ones

    def __post_init__(self) -> None:
        require(len(self.text) >= 1, "text", "an empty list", "a list of at least one")
        require(self.vocab_size > FIRST_WORD_TOKEN, "vocab_size", self.vocab_size, f"above {FIRST_WORD_TOKEN}")


def train_tokenizer_stage(recipe: TokenizerRecipe, folder: Path, device: torch.device) -> Path:
    """Does the stage, unless it is done; the device does not matter.

    Returns:
        `folder`, which holds tokenizer.json.

    Raises:
        DataError: see `read_sentences`.
    """
    if rank() == 0 and not (folder / "tokenizer.json").is_file():
        train_tokenizer(read_sentences(recipe.text), recipe.vocab_size, folder, recipe.alphabet)
    wait_for_all()
    return folder


def train_tokenizer(
    sentences: Mapping[str, Iterable[str]], vocab_size: int, folder: str | Path, alphabet: int = 100_000
) -> PreTrainedTokenizerFast:
    """Trains a tokenizer and saves it as `tokenizer.json` in `folder`.

    Ids 0 to 2 are pad, eos and bos as in Gemma, then the other special tokens and 256 bytes; the rest is learnt.

    Args:
        sentences: plain text of each language, by its code.
        vocab_size: tokens in all.
        folder: made if missing.
        alphabet: at most so many single characters, the most frequent ones, get a token.
    """
    special = [*SPECIAL_TOKENS.values()]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\p{Han}"), "isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[*special, "<unk>", *BYTES], show_progress=False, limit_alphabet=alphabet
    )
    tokenizer.train_from_iterator(_words(sentences), trainer)
    # The trainer makes the bytes special tokens, which decoding skips: leave them ordinary tokens of the model.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in BYTES]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in [*special, "<unk>"]])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        extra_special_tokens=special[3:],
    )
    fast.save_pretrained(folder)
    return fast


def _words(sentences: Mapping[str, Iterable[str]]) -> Iterator[str]:
    """Single words (the normaliser marks them): merges never cross words. The prompt and the codes of languages get tokens
    of their own."""
    counts = {code: Counter(word for sentence in lines for word in sentence.split()) for code, lines in sentences.items()}
    sizes = {code: sum(len(word.encode()) * n for word, n in words.items()) for code, words in counts.items()}
    largest = max(sizes.values())
    total = 0
    for code, words in counts.items():
        for word, n in words.items():
            weighed = max(1, round(n * largest / sizes[code]))
            total += weighed
            yield from [word] * weighed
    prompt = [word for language in (*LANGUAGES.values(), None) for word in instruction(language).split()]
    yield from [*prompt, *LANGUAGES] * (total // 2000)


def read_sentences(files: Iterable[str | Path]) -> dict[str, list[str]]:
    """Different plain sentences of each language, in order, from files CODE.txt with one a line and from manifests.

    Raises:
        DataError: a file is neither, or a manifest cannot be read.
    """
    unique: dict[str, dict[str, None]] = {}
    for path in map(Path, files):
        if path.suffix == ".jsonl":
            lines = [(u.language, u.text) for u in read_manifest(path)]
        elif path.stem in LANGUAGES and path.is_file():
            lines = [(path.stem, line) for line in path.read_text(encoding="utf-8").splitlines()]
        else:
            raise DataError(f"{path}: no such text; give a file CODE.txt, CODE one of {', '.join(LANGUAGES)}, or a manifest")
        for code, line in lines:
            if speakable(line, code):
                unique.setdefault(code, {})[plain_text(line, code)] = None
    return {code: list(sentences) for code, sentences in unique.items()}


def kept_sentences(files: Iterable[str | Path], exclude: Iterable[str | Path]) -> dict[str, list[str]]:
    """What `read_sentences` finds in files, without what it finds in others.

    Raises:
        DataError: see `read_sentences`.
    """
    kept_out = {sentence for lines in read_sentences(exclude).values() for sentence in lines}
    return {code: [line for line in lines if line and line not in kept_out] for code, lines in read_sentences(files).items()}
