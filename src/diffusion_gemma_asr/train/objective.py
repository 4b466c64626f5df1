"""What is minimised: prompt and transcript in one causal row, the transcript once more on a noisy canvas, and CTC."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..denoise.canvas import EditCanvases, edit_canvases, q_xt, sample_t, write_canvas
from ..denoise.steps import accept, renoise, sample
from ..model.backbone import Backbone, Prefill
from ..model.ctc import ctc_loss
from ..model.drafter import Encoded
from ..model.model import DiffusionGemmaASR
from ..model.prompt import AUTO, PromptBuilder, fill_slots, pad_prompts
from .losses import autoregressive_loss, diffusion_loss
from .recipe import LossRecipe


@dataclass(frozen=True)
class TextBatch:
    """Prompts followed by their transcripts, and the clean canvases.

    Attributes:
        ids: (B, P) long, tokens.
        mask: (B, P) bool, real ones.
        slot_mask: (B, P) bool, placeholders of audio tokens.
        target_mask: (B, P) bool, the transcript with its end of turn; where the prompt names no language, behind its marker.
        lengths: (B,) long, tokens of the prompt alone.
        canvas: (B, C) long, transcript, end of turn, then end of sequence.
        counts: (B,) long, tokens of the transcript on the canvas, without the end of turn.
    """

    ids: Tensor
    mask: Tensor
    slot_mask: Tensor
    target_mask: Tensor
    lengths: Tensor
    canvas: Tensor
    counts: Tensor

    def transcripts(self) -> list[list[int]]:
        """The tokens of each transcript."""
        return [row[:n] for row, n in zip(self.canvas.tolist(), self.counts.tolist(), strict=True)]

    def to(self, device: torch.device) -> TextBatch:
        """The same batch on another device."""
        return TextBatch(**{name: value.to(device) for name, value in self.__dict__.items()})


@dataclass(frozen=True)
class SpeechBatch:
    """Training examples.

    Attributes:
        frames: (B, F, D) of the frozen encoder.
        frame_lengths: (B,) long.
        text: the same rows.
    """

    frames: Tensor
    frame_lengths: Tensor
    text: TextBatch

    def to(self, device: torch.device) -> SpeechBatch:
        """The same batch on another device."""
        return SpeechBatch(self.frames.to(device), self.frame_lengths.to(device), self.text.to(device))


def text_batch(
    prompts: PromptBuilder,
    slots: Sequence[int],
    targets: Sequence[Sequence[int]],
    languages: Sequence[str],
    margin: int,
    unnamed: Sequence[bool] | None = None,
    contexts: Sequence[str] | None = None,
) -> TextBatch:
    """Joins prompts and targets.

    Args:
        prompts: of the tokenizer.
        slots: audio tokens of each row.
        targets: transcript and end of turn of each row, as `PromptBuilder.target` gives them.
        languages: spoken in each row.
        margin: canvas positions beyond the longest target.
        unnamed: rows whose prompt does not name the language; behind it the causal row has the language's marker before the
            transcript, the canvas does not. None: no row.
        contexts: what each prompt says behind the instruction. None: nothing.
    """
    unnamed, contexts = unnamed or [False] * len(targets), contexts or [""] * len(targets)
    rows, causal = [], []
    for n, target, language, hidden, context in zip(slots, targets, languages, unnamed, contexts, strict=True):
        rows.append(prompts.row(n, AUTO if hidden else language, context))
        causal.append([*rows[-1], *(prompts.marker(language) if hidden else ()), *target])
    joined = pad_prompts(causal, prompts.special)
    lengths = torch.tensor([len(row) for row in rows])
    return TextBatch(
        ids=joined.ids,
        mask=joined.mask,
        slot_mask=joined.slot_mask,
        target_mask=joined.mask & (torch.arange(joined.ids.shape[1]) >= lengths[:, None]),
        lengths=lengths,
        canvas=write_canvas(targets, max(map(len, targets)) + margin, prompts.special["eos"]),
        counts=torch.tensor([len(target) - 1 for target in targets]),
    )


@dataclass(frozen=True)
class Losses:
    """Scalars, None where a loss was not computed.

    Attributes:
        diffusion: cross-entropy a position of the canvas, in nats.
        autoregressive: cross-entropy a token of the transcript, in nats.
        ctc: negative log-likelihood a token, in nats.
        canvas_accuracy, next_token_accuracy: share of the tokens that the first two get right.
    """

    diffusion: Tensor | None = None
    autoregressive: Tensor | None = None
    ctc: Tensor | None = None
    canvas_accuracy: Tensor | None = None
    next_token_accuracy: Tensor | None = None

    def total(self, weights: LossRecipe) -> Tensor:
        """The weighted sum of the three."""
        parts = ((weights.diffusion, self.diffusion), (weights.autoregressive, self.autoregressive), (weights.ctc, self.ctc))
        return torch.stack([weight * loss for weight, loss in parts if loss is not None]).sum()

    def figures(self) -> dict[str, float]:
        """All that was computed, for a log."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: float(value.detach()) for name, value in values.items() if value is not None}


