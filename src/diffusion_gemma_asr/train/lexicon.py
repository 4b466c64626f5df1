"""Makes a pronouncing dictionary (lexicon.py) of the words in text, but for sentences of lists that models are judged by,
and of the most frequent words of each language.

A word sounds different alone and in a sentence: "a", "les" before a vowel. espeak-ng therefore says whole sentences; which
phonemes belong to which word is told by aligning them with the words said one by one. Frequent words that the text lacks,
from the lists of wordfreq (Speer 2022), are said alone.
"""

from __future__ import annotations

import argparse
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rapidfuzz.distance import Levenshtein

from ..data.phonemes import pronounced
from ..data.synth import ACCENTS
from ..data.text import plain_text
from ..errors import DataError
from ..lexicon import Lexicon, lexicon_of, symbols_of
from ..prompt import LANGUAGES
from .tokenizer import kept_sentences

LEAST = 50  # occurrences of a phoneme in a language's text, below which it gets no class
SHARE, WAYS = 0.04, 4  # a word's pronunciations that are kept: those of at least so large a share, at most so many
MISSPELLED = 5.0
BESIDE = 0.25  # weight of wordfreq's frequencies beside those in the text

Ways = dict[str, Counter[tuple[str, ...]]]  # of each word


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


def counted(sentences: Sequence[str], language: str, frequencies: Mapping[str, float] | None = None) -> Ways:
    """How often each word is said in which way, over all accents of a language: in plain sentences, and once more alone.

    Args:
        frequencies: of more words, as shares; they weigh BESIDE as much as the sentences.
    """
    rows = [words_of(sentence, language) for sentence in sentences]
    known = sorted({word for row in rows for word in row} | set(frequencies or ()))
    found: Ways = {word: Counter() for word in known}
    for accent in sorted(set(ACCENTS[language])):
        alone = dict(zip(known, pronounced(known, language, accent), strict=True))
        for row, together in zip(rows, pronounced(sentences, language, accent), strict=True):
            if row:
                for word, said in zip(row, parted([alone[word] for word in row], together), strict=True):
                    found[word][said] += 1
        for word in known:
            found[word][tuple(alone[word])] += 1
    size = sum(map(len, rows))
    extra = {word: BESIDE * size * share for word, share in (frequencies or {}).items()}
    said_there = Counter(word for row in rows for word in row)
    return {word: _kept(ways, said_there[word] + extra.get(word, 0.0)) for word, ways in found.items()}


def _kept(ways: Counter[tuple[str, ...]], weight: float) -> Counter[tuple[str, ...]]:
    """The most frequent ways to say a word, which together weigh as much as the word."""
    del ways[()]
    total = ways.total()
    return Counter({way: weight * n / total for way, n in ways.most_common(WAYS) if n >= SHARE * total})


def frequent_words(language: str, count: int) -> dict[str, float]:
    """The most frequent words of a language that are written as plain text has them, with their shares.

    Left out are words that another language has more often, since these lists come from the web, and those that some other
    word, MISSPELLED times as frequent, is without its accents. There are none of Mandarin, whose characters the texts have.

    Raises:
        DataError: wordfreq is not installed.
    """
    if count == 0 or language == "zh":
        return {}
    try:
        import wordfreq
    except ImportError:
        raise DataError("frequent words need wordfreq; pip install wordfreq, or ask for --frequent 0") from None
    others = [wordfreq.get_frequency_dict(code, "best") for code in LANGUAGES if code != language]
    found: dict[str, float] = {}
    for word, share in wordfreq.get_frequency_dict(language, "best").items():
        plain = plain_text(word, language)
        at_home = all(share >= other.get(word, 0.0) for other in others)
        if at_home and plain and " " not in plain and len(plain) == len(word):  # one word of which nothing is lost
            found[plain] = found.get(plain, 0.0) + share
    alike: dict[str, float] = {}
    for word, share in found.items():
        alike[_bare(word)] = max(share, alike.get(_bare(word), 0.0))
    right = [(word, share) for word, share in found.items() if MISSPELLED * share > alike[_bare(word)]]
    return dict(sorted(right, key=lambda item: -item[1])[:count])


def _bare(word: str) -> str:
    """A word without its accents; the signs of Hindi are none."""
    return "".join(c for c in unicodedata.normalize("NFD", word) if unicodedata.combining(c) < 200)


def make_lexicon(
    text: Iterable[str | Path], exclude: Iterable[str | Path], frequent: int, like: Lexicon | None = None
) -> Lexicon:
    """The dictionary of all sentences of `text` that are not in `exclude`, both as `read_sentences` takes them.

    Args:
        frequent: words of wordfreq's list of each language that are looked at.
        like: phonemes have the classes that they have there; a speller that writes these goes on to.

    Raises:
        DataError: a file cannot be read, or wordfreq is missing.
        SynthesisError: espeak-ng is missing.
    """
    counts = {}
    for code, kept in kept_sentences(text, exclude).items():
        counts[code] = counted(kept, code, frequent_words(code, frequent))
        print(f"{code}: {len(kept)} sentences, {len(counts[code])} words", flush=True)
    return lexicon_of(counts, symbols_of(counts, LEAST) if like is None else like.symbols)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the pronouncing dictionary of drafts.")
    parser.add_argument("file", type=Path, help=".npz to write")
    parser.add_argument("text", nargs="+", help="files CODE.txt with a sentence of that language a line, and manifests")
    parser.add_argument("--exclude", nargs="*", default=(), help="the same, of sentences whose words are not looked at")
    parser.add_argument("--frequent", type=int, default=100_000, help="words of wordfreq's list of each language")
    parser.add_argument("--like", type=Path, help="a dictionary whose phonemes' classes are kept: a trained speller's")
    args = parser.parse_args()
    like = None if args.like is None else Lexicon.load(args.like)
    lexicon = make_lexicon(args.text, args.exclude, args.frequent, like)
    args.file.parent.mkdir(parents=True, exist_ok=True)
    lexicon.save(args.file)
    size = args.file.stat().st_size / 1e6
    print(f"{args.file}: {len(lexicon.words)} pronunciations, {len(lexicon)} classes, {size:.1f} MB")
