"""Several transcripts of a clip: what CTC proposes, how the backbone reads them, which one is taken."""

from __future__ import annotations

import copy
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

from diffusion_gemma_asr.denoise import candidates as candidates_module
from diffusion_gemma_asr.denoise import clip as clip_module
from diffusion_gemma_asr.denoise.candidates import (
    BEGINNINGS,
    PIECE_S,
    PROMPTS,
    ROWS,
    WEIGHTS,
    Weights,
    chosen,
    language_scores,
    prompt_without_sound,
    proposed,
)
from diffusion_gemma_asr.denoise.clip import candidates_of
from diffusion_gemma_asr.denoise.decode import decode_clips, draft_clips
from diffusion_gemma_asr.denoise.options import DecodeOptions
from diffusion_gemma_asr.errors import AsrError
from diffusion_gemma_asr.model.ctc import transcript_scores
from diffusion_gemma_asr.model.ctc_beam import Slot, heard_in, likeliest, pieces
from diffusion_gemma_asr.model.head import Head
from diffusion_gemma_asr.model.model import DiffusionGemmaASR
from diffusion_gemma_asr.model.projector import noise

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
    found = likeliest(heard_in(*slots_of(log_probs), 0), 4)
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
    assert [score for _, score in found] == pytest.approx([math.log(value) for _, value in expected], abs=0.05)


def test_silence_proposes_nothing() -> None:
    assert likeliest(heard_in(Head(torch.eye(4), 30.0), torch.zeros(0, 4), 0), 3) == [((), 0.0)]
    sure = torch.tensor([[0.99, 0.01 / 3, 0.01 / 3, 0.01 / 3]] * 3).log()
    assert likeliest(heard_in(*slots_of(sure), 0), 1)[0][0] == ()


def test_pieces_end_where_nothing_is_heard() -> None:
    heard = [Slot(-3.0, [])] * 40
    for place in (8, 9, 10, 21, 22, 23):
        heard[place] = Slot(-0.01, [])
    assert pieces(heard, 10) == [(0, 9), (9, 22), (22, 27), (27, 40)]
    assert pieces(heard[:15], 10) == [(0, 15)]
    assert pieces([], 10) == [(0, 0)]
    for size in (2, 3, 25):
        cut = pieces(heard, size)
        assert [start for start, _ in cut[1:]] == [end for _, end in cut[:-1]] and cut[-1][1] == 40
        assert all(size / 2 <= end - start <= 1.5 * size for start, end in cut[:-1])


@torch.no_grad()
def slots_heard(model: DiffusionGemmaASR, audio: list[np.ndarray], index: int = 0) -> Tensor:
    """Slots (S, H) of a clip."""
    return model.encode([audio[index]]).slots[0]


@torch.no_grad()
def test_transcripts_are_scored_as_the_encoder_reads_them_in_one_go(model: DiffusionGemmaASR) -> None:
    """Prompt, transcript and end as one sequence: the sum of the next tokens' log-probabilities."""
    generator = torch.Generator().manual_seed(0)
    candidates = [torch.randint(5, 400, (n,), generator=generator).tolist() for n in (3, 7, 0, 1)]
    candidates += [[*candidates[1][:4], 9, 9], candidates[1][:5], candidates[1]]  # what begins alike is read once
    found = language_scores(model, candidates, "en")
    end = model.prompts.special["end_of_turn"]
    slots = noise(1, model.backbone.hidden_size, float(model.projector.scale), torch.Generator().manual_seed(0))
    for tokens, score in zip(candidates, found, strict=True):
        _, hidden = model.read_prompts(slots[None], torch.tensor([1]), ["en"], [[*tokens, end]])
        logits = model.head.logits(hidden[0, -len(tokens) - 2 : -1])
        expected = -float(F.cross_entropy(logits, torch.tensor([*tokens, end]), reduction="sum"))
        assert score == pytest.approx(expected, abs=1e-2)


def test_many_candidates_are_read_in_parts(model: DiffusionGemmaASR) -> None:
    rows = [[7, 8], [9]] * ROWS
    found = language_scores(model, rows, "en")
    assert found == pytest.approx(language_scores(model, rows[:2], "en") * ROWS, abs=1e-3)


