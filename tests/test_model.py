"""The whole model: a transcript depends on its clip and the seed alone; training reaches what it should."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import clips, speech_batch, tiny_model
from torch import Tensor
from torch.nn import functional as F

from diffusion_gemma_asr import decoding as decoding_module
from diffusion_gemma_asr.backbone import Backbone, Prefill
from diffusion_gemma_asr.ctc import greedy
from diffusion_gemma_asr.decoding import CANVAS_STEP, Decoded, EngineName, Shown, fitted_canvas
from diffusion_gemma_asr.denoise import DenoiseOptions
from diffusion_gemma_asr.edits import edit_layout
from diffusion_gemma_asr.engine import Finished, Job, run_fast
from diffusion_gemma_asr.errors import AsrError, AudioError
from diffusion_gemma_asr.model import DiffusionGemmaASR
from diffusion_gemma_asr.objective import BackboneLosses
from diffusion_gemma_asr.projector import output_length
from diffusion_gemma_asr.prompt import Prompt, PromptBuilder, fill_slots

SAMPLES = [40_000, 4000, 36_200, 320, 9000]
STEPS = DenoiseOptions(steps=3, entropy_bound=2.0)
TEXTS = ["the quick brown fox", "she sells", "it is"]
FRAMES = [150, 90, 41]

Losses = tuple[BackboneLosses, Tensor]


@pytest.fixture(scope="module")
def model(whisper_folder: Path, backbone_folder: Path) -> DiffusionGemmaASR:
    return tiny_model(whisper_folder, backbone_folder)


@pytest.fixture(scope="module")
def audio() -> list[np.ndarray]:
    return clips(SAMPLES)


@pytest.fixture
def canvases(model: DiffusionGemmaASR, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the canvases that the backbone denoises for the reference engine."""
    shapes: list[tuple[int, ...]] = []
    denoise_logits = model.backbone.denoise_logits

    def noted(canvas: Tensor, prefill: Prefill, self_conditioning: Tensor | None = None) -> Tensor:
        shapes.append(tuple(canvas.shape))
        return denoise_logits(canvas, prefill, self_conditioning)

    monkeypatch.setattr(model.backbone, "denoise_logits", noted)
    return shapes


def assert_same(found: Decoded, expected: Decoded) -> None:
    assert found.tokens == expected.tokens
    assert (found.text, found.draft, found.steps) == (expected.text, expected.draft, expected.steps)
    assert found.logprobs == pytest.approx(expected.logprobs, abs=5e-3)  # each step magnifies rounding some tenfold


# -- transcription -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "drafts, canvas_length, groups",
    [
        (True, None, {8, 16}),  # as long as the drafts suggest, whatever these random weights spell
        (False, None, {8, 24}),  # 16, 2, 15, 1 and 4 slots
        (True, 12, {12}),
    ],
)
def test_batch_is_what_single_calls_give(
    model: DiffusionGemmaASR,
    audio: list[np.ndarray],
    canvases: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
    drafts: bool,
    canvas_length: int | None,
    groups: set[int],
) -> None:
    monkeypatch.setattr(model, "drafts", drafts)
    together = model.transcribe_batch(audio, "en", STEPS, 5, canvas_length, engine="reference")
    assert {shape[1] for shape in canvases} == groups
    assert max(shape[0] for shape in canvases) > 1, "no clip shared a canvas batch"
    assert len(together) == len(audio)
    assert len({found.text for found in together}) == len(audio)
    for clip, found in zip(audio, together, strict=True):
        (alone,) = model.transcribe_batch([clip], "en", STEPS, 5, canvas_length, engine="reference")
        assert_same(found, alone)