def losses(model: DiffusionGemmaASR, batch: SpeechBatch, options: LossRecipe) -> Losses:
    """The losses of a batch that have a weight.

    Args:
        model: whose projector, and whatever else is trainable, gets gradients. CTC alone does not run the backbone's layers.
        batch: on the model's device.
        options: which losses, and how canvases are made.
    """
    slots, slot_lengths = model.projector(batch.frames, batch.frame_lengths)
    text, ctc = batch.text, None
    if options.ctc > 0:
        head = model.head
        with torch.autocast(slots.device.type, enabled=False):  # logits in the head's own precision
            hidden = slots.to(head.weight.dtype)
            ctc = ctc_loss(head, hidden, text.canvas, slot_lengths, text.counts, model.blank)
    if not options.uses_backbone:
        return Losses(ctc=ctc)
    drafts = None
    if options.draft_share > 0:
        drafts = draft_edits(model, Encoded(batch.frames, batch.frame_lengths, slots.detach(), slot_lengths), text)
    embeds = fill_slots(model.backbone.embed(text.ids), text.slot_mask, slots, slot_lengths)
    of_backbone = backbone_losses(model.backbone, embeds, text, options, drafts)
    return Losses(**of_backbone.__dict__ | {"ctc": ctc})


@torch.no_grad()
def draft_edits(model: DiffusionGemmaASR, encoded: Encoded, text: TextBatch) -> EditCanvases:
    """Canvases that hold the greedy drafts, and what they have to become, on the model's device."""
    special = model.prompts.special
    drafts = [[token.id for token in draft] for draft in model.greedy.drafts(encoded)]
    ending = special["end_of_turn"], special["eos"]
    canvases = edit_canvases(drafts, text.transcripts(), ending, model.blank, text.canvas.shape[1])
    return EditCanvases(*(part.to(model.device) for part in canvases))


def backbone_losses(
    backbone: Backbone,
    embeds: Tensor,
    batch: TextBatch,
    options: LossRecipe,
    drafts: EditCanvases | None = None,
    generator: torch.Generator | None = None,
) -> Losses:
    """Diffusion and autoregressive loss of a batch.

    The encoder reads prompt and transcript in one causal pass; the canvas sees the prompt's part of the cache alone and
    takes the positions that follow it.

    Args:
        backbone: its layers are run.
        embeds: (B, P, H), audio slots filled.
        batch: the same rows.
        options: which losses have a weight, and how canvases are made.
        drafts: of the same rows, C' >= C positions; a share of the usable ones stands on the canvas at first.
        generator: on the device of `embeds`; None is torch's default.
    """
    prefill, hidden = backbone.prefill(embeds, batch.mask, batch.lengths)
    ar = ar_accuracy = diffusion = accuracy = None
    if options.autoregressive > 0:
        ar, ar_accuracy = autoregressive_loss(backbone.head, hidden, batch.ids, batch.target_mask)
    if options.diffusion > 0:
        noisy, clean = noisy_canvases(batch.canvas, backbone.vocab_size, options, drafts, generator)
        noisy, signal = first_pass(backbone, noisy, prefill, options, generator)
        hidden = backbone.denoise_hidden(noisy, prefill, signal)
        everywhere = torch.ones_like(noisy, dtype=torch.bool)
        diffusion, accuracy = diffusion_loss(backbone.head, hidden, clean, everywhere)
    return Losses(diffusion, ar, None, accuracy, ar_accuracy)


