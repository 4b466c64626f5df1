"""speller.py and spelled_beam.py: characters of a tokenizer, words that they and a language model find together."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from diffusion_gemma_asr.beam import DraftLM
from diffusion_gemma_asr.ngram import NgramLM
from diffusion_gemma_asr.prompt import sentence_ends
from diffusion_gemma_asr.spelled_beam import SPACE, SpelledSearch, placed
from diffusion_gemma_asr.speller import Alphabet, Speller, Spelling, spelling_loss, text_of
from diffusion_gemma_asr.token_scores import TokenScores, is_unspaced

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
    return DraftLM(NgramLM.count(rows, len(tokenizer), *ends, order=3, least=1), *ends, weight, bonus)


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


def test_targets_spell_the_tokens_that_count(tokenizer: PreTrainedTokenizerBase, alphabet: Alphabet) -> None:
    rows = [tokenizer.encode(text, add_special_tokens=False) for text in ("sea", "the sea shells")]
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=7)
    targets = alphabet.targets(tokens, torch.tensor([len(row) for row in rows]))
    assert [text_of([alphabet.characters[found] for found in row]) for row in targets] == ["sea", "the sea shells"]


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


def test_the_loss_falls_as_the_text_gets_likelier(alphabet: Alphabet) -> None:
    targets = [[alphabet.classes[character] for character in "sea"]]
    logits, lengths = clear(alphabet, "-s-ea-")[None], torch.tensor([6])
    assert spelling_loss(logits, lengths, targets) < 1e-3 < spelling_loss(0.3 * logits, lengths, targets)
    assert spelling_loss(logits, torch.tensor([2]), targets) == 0  # no room
    two = torch.cat([logits, logits])
    longer = [*targets, 2 * targets[0]]
    both = [float(spelling_loss(logits, lengths, [row])) for row in longer]
    assert float(spelling_loss(two, torch.tensor([6, 6]), longer)) == pytest.approx(sum(both) / 2, rel=1e-5)
    assert alphabet.read(Spelling(*(part[None] for part in spelling_of(logits[0]))), lengths) == ["sea"]


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


def test_a_search_that_forgets_finds_the_same(
    tokenizer: PreTrainedTokenizerBase, alphabet: Alphabet, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = spelling_of(0.3 * clear(alphabet, "the▁sea"))
    search = SpelledSearch(alphabet, token_scores(tokenizer))
    found = search.best(heard)
    assert search.best(heard) == found
    for module in ("spelled_beam", "token_scores"):
        monkeypatch.setattr(f"diffusion_gemma_asr.{module}.REMEMBERED", 1)
    assert search.best(heard) == found
    transcripts = [row.tokens for row in found]
    fresh = SpelledSearch(alphabet, token_scores(tokenizer))
    assert search.language.whole(transcripts) == pytest.approx(fresh.language.whole(transcripts))


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