def test_a_weighted_sum_decides(model: DiffusionGemmaASR, audio: list[np.ndarray]) -> None:
    """Of what CTC hears and what the backbone expects."""
    slots = slots_heard(model, audio)
    candidates = [[5, 6], [7], [9, 9, 9]]

    def best(by_ctc: list[float], rows: list[list[int]]) -> int:
        said = language_scores(model, rows, "en")
        totals = [a + WEIGHTS.language * b + WEIGHTS.length * len(row) for a, b, row in zip(by_ctc, said, rows, strict=True)]
        return totals.index(max(totals))

    expected = best(transcript_scores(model.head, slots, candidates, model.blank), candidates)
    assert chosen(model, slots, candidates, "en") == expected
    too_long = [[5] * (len(slots) + 1), [6] * (len(slots) + 2)]  # CTC hears neither: the backbone decides alone
    assert chosen(model, slots, too_long, "en") == best([0.0, 0.0], too_long)


def test_language_and_context_count(model: DiffusionGemmaASR) -> None:
    prompt, again, german = (prompt_without_sound(model, code) for code in ("en", "en", "de"))
    assert int(prompt[0].lengths[0]) == len(model.prompts.row(1, "en"))
    assert torch.equal(prompt[1], again[1]) and not torch.equal(prompt[1], german[1])
    assert not torch.equal(prompt[1], prompt_without_sound(model, "en", "A context.")[1])


def test_prompts_without_sound_are_read_once_while_nothing_learns(model: DiffusionGemmaASR) -> None:
    frozen = copy.deepcopy(model).requires_grad_(False)
    frozen.without_sound.clear()
    first = prompt_without_sound(frozen, "en")
    assert prompt_without_sound(frozen, "en") is first
    for number in range(PROMPTS):
        prompt_without_sound(frozen, "en", f"Context {number}.")
    assert len(frozen.without_sound) == PROMPTS and prompt_without_sound(frozen, "en") is not first
    frozen.projector.requires_grad_(True)
    assert prompt_without_sound(frozen, "de") is not prompt_without_sound(frozen, "de")


def test_one_candidate_changes_nothing(model: DiffusionGemmaASR, audio: list[np.ndarray]) -> None:
    for start in ("noise", "draft"):
        options = replace(OPTIONS, start=start)
        assert decode_clips(model, audio, replace(options, candidates=1)) == decode_clips(model, audio, options)


