"""Aligned canvases: a position for each audio token of the prompt, in training and in decoding."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_model import clips, speech_batch, tiny_model

from diffusion_gemma_asr.denoise.canvas import aligned_layout
from diffusion_gemma_asr.denoise.clip import ClipDecoding, kept_spans, read_prompts
from diffusion_gemma_asr.denoise.decode import decode, decode_clips, draft_clips
from diffusion_gemma_asr.denoise.engine import Engine, Finished
from diffusion_gemma_asr.denoise.options import DecodeOptions
from diffusion_gemma_asr.denoise.queue import run_queue
from diffusion_gemma_asr.denoise.static_engine import StaticEngine
from diffusion_gemma_asr.model.ctc import DraftToken
from diffusion_gemma_asr.model.model import DiffusionGemmaASR
from diffusion_gemma_asr.model.prefill import Prefill
from diffusion_gemma_asr.train.objective import aligned_edits, losses
from diffusion_gemma_asr.train.recipe import LossRecipe

OPTIONS = DecodeOptions(language="en", steps=3, start="draft")
TEXTS = ["the quick fox", "she sells"]


@pytest.fixture(scope="module")
def model(whisper_folder: Path, backbone_folder: Path) -> DiffusionGemmaASR:
    return tiny_model(whisper_folder, backbone_folder, canvas="aligned", start="draft")


@pytest.fixture(scope="module")
def audio() -> list[np.ndarray]:
    return clips([24_000, 40_000, 9_000])


def said(row: list[int], blank: int) -> list[int]:
    """As CTC reads a path: runs collapsed, blanks dropped."""
    return [token for token, _ in itertools.groupby(row) if token != blank]


def test_tokens_stand_where_they_are_heard() -> None:
    assert aligned_layout([7, 8], [(0, 1), (3, 5)], 5, 0) == [7, 0, 0, 8, 8]
    assert aligned_layout([], [], 2, 0) == [0, 0]
    draft = [DraftToken(7, 1, 2, 1.0), DraftToken(8, 2, 4, 1.0), DraftToken(9, 5, 6, 0.5)]
    kept = torch.tensor([False, True, True, True, False, False])
    spans = [(0, 1), (1, 3), (3, 3)]  # the last one is heard where the prompt holds nothing
    assert kept_spans(draft, kept) == ([7, 8, 9], spans)


def test_canvases_have_the_positions_of_their_audio_tokens(model: DiffusionGemmaASR, audio: list[np.ndarray]) -> None:
    encoded = model.encode(audio)
    prefill, _ = model.read_prompts(encoded.slots, encoded.slot_lengths, ["en", "de", "en"])
    for row, code in enumerate(("en", "de", "en")):
        assert int(prefill.first[row]) == model.prompts.row(1, code).index(model.prompts.special["audio"])
    one, two = (prefill.keep(torch.tensor([row]), int(prefill.lengths[row])) for row in (0, 1))
    assert torch.equal(one.join(two).first, prefill.first[:2])
    behind = replace(prefill, at=None)
    assert torch.equal(behind.first, prefill.lengths)
    canvas = torch.full((3, 4), 5)
    moved = model.backbone.denoise_hidden(canvas, prefill) - model.backbone.denoise_hidden(canvas, behind)
    assert moved.abs().max() > 1e-3


@pytest.mark.parametrize("start", ["noise", "draft"])
def test_a_transcript_does_not_depend_on_the_batch(model: DiffusionGemmaASR, audio: list[np.ndarray], start: str) -> None:
    options = replace(OPTIONS, start=start)
    together = decode_clips(model, audio, options)
    for clip, row in zip(audio, together, strict=True):
        (alone,) = decode_clips(model, [clip], options)
        assert (alone.tokens, alone.steps, alone.draft) == (row.tokens, row.steps, row.draft)
        assert model.blank not in row.tokens and len(row.tokens) == len(row.logprobs) > 0


def test_a_canvas_has_room_for_all_audio_tokens_and_an_end(model: DiffusionGemmaASR, audio: list[np.ndarray]) -> None:
    for clip in draft_clips(model, model.encode(audio)):
        assert len(clip.kept) == len(clip.slots)
        size = int(clip.kept.sum())
        noise = ClipDecoding(model, clip, replace(OPTIONS, start="noise"), "en").job().canvas
        draft = ClipDecoding(model, clip, OPTIONS, "en").job().canvas
        assert len(noise) == len(draft) == -(-(size + 1) // 8) * 8
        asked = [ClipDecoding(model, clip, replace(OPTIONS, canvas_length=n), "en").job().canvas for n in (1, 200)]
        assert torch.equal(asked[0], draft) and len(asked[1]) == 200, "a canvas that is asked for cuts the text off"
        assert int(draft[size]) == model.prompts.special["end_of_turn"]
        assert said(draft[:size].tolist(), model.blank) == [token.id for token in clip.draft]


def test_the_text_ends_where_the_audio_tokens_do(model: DiffusionGemmaASR, audio: list[np.ndarray]) -> None:
    """An end that the denoiser writes among them, unsure of a word, costs no word behind it."""
    clip = draft_clips(model, model.encode(audio))[1]
    decoding, size = ClipDecoding(model, clip, OPTIONS, "en"), int(clip.kept.sum())
    canvas = decoding.job().canvas
    assert size > 4 and len(canvas) > size
    canvas[:size] = model.blank
    canvas[0], canvas[1], canvas[3], canvas[size] = 40, model.prompts.special["end_of_turn"], 41, 42
    logprobs = -torch.arange(len(canvas)).float()
    shown = decoding.shown(canvas, torch.zeros(len(canvas)))
    decoding.take(Finished(canvas, logprobs, 2))
    decoded = decoding.decoded()
    assert decoded.tokens == [40, 41] and decoded.logprobs == [0, -3]
    assert "".join(piece.text for piece in shown).strip() == decoded.text


@pytest.fixture(scope="module")
def conditioned(whisper_folder: Path, backbone_folder: Path) -> DiffusionGemmaASR:
    return tiny_model(whisper_folder, backbone_folder, canvas="aligned", start="draft", draft_conditioning=True)


@pytest.fixture(scope="module")
def quieter(whisper_folder: Path, backbone_folder: Path) -> DiffusionGemmaASR:
    how = {"canvas": "aligned", "start": "draft", "draft_conditioning": True, "canvas_share": 0.25}
    return tiny_model(whisper_folder, backbone_folder, **how)


def test_a_draft_is_denoised_over_its_audio_tokens(
    model: DiffusionGemmaASR, conditioned: DiffusionGemmaASR, audio: list[np.ndarray]
) -> None:
    for clip in draft_clips(conditioned, conditioned.encode(audio)):
        job = ClipDecoding(conditioned, clip, OPTIONS, "en").job()
        assert job.slots is not None
        torch.testing.assert_close(job.slots, clip.slots[clip.kept])
        for other in (
            ClipDecoding(conditioned, clip, replace(OPTIONS, start="noise"), "en"),
            ClipDecoding(model, clip, OPTIONS, "en"),
        ):
            assert other.job().slots is None


def test_training_shows_drafts_the_same(conditioned: DiffusionGemmaASR, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, seen = speech_batch(conditioned, TEXTS, [300, 180]), []
    plain = conditioned.backbone.denoise_hidden

    def watched(canvas: torch.Tensor, *given: object, **named: object) -> torch.Tensor:
        seen.append(given[2:4])
        return plain(canvas, *given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(conditioned.backbone, "denoise_hidden", watched)
    slots, lengths = conditioned.projector(batch.frames, batch.frame_lengths)
    kept = conditioned.read_mask(slots, lengths)
    for share, passes in itertools.product((0.0, 1.0), (0.0, 1.0)):
        seen.clear()
        losses(conditioned, batch, LossRecipe(self_conditioning=passes, draft_share=share, ctc=0.0))
        assert len(seen) == 1 + passes
        for soft, under in seen:
            for row in range(2):
                heard = slots[row][kept[row]]
                expected = conditioned.head.logits(heard).softmax(-1) @ conditioned.head.weight
                torch.testing.assert_close(soft[row, : len(heard)], share * expected, atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(under[row, : len(heard)], share * heard)
                assert not soft[row, len(heard) :].any() and not under[row, len(heard) :].any()


def test_what_ctc_hears_is_added_to_what_the_denoiser_predicts(
    conditioned: DiffusionGemmaASR, audio: list[np.ndarray]
) -> None:
    """A backbone that says nothing leaves the draft as it is."""
    drafted = draft_clips(conditioned, conditioned.encode(audio))
    norm = conditioned.backbone.model.model.decoder.norm
    silenced = norm.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
    try:
        decoded = decode(conditioned, drafted, OPTIONS)
    finally:
        silenced.remove()
    for one, clip in zip(decoded, drafted, strict=True):
        assert one.steps and one.tokens == [token.id for token in clip.draft]


@torch.no_grad()
def test_a_share_of_the_canvas_own_logits_is_added_to_ctcs(
    conditioned: DiffusionGemmaASR, quieter: DiffusionGemmaASR, audio: list[np.ndarray]
) -> None:
    clip = draft_clips(conditioned, conditioned.encode(audio[:1]))[0]
    job = ClipDecoding(conditioned, clip, OPTIONS, "en").job()
    assert job.slots is not None
    prefill = read_prompts([ClipDecoding(conditioned, clip, OPTIONS, "en")])
    slots = torch.zeros(1, len(job.canvas), conditioned.backbone.hidden_size)
    slots[0, : len(job.slots)] = job.slots
    alone = conditioned.backbone.denoise_hidden(job.canvas[None], prefill)
    for share, model in ((1.0, conditioned), (0.25, quieter)):
        heard, given = len(job.slots), ClipDecoding(model, clip, OPTIONS, "en").job().share
        shares = torch.ones(1, len(job.canvas))
        shares[0, :heard] = given
        summed = model.backbone.denoise_hidden(job.canvas[None], prefill, slots=slots, share=shares)
        torch.testing.assert_close(summed[:, :heard], share * alone[:, :heard] + slots[:, :heard])
        torch.testing.assert_close(summed[:, heard:], alone[:, heard:])


@pytest.mark.parametrize("name", ["model", "conditioned", "quieter"])
def test_steps_of_fixed_shapes_write_the_same(name: str, audio: list[np.ndarray], request: pytest.FixtureRequest) -> None:
    model: DiffusionGemmaASR = request.getfixturevalue(name)
    drafted = draft_clips(model, model.encode(audio))
    written = []
    for engine in (Engine(model.backbone), StaticEngine(model.backbone)):
        decodings = [ClipDecoding(model, clip, OPTIONS, "en") for clip in drafted]

        def read(numbers: Sequence[int], decodings: list[ClipDecoding] = decodings) -> Prefill:
            return read_prompts([decodings[n] for n in numbers])

        jobs = [decoding.job() for decoding in decodings]
        how = OPTIONS.denoising({})
        done = dict(run_queue(model.backbone, jobs, read, how, 2, engine=engine))
        written.append([done[n].canvas.tolist() for n in range(len(jobs))])
    assert written[0] == written[1]


@torch.no_grad()
def test_what_training_wants_is_the_transcript_where_ctc_aligns_it(model: DiffusionGemmaASR) -> None:
    batch = speech_batch(model, TEXTS, [300, 180])
    slots, lengths = model.projector(batch.frames, batch.frame_lengths)
    heard = model.greedy.of_slots(slots, lengths)
    kept = model.read_mask(slots, lengths, heard)
    assert torch.equal(kept, model.read_mask(slots, lengths))
    shown, wanted, usable = aligned_edits(model, slots, heard, kept, batch.text)
    special = model.prompts.special
    assert shown.shape == wanted.shape and usable.all()
    for row, (tokens, draft) in enumerate(zip(batch.text.transcripts(), heard.drafts, strict=True)):
        size = int(kept[row].sum())
        spans = model.align(slots[row][kept[row]], tokens)
        assert spans is not None
        assert model.places(slots[row][kept[row]], tokens) == [(span.start, span.end) for span in spans]
        for span, token in zip(spans, tokens, strict=True):
            assert set(wanted[row, span.start : span.end].tolist()) == {token}
        assert said(wanted[row, :size].tolist(), model.blank) == tokens
        assert said(shown[row, :size].tolist(), model.blank) == [token.id for token in draft]
        for canvas in (shown, wanted):
            assert int(canvas[row, size]) == special["end_of_turn"]
            assert set(canvas[row, size + 1 :].tolist()) <= {special["eos"]}


def test_transcripts_that_do_not_fit_do_not_count(model: DiffusionGemmaASR) -> None:
    long = speech_batch(model, [TEXTS[0], "by the sea shore she sells many shells and the quick fox jumps"], [300, 20])
    options = LossRecipe(self_conditioning=0.0, draft_share=0.5, ctc=0.0)
    with torch.no_grad():
        slots, lengths = model.projector(long.frames, long.frame_lengths)
        heard, kept = model.greedy.of_slots(slots, lengths), model.read_mask(slots, lengths)
        assert aligned_edits(model, slots, heard, kept, long.text).usable.tolist() == [
            True,
            False,
        ]
        torch.manual_seed(0)
        parts = losses(model, long, options)
    assert parts.diffusion is not None and torch.isfinite(parts.diffusion)


def test_all_losses_reach_what_is_trained(whisper_folder: Path, backbone_folder: Path) -> None:
    fresh = tiny_model(whisper_folder, backbone_folder, canvas="aligned", start="draft")
    options = LossRecipe(self_conditioning=1.0, unroll=0.5, draft_share=0.5, known_start=0.3, full_noise=0.3)
    losses(fresh, speech_batch(fresh, TEXTS, [300, 180]), options).total(options).backward()
    missing = [name for name, p in fresh.trained().items() if p.grad is None or not bool(p.grad.any())]
    assert [name for name in missing if "lora_A" not in name] == []
