"""The stage `tokenizer`: a small Gemma-like tokenizer, byte-pair encoding of words with a leading space mark.

Characters without a token are encoded as bytes. Word counts are scaled so that all languages have equally many bytes,
however much text there is of each. In Mandarin, which has no spaces, each character is a token. Where a recipe names a
Whisper, tokens of other languages are that Whisper's (whisper_tokens.py).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ...data.manifest import read_manifest
from ...data.text import plain_text, speakable
from ...errors import DataError
from ...files import whole_file
from ...model.prompt import LANGUAGES, SPECIAL_TOKENS, instruction
from ...strict import require
from ..recipe_files import PART
from ..workers import rank, wait_for_all
from .whisper_tokens import load_whisper_tokens, rows_for, with_tokens

SPECIAL = [*SPECIAL_TOKENS.values()]
ROWS = "rows.safetensors"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
FIRST_WORD_TOKEN = len(SPECIAL_TOKENS) + 1 + len(BYTES)  # lowest id of an ordinary token, after special, <unk> and bytes


@dataclass(frozen=True)
class TokenizerRecipe:
    """The stage `tokenizer`."""

    stage: Literal["tokenizer"]
    name: str  # of the run's folder, which gets tokenizer.json
    text: tuple[Path, ...]  # files CODE.txt with a sentence of that language per line, or manifests
    vocab_size: int = 6144  # without Whisper's
    alphabet: int = 2765  # number of single characters with a token, the most frequent ones
    whisper: str | None = field(default=None, metadata=PART)  # whose tokens there are beside: hub repository or folder
    whisper_tokens: int = 10000  # the ones that the text needs most, beside what these are merged from
    own: tuple[str, ...] = ()  # languages without Whisper's tokens, which spell them in bytes

    def __post_init__(self) -> None:
        if self.whisper is not None:
            require(len(self.own) >= 1, "own", "an empty list", "a list of at least one language, beside 'whisper'")
        require(self.whisper is not None or not self.own, "own", list(self.own), "left out without 'whisper'")
        require(len(self.text) >= 1, "text", "an empty list", "a list of at least one")
        require(self.vocab_size > FIRST_WORD_TOKEN, "vocab_size", self.vocab_size, f"above {FIRST_WORD_TOKEN}")


def train_tokenizer_stage(recipe: TokenizerRecipe, folder: Path, device: torch.device) -> Path:
    """Trains a tokenizer, unless `folder` has one.

    Args:
        recipe: of the stage.
        folder: of the run; gets tokenizer.json, and where the recipe names a Whisper rows.safetensors, for the head.
        device: ignored.

    Returns:
        `folder`.

    Raises:
        DataError: see `read_sentences`; or a language of `own` has no text.
        CheckpointError: there is no such Whisper.
    """
    if rank() == 0 and not (folder / "tokenizer.json").is_file():
        sentences = read_sentences(recipe.text)
        if recipe.whisper is None:
            saved(train_tokenizer(sentences, recipe.vocab_size, recipe.alphabet), folder)
        else:
            with_whispers_tokens(recipe, sentences, folder)
    wait_for_all()
    return folder


def with_whispers_tokens(recipe: TokenizerRecipe, sentences: Mapping[str, list[str]], folder: Path) -> None:
    """Writes a tokenizer with a Whisper's tokens, and the rows of its head, to `folder`."""
    assert recipe.whisper is not None
    if missing := [code for code in recipe.own if code not in sentences]:
        raise DataError(f"'own': there is no text in {missing[0]}; 'text' has {', '.join(sentences)}")
    whisper = load_whisper_tokens(recipe.whisper)
    own = train_tokenizer({code: sentences[code] for code in recipe.own}, recipe.vocab_size, recipe.alphabet)
    others = {code: lines for code, lines in sentences.items() if code not in recipe.own}
    tokenizer = with_tokens(whisper, whisper.needed(others, recipe.whisper_tokens), own, [*SPECIAL, "<unk>", *BYTES])
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / ROWS) as part:
        save_file({"rows": rows_for(tokenizer.get_vocab(), whisper).half()}, part)
    saved(tokenizer, folder)


def train_tokenizer(sentences: Mapping[str, Iterable[str]], vocab_size: int, alphabet: int = 100_000) -> Tokenizer:
    """Trains a tokenizer.

    Ids 0 to 2 are pad, eos and bos as in Gemma, followed by the other special tokens, 256 bytes and the trained tokens.

    Args:
        sentences: plain text of each language, by its code.
        vocab_size: total number of tokens.
        alphabet: number of single characters with a token at most, the most frequent ones.
    """
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\p{Han}"), "isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[*SPECIAL, "<unk>", *BYTES], show_progress=False, limit_alphabet=alphabet
    )
    tokenizer.train_from_iterator(_words(sentences), trainer)
    # The trainer made the bytes special tokens, which decoding would skip: make them ordinary ones.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in BYTES]
    return Tokenizer.from_str(json.dumps(state))


def saved(tokenizer: Tokenizer, folder: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers has it, saved as `tokenizer.json` in `folder`, which is made if missing."""
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in [*SPECIAL, "<unk>"]])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        extra_special_tokens=SPECIAL[3:],
    )
    fast.save_pretrained(folder)
    return fast


def _words(sentences: Mapping[str, Iterable[str]]) -> Iterator[str]:
    """The training text as single words, so that merges do not cross words, weighted equally over languages.

    Words of the prompt and language codes are added often enough to become single tokens.
    """
    counts = {code: Counter(word for sentence in lines for word in sentence.split()) for code, lines in sentences.items()}
    sizes = {code: sum(len(word.encode()) * n for word, n in words.items()) for code, words in counts.items()}
    largest = max(sizes.values())
    total = 0
    for code, words in counts.items():
        for word, n in words.items():
            repeats = max(1, round(n * largest / sizes[code]))
            total += repeats
            yield from [word] * repeats
    prompt = [word for language in (*LANGUAGES.values(), None) for word in instruction(language).split()]
    yield from [*prompt, *LANGUAGES] * (total // 2000)


def read_sentences(files: Iterable[str | Path]) -> dict[str, list[str]]:
    """Reads the sentences of each language, as plain text without duplicates, in order.

    Args:
        files: CODE.txt with a sentence per line, or manifests.

    Returns:
        sentences by language code.

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
    """As `read_sentences`, without the sentences of other files.

    Args:
        files: see `read_sentences`.
        exclude: files whose sentences are left out.

    Raises:
        DataError: see `read_sentences`.
    """
    excluded = {sentence for lines in read_sentences(exclude).values() for sentence in lines}
    return {code: [line for line in lines if line and line not in excluded] for code, lines in read_sentences(files).items()}
