"""Acoustic tokens: prompts hold what the frames say, and CTC alone reads the tokens of the layers above."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sounds import tone
from tiny_model import speech_batch, tiny_model
from torch.nn import functional as F

from diffusion_gemma_asr.denoise.candidates import prompt_without_sound
from diffusion_gemma_asr.denoise.clip import ClipDecoding, read_prompts
from diffusion_gemma_asr.denoise.decode import decode, draft_clips
from diffusion_gemma_asr.denoise.options import DecodeOptions
from diffusion_gemma_asr.model.config import ProjectorConfig
from diffusion_gemma_asr.model.model import DiffusionGemmaASR
from diffusion_gemma_asr.model.projector import AudioProjector
from diffusion_gemma_asr.train.objective import losses
from diffusion_gemma_asr.train.recipe import LossRecipe

HOW = {"canvas": "aligned", "start": "draft", "draft_conditioning": True, "canvas_share": 0.5, "causal_share": 0.3}
OPTIONS = DecodeOptions(start="draft", candidates=1, steps=3)
SETTINGS = ProjectorConfig(hidden_size=24, acoustic=True, skip_blanks=1.0)


@pytest.fixture(scope="module")
def model(whisper_folder: Path, backbone_folder: Path) -> DiffusionGemmaASR:
    return tiny_model(whisper_folder, backbone_folder, **HOW, projector=SETTINGS).eval().requires_grad_(False)


@torch.no_grad()
def test_an_acoustic_token_is_a_linear_map_of_its_slot_s_frames() -> None:
    torch.manual_seed(0)
    projector = AudioProjector(ProjectorConfig(hidden_size=8, strides=(2, 2), acoustic=True), 6, 16, 3.0).eval()
    frames = torch.randn(2, 11, 6)
    frames[1, 7:] = 0
    lengths = torch.tensor([11, 7])
    slots, slot_lengths = projector(frames, lengths)
    tokens = projector.prompted(frames, lengths, slots)
    assert slot_lengths.tolist() == [3, 2] and tokens.shape == slots.shape and not tokens[1, 2].any()
    weight = projector.acoustic.weight.permute(2, 1, 0).flatten(0, 1)  # (4 * 6, 16)
    for row, place in ((0, 0), (0, 1), (0, 2), (1, 1)):
        span = F.pad(frames[row, 4 * place : 4 * place + 4], (0, 0, 0, 4))[:4]
        wanted = span.flatten() @ weight + projector.acoustic.bias
        torch.testing.assert_close(tokens[row, place], 3.0 * wanted / wanted.square().mean().sqrt(), atol=1e-4, rtol=1e-4)
    plain = AudioProjector(ProjectorConfig(hidden_size=8, strides=(2, 2)), 6, 16, 3.0).eval()
    assert plain.prompted(frames, lengths, slots) is slots


def test_prompts_hold_every_acoustic_token_and_canvases_those_that_are_no_blanks(
    model: DiffusionGemmaASR, whisper_folder: Path, backbone_folder: Path
) -> None:
    plain = tiny_model(whisper_folder, backbone_folder).eval()
    probability = plain.head.logits(model.encode([tone(300, 2.0)]).slots).softmax(-1)[..., plain.blank]
    half = ProjectorConfig(hidden_size=24, acoustic=True, skip_blanks=float(probability.median()))
    skipping = tiny_model(whisper_folder, backbone_folder, **HOW, projector=half).eval().requires_grad_(False)
    encoded = skipping.encode([tone(300, 2.0)])
    (clip,) = draft_clips(skipping, encoded)
    assert 0 < int(clip.kept.sum()) < len(clip.slots) == len(clip.prompted)
    assert torch.equal(clip.prompted, encoded.acoustic[0, : len(clip.slots)])
    decoding = ClipDecoding(skipping, clip, OPTIONS, "en")
    heard = read_prompts([decoding])
    assert int(heard.lengths) - int(prompt_without_sound(skipping, "en")[0].lengths) == len(clip.slots) - 1
    assert len(decoding.job().slots) == int(clip.kept.sum())


@torch.no_grad()
def test_what_is_expected_follows_the_clip_s_own_prompt(model: DiffusionGemmaASR) -> None:
    clips = draft_clips(model, model.encode([tone(300, 2.0), tone(500, 2.0)]))
    canvas = torch.full((len(clips[0].slots),), model.blank)
    canvas[2:4] = torch.tensor([40, 41])
    jobs = [ClipDecoding(model, clip, OPTIONS, "en").job() for clip in clips]
    found = jobs[0].expected(canvas)
    prefill, hidden = model.read_prompts(
        clips[0].prompted[None], torch.tensor([len(clips[0].slots)]), ["en"], written=[[40, 41]]
    )
    end = int(prefill.lengths[0])
    torch.testing.assert_close(found[[0, 3, 5]], 0.3 * hidden[0, [end - 3, end - 2, end - 1]], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found, jobs[1].expected(canvas))


def test_a_clip_s_text_does_not_depend_on_the_batch(model: DiffusionGemmaASR) -> None:
    clips = draft_clips(model, model.encode([tone(300, 2.0), tone(500, 1.2)]))
    both = decode(model, clips, OPTIONS, languages=["en", "de"])
    alone = [decode(model, [clip], OPTIONS, languages=[code])[0] for clip, code in zip(clips, ["en", "de"], strict=True)]
    assert [one.tokens for one in both] == [one.tokens for one in alone]


def test_the_backbone_s_losses_reach_acoustic_tokens_and_ctc_s_does_not(whisper_folder: Path, backbone_folder: Path) -> None:
    model = tiny_model(whisper_folder, backbone_folder, **HOW, projector=SETTINGS)
    batch = speech_batch(model, ["the fox", "she"], [150, 90])
    ctc = LossRecipe(diffusion=0.0, autoregressive=0.0)
    losses(model, batch, ctc).total(ctc).backward()
    assert model.projector.acoustic.weight.grad is None and model.projector.linear.weight.grad.any()
    model.zero_grad()
    rest = LossRecipe(ctc=0.0, draft_share=1.0)
    parts = losses(model, batch, rest)
    parts.total(rest).backward()
    assert parts.diffusion > 0 and parts.autoregressive > 0
    assert model.projector.acoustic.weight.grad.any() and not model.projector.linear.weight.grad
