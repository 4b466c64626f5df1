"""Several transcripts of a clip: what CTC proposes, how the backbone reads them, which one is taken."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_model import clips, tiny_model
from torch import Tensor
from torch.nn import functional as F

from diffusion_gemma_asr.denoise import decode as decode_module
from diffusion_gemma_asr.denoise.candidates import (
    LENGTH,
    READ,
    ROWS,
    SAID,
    ReadPrompt,
    chosen,
    prompt_without_sound,
    read_scores,
)
from diffusion_gemma_asr.denoise.decode import decode_clips, draft_clips
from diffusion_gemma_asr.denoise.options import DecodeOptions
from diffusion_gemma_asr.errors import AsrError
from diffusion_gemma_asr.model.ctc import transcript_scores
from diffusion_gemma_asr.model.ctc_beam import likeliest
from diffusion_gemma_asr.model.head import Head
from diffusion_gemma_asr.model.model import DiffusionGemmaASR

SAMPLES = [40_000, 9000, 22_000]
OPTIONS = DecodeOptions(language="en", steps=2, entropy_bound=2.0)


@pytest.fixture(scope="module")
def model(whisper_folder: Path, backbone_folder: Path) -> DiffusionGemmaASR:
    return tiny_model(whisper_folder, backbone_folder)


@pytest.fixture(scope="module")
def audio() -> list[np.ndarray]:
    return clips(SAMPLES)


def slots_of(log_probs: Tensor) -> tuple[Head, Tensor]:
    """A head and slots whose log-probabilities are (nearly) the given ones (S, V)."""
    cap = 1000.0
    return Head(torch.eye(log_probs.shape[1]), cap), cap * torch.atanh(log_probs / cap)


@pytest.mark.parametrize("seed", range(5))
def test_the_beam_finds_the_likeliest_transcripts(seed: int) -> None:
    """Against all paths of five slots over four symbols."""
    log_probs = (3 * torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))).log_softmax(-1)
    totals: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(4), repeat=5):
        spelled = tuple(symbol for symbol, _ in itertools.groupby(path) if symbol != 0)
        totals[spelled] = totals.get(spelled, 0.0) + math.exp(sum(float(log_probs[i, x]) for i, x in enumerate(path)))
    expected = sorted(totals.items(), key=lambda item: -item[1])[:4]
    found = likeliest(*slots_of(log_probs), 0, 4)
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
    assert [score for _, score in found] == pytest.approx([math.log(value) for _, value in expected], abs=0.05)


def test_silence_proposes_nothing() -> None:
    assert likeliest(Head(torch.eye(4), 30.0), torch.zeros(0, 4), 0, 3) == [((), 0.0)]
    sure = torch.tensor([[0.99, 0.01 / 3, 0.01 / 3, 0.01 / 3]] * 3).log()
    assert likeliest(*slots_of(sure), 0, 1)[0][0] == ()


def read(model: DiffusionGemmaASR, audio: list[np.ndarray]) -> tuple[Tensor, ReadPrompt]:
    """Slots (S, H) of the first clip, and its prompt."""
    with torch.no_grad():
        encoded = model.encode(audio[:1])
        prefill, hidden = model.read_prompts(encoded.slots, encoded.slot_lengths, ["en"])
    return encoded.slots[0], ReadPrompt(prefill.keep(torch.tensor([0]), int(prefill.lengths[0])), hidden[:, -1])


@torch.no_grad()
def test_transcripts_are_scored_as_the_encoder_reads_them_in_one_go(
    model: DiffusionGemmaASR, audio: list[np.ndarray]
) -> None:
    """Prompt, transcript and end as one sequence: the sum of the next tokens' log-probabilities."""
    generator = torch.Generator().manual_seed(0)
    candidates = [torch.randint(5, 400, (n,), generator=generator).tolist() for n in (3, 7, 0, 1)]
    slots, heard = read(model, audio)
    found = read_scores(model, candidates, heard)
    end = model.prompts.special["end_of_turn"]
    for tokens, score in zip(candidates, found, strict=True):
        _, hidden = model.read_prompts(slots[None], torch.tensor([len(slots)]), ["en"], [[*tokens, end]])
        logits = model.head.logits(hidden[0, -len(tokens) - 2 : -1])
        assert score == pytest.approx(
            -float(F.cross_entropy(logits, torch.tensor([*tokens, end]), reduction="sum")), abs=1e-2
        )
    prefill = heard.prefill
    assert int(prefill.lengths[0]) == prefill.visible.shape[1] == prefill.layers()[0][0].shape[2]  # as it was


