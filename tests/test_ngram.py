"""ngram.py and beam.py: counted probabilities, and drafts that CTC and the language model find together."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from diffusion_gemma_asr.beam import DraftLM, beam_search, draft_with_lm
from diffusion_gemma_asr.ctc import greedy_draft
from diffusion_gemma_asr.errors import CheckpointError
from diffusion_gemma_asr.ngram import CODES, DISCOUNT, NgramLM

BLANK, EOS, BOS = 0, 1, 2
VOCAB = 8
SENTENCES = [[3, 4, 5], [3, 4, 6], [3, 4, 5], [7]]
FINE = math.expm1(0.5 / CODES) + 1e-9  # what storing a share in a byte may change it by


def test_probabilities_are_those_of_kneser_and_ney() -> None:
    lm = NgramLM.count(SENTENCES, VOCAB, BOS, EOS, order=3, least=1)
    pairs = 8  # different ones: each of five tokens behind one, the end behind three
    five = (1 - DISCOUNT) / pairs + 6 * DISCOUNT / pairs / VOCAB  # six different ones
    behind_four = (1 - DISCOUNT) / 2 + 2 * DISCOUNT / 2 * five
    behind_both = (2 - DISCOUNT) / 3 + 2 * DISCOUNT / 3 * behind_four
    found = np.exp(lm.logprobs([[], [4], [3, 4], [6, 5, 3, 4]], [5, 5, 5, 5]))
    np.testing.assert_allclose(found, [five, behind_four, behind_both, behind_both], rtol=3 * FINE)
    np.testing.assert_allclose(lm.logprobs([[7, 4]], [5]), lm.logprobs([[4]], [5]))  # a context that never occurred


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.integers(3, VOCAB - 1), max_size=6), min_size=1, max_size=8),
    st.integers(1, 4),
    st.integers(1, 3),
    st.lists(st.integers(3, VOCAB - 1), max_size=4),
)
def test_probabilities_of_all_tokens_come_to_one(
    sentences: list[list[int]], order: int, least: int, context: list[int]
) -> None:
    for languages in (None, [i % 2 for i in range(len(sentences))]):
        lm = NgramLM.count(sentences, VOCAB, BOS, EOS, order, least, languages)
        assert lm.order == order
        for before in ([BOS, *context], context, []):
            total = np.exp(lm.logprobs([before] * VOCAB, range(VOCAB))).sum()
            assert total == pytest.approx(1.0, rel=order * FINE)


def test_a_context_tells_the_language_of_what_was_never_seen_behind_it() -> None:
    sentences = [[3, 4], [5, 4], [3, 5]] * 9 + [[6, 7]]  # the second language is rare
    one, two = (NgramLM.count(sentences, VOCAB, BOS, EOS, 3, 1, told) for told in (None, [0] * 27 + [1]))
    (rare,), (rare_before,) = two.logprobs([[6]], [6]), one.logprobs([[6]], [6])
    (frequent,), (frequent_before,) = two.logprobs([[6]], [5]), one.logprobs([[6]], [5])
    assert rare > rare_before and frequent < frequent_before
    np.testing.assert_array_equal(two.logprobs([[BOS]], [3]) > two.logprobs([[BOS]], [6]), [True])


def test_rare_long_sequences_are_left_out() -> None:
    all_of_them, often = (NgramLM.count(SENTENCES, VOCAB, BOS, EOS, 3, least) for least in (1, 2))
    sizes = [[len(keys) for keys, _ in lm.sequences] for lm in (all_of_them, often)]
    assert sizes[0][:2] == sizes[1][:2] and sizes[1][2] == 3 < sizes[0][2]  # <bos> 3 4, 3 4 5, 4 5 <eos>


def test_a_saved_model_is_the_same(tmp_path: Path) -> None:
    lm = NgramLM.count(SENTENCES, VOCAB, BOS, EOS, 3, 1, [0, 0, 1, 2])
    lm.save(tmp_path / "lm.npz")
    loaded = NgramLM.load(tmp_path / "lm.npz")
    contexts = [list(row) for row in itertools.product(range(VOCAB), repeat=2)]
    for token in range(VOCAB):
        tokens = [token] * len(contexts)
        np.testing.assert_array_equal(lm.logprobs(contexts, tokens), loaded.logprobs(contexts, tokens))
    assert [path.name for path in tmp_path.iterdir()] == ["lm.npz"]


def test_what_cannot_be_read_or_counted_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lm\.npz cannot be read"):
        NgramLM.load(tmp_path / "lm.npz")
    (tmp_path / "lm.npz").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(CheckpointError, match=r"lm\.npz cannot be read"):
        NgramLM.load(tmp_path / "lm.npz")
    np.savez(tmp_path / "lm.npz", other=np.zeros(3))
    with pytest.raises(CheckpointError, match=r"lm\.npz cannot be read"):
        NgramLM.load(tmp_path / "lm.npz")
    with pytest.raises(ValueError, match="do not fit"):
        NgramLM.count(SENTENCES, 262_144, BOS, EOS, order=4)


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


@pytest.mark.parametrize("seed", range(6))
def test_the_search_finds_the_best_of_all_transcripts(seed: int) -> None:
    """On slots so few that all transcripts can be scored, without dropping unlikely tokens or beams that matter."""
    model = DraftLM(NgramLM.count(SENTENCES, VOCAB, BOS, EOS, 3, 1), BOS, EOS, 0.8, 0.7)
    logprobs = spoken(seed, 4)

    def score(transcript: tuple[int, ...]) -> float:
        row = [*transcript, EOS]
        contexts = [[BOS, *transcript[:i]][-2:] for i in range(len(row))]
        language = model.weight * model.lm.logprobs(contexts, row).sum() + model.bonus * len(transcript)
        return ctc_logprob(logprobs, transcript) + language

    every = [row for size in range(5) for row in itertools.product(range(3, 7), repeat=size)]
    best = max(every, key=score)
    assert beam_search(*parts(logprobs), BLANK, model) == list(best)


def test_without_weight_and_bonus_sure_slots_give_the_greedy_draft_and_its_spans() -> None:
    model = DraftLM(NgramLM.count(SENTENCES, VOCAB, BOS, EOS, 3, 1), BOS, EOS, 0.0, 0.0)
    path = [BLANK, 3, 3, BLANK, 3, 4, BLANK, BLANK, 5]
    logprobs = torch.full((len(path), 7), -9.0)
    logprobs[torch.arange(len(path)), torch.tensor(path)] = 9.0
    logprobs = logprobs.log_softmax(-1)
    (expected,) = greedy_draft(logprobs[None], torch.tensor([len(path)]), BLANK)
    found = draft_with_lm(*parts(logprobs), BLANK, model)
    assert [token[:3] for token in found] == [token[:3] for token in expected]
    assert [token.probability for token in found] == pytest.approx([1.0] * 4, abs=1e-3)
    assert draft_with_lm(*parts(spoken(0)[:0]), BLANK, model) == []


def test_text_decides_between_sounds_that_are_alike() -> None:
    model = DraftLM(NgramLM.count(SENTENCES, VOCAB, BOS, EOS, 3, 1), BOS, EOS)
    probabilities = torch.full((5, 7), 1e-4)
    for slot, likely in enumerate(({3: 0.9}, {BLANK: 0.9}, {4: 0.9}, {BLANK: 0.9}, {6: 0.5, 5: 0.45})):
        for token, probability in likely.items():
            probabilities[slot, token] = probability
    found = draft_with_lm(*parts(probabilities.log()), BLANK, model)
    assert [token.id for token in found] == [3, 4, 5]  # 3 4 5 was read twice, 3 4 6 once


@pytest.mark.parametrize("order", [1, 2, 4])
def test_what_a_token_brings_is_the_difference_between_two_transcripts(order: int) -> None:
    model = DraftLM(NgramLM.count(SENTENCES, VOCAB, BOS, EOS, order, 1), BOS, EOS, 0.8, 0.7)

    def score(transcript: list[int]) -> float:
        row = [*transcript, EOS]
        contexts = [([BOS, *transcript[:i]][-order + 1 :] if order > 1 else []) for i in range(len(row))]
        return model.weight * model.lm.logprobs(contexts, row).sum() + model.bonus * len(transcript)

    for before, after in (([3], [5, 6, 7, 3, 4]), ([], [3]), ([3, 4, 5, 6, 7, 3], [])):
        found = model.gains(before, after, [4, 6])
        expected = [score([*before, token, *after]) - score([*before, *after]) for token in (4, 6)]
        np.testing.assert_allclose(found, expected, atol=1e-9)