def test_drafts_are_put_together_and_the_best_is_denoised(
    model: DiffusionGemmaASR, audio: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(OPTIONS, start="draft", candidates=4)
    decoded = decode_clips(model, audio, options)
    drafted = draft_clips(model, model.encode(audio))
    for one, clip in zip(decoded, drafted, strict=True):
        assert tuple(token.id for token in one.draft_tokens) == proposed(model, clip.slots, 4, "en", "")
        assert [token.start for token in one.draft_tokens] == sorted(token.start for token in one.draft_tokens)
    monkeypatch.setattr(clip_module, "proposed_draft", lambda *_: [])
    assert all(one.draft == "" for one in decode_clips(model, audio, options))


def test_a_short_clip_is_one_piece(model: DiffusionGemmaASR, audio: list[np.ndarray]) -> None:
    """Then the best of the likeliest transcripts is taken, by CTC, language, and length."""
    slots = slots_heard(model, audio, 1)
    found = likeliest(heard_in(model.head, slots, model.blank), 6)
    said = language_scores(model, [tokens for tokens, _ in found], "en")
    taken = set()
    for weights in (Weights(0.0, 0.0), Weights(1.0, 0.0), Weights(0.5, 9.0)):
        totals = [
            heard + weights.language * b + weights.length * len(tokens)
            for (tokens, heard), b in zip(found, said, strict=True)
        ]
        best = found[totals.index(max(totals))][0]
        assert proposed(model, slots, 6, "en", "", weights) == best
        taken.add(best)
    assert len(taken) > 1, "the same whatever the weights: nothing to show"


def test_a_long_clip_is_read_piece_by_piece(model: DiffusionGemmaASR, audio: list[np.ndarray]) -> None:
    """Without language each piece is what CTC hears in it; with it what stands before counts."""
    slots = slots_heard(model, [np.concatenate(audio)])
    heard = heard_in(model.head, slots, model.blank)
    cut = pieces(heard, round(PIECE_S / model.slot_s))
    assert len(cut) > 1
    best = [likeliest(heard[start:end], 1)[0][0] for start, end in cut]
    assert proposed(model, slots, 3, "en", "", Weights(0.0, 0.0)) == sum(best, ())


def test_pieces_are_read_behind_the_best_beginnings(
    model: DiffusionGemmaASR, audio: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one reads every beginning and every transcript behind it by itself, from the prompt on; in parts or at once."""
    slots, weights = slots_heard(model, [np.concatenate(audio)]), Weights(3.0, 0.5)
    heard = heard_in(model.head, slots, model.blank)
    cut = pieces(heard, round(PIECE_S / model.slot_s))
    ended = model.prompts.special["end_of_turn"]
    silent = noise(1, model.backbone.hidden_size, float(model.projector.scale), torch.Generator().manual_seed(0))

    def said(row: tuple[int, ...]) -> float:
        if not row:
            return 0.0
        with torch.no_grad():
            _, hidden = model.read_prompts(silent[None], torch.tensor([1]), ["en"], [row])
            logits = model.head.logits(hidden[0, -len(row) - 1 : -1])
        return -float(F.cross_entropy(logits, torch.tensor(row), reduction="sum"))

    best: dict[tuple[int, ...], float] = {(): 0.0}
    order: list[tuple[int, ...]] = []
    for start, end in cut:
        rows: dict[tuple[int, ...], float] = {}
        for (before, score), (tokens, more) in itertools.product(best.items(), likeliest(heard[start:end], 3)):
            total = score + more + weights.length * len(tokens)
            rows[(*before, *tokens)] = max(total, rows.get((*before, *tokens), -math.inf))
        closing = (ended,) if end == len(heard) else ()
        totals = {row: score + weights.language * said((*row, *closing)) for row, score in rows.items()}
        order = sorted(totals, key=totals.__getitem__, reverse=True)
        best = {row: rows[row] for row in order[:BEGINNINGS]}
    assert len(cut) > 1 and order[0] != sum((likeliest(heard[start:end], 1)[0][0] for start, end in cut), ())
    for at_once in (ROWS, 4):
        monkeypatch.setattr(candidates_module, "ROWS", at_once)
        assert proposed(model, slots, 3, "en", "", weights) == order[0]
    assert proposed(model, slots, 3, "en", "", weights) == order[0], "what was read of the prompt is as it was"


@pytest.mark.parametrize("taken", [0, 1])
def test_what_was_denoised_is_left_where_the_draft_is_better(
    model: DiffusionGemmaASR, audio: list[np.ndarray], monkeypatch: pytest.MonkeyPatch, taken: int
) -> None:
    asked: list[list[list[int]]] = []

    def choice(_: object, slots: Tensor, rows: list[list[int]], *__: object) -> int:
        asked.append(rows)
        return taken

    monkeypatch.setattr(clip_module, "proposed_draft", lambda model, slots, draft, *_: draft)
    monkeypatch.setattr(clip_module, "chosen", choice)
    alone = decode_clips(model, audio, replace(OPTIONS, start="draft", candidates=1))
    assert not asked
    both = decode_clips(model, audio, replace(OPTIONS, start="draft", candidates=2))
    drafts = [[token.id for token in one.draft_tokens] for one in alone]
    differing = [[one.tokens, draft] for one, draft in zip(alone, drafts, strict=True) if one.tokens != draft]
    assert differing and asked == differing
    for one, before, draft in zip(both, alone, drafts, strict=True):
        kept = taken and before.tokens != draft
        assert (one.tokens, one.steps) == (draft if kept else before.tokens, before.steps)
        assert one.decoder == ("draft" if kept else "denoising")


def test_a_checkpoint_says_how_many_drafts_there_are(
    whisper_folder: Path, backbone_folder: Path, audio: list[np.ndarray]
) -> None:
    model = tiny_model(whisper_folder, backbone_folder)
    model.config = replace(model.config, candidates=4)
    for start, count in (("draft", 4), ("noise", 1), ("ctc", 1)):
        assert candidates_of(model, replace(OPTIONS, start=start)) == count
        assert candidates_of(model, replace(OPTIONS, start=start, candidates=2)) == 2
    options = replace(OPTIONS, start="draft")
    assert decode_clips(model, audio, options) == decode_clips(model, audio, replace(options, candidates=4))


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
        rows = [run[index] for run in alone]
        best = chosen(model, slots_heard(model, audio, index), [row.tokens for row in rows], "en")
        taken.add(best)
        assert one.tokens == rows[best].tokens and one.steps == sum(row.steps for row in rows)
    assert len(taken) > 1 or taken != {0}, "always the first seed: nothing to show"


def test_fewer_than_one_is_refused() -> None:
    with pytest.raises(AsrError, match="candidates is 0; it must be from 1 to 256"):
        DecodeOptions(candidates=0)
