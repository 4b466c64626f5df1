"""What the backbone is trained on: the canvas' content, its noise, and which part of a row each loss sees."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer

from diffusion_gemma_asr.backbone import Backbone, Prefill
from diffusion_gemma_asr.edits import EditCanvases
from diffusion_gemma_asr.objective import (
    BackboneLosses,
    TextBatch,
    backbone_losses,
    draw_temperature,
    one_step,
    text_batch,
    write_canvas,
)
from diffusion_gemma_asr.prompt import PromptBuilder

TEXTS = ["the quick brown fox", "she sells", ""]
SLOTS = [6, 0, 3]
MARGIN = 4


class Recorded(Backbone):
    """A backbone that keeps what every pass over the canvas was given and what it returned."""

    calls: list[tuple[Tensor, Tensor | None, Tensor]]

    def denoise_hidden(
        self,
        canvas: Tensor,
        prefill: Prefill,
        self_conditioning: Tensor | None = None,
        self_conditioning_mask: Tensor | None = None,
    ) -> Tensor:
        hidden = super().denoise_hidden(canvas, prefill, self_conditioning, self_conditioning_mask)
        self.calls.append((canvas, self_conditioning, hidden))
        return hidden


@pytest.fixture(scope="module")
def recorded(backbone_folder: Path) -> Recorded:
    found = Recorded.from_pretrained(backbone_folder)
    assert isinstance(found, Recorded)
    return found.requires_grad_(True)


@pytest.fixture(scope="module")
def prompts(backbone_folder: Path) -> PromptBuilder:
    return PromptBuilder(AutoTokenizer.from_pretrained(backbone_folder))


@pytest.fixture
def batch(prompts: PromptBuilder) -> TextBatch:
    return text_batch(prompts, SLOTS, [prompts.target(text) for text in TEXTS], ["en", "de", "zh"], MARGIN)


def losses(
    backbone: Recorded,
    batch: TextBatch,
    *,
    self_conditioning: float = 0.0,
    full_noise: float = 0.0,
    seed: int = 0,
    autoregressive: bool = True,
    **others: Any,
) -> BackboneLosses:
    backbone.calls = []
    generator = torch.Generator().manual_seed(seed)
    embeds = backbone.embed(batch.ids)
    return backbone_losses(
        backbone, embeds, batch, self_conditioning, full_noise, generator, autoregressive=autoregressive, **others
    )


def rows_of(batch: TextBatch, row: int) -> TextBatch:
    """One row without its padding; the canvas keeps its length."""
    n = int(batch.mask[row].sum())
    cut = {f.name: getattr(batch, f.name)[row : row + 1] for f in fields(batch)}
    return TextBatch(**{k: v if k in ("lengths", "canvas", "leads") else v[:, :n] for k, v in cut.items()})


# -- the batch -----------------------------------------------------------------------------------------------


def test_canvas_is_transcript_end_of_turn_and_eos(prompts: PromptBuilder, batch: TextBatch) -> None:
    targets = [prompts.target(text) for text in TEXTS]
    assert batch.canvas.shape == (3, max(map(len, targets)) + MARGIN)
    for canvas, text in zip(batch.canvas.tolist(), TEXTS, strict=True):
        end = canvas.index(prompts.special["end_of_turn"])
        assert prompts.tokenizer.decode(canvas[:end]).strip() == text
        assert set(canvas[end + 1 :]) == {prompts.special["eos"]}


def test_rows_are_prompt_then_transcript(prompts: PromptBuilder, batch: TextBatch) -> None:
    for i, (slots, language) in enumerate(zip(SLOTS, ["en", "de", "zh"], strict=True)):
        prompt, target = prompts.row(slots, language), prompts.target(TEXTS[i])
        n, total = len(prompt), len(prompt) + len(target)
        assert batch.lengths[i] == n
        assert batch.ids[i, :total].tolist() == prompt + target
        assert (batch.ids[i, total:] == prompts.special["pad"]).all()
        assert batch.mask[i].nonzero().flatten().tolist() == list(range(total))
        assert batch.target_mask[i].nonzero().flatten().tolist() == list(range(n, total))
        assert batch.slot_mask[i].sum() == slots
        assert (batch.ids[i][batch.slot_mask[i]] == prompts.special["audio"]).all()


def test_to_moves_every_tensor(batch: TextBatch) -> None:
    moved = batch.to(torch.device("meta"))
    assert {getattr(moved, f.name).device.type for f in fields(moved)} == {"meta"}


# -- noise ---------------------------------------------------------------------------------------------------


def test_full_noise_tells_nothing_of_the_transcript(recorded: Recorded, batch: TextBatch) -> None:
    long = replace(batch, canvas=F.pad(batch.canvas, (0, 60), value=1))
    other = replace(long, canvas=torch.full_like(long.canvas, 7))
    losses(recorded, long, full_noise=1.0)
    noisy = recorded.calls[0][0]
    losses(recorded, other, full_noise=1.0)
    assert recorded.calls[0][0].equal(noisy)
    assert len(noisy.unique()) > 100
    losses(recorded, other, full_noise=1.0, seed=1)
    assert not recorded.calls[0][0].equal(noisy)


def test_noise_levels_differ_by_row(recorded: Recorded, batch: TextBatch) -> None:
    """Without full noise t ~ U(eps, 1): over many rows half of the positions stay, in some nearly all."""
    many = TextBatch(**{f.name: getattr(batch, f.name)[[1] * 40] for f in fields(batch)})
    losses(recorded, many, autoregressive=False)
    kept = (recorded.calls[0][0] == many.canvas).float().mean(1)
    assert 0.3 < kept.mean() < 0.7
    assert kept.min() < 0.2
    assert kept.max() > 0.8


def test_a_share_of_the_rows_starts_from_drafts(recorded: Recorded, batch: TextBatch) -> None:
    """A drafted row is corrupted at t / 4: most of its draft stays, whatever full noise says of the others."""
    many = TextBatch(**{f.name: getattr(batch, f.name)[[1] * 60] for f in fields(batch)})
    shown = F.pad(torch.full_like(many.canvas, 9), (0, 20), value=1)
    clean = F.pad(many.canvas, (0, 20), value=1)
    usable = torch.arange(60) % 3 != 0
    losses(recorded, many, full_noise=1.0, autoregressive=False, drafts=EditCanvases(shown, clean, usable), draft_share=0.5)
    canvas, _, _ = recorded.calls[-1]
    kept = (canvas == shown).float().mean(1)
    started = kept > 0.5
    assert 0.3 < started[usable].float().mean() < 0.7 and not started[~usable].any()
    assert 0.8 < kept[started].mean() < 0.95
    assert kept[~started].mean() < 0.05
    losses(recorded, many, full_noise=1.0, autoregressive=False, drafts=EditCanvases(shown, clean, usable), draft_share=0.0)
    assert (recorded.calls[-1][0] == shown).float().mean() < 0.05


def test_a_drafted_row_has_to_become_its_correction(recorded: Recorded, batch: TextBatch) -> None:
    """The loss of rows that start from drafts is that of a batch whose clean canvases are the corrections."""
    usable = torch.ones(len(batch.canvas), dtype=torch.bool)
    shown, corrected = torch.full_like(batch.canvas, 9), torch.full_like(batch.canvas, 7)
    drafted = losses(recorded, batch, autoregressive=False, drafts=EditCanvases(shown, corrected, usable), draft_share=1.0)
    plain = losses(recorded, batch, autoregressive=False, drafts=EditCanvases(shown, batch.canvas, usable), draft_share=1.0)
    assert drafted.diffusion.item() != pytest.approx(plain.diffusion.item(), abs=1e-6)
    assert recorded.calls[0][0].equal(recorded.calls[-1][0])  # what is shown is the same


def test_rows_longer_than_the_canvas_are_cut() -> None:
    assert write_canvas([[5, 6, 7], [8], []], 2, eos=1).tolist() == [[5, 6], [8, 1], [1, 1]]


# -- self-conditioning ---------------------------------------------------------------------------------------


def test_without_self_conditioning_there_is_one_pass(recorded: Recorded, batch: TextBatch) -> None:
    for seed in range(4):
        losses(recorded, batch, self_conditioning=0.0, seed=seed)
        assert [signal for _, signal, _ in recorded.calls] == [None]


def test_self_conditioning_hands_on_the_first_passs_logits(recorded: Recorded, batch: TextBatch) -> None:
    for seed in range(4):
        losses(recorded, batch, self_conditioning=1.0, seed=seed)
        (canvas, first, hidden), (again, second, last) = recorded.calls
        assert first is None
        assert second is not None
        assert canvas.equal(again)
        assert not hidden.requires_grad
        assert last.requires_grad
        ratio = second / recorded.logits(hidden)  # 1 over the temperature, as in denoising
        torch.testing.assert_close(ratio, ratio.flatten()[0].expand_as(ratio), rtol=1e-4, atol=0.0)
        assert 1 / 0.81 < float(ratio.flatten()[0]) < 1 / 0.099


def test_self_conditioning_happens_as_often_as_asked(recorded: Recorded, prompts: PromptBuilder) -> None:
    one = text_batch(prompts, [0], [prompts.target("a")], ["en"], 0)
    passes = []
    for seed in range(16):
        losses(recorded, one, self_conditioning=0.25, seed=seed, autoregressive=False)
        passes.append(len(recorded.calls))
    assert set(passes) == {1, 2}
    assert passes.count(2) < 8


def test_unrolled_rows_go_on_with_the_canvas_that_the_first_pass_makes(recorded: Recorded, batch: TextBatch) -> None:
    many = TextBatch(**{f.name: getattr(batch, f.name)[[0] * 40] for f in fields(batch)})
    for share, low, high in ((0.0, 0, 0), (0.5, 10, 30), (1.0, 40, 40)):
        losses(recorded, many, self_conditioning=1.0, autoregressive=False, unroll=share)
        (canvas, first, _), (again, second, last) = recorded.calls
        assert first is None and second is not None and last.requires_grad
        assert low <= int((canvas != again).any(1).sum()) <= high
    losses(recorded, many, self_conditioning=0.0, autoregressive=False, unroll=1.0)
    assert len(recorded.calls) == 1


def test_one_step_keeps_what_is_sure_and_draws_the_rest_anew() -> None:
    logits = torch.zeros(1, 200, 500)
    logits[:, :50, 7] = 60.0  # fifty sure positions among even ones
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        temperature = draw_temperature(generator)
        assert 0.099 < temperature < 0.81
        canvas = one_step(logits / temperature, generator)[0]
        assert (canvas[:50] == 7).all()
        assert len(canvas[50:].unique()) > 80
    generator = torch.Generator().manual_seed(4)
    again = one_step(logits / draw_temperature(generator), generator)[0]
    assert torch.equal(again, canvas)


# -- the losses ----------------------------------------------------------------------------------------------


def test_losses_are_the_cross_entropies_of_their_positions(recorded: Recorded, batch: TextBatch) -> None:
    found = losses(recorded, batch, self_conditioning=1.0)
    logits = recorded.logits(recorded.calls[-1][2])  # (B, C, V)
    torch.testing.assert_close(found.diffusion, F.cross_entropy(logits.flatten(0, 1), batch.canvas.flatten()))
    assert found.canvas_accuracy == (logits.argmax(-1) == batch.canvas).float().mean()
    predicted, tokens = [], []
    for row in range(3):  # each alone, without padding: the last token predicts nothing
        alone = rows_of(batch, row)
        _, hidden = recorded.prefill(recorded.embed(alone.ids), alone.mask)
        n = int(alone.lengths)
        predicted.append(recorded.logits(hidden[0, n - 1 : -1]))
        tokens.append(alone.ids[0, n:])
    expected, spelled = torch.cat(predicted), torch.cat(tokens)
    torch.testing.assert_close(found.autoregressive, F.cross_entropy(expected, spelled))
    assert found.next_token_accuracy == (expected.argmax(-1) == spelled).float().mean()


def test_the_canvas_sees_the_prompt_but_not_the_transcript(recorded: Recorded, batch: TextBatch) -> None:
    found = losses(recorded, batch)
    changed = torch.where(batch.target_mask, (batch.ids + 1) % tiny.VOCAB_SIZE, batch.ids)
    other = losses(recorded, replace(batch, ids=changed))
    torch.testing.assert_close(other.diffusion, found.diffusion, atol=1e-6, rtol=0)
    assert (other.autoregressive - found.autoregressive).abs() > 1e-3
    prompt = torch.where(batch.slot_mask, batch.ids - 1, batch.ids)
    assert (losses(recorded, replace(batch, ids=prompt)).diffusion - found.diffusion).abs() > 1e-3


def test_autoregressive_can_be_left_out(recorded: Recorded, batch: TextBatch) -> None:
    both, one = losses(recorded, batch), losses(recorded, batch, autoregressive=False)
    assert one.autoregressive == one.next_token_accuracy == 0
    assert both.autoregressive > 0
    assert one.diffusion == both.diffusion


def test_the_generator_decides(recorded: Recorded, batch: TextBatch) -> None:
    first = losses(recorded, batch, self_conditioning=0.5, full_noise=0.5)
    torch.rand(3)  # the global state does not matter
    assert losses(recorded, batch, self_conditioning=0.5, full_noise=0.5).diffusion == first.diffusion
    assert losses(recorded, batch, self_conditioning=0.5, full_noise=0.5, seed=1).diffusion != first.diffusion
