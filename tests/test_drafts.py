"""Searches for drafts: language models by their formulas, beams against all transcripts, bundled models in any batch."""

from __future__ import annotations

import itertools
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from counted import WORDS, arrays_of, codes, ngram_of, number, small_lexicon
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny_model import bundled_model
from torch.nn import functional as F

from diffusion_gemma_asr.audio.read import load_audio
from diffusion_gemma_asr.checkpoint.config_file import read_config_file
from diffusion_gemma_asr.checkpoint.load import BUNDLED, PRESETS, load_checkpoint
from diffusion_gemma_asr.drafts import read_search_config
from diffusion_gemma_asr.drafts.beam import DraftLM, beam_search, draft_with_lm
from diffusion_gemma_asr.drafts.lexicon import Lexicon
from diffusion_gemma_asr.drafts.ngram import CODES, NgramLM
from diffusion_gemma_asr.drafts.search import PhonemeDrafter
from diffusion_gemma_asr.drafts.sentences import SentenceLM
from diffusion_gemma_asr.errors import CheckpointError
from diffusion_gemma_asr.model.ctc import collapse

BLANK, EOS, BOS = 0, 1, 2
VOCAB = 8
SENTENCES = [[3, 4, 5], [3, 4, 6], [3, 4, 5], [7]]
FINE = math.expm1(0.5 / CODES) + 1e-9  # what storing a share in a byte may change it by
EXAMPLES = Path(__file__).parents[1] / "examples"
RESCORING = "mini6"
SEARCHING = [name for name in BUNDLED if read_config_file(PRESETS / name).drafter is not None]


# -- n-grams --------------------------------------------------------------------------------------------------------


def test_probabilities_are_interpolated() -> None:
    lm = ngram_of(SENTENCES, VOCAB, BOS, EOS, 3)
    tokens = 3 + 3 + 3 + 1 + 4  # read, with the ends
    one = (2 - 0.5) / tokens + 0.5 * 6 / tokens / VOCAB  # 5 was read twice; six different ones
    behind_four = (2 - 0.5) / 3 + 2 * 0.5 / 3 * one
    behind_both = (2 - 0.5) / 3 + 2 * 0.5 / 3 * behind_four
    probabilities = np.exp(lm.logprobs([[], [4], [3, 4], [6, 5, 3, 4]], [5, 5, 5, 5]))
    np.testing.assert_allclose(probabilities, [one, behind_four, behind_both, behind_both], rtol=3 * FINE)
    np.testing.assert_allclose(lm.logprobs([[7, 4]], [5]), lm.logprobs([[4]], [5]))  # a context that was never read


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.integers(3, VOCAB - 1), max_size=6), min_size=1, max_size=8),
    st.integers(1, 4),
    st.lists(st.integers(3, VOCAB - 1), max_size=4),
)
def test_probabilities_of_all_tokens_come_to_one(sentences: list[list[int]], order: int, context: list[int]) -> None:
    lm = ngram_of(sentences, VOCAB, BOS, EOS, order)
    assert lm.order == order
    for before in ([BOS, *context], context, []):
        total = np.exp(lm.logprobs([before] * VOCAB, range(VOCAB))).sum()
        assert total == pytest.approx(1.0, rel=order * FINE)


def test_a_context_says_the_language_of_what_was_never_read_behind_it() -> None:
    """Tokens 3 to 5 are of one language, 6 and 7 of another; both know the ends."""
    share = np.zeros((VOCAB, 2))
    share[[EOS, 3, 4, 5], 0] = 0.25
    share[[EOS, 6, 7], 1] = 1 / 3
    within = np.stack([codes(column) for column in share.T], 1)
    belongs = np.stack([codes(column) for column in (share / share.sum(1, keepdims=True).clip(1e-9)).T], 1)
    belongs[BOS] = 0
    plain = ngram_of([[3, 4], [5, 4], [6, 7]], VOCAB, BOS, EOS, 3)
    lm = NgramLM(VOCAB, plain.sequences, plain.contexts, within, belongs)
    (same,), (other,) = lm.logprobs([[4, 5]], [3]), lm.logprobs([[4, 5]], [6])
    assert same > other + 2
    (same,), (other,) = lm.logprobs([[7, 7]], [6]), lm.logprobs([[7, 7]], [3])
    assert same > other + 2
    for before in ([BOS], [4, 3], [7], [3, 7]):
        assert np.exp(lm.logprobs([before] * VOCAB, range(VOCAB))).sum() == pytest.approx(1.0, rel=4 * FINE)


