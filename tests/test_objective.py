"""What the backbone is trained on: the canvas' content, its noise, and which part of a row each loss sees."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
import tiny
import torch
from tiny_model import speech_batch, tiny_model
from torch import Tensor
from torch.nn import functional as F

from diffusion_gemma_asr.checkpoint.parts import load_backbone, load_tokenizer
from diffusion_gemma_asr.denoise.canvas import EditCanvases
from diffusion_gemma_asr.model.backbone import Backbone
from diffusion_gemma_asr.model.config import BackboneConfig
from diffusion_gemma_asr.model.model import DiffusionGemmaASR
from diffusion_gemma_asr.model.prefill import Prefill
from diffusion_gemma_asr.model.prompt import AUTO, PromptBuilder
from diffusion_gemma_asr.train.objective import (
    Losses,
    TextBatch,
    backbone_losses,
    draft_edits,
    draw_temperature,
    losses,
    one_step,
    text_batch,
)
from diffusion_gemma_asr.train.recipe import LossRecipe

TEXTS = ["the quick brown fox", "she sells", ""]
SLOTS = [6, 0, 3]
MARGIN = 4


class Recorded(Backbone):
    """A backbone that keeps what every pass over the canvas was given and what it returned."""

    calls: list[tuple[Tensor, Tensor | None, Tensor]]

    def denoise_hidden(
        self, canvas: Tensor, prefill: Prefill, self_conditioning: Tensor | None = None, *heard: Tensor | None
    ) -> Tensor:
        hidden = super().denoise_hidden(canvas, prefill, self_conditioning, *heard)
        self.calls.append((canvas, self_conditioning, hidden))
        return hidden


@pytest.fixture(scope="module")
def recorded(backbone_folder: Path) -> Recorded:
    return Recorded(load_backbone(BackboneConfig(str(backbone_folder))).model).requires_grad_(True)


@pytest.fixture(scope="module")
def prompts(backbone_folder: Path) -> PromptBuilder:
    return PromptBuilder(load_tokenizer(BackboneConfig(str(backbone_folder))))


@pytest.fixture
def batch(prompts: PromptBuilder) -> TextBatch:
    return text_batch(prompts, SLOTS, [prompts.target(text) for text in TEXTS], ["en", "de", "zh"], MARGIN)


def of_backbone(
    backbone: Recorded, batch: TextBatch, *, seed: int = 0, drafts: EditCanvases | None = None, **options: float
) -> Losses:
    """Diffusion and autoregressive loss, by default without self-conditioning."""
    backbone.calls = []
    generator = torch.Generator().manual_seed(seed)
    recipe = LossRecipe(**{"self_conditioning": 0.0, "ctc": 0.0} | options)
    return backbone_losses(backbone, backbone.embed(batch.ids), batch, recipe, drafts, generator)


def rows_of(batch: TextBatch, row: int) -> TextBatch:
    """One row without its padding; the canvas keeps its length."""
    n = int(batch.mask[row].sum())
    cut = {f.name: getattr(batch, f.name)[row : row + 1] for f in fields(batch)}
    return TextBatch(**{k: v if k in ("lengths", "canvas", "counts") else v[:, :n] for k, v in cut.items()})


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


def test_where_the_language_is_not_named_its_marker_stands_in_the_causal_row_alone(prompts: PromptBuilder) -> None:
    targets, languages = [prompts.target(text) for text in TEXTS], ["en", "de", "zh"]
    named = text_batch(prompts, SLOTS, targets, languages, MARGIN)
    hidden = text_batch(prompts, SLOTS, targets, languages, MARGIN, unnamed=[False, True, True])
    assert hidden.canvas.equal(named.canvas) and hidden.counts.equal(named.counts)
    for row, (target, language) in enumerate(zip(targets, languages, strict=True)):
        marker = prompts.marker(language) if row else []
        asked = prompts.row(SLOTS[row], AUTO if row else language)
        total = int(hidden.mask[row].sum())
        assert hidden.ids[row, :total].tolist() == [*asked, *marker, *target]
        assert hidden.lengths[row] == len(asked)
        assert hidden.target_mask[row].sum() == len(marker) + len(target)
    assert hidden.transcripts() == [target[:-1] for target in targets]


def test_to_moves_every_tensor(batch: TextBatch) -> None:
    moved = batch.to(torch.device("meta"))
    assert {getattr(moved, f.name).device.type for f in fields(moved)} == {"meta"}


# -- noise ---------------------------------------------------------------------------------------------------


def test_full_noise_tells_nothing_of_the_transcript(recorded: Recorded, batch: TextBatch) -> None:
    long = replace(batch, canvas=F.pad(batch.canvas, (0, 60), value=1))
    other = replace(long, canvas=torch.full_like(long.canvas, 7))
    of_backbone(recorded, long, full_noise=1.0)
    noisy = recorded.calls[0][0]
    of_backbone(recorded, other, full_noise=1.0)
    assert recorded.calls[0][0].equal(noisy)
    assert len(noisy.unique()) > 100
    of_backbone(recorded, other, full_noise=1.0, seed=1)
    assert not recorded.calls[0][0].equal(noisy)


def test_noise_levels_differ_by_row(recorded: Recorded, batch: TextBatch) -> None:
    """Without full noise t ~ U(eps, 1): over many rows half of the positions stay, in some nearly all."""
    many = TextBatch(**{f.name: getattr(batch, f.name)[[1] * 40] for f in fields(batch)})
    of_backbone(recorded, many, autoregressive=0.0)
    kept = (recorded.calls[0][0] == many.canvas).float().mean(1)
    assert 0.3 < kept.mean() < 0.7
    assert kept.min() < 0.2
    assert kept.max() > 0.8


def test_a_known_start_is_right_up_to_some_place_in_the_transcript(recorded: Recorded, batch: TextBatch) -> None:
    many = TextBatch(**{f.name: getattr(batch, f.name)[[1] * 40] for f in fields(batch)})
    of_backbone(recorded, many, autoregressive=0.0, known_start=1.0)
    right = recorded.calls[0][0] == many.canvas
    known = right.cumprod(1).sum(1)  # positions before the first that is wrong
    length = int((many.canvas[0] != many.canvas[0, -1]).sum())
    assert len(known.unique()) > 3 and known.max() <= length + 2  # noise may be right by chance
    behind = torch.arange(right.shape[1]) > known[:, None]
    assert right[behind].float().mean() < 0.05
    of_backbone(recorded, many, autoregressive=0.0, known_start=0.5, full_noise=1.0)
    started = (recorded.calls[0][0] == many.canvas)[:, 0]
    assert 0.2 < started.float().mean() < 0.7


def test_a_share_of_the_rows_starts_from_drafts(recorded: Recorded, batch: TextBatch) -> None:
    """A drafted row is corrupted at t / 4: most of its draft stays, whatever full noise says of the others."""
    many = TextBatch(**{f.name: getattr(batch, f.name)[[1] * 60] for f in fields(batch)})
    shown = F.pad(torch.full_like(many.canvas, 9), (0, 20), value=1)
    clean = F.pad(many.canvas, (0, 20), value=1)
    usable = torch.arange(60) % 3 != 0
    of_backbone(
        recorded, many, full_noise=1.0, autoregressive=0.0, drafts=EditCanvases(shown, clean, usable), draft_share=0.5
    )
    canvas, _, _ = recorded.calls[-1]
    kept = (canvas == shown).float().mean(1)
    started = kept > 0.5
    assert 0.3 < started[usable].float().mean() < 0.7 and not started[~usable].any()
    assert 0.8 < kept[started].mean() < 0.95
    assert kept[~started].mean() < 0.05
    of_backbone(
        recorded, many, full_noise=1.0, autoregressive=0.0, drafts=EditCanvases(shown, clean, usable), draft_share=0.0
    )
    assert (recorded.calls[-1][0] == shown).float().mean() < 0.05


def test_a_drafted_row_has_to_become_its_correction(recorded: Recorded, batch: TextBatch) -> None:
    """The loss of rows that start from drafts is that of a batch whose clean canvases are the corrections."""
    usable = torch.ones(len(batch.canvas), dtype=torch.bool)
    shown, corrected = torch.full_like(batch.canvas, 9), torch.full_like(batch.canvas, 7)
    to_sevens = EditCanvases(shown, corrected, usable)
    as_it_is = EditCanvases(shown, batch.canvas, usable)
    drafted = of_backbone(recorded, batch, autoregressive=0.0, drafts=to_sevens, draft_share=1.0)
    first = recorded.calls[0][0]
    plain = of_backbone(recorded, batch, autoregressive=0.0, drafts=as_it_is, draft_share=1.0)
    assert recorded.calls[0][0].equal(first)  # what is shown is the same
    assert drafted.diffusion.item() != pytest.approx(plain.diffusion.item(), abs=1e-6)


# -- self-conditioning ---------------------------------------------------------------------------------------


def test_without_self_conditioning_there_is_one_pass(recorded: Recorded, batch: TextBatch) -> None:
    for seed in range(4):
        of_backbone(recorded, batch, self_conditioning=0.0, seed=seed)
        assert [signal for _, signal, _ in recorded.calls] == [None]


def test_self_conditioning_hands_on_the_first_passs_logits(recorded: Recorded, batch: TextBatch) -> None:
    for seed in range(4):
        of_backbone(recorded, batch, self_conditioning=1.0, seed=seed)
        (canvas, first, hidden), (again, second, last) = recorded.calls
        assert first is None
        assert second is not None
        assert canvas.equal(again)
        assert not hidden.requires_grad
        assert last.requires_grad
        ratio = (second / recorded.logits(hidden)).detach()  # 1 over the temperature, as in denoising
        torch.testing.assert_close(ratio, ratio.flatten()[0].expand_as(ratio), rtol=1e-4, atol=0.0)
        assert 1 / 0.81 < float(ratio.flatten()[0]) < 1 / 0.099


def test_self_conditioning_happens_as_often_as_asked(recorded: Recorded, prompts: PromptBuilder) -> None:
    one = text_batch(prompts, [0], [prompts.target("a")], ["en"], 0)
    passes = []
    for seed in range(16):
        of_backbone(recorded, one, self_conditioning=0.25, seed=seed, autoregressive=0.0)
        passes.append(len(recorded.calls))
    assert set(passes) == {1, 2}
    assert passes.count(2) < 8


def test_unrolled_rows_go_on_with_the_canvas_that_the_first_pass_makes(recorded: Recorded, batch: TextBatch) -> None:
    many = TextBatch(**{f.name: getattr(batch, f.name)[[0] * 40] for f in fields(batch)})
    for share, low, high in ((0.0, 0, 0), (0.5, 10, 30), (1.0, 40, 40)):
        of_backbone(recorded, many, self_conditioning=1.0, autoregressive=0.0, unroll=share)
        (canvas, first, _), (again, second, last) = recorded.calls
        assert first is None and second is not None and last.requires_grad
        assert low <= int((canvas != again).any(1).sum()) <= high
    of_backbone(recorded, many, self_conditioning=0.0, autoregressive=0.0, unroll=1.0)
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
    found = of_backbone(recorded, batch, self_conditioning=1.0)
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
    found = of_backbone(recorded, batch)
    changed = torch.where(batch.target_mask, (batch.ids + 1) % tiny.VOCAB_SIZE, batch.ids)
    other = of_backbone(recorded, replace(batch, ids=changed))
    torch.testing.assert_close(other.diffusion, found.diffusion, atol=1e-6, rtol=0)
    assert (other.autoregressive - found.autoregressive).abs() > 1e-3
    prompt = torch.where(batch.slot_mask, batch.ids - 1, batch.ids)
    assert (of_backbone(recorded, replace(batch, ids=prompt)).diffusion - found.diffusion).abs() > 1e-3


def test_a_loss_without_weight_is_not_computed(recorded: Recorded, batch: TextBatch) -> None:
    both, diffusion = of_backbone(recorded, batch), of_backbone(recorded, batch, autoregressive=0.0)
    assert diffusion.autoregressive is None and diffusion.next_token_accuracy is None
    assert both.autoregressive is not None and both.autoregressive > 0 and diffusion.diffusion == both.diffusion
    assert both.figures().keys() - diffusion.figures().keys() == {"autoregressive", "next_token_accuracy"}
    causal = of_backbone(recorded, batch, diffusion=0.0)
    assert causal.diffusion is None and causal.autoregressive == both.autoregressive and recorded.calls == []


def test_the_total_is_the_weighted_sum() -> None:
    two, three, five, half = (torch.tensor(value) for value in (2.0, 3.0, 5.0, 0.5))
    parts = Losses(two, three, five, canvas_accuracy=half)
    assert parts.total(LossRecipe(diffusion=1.0, autoregressive=0.5, ctc=2.0)) == 2.0 + 1.5 + 10.0
    figures = {"diffusion": 2.0, "autoregressive": 3.0, "ctc": 5.0, "canvas_accuracy": 0.5}
    assert parts.figures() == figures


def test_the_generator_decides(recorded: Recorded, batch: TextBatch) -> None:
    first = of_backbone(recorded, batch, self_conditioning=0.5, full_noise=0.5)
    torch.rand(3)  # the global state does not matter
    assert of_backbone(recorded, batch, self_conditioning=0.5, full_noise=0.5).diffusion == first.diffusion
    assert of_backbone(recorded, batch, self_conditioning=0.5, full_noise=0.5, seed=1).diffusion != first.diffusion


# -- sound -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(whisper_folder: Path, backbone_folder: Path) -> DiffusionGemmaASR:
    return tiny_model(whisper_folder, backbone_folder).requires_grad_(False)


def test_the_three_losses_of_speech(model: DiffusionGemmaASR) -> None:
    batch = speech_batch(model, ["the quick fox", "she sells"], [150, 90])
    options = LossRecipe(self_conditioning=0.0)
    torch.manual_seed(3)
    parts = losses(model, batch, options)
    figures = parts.figures()
    assert figures.keys() == {"diffusion", "autoregressive", "ctc", "canvas_accuracy", "next_token_accuracy"}
    slots, slot_lengths = model.projector(batch.frames, batch.frame_lengths)
    logits = model.head.logits(slots).log_softmax(-1)  # (B, S, V)
    wanted = F.ctc_loss(logits.transpose(0, 1), batch.text.canvas, slot_lengths, batch.text.counts, blank=model.blank)
    assert figures["ctc"] == pytest.approx(wanted.item(), rel=1e-4)
    assert parts.total(options).item() == pytest.approx(sum(figures[n] for n in ("diffusion", "autoregressive", "ctc")))


def test_ctc_alone_does_not_run_the_backbone(whisper_folder: Path, backbone_folder: Path) -> None:
    model = tiny_model(whisper_folder, backbone_folder)
    batch = speech_batch(model, ["the quick fox", "she sells"], [150, 90])
    model.backbone.model.model = torch.nn.Module()  # its layers; the head is beside them
    options = LossRecipe(diffusion=0.0, autoregressive=0.0)
    parts = losses(model, batch, options)
    parts.total(options).backward()
    assert parts.figures().keys() == {"ctc"} and model.projector.conv1.weight.grad is not None
    with pytest.raises(AttributeError):
        losses(model, batch, LossRecipe(diffusion=0.0))


def test_drafts_that_are_to_be_corrected_are_the_greedy_ones(model: DiffusionGemmaASR) -> None:
    batch = speech_batch(model, ["the quick fox", "she sells"], [150, 90])
    encoded = model.project(batch.frames, batch.frame_lengths)
    shown, corrected, usable = draft_edits(model, encoded.slots, encoded.slot_lengths, batch.text)
    end = model.prompts.special["end_of_turn"]
    for row, (draft, target) in enumerate(zip(model.greedy.drafts(encoded), batch.text.transcripts(), strict=True)):
        if not usable[row]:
            continue
        layout, clean = (part[row].tolist()[: part[row].tolist().index(end)] for part in (shown, corrected))
        assert [token for token in layout if token != model.blank] == [token.id for token in draft]
        assert [token for token in clean if token != model.blank] == target
    assert usable.any()