def test_slots_are_what_single_calls_give(model: DiffusionGemmaASR, audio: list[np.ndarray]) -> None:
    slots, lengths = model.encode_audio(audio)
    assert lengths.tolist() == [output_length(math.ceil(n // 160 / 2)) for n in SAMPLES]
    for row, (clip, n) in enumerate(zip(audio, lengths.tolist(), strict=True)):
        alone, own = model.encode_audio([clip])
        assert own.tolist() == [n]
        torch.testing.assert_close(slots[row, :n], alone[0], atol=1e-4, rtol=1e-5)
        assert not slots[row, n:].any()


def test_the_seed_decides(model: DiffusionGemmaASR, audio: list[np.ndarray]) -> None:
    first = model.transcribe_batch(audio[:2], options=STEPS, seed=1)
    torch.rand(3)  # the global state does not matter
    for found, expected in zip(model.transcribe_batch(audio[:2], options=STEPS, seed=1), first, strict=True):
        assert_same(found, expected)
    for found, other in zip(model.transcribe_batch(audio[:2], options=STEPS, seed=2), first, strict=True):
        assert found.tokens != other.tokens
        assert found.draft == other.draft


def test_sound_and_language_reach_the_transcript(model: DiffusionGemmaASR, audio: list[np.ndarray]) -> None:
    found = [
        model.transcribe_batch([clip], language, STEPS, canvas_length=16)[0].text
        for clip, language in [(audio[0], "en"), (audio[0], "de"), (audio[0][::-1].copy(), "en")]
    ]
    assert len(set(found)) == 3


def test_decoded_is_one_whole(model: DiffusionGemmaASR, audio: list[np.ndarray]) -> None:
    slots, lengths = model.encode_audio(audio)
    drafts = greedy(model.backbone.logits(slots), lengths, blank=model.blank)
    assert model.blank == model.tokenizer.pad_token_id == 0
    assert [[token.id for token in row] for row in model.draft(slots, lengths)] == drafts
    for found, draft in zip(model.transcribe_batch(audio, options=STEPS), drafts, strict=True):
        assert found.text == model.tokenizer.decode(found.tokens, skip_special_tokens=True).strip()
        assert found.draft == model.tokenizer.decode(draft, skip_special_tokens=True).strip()
        assert not set(found.tokens) & set(model.prompts.end_ids)
        assert len(found.logprobs) == len(found.tokens)
        assert all(value <= 0 for value in found.logprobs)
        assert 1 <= found.steps <= STEPS.steps


def joined(row: list[Shown]) -> str:
    return "".join(piece.text for piece in row)


def test_transcript_stops_before_the_first_end_token(
    model: DiffusionGemmaASR, audio: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    (whole,) = model.transcribe_batch(audio[:1], options=STEPS, engine="reference")
    end = whole.tokens[5]
    first = whole.tokens.index(end)
    monkeypatch.setattr(PromptBuilder, "end_ids", (end,))
    shown: list[str] = []
    (cut,) = model.transcribe_batch(audio[:1], options=STEPS, on_step=lambda _, rows: shown.extend(map(joined, rows)))
    assert cut.tokens == whole.tokens[:first]
    assert cut.logprobs == whole.logprobs[:first]
    assert cut.text == shown[-1] == model.tokenizer.decode(cut.tokens, skip_special_tokens=True).strip()


def test_every_step_is_shown(model: DiffusionGemmaASR, audio: list[np.ndarray]) -> None:
    shown: list[tuple[int, list[Shown]]] = []
    (found,) = model.transcribe_batch(
        audio[:1], options=STEPS, canvas_length=8, on_step=lambda step, rows: shown.append((step, rows[0]))
    )
    assert [step for step, _ in shown] == [0, 1, 2, 3] * (len(shown) // 4)
    assert found.text.endswith(joined(shown[-1][1]))
    assert shown[1][1] != shown[3][1]
    assert {piece.confidence for piece in shown[0][1]} == {0.0}
    assert all(0 < piece.confidence <= 1 for piece in shown[1][1])


@pytest.mark.parametrize("engine", ["fast", "reference"])
def test_a_full_canvas_is_continued_on_another(
    model: DiffusionGemmaASR, audio: list[np.ndarray], monkeypatch: pytest.MonkeyPatch, engine: EngineName
) -> None:
    """These random weights write no end: every canvas is full until there is a token for each slot."""
    begun: list[list[int]] = []
    build = PromptBuilder.build

    def noted(self: PromptBuilder, lengths: list[int], languages: list[str], written: list[list[int]], _: str) -> Prompt:
        begun.extend(written)
        return build(self, lengths, languages, written)

    monkeypatch.setattr(PromptBuilder, "build", noted)
    (found,) = model.transcribe_batch(audio[:1], options=STEPS, canvas_length=6, engine=engine)
    assert begun == [found.tokens[: 6 * i] for i in range(3)]  # 16 slots
    assert len(found.tokens) == len(found.logprobs) == 18
    assert found.steps == 3 * STEPS.steps

    monkeypatch.setattr(PromptBuilder, "end_ids", (found.tokens[8],))
    assert found.tokens[8] not in found.tokens[:8], "choose another"
    (ended,) = model.transcribe_batch(audio[:1], options=STEPS, canvas_length=6, engine=engine)
    assert ended.tokens == found.tokens[:8]


def test_canvas_fits_the_draft_or_without_one_the_slots(
    model: DiffusionGemmaASR,
    audio: list[np.ndarray],
    canvases: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slots, lengths = model.encode_audio(audio[:1])
    drafted = len(model.draft(slots, lengths)[0])
    once = DenoiseOptions(steps=1)
    first = []
    for drafts, canvas_length in ((True, None), (False, None), (False, 5)):
        monkeypatch.setattr(model, "drafts", drafts)
        canvases.clear()
        model.transcribe_batch(audio[:1], options=once, engine="reference", canvas_length=canvas_length)
        first.append(canvases[0])
    n = int(lengths[0])
    assert first == [(1, fitted_canvas(n, drafted)), (1, fitted_canvas(n, None)), (1, 5)]


def test_the_canvas_can_start_from_the_draft_with_room_for_corrections(
    model: DiffusionGemmaASR, audio: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    first: dict[str, torch.Tensor] = {}

    def recorded(backbone: Backbone, jobs: list[Job], *others: Any) -> Iterator[tuple[int, Finished]]:
        first[start] = jobs[0].canvas.clone()
        return run_fast(backbone, jobs, *others)

    monkeypatch.setattr(decoding_module, "run_fast", recorded)
    for start in ("noise", "draft"):
        (decoded,) = model.transcribe_batch(audio[:1], options=STEPS, start=start)
        assert model.blank not in decoded.tokens and len(decoded.tokens) == len(decoded.logprobs)
    draft = model.draft(*model.encode_audio(audio[:1]))[0]
    drafted, special = first["draft"].tolist(), model.prompts.special
    layout = [*edit_layout([token.id for token in draft], model.blank), special["end_of_turn"]]
    assert len(draft) > 0 and len(drafted) % 8 == 0
    assert drafted[: len(layout)] == layout
    assert set(drafted[len(layout) :]) <= {special["eos"]}
    assert first["noise"].tolist() != drafted


def test_bad_language_and_bad_clip_are_refused(model: DiffusionGemmaASR, audio: list[np.ndarray]) -> None:
    with pytest.raises(AsrError, match="'xx'"):
        model.transcribe_batch(audio[:1], "xx")
    with pytest.raises(AudioError, match=r"0\.00 s"):
        model.transcribe_batch([audio[0], np.zeros(10, np.float32)])


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
        found = model.backbone.denoise_logits(canvas, model.read_prompts(slots, lengths, ["en", "fr"])[0])
    assert found.equal(expected)


# -- training ------------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_projector_and_lora(model: DiffusionGemmaASR) -> None:
    names = set(model.trained())
    assert {name for name in names if "lora_" not in name} == {
        f"projector.{layer}.{kind}" for layer in ("conv1", "conv2", "linear") for kind in ("weight", "bias")
    }
    assert sum("lora_" in name for name in names) == len(model.backbone.lora_state_dict()) > 0
    assert names == {name for name, p in model.named_parameters() if p.requires_grad}


def diffusion(losses: Losses) -> Tensor:
    return losses[0].diffusion


def autoregressive(losses: Losses) -> Tensor:
    return losses[0].autoregressive


def ctc(losses: Losses) -> Tensor:
    return losses[1]


def everything(losses: Losses) -> Tensor:
    return diffusion(losses) + autoregressive(losses) + ctc(losses)


@pytest.mark.parametrize(
    "loss, reached",
    [
        (everything, {"projector", "encoder", "decoder"}),
        (diffusion, {"projector", "encoder", "decoder"}),
        (autoregressive, {"projector", "encoder"}),
        (ctc, {"projector"}),
    ],
)
def test_gradients_reach_what_each_loss_trains(
    model: DiffusionGemmaASR, loss: Callable[[Losses], Tensor], reached: set[str]
) -> None:
    def part(name: str) -> str:
        if "lora_" not in name:
            return "projector"
        return "decoder" if "model.decoder" in name else "encoder"

    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    value = loss(model.losses(speech_batch(model, TEXTS, FRAMES), self_conditioning=1.0))
    assert value.isfinite()
    value.backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    model.zero_grad(set_to_none=True)
    expected = {name for name in model.trained() if part(name) in reached}
    if loss is diffusion:
        # The canvas reads keys and values: what the encoder's last layer makes of them is not looked at.
        expected -= {name for name in expected if "language_model.layers.5.self_attn.q_" in name}
        expected -= {name for name in expected if "language_model.layers.5.self_attn.o_" in name}
    assert moved == expected


def test_losses_are_finite_without_the_options(model: DiffusionGemmaASR) -> None:
    batch = speech_batch(model, TEXTS, FRAMES)
    found, loss = model.losses(batch, self_conditioning=0.0, full_noise=1.0, autoregressive=False)
    assert loss.isfinite()
    assert found.diffusion.isfinite()
    assert found.autoregressive == 0


@pytest.mark.parametrize("frames", [FRAMES, [150, 9, 41]])  # in the second no path spells the second text
def test_ctc_part_is_ctc_loss_on_full_logits(model: DiffusionGemmaASR, frames: list[int]) -> None:
    batch = speech_batch(model, TEXTS, frames)
    tokens = [model.prompts.target(text)[:-1] for text in TEXTS]
    with torch.no_grad():
        found = model.losses(batch)[1]
        total = []
        for row, n in enumerate(frames):  # each row alone
            slots, lengths = model.projector(batch.frames[row : row + 1, :n], torch.tensor([n]))
            log_probs = model.backbone.logits(slots).log_softmax(-1).transpose(0, 1)  # (S, 1, V)
            target = torch.tensor(tokens[row : row + 1])
            total.append(F.ctc_loss(log_probs, target, lengths, torch.tensor([len(target[0])]), model.blank,
                                    zero_infinity=True))  # fmt: skip
    assert (total[1] == 0) == (frames[1] == 9)
    torch.testing.assert_close(found, torch.stack(total).mean(), atol=1e-4, rtol=1e-4)


def test_padding_does_not_change_the_losses(model: DiffusionGemmaASR) -> None:
    batch = speech_batch(model, TEXTS, FRAMES)
    found = model.losses(batch)
    batch.frames[1, FRAMES[1] :].zero_()
    wider = type(batch)(F.pad(batch.frames, (0, 0, 0, 40)), batch.frame_lengths, batch.text)
    again = model.losses(wider)
    torch.testing.assert_close(again[1], found[1])
    torch.testing.assert_close(again[0].autoregressive, found[0].autoregressive)
