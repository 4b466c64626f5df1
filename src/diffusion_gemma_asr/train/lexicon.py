"""Makes the pronouncing dictionary (lexicon.py) of the words in text, but for sentences of lists that models are judged by.

A word sounds different alone and in a sentence: "a", "les" before a vowel. espeak-ng therefore says whole sentences; which
phonemes belong to which word is told by aligning them with the words said one by one.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from rapidfuzz.distance import Levenshtein

from ..data.phonemes import pronounced
from ..data.synth import ACCENTS
from ..lexicon import Lexicon, lexicon_of
from .tokenizer import read_sentences

LEAST = 50  # occurrences of a phoneme in a language's text, below which it gets no class
SHARE, WAYS = 0.04, 4  # a word's pronunciations that are kept: those of at least so large a share, at most so many

Counts = dict[str, Counter[tuple[str, ...]]]


def words_of(sentence: str, language: str) -> list[str]:
    """The words of a plain text; in Mandarin its characters."""
    return list(sentence) if language == "zh" else sentence.split()


def parted(alone: Sequence[Sequence[str]], together: Sequence[str]) -> list[tuple[str, ...]]:
    """The phonemes of a sentence, word by word.

    Args:
        alone: phonemes of each word, said alone.
        together: those of the sentence. What it has between two words, such as a liaison, belongs to the first.
    """
    joined = [phoneme for word in alone for phoneme in word]
    blocks = Levenshtein.opcodes(joined, together)
    found, begin, end, block = [], 0, 0, 0
    place = 0
    for word in alone:
        place += len(word)
        while block < len(blocks) and blocks[block].src_end <= place:
            end = blocks[block].dest_end
            block += 1
        if block < len(blocks) and blocks[block].src_start < place:
            within = blocks[block]
            end = min(within.dest_end, within.dest_start + place - within.src_start)
        found.append(tuple(together[begin:end]))
        begin = end
    found[-1] += tuple(together[end:])
    return found


def counted(sentences: Sequence[str], language: str) -> Counts:
    """How often each word of plain sentences is said in which way, over all accents of a language."""
    rows = [words_of(sentence, language) for sentence in sentences]
    known = sorted({word for row in rows for word in row})
    found: Counts = {word: Counter() for word in known}
    for accent in sorted(set(ACCENTS[language])):
        alone = dict(zip(known, pronounced(known, language, accent), strict=True))
        for row, together in zip(rows, pronounced(sentences, language, accent), strict=True):
            if row:
                for word, said in zip(row, parted([alone[word] for word in row], together), strict=True):
                    if said:
                        found[word][said] += 1
        for word in known:
            if not found[word] and alone[word]:
                found[word][tuple(alone[word])] = 1
    return {word: _kept(ways) for word, ways in found.items()}


def _kept(ways: Counter[tuple[str, ...]]) -> Counter[tuple[str, ...]]:
    total = ways.total()
    return Counter({way: n for way, n in ways.most_common(WAYS) if n >= SHARE * total})


def make_lexicon(text: Iterable[str | Path], exclude: Iterable[str | Path]) -> Lexicon:
    """The dictionary of all sentences of `text` that are not in `exclude`, both as `read_sentences` takes them.

    Raises:
        DataError: a file cannot be read.
        SynthesisError: espeak-ng is missing.
    """
    kept_out = {sentence for lines in read_sentences(exclude).values() for sentence in lines}
    counts = {}
    for code, lines in read_sentences(text).items():
        kept = [line for line in lines if line and line not in kept_out]
        counts[code] = counted(kept, code)
        print(f"{code}: {len(kept)} sentences, {len(counts[code])} words", flush=True)
    return lexicon_of(counts, LEAST)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the pronouncing dictionary of drafts.")
    parser.add_argument("file", type=Path, help=".npz to write")
    parser.add_argument("text", nargs="+", help="files CODE.txt with a sentence of that language a line, and manifests")
    parser.add_argument("--exclude", nargs="*", default=(), help="the same, of sentences whose words are not looked at")
    args = parser.parse_args()
    lexicon = make_lexicon(args.text, args.exclude)
    args.file.parent.mkdir(parents=True, exist_ok=True)
    lexicon.save(args.file)
    size = args.file.stat().st_size / 1e6
    print(f"{args.file}: {len(lexicon.words)} pronunciations, {len(lexicon)} classes, {size:.1f} MB")
