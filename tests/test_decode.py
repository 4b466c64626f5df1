"""From drafts to canvases and on: what a canvas starts with, when another follows, when a draft is the transcript."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import clips, tiny_model
from torch import Tensor

from diffusion_gemma_asr.denoise.canvas import edit_layout, uniform_canvas
from diffusion_gemma_asr.denoise.clip import CANVAS_STEP, Decoded, Shown, fitted_canvas
from diffusion_gemma_asr.denoise.decode import decode_clips
from diffusion_gemma_asr.denoise.options import DecodeOptions
from diffusion_gemma_asr.denoise.steps import denoise, sample_by_inversion
from diffusion_gemma_asr.model.model import DiffusionGemmaASR

SAMPLES = [40_000, 4000, 36_200, 320, 9000]
STEPS = DecodeOptions(language="en", steps=3, entropy_bound=2.0, seed=5)


@pytest.fixture(scope="module")
def model(whisper_folder: Path, backbone_folder: Path) -> DiffusionGemmaASR:
    return tiny_model(whisper_folder, backbone_folder)


@pytest.fixture(scope="module")
def without_ctc(whisper_folder: Path, backbone_folder: Path) -> DiffusionGemmaASR:
    """Its drafts mean nothing, so that canvases are as long as there are slots."""
    return tiny_model(whisper_folder, backbone_folder, ctc=False)


@pytest.fixture(scope="module")
def audio() -> list[np.ndarray]:
    return clips(SAMPLES)


def assert_same(ours: Decoded, expected: Decoded) -> None:
    assert (ours.tokens, ours.text, ours.draft, ours.steps) == (
        expected.tokens,
        expected.text,
        expected.draft,
        expected.steps,
    )


class Tape:
    """What `decode_clips` shows of the canvases of one clip: all (step, text) in order."""

    def __init__(self) -> None:
        self.rows: dict[int, list[tuple[int, list[Shown]]]] = {}

    def __call__(self, clip: int, step: int, shown: list[Shown]) -> None:
        self.rows.setdefault(clip, []).append((step, shown))


def joined(row: list[Shown]) -> str:
    return "".join(piece.text for piece in row)


# -- canvases ----------------------------------------------------------------------------------------------------


def test_every_step_is_shown(model: DiffusionGemmaASR, audio: list[np.ndarray]) -> None:
    tape = Tape()
    rows = decode_clips(model, audio[:2], replace(STEPS, canvas_length=8), on_step=tape)
    assert tape.rows.keys() == {0, 1}
    for clip, decoded in enumerate(rows):
        shown = tape.rows[clip]
        assert [step for step, _ in shown] == [0, 1, 2, 3] * (len(shown) // 4)
        assert len(shown) // 4 * 3 == decoded.steps
        assert decoded.text.endswith(joined(shown[-1][1]).strip())
        assert shown[1][1] != shown[3][1]
        assert {piece.confidence for piece in shown[0][1]} == {0.0}
        assert all(0 < piece.confidence <= 1 for piece in shown[1][1])


def test_watching_changes_nothing(model: DiffusionGemmaASR, audio: list[np.ndarray]) -> None:
    for seen, unseen in zip(
        decode_clips(model, audio, STEPS, on_step=Tape()), decode_clips(model, audio, STEPS), strict=True
    ):
        assert_same(seen, unseen)


class EndsAt(torch.nn.Module):
    """A backbone that writes the end of the turn from a place on, whatever the other one thinks."""

    def __init__(self, backbone: torch.nn.Module, place: int, end: int):
        super().__init__()
        self.backbone, self.place, self.end = backbone, place, end

    def __getattr__(self, name: str) -> object:
        return super().__getattr__(name) if name in ("backbone", "_modules") else getattr(self.backbone, name)

    def denoise_hidden_from_soft(self, *inputs: Tensor) -> Tensor:
        hidden = self.backbone.denoise_hidden_from_soft(*inputs)
        hidden[:, self.place :] = 50 * self.backbone.lm_head_weight[self.end]
        return hidden


def test_a_transcript_stops_before_the_first_end_token(
    whisper_folder: Path, backbone_folder: Path, audio: list[np.ndarray]
) -> None:
    ending = tiny_model(whisper_folder, backbone_folder)
    backbone = ending.backbone
    for end in ending.prompts.end_ids:
        ending.backbone = EndsAt(backbone, 5, end)
        (decoded,) = decode_clips(ending, audio[:1], replace(STEPS, canvas_length=12))
        assert 0 < len(decoded.tokens) <= 5 and len(decoded.logprobs) == len(decoded.tokens)
        assert decoded.steps == STEPS.steps, "a canvas with an end is not continued"


def test_a_full_canvas_is_continued_on_another(model: DiffusionGemmaASR, audio: list[np.ndarray]) -> None:
    """These random weights write no end: every canvas is full until there is a token for each slot."""
    options = replace(STEPS, canvas_length=6)
    slots = int(model.encode(audio[:1]).slot_lengths)
    assert slots == 16
    (decoded,) = decode_clips(model, audio[:1], options)
    assert len(decoded.tokens) == len(decoded.logprobs) == 18
    assert decoded.steps == 3 * STEPS.steps

    # The same by hand: what is written stands in the prompt of the next canvas, and the generator goes on.
    encoded, generator, written = model.encode(audio[:1]), torch.Generator().manual_seed(options.seed), []
    denoising = options.denoising(model.backbone.sampler_settings())
    for _ in range(3):
        canvas = uniform_canvas(1, 6, model.backbone.vocab_size, generator)
        prefill, _ = model.read_prompts(encoded.slots, encoded.slot_lengths, ["en"], [written])
        result = denoise(model.backbone, prefill, canvas, denoising, [generator], sampler=sample_by_inversion)
        written += result.canvas[0].tolist()
    assert decoded.tokens == written


def canvas_sizes(model: DiffusionGemmaASR, clip: np.ndarray, options: DecodeOptions) -> int:
    """Positions of the first canvas, as the first step shows them."""
    sizes: list[int] = []

    class Counting(EndsAt):
        def denoise_hidden_from_soft(self, canvas: Tensor, *inputs: Tensor) -> Tensor:
            sizes.append(canvas.shape[1])
            return self.backbone.denoise_hidden_from_soft(canvas, *inputs)

    plain = model.backbone
    model.backbone = Counting(plain, 0, 0)
    try:
        decode_clips(model, [clip], options)
    finally:
        model.backbone = plain
    return sizes[0]


def test_a_canvas_fits_the_draft_or_without_one_the_slots(
    model: DiffusionGemmaASR, without_ctc: DiffusionGemmaASR, audio: list[np.ndarray]
) -> None:
    encoded = model.encode(audio[:1])
    slots, draft = int(encoded.slot_lengths), model.greedy.drafts(encoded)[0]
    once = replace(STEPS, steps=1)
    assert canvas_sizes(model, audio[0], once) == fitted_canvas(slots, len(draft))
    assert canvas_sizes(without_ctc, audio[0], once) == fitted_canvas(slots, None)
    assert canvas_sizes(without_ctc, audio[0], replace(once, canvas_length=5)) == 5


def test_a_canvas_can_start_from_the_draft_with_room_for_corrections(
    model: DiffusionGemmaASR, audio: list[np.ndarray]
) -> None:
    """Before the first step it shows the draft, in positions that alternate with blanks."""
    for clip in audio[:3]:
        tape = Tape()
        (decoded,) = decode_clips(model, [clip], replace(STEPS, start="draft"), on_step=tape)
        assert len(decoded.draft_tokens) > 0
        assert joined(tape.rows[0][0][1]).strip() == decoded.draft
        assert model.blank not in decoded.tokens and len(decoded.tokens) == len(decoded.logprobs)
        layout = edit_layout([token.id for token in decoded.draft_tokens], model.blank)
        size = canvas_sizes(model, clip, replace(STEPS, start="draft"))
        assert size % CANVAS_STEP == 0 and len(layout) < size <= len(layout) + CANVAS_STEP


@given(slots=st.integers(1, 188), share=st.floats(0, 1))
def test_fitted_canvas_has_room_for_the_draft_and_its_end(slots: int, share: float) -> None:
    draft = round(share * slots)  # CTC never spells more tokens than slots
    canvas = fitted_canvas(slots, draft)
    assert canvas % CANVAS_STEP == 0
    assert canvas >= min(slots + 2, 1.2 * draft + 4)
    assert canvas >= draft + 2
    assert canvas <= fitted_canvas(slots, None) < slots + 2 + CANVAS_STEP
    assert canvas <= 1.2 * draft + 5 + CANVAS_STEP
    assert fitted_canvas(slots, None) >= slots + 2


# -- nothing but CTC ---------------------------------------------------------------------------------------------


def test_what_ctc_hears_may_be_the_transcript(model: DiffusionGemmaASR, audio: list[np.ndarray]) -> None:
    done, tape = [], Tape()
    options = replace(STEPS, start="ctc")
    rows = decode_clips(model, audio[:2], options, align=True, on_done=done.append, on_step=tape)
    assert sorted(done) == [0, 1]
    for clip, (decoded, draft) in enumerate(zip(rows, model.greedy.drafts(model.encode(audio[:2])), strict=True)):
        assert decoded.tokens == [token.id for token in draft] and decoded.draft_tokens == draft
        assert decoded.text == decoded.draft == model.text(decoded.tokens)
        assert (decoded.decoder, decoded.steps, decoded.language) == ("draft", 0, "en")
        assert decoded.logprobs == pytest.approx([math.log(token.probability) for token in draft])
        assert [(step, joined(row).strip()) for step, row in tape.rows[clip]] == [(0, decoded.text)]
        assert [piece.confidence for piece in tape.rows[clip][0][1]] != []


def test_a_model_may_have_been_trained_for_that(model: DiffusionGemmaASR, audio: list[np.ndarray]) -> None:
    plain, how = model.config, replace(STEPS, start=None)
    model.config = replace(plain, start="ctc")
    try:
        (alone,) = decode_clips(model, audio[:1], how)
        (denoised,) = decode_clips(model, audio[:1], replace(how, start="draft"))
    finally:
        model.config = plain
    assert (alone.decoder, denoised.decoder) == ("draft", "denoising") and alone.draft == denoised.draft
