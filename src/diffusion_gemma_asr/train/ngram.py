"""Counts the language model of drafts (ngram.py) in text, but for the sentences of lists that models are judged by."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from transformers import AutoTokenizer

from ..ngram import NgramLM
from ..prompt import sentence_ends
from .tokenizer import kept_sentences


def count_text(
    tokenizer_folder: str | Path, text: Iterable[str | Path], exclude: Iterable[str | Path], order: int, least: int
) -> NgramLM:
    """The model of all sentences of `text` that are not in `exclude`, both as `read_sentences` takes them, in a tokenizer's
    tokens.

    Args:
        order, least: see `NgramLM.count`.

    Raises:
        DataError: a file cannot be read.
    """
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    rows: list[list[int]] = []
    languages: list[int] = []
    for number, (code, kept) in enumerate(kept_sentences(text, exclude).items()):
        spelled = tokenizer(kept, add_special_tokens=False)["input_ids"]
        print(f"{code}: {len(kept)} sentences, {sum(map(len, spelled))} tokens")
        rows += spelled
        languages += [number] * len(spelled)
    several = languages if languages and languages[-1] > 0 else None
    return NgramLM.count(rows, len(tokenizer), *sentence_ends(tokenizer), order, least, several)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Count the language model of drafts.")
    parser.add_argument("tokenizer", help="folder of the tokenizer")
    parser.add_argument("file", type=Path, help=".npz to write")
    parser.add_argument("text", nargs="+", help="files CODE.txt with a sentence of that language a line, and manifests")
    parser.add_argument("--exclude", nargs="*", default=(), help="the same, of sentences that are not counted")
    parser.add_argument("--order", type=int, default=5, help="tokens of the longest sequences")
    parser.add_argument("--least", type=int, default=3, help="longer sequences than two that occur less often are left out")
    args = parser.parse_args()
    model = count_text(args.tokenizer, args.text, args.exclude, args.order, args.least)
    args.file.parent.mkdir(parents=True, exist_ok=True)
    model.save(args.file)
    print(f"{args.file}: {sum(len(keys) for keys, _ in model.sequences)} sequences, {args.file.stat().st_size / 1e6:.1f} MB")