def noisy_canvases(
    clean: Tensor,
    vocab_size: int,
    options: LossRecipe,
    drafts: EditCanvases | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """What canvases hold at first, and what they have to become.

    A row is the transcript at a noise level t ~ U(eps, 1), with probability `full_noise` pure noise; with probability
    `draft_share`, where its draft is usable, the draft, corrupted at a quarter of the level.

    Args:
        clean: (B, C) long, transcripts.
        vocab_size: of the noise.
        options: the probabilities.
        drafts: (B, C'), C' >= C; None: no row starts from one.
        generator: on the device of `clean`.

    Returns:
        noisy and clean canvases, (B, C) or (B, C') each.
    """
    t = sample_t(len(clean), generator, device=clean.device)
    pure = torch.rand(t.shape, generator=generator, device=t.device) < options.full_noise
    if drafts is None:
        return q_xt(clean, torch.where(pure, 1.0, t), vocab_size, generator), clean
    shown, corrected, usable = drafts
    filling = corrected[:, -1:].expand(-1, corrected.shape[1] - clean.shape[1])
    clean = torch.cat([clean, filling], dim=1)  # (B, C')
    noisy = q_xt(clean, torch.where(pure, 1.0, t), vocab_size, generator)
    drafted = (torch.rand(t.shape, generator=generator, device=t.device) < options.draft_share) & usable
    noisy = torch.where(drafted[:, None], q_xt(shown, t / 4, vocab_size, generator), noisy)
    return noisy, torch.where(drafted[:, None], corrected, clean)


@torch.no_grad()
def first_pass(
    backbone: Backbone, noisy: Tensor, prefill: Prefill, options: LossRecipe, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor | None]:
    """With probability `self_conditioning` a pass without gradient, whose logits the second one sees.

    With probability `unroll` a row then goes on with the canvas that a denoising step makes of these logits, its own
    mistakes included, as inference does (Savinov et al. 2021, arXiv 2112.06749).

    Args:
        backbone, prefill: as for `Backbone.denoise_logits`.
        noisy: (B, C) long.
        options: the probabilities.
        generator: on the device of `noisy`.

    Returns:
        canvases (B, C) for the second pass; the first one's logits (B, C, V), divided by a temperature as in denoising, or
        None without a first pass.
    """
    if float(torch.rand((), generator=generator, device=noisy.device)) >= options.self_conditioning:
        return noisy, None
    signal = backbone.denoise_logits(noisy, prefill) / draw_temperature(generator, noisy.device)
    if options.unroll > 0:
        stepped = one_step(signal, generator)
        unrolled = torch.rand(len(noisy), generator=generator, device=noisy.device) < options.unroll
        noisy = torch.where(unrolled[:, None], stepped, noisy)
    return noisy, signal


def draw_temperature(generator: torch.Generator | None, device: torch.device | str = "cpu") -> float:
    """A denoising step's temperature: 0.1 to 0.8, the range that decoding uses, on a logarithmic scale."""
    return 0.1 * 8 ** float(torch.rand((), generator=generator, device=device))


@torch.no_grad()
def one_step(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The canvas (B, C) that a denoising step makes of its logits (B, C, V), temperature-scaled: drawn, accepted or drawn
    anew.

    The entropy bound is drawn for the batch: 0.1 to 10 nats, the range that decoding uses, on a logarithmic scale.
    """
    bound = 0.1 * 100 ** float(torch.rand((), generator=generator, device=logits.device))
    drawn, entropy = sample(logits, generator)
    return renoise(drawn, accept(entropy, bound), logits.shape[-1], generator)