def test_a_file_gives_the_model_that_was_written(tmp_path: Path) -> None:
    lm = ngram_of(SENTENCES, VOCAB, BOS, EOS, 3)
    np.savez(tmp_path / "lm.npz", **arrays_of(lm))
    loaded = NgramLM.load(tmp_path / "lm.npz")
    contexts = [list(row) for row in itertools.product(range(VOCAB), repeat=2)]
    for token in range(VOCAB):
        tokens = [token] * len(contexts)
        np.testing.assert_array_equal(lm.logprobs(contexts, tokens), loaded.logprobs(contexts, tokens))


def test_sequences_are_numbers_with_tokens_as_digits() -> None:
    assert number([1, 2, 3], 10) == 123
    assert codes([1.0, math.exp(-1), 0.0]).tolist() == [0, 16, 255]


# -- the beam over tokens -------------------------------------------------------------------------------------------


def spoken(seed: int, slots: int = 5, tokens: int = 4) -> torch.Tensor:
    """(S, tokens + 3) log-probabilities of the blank and of tokens from 3 on."""
    logits = 2 * torch.randn(slots, tokens + 3, generator=torch.Generator().manual_seed(seed))
    logits[:, [EOS, BOS]] = -30.0
    return logits.log_softmax(-1)


def parts(logprobs: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    best, ids = logprobs.sort(-1, descending=True)
    return ids.numpy(), best.numpy(), logprobs[:, BLANK].numpy()


def ctc_logprob(logprobs: torch.Tensor, transcript: tuple[int, ...]) -> float:
    target = torch.tensor([transcript], dtype=torch.long).view(1, -1)
    sizes = torch.tensor([len(logprobs)]), torch.tensor([len(transcript)])
    return -float(F.ctc_loss(logprobs[:, None], target, *sizes, blank=BLANK, reduction="sum"))


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("seed", range(6))
def test_the_beam_finds_the_best_of_all_transcripts(seed: int, order: int) -> None:
    """On slots so few that all transcripts can be scored."""
    model = DraftLM(ngram_of(SENTENCES, VOCAB, BOS, EOS, order), BOS, EOS, 0.8, 0.7)
    logprobs = spoken(seed, 4)

    def score(transcript: tuple[int, ...]) -> float:
        row = [*transcript, EOS]
        contexts = [([BOS, *transcript[:i]])[-order + 1 :] if order > 1 else [] for i in range(len(row))]
        language = model.weight * model.lm.logprobs(contexts, row).sum() + model.bonus * len(transcript)
        return ctc_logprob(logprobs, transcript) + language

    every = [row for size in range(5) for row in itertools.product(range(3, 7), repeat=size)]
    assert beam_search(*parts(logprobs), BLANK, model) == list(max(every, key=score))


def test_without_weight_and_bonus_sure_slots_give_the_greedy_draft_and_its_spans() -> None:
    model = DraftLM(ngram_of(SENTENCES, VOCAB, BOS, EOS, 3), BOS, EOS, 0.0, 0.0)
    path = [BLANK, 3, 3, BLANK, 3, 4, BLANK, BLANK, 5]
    logprobs = torch.full((len(path), 7), -9.0)
    logprobs[torch.arange(len(path)), torch.tensor(path)] = 9.0
    logprobs = logprobs.log_softmax(-1)
    values, best = logprobs.max(-1)
    (expected,) = collapse(best[None], values[None], torch.tensor([len(path)]), BLANK)
    draft = draft_with_lm(*parts(logprobs), BLANK, model)
    assert [token[:3] for token in draft] == [token[:3] for token in expected]
    assert [token.probability for token in draft] == pytest.approx([1.0] * 4, abs=1e-3)
    assert draft_with_lm(*parts(spoken(0)[:0]), BLANK, model) == []


def test_text_decides_between_sounds_that_are_alike() -> None:
    model = DraftLM(ngram_of(SENTENCES, VOCAB, BOS, EOS, 3), BOS, EOS, 0.5, 3.5)
    probabilities = torch.full((5, 7), 1e-4)
    for slot, likely in enumerate(({3: 0.9}, {BLANK: 0.9}, {4: 0.9}, {BLANK: 0.9}, {6: 0.5, 5: 0.45})):
        for token, probability in likely.items():
            probabilities[slot, token] = probability
    draft = draft_with_lm(*parts(probabilities.log()), BLANK, model)
    assert [token.id for token in draft] == [3, 4, 5]  # 3 4 5 was read twice, 3 4 6 once


# -- the dictionary -------------------------------------------------------------------------------------------------


def classes_of(lexicon: Lexicon, phonemes: str, language: str = "en") -> list[int]:
    return [lexicon.classes[f"{language}:{phoneme}"] for phoneme in phonemes.split()]


def test_a_place_in_the_dictionary_narrows() -> None:
    lexicon = small_lexicon()
    low, high = 0, len(lexicon.said)
    for depth, phoneme in enumerate(classes_of(lexicon, "s i")):
        low, high = lexicon.narrowed(low, high, depth, phoneme)
    assert sorted(lexicon.words[low:high]) == ["sea", "see"]
    low, high = lexicon.narrowed(low, high, 2, 1)
    assert low == high


def test_a_word_has_all_its_pronunciations() -> None:
    lexicon = small_lexicon()
    the = ["".join(map(chr, classes_of(lexicon, way))) for way in ("D @", "D i")]
    assert sorted(lexicon.pronunciations("the")) == sorted(the) and lexicon.pronunciations("sky") == []
    assert set(classes_of(lexicon, "s", "zh")).isdisjoint(classes_of(lexicon, "s", "en"))


def test_a_dictionary_file_gives_the_words_that_were_written(tmp_path: Path) -> None:
    lexicon = small_lexicon()
    said = np.frombuffer("".join(lexicon.said).encode("utf-16-le"), "<u2")
    np.savez(
        tmp_path / "lexicon.npz",
        said=said,
        lengths=np.array([len(way) for way in lexicon.said], np.uint8),
        symbols=np.frombuffer("\n".join(lexicon.symbols).encode(), np.uint8),
        words=np.frombuffer("\n".join(lexicon.words).encode(), np.uint8),
        frequency=np.round(-8 * lexicon.frequency).astype(np.uint8),
    )
    loaded = Lexicon.load(tmp_path / "lexicon.npz")
    assert (loaded.symbols, loaded.said, loaded.words) == (lexicon.symbols, lexicon.said, lexicon.words)
    np.testing.assert_allclose(loaded.frequency, lexicon.frequency, atol=0.07)
    assert len(loaded.words) == len(WORDS) and len(loaded) == len(loaded.symbols)


# -- whole sentences ------------------------------------------------------------------------------------------------

READ = [[5, 6, 7], [5, 6], [5, 6, 7, 8], [], [9], [5, 6], [5, 9, 7]]


def sentence_model() -> SentenceLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SentenceLM(12, 8, 16, 2, BOS, EOS).eval()


@torch.no_grad()
def test_sentences_cost_what_their_tokens_cost_one_by_one() -> None:
    model = sentence_model()
    expected = []
    for sentence in READ:
        states = model.embedding(torch.tensor([[BOS, *sentence]]))
        for layer in model.layers:
            states, _ = layer(states)
        logprobs = model.logits(states)[0].log_softmax(-1)
        expected.append(float(logprobs[range(len(sentence) + 1), [*sentence, EOS]].sum()))
    assert model.scores(READ) == pytest.approx(expected, abs=1e-4)
    assert [model.scores([sentence])[0] for sentence in READ] == pytest.approx(expected, abs=1e-4)
    assert len({round(value, 3) for value in expected}) == 6  # two sentences are the same
    assert model.scores([]) == []


def test_a_sentence_model_file_gives_the_model_that_was_written(tmp_path: Path) -> None:
    model = sentence_model()
    sizes = {"vocab_size": 12, "width": 8, "hidden": 16, "layers": 2, "bos": BOS, "eos": EOS}
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, tmp_path / "lm.safetensors", metadata={name: str(value) for name, value in sizes.items()})
    loaded = SentenceLM.load(tmp_path / "lm.safetensors")
    assert loaded.scores(READ) == model.scores(READ)
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize(
    ("kind", "name"), [(NgramLM, "a language model"), (Lexicon, "a dictionary"), (SentenceLM, "a recurrent language model")]
)
def test_what_cannot_be_read_is_one_line(tmp_path: Path, kind: type[NgramLM | Lexicon | SentenceLM], name: str) -> None:
    path = tmp_path / "file"
    for damage in (lambda: None, lambda: path.write_bytes(b"PK\x03\x04 and no more"), lambda: np.savez(path, x=np.zeros(3))):
        damage()
        with pytest.raises(CheckpointError, match=f"file cannot be read as {name}") as caught:
            kind.load(path)
        assert "\n" not in str(caught.value)


