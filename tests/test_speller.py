"""The speller, and the words that its characters or phonemes and a language model find together."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from counted import ngram_of, small_lexicon
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from diffusion_gemma_asr.drafts.beam import DraftLM
from diffusion_gemma_asr.drafts.lexicon import Lexicon
from diffusion_gemma_asr.drafts.lexicon_beam import LexiconSearch
from diffusion_gemma_asr.drafts.spelled_beam import SPACE, SpelledSearch
from diffusion_gemma_asr.drafts.speller import Alphabet, Speller, Spelling, placed, text_of
from diffusion_gemma_asr.drafts.token_scores import TokenScores, is_unspaced
from diffusion_gemma_asr.model.ctc import scores
from diffusion_gemma_asr.model.prompt import sentence_ends

SAID = ("the sea", "the sea", "she sells")


@pytest.fixture(scope="module")
def tokenizer(backbone_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(backbone_folder)


@pytest.fixture(scope="module")
def alphabet(tokenizer: PreTrainedTokenizerBase) -> Alphabet:
    return Alphabet(tokenizer)


def language_model(tokenizer: PreTrainedTokenizerBase, weight: float = 1.0, bonus: float = 0.0) -> DraftLM:
    rows = [tokenizer.encode(text, add_special_tokens=False) for text in SAID]
    ends = sentence_ends(tokenizer)
    return DraftLM(ngram_of(rows, len(tokenizer), *ends, order=3), *ends, weight, bonus)


def token_scores(tokenizer: PreTrainedTokenizerBase, weight: float = 1.0, bonus: float = 0.0) -> TokenScores:
    return TokenScores(tokenizer, language_model(tokenizer, weight, bonus))


def spelling_of(logits: torch.Tensor) -> Spelling:
    """One clip's logits (F, classes) with all classes kept."""
    best, ids = logits.log_softmax(-1).sort(-1, descending=True)
    return Spelling(ids, best, logits.log_softmax(-1)[:, 0])


def clear(alphabet: Alphabet, path: str) -> torch.Tensor:
    """Logits (F, classes) that are sure of one character a frame; "-" is the blank."""
    classes = [0 if character == "-" else alphabet.classes[character] for character in path]
    return 20.0 * F.one_hot(torch.tensor(classes), len(alphabet)).float()


@pytest.mark.parametrize("text", ["the quick brown fox", "she, Ada", "naïve 今 ß", ""])
def test_characters_spell_what_the_tokens_do(tokenizer: PreTrainedTokenizerBase, alphabet: Alphabet, text: str) -> None:
    tokens = tokenizer.encode(text, add_special_tokens=False)
    spelled = alphabet.spell([*tokens, *tokenizer.all_special_ids])
    characters = [alphabet.characters[found] for found in spelled]
    assert text_of(characters) == text and 0 not in spelled
    assert all(len(character) == 1 or character.startswith("<0x") for character in characters)


