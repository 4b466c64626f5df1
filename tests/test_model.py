"""The whole model: a transcript depends on its clip, the options and the seed alone."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from tiny_model import clips, tiny_model

from diffusion_gemma_asr.denoise.canvas import uniform_canvas
from diffusion_gemma_asr.denoise.clip import Decoded
from diffusion_gemma_asr.denoise.decode import decode_clips
from diffusion_gemma_asr.denoise.options import DecodeOptions
from diffusion_gemma_asr.denoise.steps import DenoiseOptions, cut_at_end, denoise, sample_by_inversion
from diffusion_gemma_asr.errors import AsrError, AudioError
from diffusion_gemma_asr.model.ctc import collapse
from diffusion_gemma_asr.model.lengths import strided_length
from diffusion_gemma_asr.model.model import DiffusionGemmaASR
from diffusion_gemma_asr.model.prompt import fill_slots

SAMPLES = [40_000, 4000, 36_200, 320, 9000]
STEPS = DecodeOptions(language="en", steps=3, entropy_bound=2.0, seed=5)


@pytest.fixture(scope="module")
def model(whisper_folder: Path, backbone_folder: Path) -> DiffusionGemmaASR:
    return tiny_model(whisper_folder, backbone_folder, reads_context=True)


@pytest.fixture(scope="module")
def without_ctc(whisper_folder: Path, backbone_folder: Path) -> DiffusionGemmaASR:
    """Its drafts mean nothing, so that canvases are as long as there are slots."""
    return tiny_model(whisper_folder, backbone_folder, ctc=False)


@pytest.fixture(scope="module")
def audio() -> list[np.ndarray]:
    return clips(SAMPLES)


def assert_same(ours: Decoded, expected: Decoded) -> None:
    assert ours.tokens == expected.tokens
    assert (ours.text, ours.draft, ours.steps) == (expected.text, expected.draft, expected.steps)
    assert ours.logprobs == pytest.approx(expected.logprobs, abs=5e-3)  # each step magnifies rounding some tenfold


# -- transcription -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ctc", "start"), [(True, "noise"), (True, "draft"), (False, "noise")])
@pytest.mark.parametrize("canvas_length", [None, 12])
def test_a_batch_is_what_single_calls_give(
    model: DiffusionGemmaASR,
    without_ctc: DiffusionGemmaASR,
    audio: list[np.ndarray],
    ctc: bool,
    start: str,
    canvas_length: int | None,
) -> None:
    options = replace(STEPS, start=start, canvas_length=canvas_length)
    chosen = model if ctc else without_ctc
    together = decode_clips(chosen, audio, options, align=True)
    assert len({decoded.text for decoded in together}) == len(audio)
    for clip, decoded in zip(audio, together, strict=True):
        (alone,) = decode_clips(chosen, [clip], options, align=True)
        assert_same(decoded, alone)
        assert (decoded.spans is None) == (alone.spans is None)
        assert [s[:2] for s in decoded.spans or ()] == [s[:2] for s in alone.spans or ()]


def test_slots_are_what_single_calls_give(model: DiffusionGemmaASR, audio: list[np.ndarray]) -> None:
    encoded = model.encode(audio)
    frames = [math.ceil(n // 160 / 2) for n in SAMPLES]
    assert encoded.frame_lengths.tolist() == frames
    assert encoded.slot_lengths.tolist() == [strided_length(n) for n in frames]
    for row, clip in enumerate(audio):
        alone = model.encode([clip])
        for parts, own, lengths in (
            (encoded.slots, alone.slots, encoded.slot_lengths),
            (encoded.frames, alone.frames, encoded.frame_lengths),
        ):
            n = int(lengths[row])
            assert own.shape[1] == n
            torch.testing.assert_close(parts[row, :n], own[0], atol=1e-4, rtol=1e-5)
            assert not parts[row, n:].any()
    again = model.project(encoded.frames, encoded.frame_lengths)  # as from frames that were kept
    torch.testing.assert_close(again.slots, encoded.slots)


def test_a_transcript_is_what_the_plain_loop_writes(model: DiffusionGemmaASR, audio: list[np.ndarray]) -> None:
    """Step by step by hand: slots, prompt, a canvas from the seed, the loop of steps.py, up to the first end token."""
    options = replace(STEPS, start="noise", canvas_length=24)
    (decoded,) = decode_clips(model, audio[:1], options)
    encoded = model.encode(audio[:1])
    prefill, _ = model.read_prompts(encoded.slots, encoded.slot_lengths, ["en"])
    generator = torch.Generator().manual_seed(options.seed)
    canvas = uniform_canvas(1, 24, model.backbone.vocab_size, generator)
    denoising = options.denoising(model.backbone.sampler_settings())
    result = denoise(model.backbone, prefill, canvas, denoising, [generator], sampler=sample_by_inversion)
    (tokens,) = cut_at_end(result.canvas, model.prompts.end_ids)
    kept = [place for place, token in enumerate(tokens) if token != model.blank]
    assert decoded.tokens == [tokens[place] for place in kept]
    assert decoded.logprobs == pytest.approx(result.logprobs[0, kept].tolist(), abs=5e-3)
    assert decoded.steps == int(result.steps)


def test_the_seed_decides(model: DiffusionGemmaASR, audio: list[np.ndarray]) -> None:
    first = decode_clips(model, audio[:2], replace(STEPS, seed=1))
    torch.rand(3)  # the global state does not matter
    for again, expected in zip(decode_clips(model, audio[:2], replace(STEPS, seed=1)), first, strict=True):
        assert_same(again, expected)
    for other, one in zip(decode_clips(model, audio[:2], replace(STEPS, seed=2)), first, strict=True):
        assert other.tokens != one.tokens
        assert other.draft == one.draft


def test_sound_language_and_context_reach_the_transcript(model: DiffusionGemmaASR, audio: list[np.ndarray]) -> None:
    options = replace(STEPS, canvas_length=16)
    backwards = np.ascontiguousarray(audio[0][::-1])
    texts = [
        decode_clips(model, [clip], chosen)[0].text
        for clip, chosen in [
            (audio[0], options),
            (audio[0], replace(options, language="de")),
            (backwards, options),
            (audio[0], replace(options, hotwords="Kant")),
            (audio[0], replace(options, initial_prompt="Kant")),
        ]
    ]
    assert len(set(texts)) == 5


def test_decoded_is_one_whole(model: DiffusionGemmaASR, audio: list[np.ndarray]) -> None:
    encoded = model.encode(audio)
    with torch.no_grad():
        log_probs, best = model.backbone.logits(encoded.slots).log_softmax(-1).max(-1)
    drafts = collapse(best, log_probs, encoded.slot_lengths, model.blank)
    assert model.blank == model.tokenizer.pad_token_id == 0
    assert [[token[:3] for token in row] for row in model.greedy.drafts(encoded)] == [
        [token[:3] for token in row] for row in drafts
    ]
    for decoded, draft in zip(decode_clips(model, audio, STEPS), drafts, strict=True):
        ids = [token.id for token in draft]
        assert decoded.text == model.tokenizer.decode(decoded.tokens, skip_special_tokens=True).strip()
        assert decoded.draft == model.tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert [token.id for token in decoded.draft_tokens] == ids
        assert not set(decoded.tokens) & {*model.prompts.end_ids, model.blank}
        assert len(decoded.logprobs) == len(decoded.tokens)
        assert all(value <= 0 for value in decoded.logprobs)
        assert decoded.steps >= 1 and decoded.decoder == "denoising" and decoded.spans is None
        assert decoded.as_drafted().tokens == ids and decoded.as_drafted().decoder == "draft"


def test_spans_are_where_ctc_places_the_tokens(model: DiffusionGemmaASR, audio: list[np.ndarray]) -> None:
    options = replace(STEPS, start="noise", canvas_length=3, steps=1)
    for decoded, clip in zip(decode_clips(model, audio[:1], options, align=True), audio, strict=False):
        slots = model.encode([clip]).slots[0]
        assert decoded.spans == model.align(slots, decoded.tokens)
        if decoded.spans is not None:
            assert len(decoded.spans) == len(decoded.tokens)
    assert model.align(slots[:1], [7, 8]) is None


def test_all_clips_are_done_once(model: DiffusionGemmaASR, audio: list[np.ndarray]) -> None:
    done: list[int] = []
    decode_clips(model, audio, replace(STEPS, canvas_length=6), batch_size=2, on_done=done.append)
    assert sorted(done) == list(range(len(audio)))


# -- what is refused -------------------------------------------------------------------------------------------


def test_clips_and_options_that_do_not_suit_the_model(
    model: DiffusionGemmaASR, without_ctc: DiffusionGemmaASR, audio: list[np.ndarray]
) -> None:
    with pytest.raises(AudioError, match=r"0\.00 s"):
        decode_clips(model, [audio[0], np.zeros(10, np.float32)], STEPS)
    with pytest.raises(AsrError, match="not trained to read context"):
        decode_clips(without_ctc, audio[:1], replace(STEPS, hotwords="Kant"))
    assert decode_clips(model, [], STEPS) == []


def test_options_of_the_loop_are_the_checkpoints_unless_named() -> None:
    settings = {"entropy_bound": 0.3, "t_max": 0.9}
    assert DecodeOptions().denoising(settings) == DenoiseOptions(steps=8, entropy_bound=0.3, t_max=0.9)
    named = DecodeOptions(steps=2, t_max=0.7, t_min=0.1).denoising(settings)
    assert named == DenoiseOptions(steps=2, entropy_bound=0.3, t_max=0.7, t_min=0.1)


# -- slots in the prompt -------------------------------------------------------------------------------------


def test_fill_slots_overwrites_placeholders_in_order() -> None:
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(3, 9, 4, generator=generator)
    slots = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64).requires_grad_()
    lengths = torch.tensor([2, 5, 0])
    slot_mask = torch.zeros(3, 9, dtype=torch.bool)
    slot_mask[0, [3, 4]] = slot_mask[1, [1, 2, 3, 5, 8]] = True
    filled = fill_slots(embeds, slot_mask, slots, lengths)
    assert filled.dtype == embeds.dtype
    assert filled[~slot_mask].equal(embeds[~slot_mask])
    assert filled[0, [3, 4]].equal(slots[0, :2].float())
    assert filled[1, [1, 2, 3, 5, 8]].equal(slots[1].float())
    filled.sum().backward()
    used = torch.arange(5) < lengths[:, None]
    assert slots.grad is not None
    assert slots.grad.amax(-1).tolist() == used.double().tolist()


def test_prefill_reads_slots_behind_any_padding(model: DiffusionGemmaASR) -> None:
    """What stands in the slots behind a row's end never reaches the prompt."""
    slots = torch.randn(2, 6, tiny.HIDDEN_SIZE, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([6, 2])
    canvas = torch.arange(10).expand(2, -1)
    with torch.no_grad():
        expected = model.backbone.denoise_logits(canvas, model.read_prompts(slots, lengths, ["en", "fr"])[0])
        slots[1, 2:] = 1000.0
        again = model.backbone.denoise_logits(canvas, model.read_prompts(slots, lengths, ["en", "fr"])[0])
    assert again.equal(expected)


def test_a_checkpoint_holds_projector_and_lora(model: DiffusionGemmaASR) -> None:
    names = set(model.trained())
    assert {name for name in names if "lora_" not in name} == {
        f"projector.{layer}.{kind}" for layer in ("conv1", "conv2", "linear") for kind in ("weight", "bias")
    }
    assert sum("lora_" in name for name in names) == len(model.backbone.lora_state_dict()) > 0
    assert names == {name for name, p in model.named_parameters() if p.requires_grad}
