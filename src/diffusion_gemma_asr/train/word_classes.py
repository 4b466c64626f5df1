"""Counts the language model of word classes (word_classes.py) in text, but for sentences that models are judged by."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from ..word_classes import ClassLM
from .lexicon import words_of
from .tokenizer import kept_sentences


def count_classes(
    text: Iterable[str | Path], exclude: Iterable[str | Path], frequent: int, order: int, least: int
) -> ClassLM:
    """The model of all sentences of `text` that are not in `exclude`, both as `read_sentences` takes them.

    Args:
        frequent: words of each language that are classes of their own; all of Mandarin's characters are.
        order, least: see `NgramLM.count`.

    Raises:
        DataError: a file cannot be read.
    """
    sentences = {
        code: [words_of(line, code) for line in kept] for code, kept in kept_sentences(text, exclude).items()
    }
    own = {code: 10_000 if code == "zh" else frequent for code in sentences}
    return ClassLM.count(sentences, own, order, least)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Count the language model of word classes.")
    parser.add_argument("file", type=Path, help=".npz to write")
    parser.add_argument("text", nargs="+", help="files CODE.txt with a sentence of that language a line, and manifests")
    parser.add_argument("--exclude", nargs="*", default=(), help="the same, of sentences that are not counted")
    parser.add_argument("--frequent", type=int, default=1500, help="words of each language that are classes of their own")
    parser.add_argument("--order", type=int, default=3, help="words of the longest sequences")
    parser.add_argument("--least", type=int, default=3, help="longer sequences than two that occur less often are left out")
    args = parser.parse_args()
    model = count_classes(args.text, args.exclude, args.frequent, args.order, args.least)
    args.file.parent.mkdir(parents=True, exist_ok=True)
    model.save(args.file)
    print(f"{args.file}: {len(model.names)} classes, {args.file.stat().st_size / 1e6:.1f} MB")