def test_a_speller_gives_a_row_of_a_batch_what_it_gives_it_alone() -> None:
    torch.manual_seed(0)
    speller = Speller(12, 9, layers=2, width=64, phonemes=5).eval()
    frames, lengths = torch.randn(2, 11, 12), torch.tensor([11, 6])
    written, alone = speller(frames, lengths), speller(frames[1:, :6], lengths[1:])
    heard = speller.hear(frames, lengths).clip(1, 6)
    for logits, own, likely, classes in zip(written, alone, heard, (9, 5), strict=True):
        assert logits.shape == (2, 11, classes) and logits.std() > 0
        torch.testing.assert_close(own[0], logits[1, :6], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(likely.logprobs[:, 0], logits[1, :6].log_softmax(-1).amax(-1), rtol=1e-4, atol=1e-5)
        assert not likely.logprobs.requires_grad
    characters = Speller(12, 9, layers=1, width=64)
    assert characters(frames, lengths)[1] is None
    assert characters.hear(frames, lengths).clip(0, 3).phonemes is None


def test_the_likeliest_path_is_read(alphabet: Alphabet) -> None:
    spelling = spelling_of(clear(alphabet, "-s-ea-"))
    batch = Spelling(*(torch.stack([part, part]) for part in spelling))
    assert alphabet.read(batch, torch.tensor([6, 2])) == ["sea", "s"]


def test_sure_frames_are_what_is_written(tokenizer: PreTrainedTokenizerBase, alphabet: Alphabet) -> None:
    search = SpelledSearch(alphabet, token_scores(tokenizer, 0.0))
    found = search.best(spelling_of(clear(alphabet, "sh-ee-▁▁-sel-ls-")))
    assert tokenizer.decode(found[0].tokens) == "she sells"
    assert search.best(spelling_of(clear(alphabet, "----")))[0].tokens == ()
    assert search.best(spelling_of(clear(alphabet, "-")[:0]))[0].tokens == ()


def test_text_decides_between_words_that_sound_alike(tokenizer: PreTrainedTokenizerBase, alphabet: Alphabet) -> None:
    logits = clear(alphabet, "the▁sha")
    logits[5, alphabet.classes["e"]] = logits[5, alphabet.classes["h"]] - 0.5  # "sea" is a little less likely than "sha"
    for weight, expected in ((0.0, "the sha"), (1.0, "the sea")):
        search = SpelledSearch(alphabet, token_scores(tokenizer, weight))
        assert tokenizer.decode(search.best(spelling_of(logits))[0].tokens) == expected


@pytest.mark.parametrize("seed", range(4))
def test_the_search_finds_the_best_of_all_transcripts(
    tokenizer: PreTrainedTokenizerBase, alphabet: Alphabet, seed: int
) -> None:
    """On so few frames and characters that all transcripts can be scored."""
    letters = [0, *(alphabet.classes[character] for character in ("a", "s", SPACE))]
    torch.manual_seed(seed)
    logits = torch.full((4, len(alphabet)), -40.0)
    logits[:, letters] = torch.randn(4, len(letters))
    model = language_model(tokenizer, 0.8, 0.7)

    def score(tokens: tuple[int, ...], spelled: set[tuple[int, ...]]) -> float:
        row = [*tokens, model.eos]
        contexts = [model.context(tokens[:i]) for i in range(len(row))]
        language = model.weight * model.lm.logprobs(contexts, row).sum() + model.bonus * len(tokens)
        return float(torch.stack([heard(way) for way in spelled]).logsumexp(0)) + float(language)

    def heard(way: tuple[int, ...]) -> torch.Tensor:
        target = torch.tensor([way], dtype=torch.long).view(1, -1)
        sizes = torch.tensor([len(logits)]), torch.tensor([len(way)])
        return -F.ctc_loss(logits.log_softmax(-1)[:, None], target, *sizes, reduction="sum")

    ways: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for size in range(5):
        for way in itertools.product(letters[1:], repeat=size):
            text = " ".join(text_of([alphabet.characters[found] for found in way]).split())
            ways.setdefault(tuple(tokenizer.encode(text, add_special_tokens=False)), set()).add(way)
    scores = {tokens: score(tokens, spelled) for tokens, spelled in ways.items()}
    found = SpelledSearch(alphabet, TokenScores(tokenizer, model), width=1000).best(spelling_of(logits))[0]
    assert found.tokens == max(scores, key=scores.__getitem__)
    assert found.score == pytest.approx(scores[found.tokens], abs=0.02)


def test_what_a_search_has_looked_up_changes_nothing(tokenizer: PreTrainedTokenizerBase, alphabet: Alphabet) -> None:
    rows = [spelling_of(0.3 * clear(alphabet, path)) for path in ("the▁sea", "she▁sel-ls", "the▁sea", "as▁he")]
    search = SpelledSearch(alphabet, token_scores(tokenizer))
    for heard in rows:
        assert search.best(heard) == SpelledSearch(alphabet, token_scores(tokenizer)).best(heard)
    transcripts = [row.tokens for row in search.best(rows[0])]
    fresh = token_scores(tokenizer)
    assert search.language.whole(transcripts) == pytest.approx(fresh.whole(transcripts))


def test_tokens_lie_where_their_characters_are_heard(tokenizer: PreTrainedTokenizerBase, alphabet: Alphabet) -> None:
    path = "--sh-ee-▁▁-sel-ls---"
    heard = spelling_of(clear(alphabet, path))
    tokens = tokenizer.encode("she sells", add_special_tokens=False)
    draft = placed(tokens, heard, alphabet, 2)
    assert [token.id for token in draft] == tokens
    assert draft[0].start == 1 and draft[-1].end == 9
    assert all(token.end - token.start > 0 and token.probability > 0.99 for token in draft)
    assert all(a.end <= b.start + 1 for a, b in itertools.pairwise(draft))
    assert 0 < len(placed(tokens * 9, heard, alphabet, 2)) < 9 * len(tokens)  # more than there is room for
    assert placed([], heard, alphabet, 2) == []


def test_scripts_without_spaces() -> None:
    assert [is_unspaced(character) for character in ("今", "a", "", SPACE, "<0x0A>", "क")] == [True, *[False] * 5]


# -- phonemes and a dictionary --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lexicon() -> Lexicon:
    return small_lexicon()


def sounds(lexicon: Lexicon, phonemes: str, language: str = "en") -> torch.Tensor:
    """Logits (F, classes) that are sure of one phoneme a frame; "-" is the blank."""
    path = [0 if phoneme == "-" else lexicon.classes[f"{language}:{phoneme}"] for phoneme in phonemes.split()]
    return 20.0 * F.one_hot(torch.tensor(path), len(lexicon)).float()


def test_the_language_model_knows_words_that_sound_alike(tokenizer: PreTrainedTokenizerBase, lexicon: Lexicon) -> None:
    search = LexiconSearch(lexicon, token_scores(tokenizer))
    rows = search.best(spelling_of(sounds(lexicon, "- D @ - s s i - -")))
    assert tokenizer.decode(rows[0].tokens) == "the sea"
    assert search.best(spelling_of(sounds(lexicon, "- D @ - s s i - -"))) == rows
    assert tokenizer.decode(search.best(spelling_of(sounds(lexicon, "S i s E l z")))[0].tokens) == "she sells"
    assert search.best(spelling_of(sounds(lexicon, "- -")))[0].tokens == ()
    assert {one.tokens for one in search.best(spelling_of(sounds(lexicon, "z z z")))} <= {()}  # no word sounds so
    careless = LexiconSearch(lexicon, token_scores(tokenizer, 0.0))
    rows = careless.best(spelling_of(sounds(lexicon, "- D @ - s s i - -")))
    assert {tokenizer.decode(one.tokens) for one in rows[:2]} == {"the sea", "the see"}


def test_a_phoneme_that_comes_twice_has_a_blank_between(tokenizer: PreTrainedTokenizerBase, lexicon: Lexicon) -> None:
    search = LexiconSearch(lexicon, token_scores(tokenizer, 0.0))
    apart = search.best(spelling_of(sounds(lexicon, "s i - i s")))
    assert tokenizer.decode(apart[0].tokens) in ("sea is", "see is") and apart[0].heard > -1
    assert all(one.heard < -10 for one in search.best(spelling_of(sounds(lexicon, "s i i s"))))


def test_characters_without_spaces_are_one_word(tokenizer: PreTrainedTokenizerBase, lexicon: Lexicon) -> None:
    search = LexiconSearch(lexicon, token_scores(tokenizer, 0.0))
    rows = search.best(spelling_of(sounds(lexicon, "S; i 55 s i 55", "zh")))
    assert rows[0].tokens == tuple(tokenizer.encode("西思", add_special_tokens=False))


@pytest.mark.parametrize("seed", range(4))
def test_the_search_along_the_dictionary_finds_the_best_of_all_transcripts(
    tokenizer: PreTrainedTokenizerBase, lexicon: Lexicon, seed: int
) -> None:
    """Of at most three words, all of which can be scored."""
    likely = [0, *(lexicon.classes[f"en:{phoneme}"] for phoneme in ("s", "i", "S", "D", "@"))]
    logits = torch.full((6, len(lexicon)), -40.0)
    logits[:, likely] = torch.randn(6, len(likely), generator=torch.Generator().manual_seed(seed))
    model = language_model(tokenizer, 0.8, 0.7)

    def language(words: tuple[str, ...]) -> float:
        tokens = tokenizer.encode(" ".join(words), add_special_tokens=False)
        row = [*tokens, model.eos]
        return float(model.weight * model.lm.logprobs([model.context(tokens[:i]) for i in range(len(row))], row).sum())

    ways: dict[tuple[str, ...], list[float]] = {}
    pairs = list(zip(lexicon.said, lexicon.words, strict=True))
    for size in range(4):
        for row in itertools.product(pairs, repeat=size):
            classes = [ord(c) for way, _ in row for c in way]
            if len(classes) <= 6 and set(classes) <= set(likely):
                heard = scores(logits.log_softmax(-1), [classes])[0]
                ways.setdefault(tuple(word for _, word in row), []).append(heard)
    totals = {words: float(np.logaddexp.reduce(heard)) + language(words) for words, heard in ways.items()}
    winner = max(totals, key=totals.__getitem__)
    best = LexiconSearch(lexicon, TokenScores(tokenizer, model), width=2000).best(spelling_of(logits))[0]
    assert tokenizer.decode(best.tokens) == " ".join(winner)
    assert best.score == pytest.approx(totals[winner], abs=0.05)
