"""What language expects at the places of a canvas: the encoder's causal reading of its text, added to what CTC hears."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from sounds import tone
from tiny_model import speech_batch, tiny_model

from diffusion_gemma_asr.denoise.candidates import prompt_without_sound
from diffusion_gemma_asr.denoise.clip import ClipDecoding, read_prompts
from diffusion_gemma_asr.denoise.decode import decode, draft_clips
from diffusion_gemma_asr.denoise.engine import Engine
from diffusion_gemma_asr.denoise.expected import expectation, text_before
from diffusion_gemma_asr.denoise.options import DecodeOptions
from diffusion_gemma_asr.denoise.queue import run_queue
from diffusion_gemma_asr.denoise.static_engine import StaticEngine
from diffusion_gemma_asr.model.model import DiffusionGemmaASR
from diffusion_gemma_asr.model.prefill import Prefill
from diffusion_gemma_asr.model.projector import noise
from diffusion_gemma_asr.train.expected import batch_expectation
from diffusion_gemma_asr.train.objective import fill_slots, losses, text_batch
from diffusion_gemma_asr.train.recipe import LossRecipe

HOW = {"canvas": "aligned", "start": "draft", "draft_conditioning": True, "canvas_share": 0.5, "causal_share": 0.3}
OPTIONS = DecodeOptions(start="draft", candidates=1, steps=4)
BLANK, END = 0, 1


@pytest.fixture(scope="module")
def model(whisper_folder: Path, backbone_folder: Path) -> DiffusionGemmaASR:
    return tiny_model(whisper_folder, backbone_folder, **HOW, silent_drafts=True).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def audio() -> list[np.ndarray]:
    return [tone(300, 2.0), tone(500, 1.2)]


def silent(model: DiffusionGemmaASR, language: str) -> Callable[[], tuple[Prefill, torch.Tensor]]:
    """What the backbone reads before a canvas: a prompt without sound."""
    return lambda: prompt_without_sound(model, language)


@pytest.mark.parametrize(
    ("canvas", "tokens", "before"),
    [
        ([], [], []),
        ([BLANK, BLANK], [], [0, 0]),
        ([5, 5, BLANK, 6], [5, 6], [0, 0, 1, 1]),
        ([BLANK, 5, 6, 6, BLANK, 6], [5, 6, 6], [0, 0, 1, 1, 2, 2]),
        ([5, END, 6, BLANK], [5, 6], [0, 1, 1, 2]),  # the text ends behind the last place
    ],
)
def test_the_text_before_each_place(canvas: list[int], tokens: list[int], before: list[int]) -> None:
    assert text_before(canvas, BLANK, {END}) == (tokens, before)


@torch.no_grad()
def test_each_place_gets_what_predicts_its_token(model: DiffusionGemmaASR) -> None:
    """The state that is added at a place is the one an autoregressive decoder would write its token from."""
    tokens = [40, 41, 42]
    canvas = torch.tensor([40, 40, model.blank, 41, 42])
    found = expectation(model, 5, silent(model, "en"))(canvas)
    slots = noise(1, model.backbone.hidden_size, float(model.projector.scale), torch.Generator().manual_seed(0))
    prefill, hidden = model.read_prompts(slots[None], torch.ones(1, dtype=torch.long), ["en"], written=[tokens])
    end = int(prefill.lengths[0])
    states = hidden[0, end - len(tokens) - 1 : end]
    torch.testing.assert_close(found, 0.3 * states[[0, 0, 1, 1, 2]], atol=1e-5, rtol=1e-4)
    nothing = expectation(model, 2, silent(model, "en"))(torch.full((2,), model.blank))
    torch.testing.assert_close(nothing, 0.3 * prompt_without_sound(model, "en")[1].expand(2, -1))


def test_a_canvas_that_stays_the_same_is_read_once(model: DiffusionGemmaASR, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    extend = model.backbone.extend
    monkeypatch.setattr(model.backbone, "extend", lambda *given: read.append(1) or extend(*given))
    expected = expectation(model, 2, silent(model, "en"))
    canvases = [torch.tensor(row) for row in ([40, 41], [40, 41], [40, 42], [40, 41])]
    first, again, other, back = (expected(canvas) for canvas in canvases)
    assert len(read) == 3
    assert torch.equal(first, again) and torch.equal(first, back)
    assert not any(torch.equal(first, expectation(model, 2, silent(model, "de"))(canvas)) for canvas in canvases)
    assert torch.equal(first[0], other[0])  # nothing is written before the first place in either


@torch.no_grad()
def test_training_expects_the_same(model: DiffusionGemmaASR) -> None:
    canvases = torch.tensor([[40, 40, model.blank, 41, 42, 7], [43, 44, 44, 7, 7, 7], [8, 9, 10, 11, 12, 13]])
    used = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
    languages = ["en", "de", "fr"]
    text = text_batch(model.prompts, [1, 1, 1], [[1], [1], [1]], languages, 0).without_transcripts()
    one = noise(1, model.backbone.hidden_size, float(model.projector.scale), torch.Generator().manual_seed(0))
    lengths = torch.ones(3, dtype=torch.long)
    embeds = fill_slots(model.backbone.embed(text.ids), text.slot_mask, one[None].expand(3, -1, -1), lengths)
    found = batch_expectation(model, *model.backbone.prefill(embeds, text.mask, text.lengths))(canvases, used)
    for row, code in enumerate(languages):
        n = int(used[row].sum())
        if n:
            wanted = expectation(model, n, silent(model, code))(canvases[row])
            torch.testing.assert_close(found[row, :n], wanted, atol=1e-5, rtol=1e-4)
        assert not found[row, n:].any()


def test_every_pass_reads_the_canvas_of_the_pass_before(model: DiffusionGemmaASR, audio: list[np.ndarray]) -> None:
    (clip,) = draft_clips(model, model.encode(audio[:1]))
    decoding = ClipDecoding(model, clip, OPTIONS, "en")
    job = decoding.job()
    assert job.slots is not None and job.expected is not None
    read, shown = [], []

    def watched(canvas: torch.Tensor) -> torch.Tensor:
        read.append(canvas.clone())
        return torch.zeros(len(job.slots), model.backbone.hidden_size)

    engine = Engine(model.backbone, lambda number, step, canvas, entropy: shown.append(canvas.clone()))
    options = replace(decoding.denoising, stability_threshold=99)
    engine.add([0], [replace(job, expected=watched)], [options], read_prompts([decoding]))
    while len(engine):
        engine.step()
    assert len(read) == OPTIONS.steps == len(shown) - 1
    for canvas, before in zip(read, shown[:-1], strict=True):
        assert torch.equal(canvas, before)


def test_a_canvas_of_noise_is_read_from_its_second_pass_on(model: DiffusionGemmaASR, audio: list[np.ndarray]) -> None:
    (clip,) = draft_clips(model, model.encode(audio[:1]))
    decoding = ClipDecoding(model, clip, replace(OPTIONS, start="noise"), "en")
    job = decoding.job()
    assert job.slots is None and job.expected is not None
    read, shown = [], []
    wanted = model.head.weight[45] * (clip.slots.norm() * 10)

    def watched(canvas: torch.Tensor) -> torch.Tensor:
        read.append(canvas.clone())
        return wanted.expand(3, -1)

    engine = Engine(model.backbone, lambda number, step, canvas, entropy: shown.append(canvas.clone()))
    options = replace(decoding.denoising, stability_threshold=99)
    engine.add([0], [replace(job, expected=watched)], [options], read_prompts([decoding]))
    while len(engine):
        engine.step()
    assert len(read) == OPTIONS.steps - 1 == len(shown) - 2
    for canvas, before in zip(read, shown[1:-1], strict=True):
        assert torch.equal(canvas, before)
    assert not (shown[1][:3] == 45).all() and all((canvas[:3] == 45).all() for canvas in shown[2:])


@pytest.mark.parametrize("start", ["draft", "noise"])
def test_both_engines_write_the_same(
    model: DiffusionGemmaASR, audio: list[np.ndarray], start: Literal["draft", "noise"]
) -> None:
    how = replace(OPTIONS, start=start)
    clips = draft_clips(model, model.encode(audio))
    found = []
    for engine in (Engine(model.backbone), StaticEngine(model.backbone, record=lambda step: step)):
        decodings = [ClipDecoding(model, clip, how, "en") for clip in clips]
        jobs = [one.job() for one in decodings]
        options = decodings[0].denoising
        done = dict(
            run_queue(
                model.backbone, jobs, lambda rows, d=decodings: read_prompts([d[i] for i in rows]), options, 4, None, engine
            )
        )
        found.append([done[i] for i in range(len(clips))])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.canvas, other.canvas) and one.steps == other.steps
        torch.testing.assert_close(one.logprobs, other.logprobs, atol=1e-4, rtol=1e-4 if start == "draft" else 1e-3)


def test_a_clip_gives_the_same_whatever_else_is_in_the_batch(model: DiffusionGemmaASR, audio: list[np.ndarray]) -> None:
    clips = draft_clips(model, model.encode(audio))
    together = decode(model, clips, OPTIONS, languages=["en", "de"])
    alone = [decode(model, [clip], OPTIONS, languages=[code])[0] for clip, code in zip(clips, ["en", "de"], strict=True)]
    assert [one.tokens for one in together] == [one.tokens for one in alone]


def test_what_is_expected_changes_what_is_written(model: DiffusionGemmaASR, audio: list[np.ndarray]) -> None:
    (clip,) = draft_clips(model, model.encode(audio[:1]))
    head = model.head
    with torch.no_grad():
        slots = clip.slots[clip.kept]
        wanted = head.weight[45] * (clip.slots.norm() * 10)

    def job(expected: bool) -> torch.Tensor:
        decoding = ClipDecoding(model, clip, replace(OPTIONS, steps=1), "en")
        made = replace(decoding.job(), expected=(lambda canvas: wanted.expand(len(slots), -1)) if expected else None)
        ((_, finished),) = run_queue(model.backbone, [made], lambda rows: read_prompts([decoding]), decoding.denoising, 1)
        return finished.canvas[: len(slots)]

    assert (job(True) == 45).all() and not (job(False) == 45).all()


def test_a_prompt_without_sound_serves_all_drafts(model: DiffusionGemmaASR, audio: list[np.ndarray]) -> None:
    clips = draft_clips(model, model.encode(audio))
    silent = read_prompts([ClipDecoding(model, clip, OPTIONS, "en") for clip in clips])
    mixed = read_prompts(
        [ClipDecoding(model, clips[0], replace(OPTIONS, start="noise"), "en"), ClipDecoding(model, clips[1], OPTIONS, "de")]
    )
    one = prompt_without_sound(model, "en")[0]
    assert silent.lengths.tolist() == [int(one.lengths[0])] * 2
    assert mixed.lengths.tolist()[0] == int(one.lengths[0]) - 1 + int(clips[0].kept.sum())
    assert mixed.lengths.tolist()[1] == int(prompt_without_sound(model, "de")[0].lengths[0])
    for row in range(2):
        for (keys, _), (wanted, _) in zip(silent.layers(), one.layers(), strict=True):
            torch.testing.assert_close(keys[row, :, : wanted.shape[2]], wanted[0])


@pytest.mark.parametrize(("drafts", "first_pass", "learns"), [(1.0, 0.0, True), (0.0, 0.0, False), (0.0, 1.0, True)])
def test_training_learns_through_it(
    whisper_folder: Path, backbone_folder: Path, drafts: float, first_pass: float, learns: bool
) -> None:
    """Without the autoregressive loss, nothing else makes use of the encoder's last states; noise has no text to read in its
    first pass."""
    model = tiny_model(whisper_folder, backbone_folder, **HOW)
    batch = speech_batch(model, ["the fox", "she sells"], [300, 180])
    options = LossRecipe(draft_share=drafts, ctc=0.0, autoregressive=0.0, self_conditioning=first_pass)
    states: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.retain_grad()
            states.append(output)

    model.backbone.model.model.encoder.language_model.norm.register_forward_hook(keep)
    losses(model, batch, options).total(options).backward()
    assert any(output.grad is not None and bool(output.grad.any()) for output in states) == learns