@torch.no_grad()
def test_many_candidates_are_read_in_parts(model: DiffusionGemmaASR, audio: list[np.ndarray]) -> None:
    _, heard = read(model, audio)
    rows = [[7, 8], [9]] * ROWS
    found = read_scores(model, rows, heard)
    assert found == pytest.approx(read_scores(model, rows[:2], heard) * ROWS, abs=1e-3)


def test_a_weighted_sum_decides(model: DiffusionGemmaASR, audio: list[np.ndarray]) -> None:
    """Of what CTC hears, what the backbone reads, and what it expects without sound."""
    slots, heard = read(model, audio)
    unheard = prompt_without_sound(model, "en")
    candidates = [[5, 6], [7], [9, 9, 9]]

    def best(by_ctc: list[float], rows: list[list[int]]) -> int:
        read, said = read_scores(model, rows, heard), read_scores(model, rows, unheard)
        assert read != said
        totals = [a + READ * b + SAID * c + LENGTH * len(row) for a, b, c, row in zip(by_ctc, read, said, rows, strict=True)]
        return totals.index(max(totals))

    expected = best(transcript_scores(model.head, slots, candidates, model.blank), candidates)
    assert chosen(model, slots, candidates, heard, unheard) == expected
    too_long = [[5] * (len(slots) + 1), [6] * (len(slots) + 2)]  # CTC hears neither: the backbone decides alone
    assert chosen(model, slots, too_long, heard, unheard) == best([0.0, 0.0], too_long)


def test_the_prompt_without_sound_is_a_clip_of_one_random_token(model: DiffusionGemmaASR) -> None:
    prompt, again, german = (prompt_without_sound(model, code) for code in ("en", "en", "de"))
    assert int(prompt.prefill.lengths[0]) == len(model.prompts.row(1, "en"))
    assert torch.equal(prompt.last, again.last) and not torch.equal(prompt.last, german.last)
    assert not torch.equal(prompt.last, prompt_without_sound(model, "en", "A context.").last)


def test_one_candidate_changes_nothing(model: DiffusionGemmaASR, audio: list[np.ndarray]) -> None:
    for start in ("noise", "draft"):
        options = replace(OPTIONS, start=start)
        assert decode_clips(model, audio, replace(options, candidates=1)) == decode_clips(model, audio, options)


def test_drafts_are_proposed_and_the_best_is_denoised(
    model: DiffusionGemmaASR, audio: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(OPTIONS, start="draft", candidates=4)
    decoded = decode_clips(model, audio, options)
    drafted = draft_clips(model, model.encode(audio))
    for one, clip in zip(decoded, drafted, strict=True):
        slots, heard = read(model, [audio[decoded.index(one)]])
        found = [tokens for tokens, _ in likeliest(model.head, slots, model.blank, 4)]
        candidates = list(dict.fromkeys([tuple(token.id for token in clip.draft), *found]))[:4]
        best = candidates[chosen(model, slots, candidates, heard, prompt_without_sound(model, "en"))]
        assert tuple(token.id for token in one.draft_tokens) == best
        assert [token.start for token in one.draft_tokens] == sorted(token.start for token in one.draft_tokens)
    monkeypatch.setattr(decode_module, "proposed_draft", lambda *_: [])
    assert all(one.draft == "" for one in decode_clips(model, audio, options))


def test_seeds_are_denoised_and_the_best_is_taken(model: DiffusionGemmaASR, audio: list[np.ndarray]) -> None:
    options = replace(OPTIONS, start="noise")
    alone = [decode_clips(model, audio, replace(options, seed=seed)) for seed in range(3)]
    steps, finished = [], []
    together = decode_clips(
        model, audio, replace(options, candidates=3), on_done=finished.append, on_step=lambda clip, *_: steps.append(clip)
    )
    assert sorted(finished) == [0, 1, 2] and set(steps) == {0, 1, 2}
    taken = set()
    for index, one in enumerate(together):
        slots, heard = read(model, [audio[index]])
        rows = [run[index] for run in alone]
        best = chosen(model, slots, [row.tokens for row in rows], heard, prompt_without_sound(model, "en"))
        taken.add(best)
        assert one.tokens == rows[best].tokens and one.steps == sum(row.steps for row in rows)
    assert len(taken) > 1 or taken != {0}, "always the first seed: nothing to show"


def test_fewer_than_one_is_refused() -> None:
    with pytest.raises(AsrError, match="candidates is 0; it must be from 1 to 256"):
        DecodeOptions(candidates=0)