# -- bundled models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"kind": "beam", "ngram": "x", "weight": 1.0}, "drafter: 'bonus' is missing"),
        ({"kind": "tree", "ngram": "x", "weight": 1.0, "bonus": 1.0}, "drafter: 'kind' must be one of beam, phonemes"),
        ({"kind": "beam", "ngrm": "x"}, "drafter: unknown key 'ngrm'"),
        ({"kind": "phonemes", "ngram": "x", "weight": 1.0, "bonus": 1.0}, "needs lexicon and sentences"),
    ],
)
def test_a_section_that_asks_for_the_impossible(section: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_search_config(section)


@pytest.fixture(scope="module")
def audio() -> list[np.ndarray]:
    """Speech of several lengths."""
    english, german = (load_audio(EXAMPLES / f"{code}.flac") for code in ("en", "de"))
    return [english, german[:60_000], english[:40_000], german[:25_000]]


@pytest.mark.parametrize("name", SEARCHING)
def test_drafts_of_a_bundled_model_do_not_depend_on_the_batch(name: str, audio: list[np.ndarray], tmp_path: Path) -> None:
    model = bundled_model(name, tmp_path / "whisper")
    assert model.drafter.trusted
    together = model.drafter.drafts(model.encode(audio))
    greedy = model.greedy.drafts(model.encode(audio))
    for row, clip in enumerate(audio):
        encoded = model.encode([clip])
        (alone,) = model.drafter.drafts(encoded)
        assert [token[:3] for token in together[row]] == [token[:3] for token in alone]
        assert [t.probability for t in together[row]] == pytest.approx([t.probability for t in alone], abs=1e-3)
        slots = int(encoded.slot_lengths)
        assert all(0 <= token.start < token.end <= slots for token in alone)
        assert all(0 <= token.probability <= 1 for token in alone)
    assert [[t.id for t in row] for row in together] != [[t.id for t in row] for row in greedy], "the search does nothing"


def test_what_reads_whole_sentences_has_the_last_word(audio: list[np.ndarray], tmp_path: Path) -> None:
    """Of the best transcripts of the searches, that one is the draft which it likes."""
    model = bundled_model(RESCORING, tmp_path / "whisper")
    drafter = model.drafter
    assert isinstance(drafter, PhonemeDrafter)
    encoded = model.encode(audio[2:3])

    class Reader:
        """A model of sentences that likes the one with a number."""

        def __init__(self, liked: int):
            self.liked = liked
            self.read: list[tuple[int, ...]] = []

        def scores(self, sentences: list[tuple[int, ...]]) -> list[float]:
            self.read = list(sentences)
            return [0.0 if number == self.liked else -500.0 for number in range(len(sentences))]

    drafter.config = replace(drafter.config, rescored=4)
    for liked in range(4):
        reader = Reader(liked)
        drafter.sentences = reader  # type: ignore[assignment]
        (draft,) = drafter.drafts(encoded)
        assert len(reader.read) == 4
        assert model.text([token.id for token in draft]) == model.text(reader.read[liked])


def test_a_checkpoint_without_its_files_says_which_is_missing(tmp_path: Path) -> None:
    name = "mini"
    folder = Path(shutil.copytree(PRESETS / name, tmp_path / name))
    section = read_config_file(folder).drafter
    assert section is not None
    (folder / section["ngram"]).unlink()
    with pytest.raises(CheckpointError, match=rf"{section['ngram']} cannot be read as a language model"):
        load_checkpoint(folder, device="cpu")
