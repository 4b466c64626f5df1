"""The training objective: a weighted sum of diffusion, autoregressive and CTC loss.

The backbone's encoder reads prompt and transcript in one causal pass (autoregressive loss); its decoder denoises the
transcript on a corrupted canvas (diffusion loss); the head reads the audio tokens directly (CTC loss).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
from torch import Tensor

from ..denoise.canvas import EditCanvases, aligned_layout, edit_canvases, write_canvas
from ..denoise.clip import kept_spans
from ..model.backbone import Backbone
from ..model.ctc import ctc_loss, only
from ..model.drafts import Heard
from ..model.lengths import length_mask
from ..model.model import DiffusionGemmaASR
from ..model.prefill import Prefill
from ..model.prompt import AUTO, PromptBuilder, fill_slots, pad_prompts
from .corruption import draw_temperature, noisy_canvases, one_step
from .expected import Under, batch_expectation, conditions
from .losses import autoregressive_loss, diffusion_loss
from .recipe import LossRecipe
from .shard import skip_pass

ALIGNED_MARGIN = 12  # aligned canvases are up to this many positions longer than the longest row


@dataclass(frozen=True)
class TextBatch:
    """Prompts followed by their transcripts, and the clean canvases.

    Attributes:
        ids: (B, P) long, tokens of prompt and transcript.
        mask: (B, P) bool, False for padding.
        slot_mask: (B, P) bool, True for placeholders of audio tokens.
        target_mask: (B, P) bool, True for the tokens behind the prompt: the language's marker if the prompt names no
            language, then transcript and end of turn.
        lengths: (B,) long, tokens of the prompt.
        canvas: (B, C) long, transcript, end of turn, then end of sequence up to C.
        counts: (B,) long, tokens of the transcript, without the end of turn.
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

    def with_slots(self, counts: Tensor) -> TextBatch:
        """The same rows with fewer placeholders: `counts` (B,), at most as many as each row has."""
        surplus = self.slot_mask & (self.slot_mask.cumsum(1) > counts[:, None])  # (B, P)
        kept = self.mask & ~surplus
        lengths = kept.sum(1)
        order = torch.argsort((~kept).long(), dim=1, stable=True)[:, : int(lengths.max())]  # (B, P')
        mask = length_mask(lengths, order.shape[1])
        return replace(
            self,
            ids=self.ids.gather(1, order),
            mask=mask,
            slot_mask=self.slot_mask.gather(1, order) & mask,
            target_mask=self.target_mask.gather(1, order) & mask,
            lengths=self.lengths - surplus.sum(1),
        )

    def without_transcripts(self) -> TextBatch:
        """The same rows cut behind the longest prompt, which is all that canvases see of them."""
        size = int(self.lengths.max())
        names = ("ids", "mask", "slot_mask", "target_mask")
        return replace(self, **{name: getattr(self, name)[:, :size] for name in names})

    def to(self, device: torch.device) -> TextBatch:
        """A copy of the batch on another device."""
        return TextBatch(**{name: value.to(device) for name, value in self.__dict__.items()})


@dataclass(frozen=True)
class SpeechBatch:
    """A batch of training examples.

    Attributes:
        frames: (B, F, D) of the frozen encoder, 20 ms each.
        frame_lengths: (B,) long, frames without padding.
        text: prompts and transcripts of the same rows.
    """

    frames: Tensor
    frame_lengths: Tensor
    text: TextBatch

    def to(self, device: torch.device) -> SpeechBatch:
        """A copy of the batch on another device."""
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
    """Builds prompts, causal rows and clean canvases.

    Args:
        prompts: of the tokenizer.
        slots: number of audio tokens of each row.
        targets: transcript and end of turn of each row, see `PromptBuilder.target`.
        languages: code of each row.
        margin: canvas positions beyond the longest target.
        unnamed: True for rows whose prompt does not name the language; in these the causal row has the language's marker
            between prompt and transcript, the canvas does not. None is False for all.
        contexts: text behind the instruction in each prompt, see `PromptBuilder.row`; None is no context.
    """
    unnamed, contexts = unnamed or [False] * len(targets), contexts or [""] * len(targets)
    lengths, causal = [], []
    for n, target, language, hidden, context in zip(slots, targets, languages, unnamed, contexts, strict=True):
        prompt = prompts.row(n, AUTO if hidden else language, context)
        lengths.append(len(prompt))
        causal.append([*prompt, *(prompts.marker(language) if hidden else ()), *target])
    padded = pad_prompts(causal, prompts.special)
    prompt_lengths = torch.tensor(lengths)  # (B,)
    return TextBatch(
        ids=padded.ids,
        mask=padded.mask,
        slot_mask=padded.slot_mask,
        target_mask=padded.mask & (torch.arange(padded.ids.shape[1]) >= prompt_lengths[:, None]),
        lengths=prompt_lengths,
        canvas=write_canvas(targets, max(map(len, targets)) + margin, prompts.special["eos"]),
        counts=torch.tensor([len(target) - 1 for target in targets]),
    )


@dataclass(frozen=True)
class Losses:
    """Scalar losses and accuracies; None for those that were not computed.

    Attributes:
        diffusion: mean cross-entropy of a canvas position, in nats.
        autoregressive: mean cross-entropy of a token behind the prompt, in nats.
        ctc: mean negative log-likelihood of a token, in nats.
        canvas_accuracy: share of canvas positions with the target as arg-max.
        next_token_accuracy: share of tokens behind the prompt with the target as arg-max.
    """

    diffusion: Tensor | None = None
    autoregressive: Tensor | None = None
    ctc: Tensor | None = None
    canvas_accuracy: Tensor | None = None
    next_token_accuracy: Tensor | None = None

    def total(self, weights: LossRecipe) -> Tensor:
        """The weighted sum of the computed losses."""
        parts = [(getattr(weights, name), getattr(self, name)) for name in ("diffusion", "autoregressive", "ctc")]
        return torch.stack([weight * loss for weight, loss in parts if loss is not None]).sum()

    def figures(self) -> dict[str, float]:
        """All computed values by name, for the log."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: float(value.detach()) for name, value in values.items() if value is not None}


def losses(model: DiffusionGemmaASR, batch: SpeechBatch, options: LossRecipe) -> Losses:
    """Computes the losses with a positive weight; for CTC alone the backbone's layers do not run.

    Args:
        model: its trainable parameters get gradients.
        batch: on the model's device.
        options: weights, and how canvases are corrupted.
    """
    slots, slot_lengths = model.projector(batch.frames, batch.frame_lengths)
    prompted = None
    if model.config.projector.acoustic and options.uses_backbone:
        prompted = model.projector.prompted(batch.frames, batch.frame_lengths, slots)
    return losses_of_slots(model, slots, slot_lengths, batch.text, options, prompted)


def losses_of_slots(
    model: DiffusionGemmaASR,
    slots: Tensor,
    slot_lengths: Tensor,
    text: TextBatch,
    options: LossRecipe,
    prompted: Tensor | None = None,
    silent: bool = False,
) -> Losses:
    """As `losses`, from audio tokens (B, S, H) with slot_lengths (B,); `text` has a placeholder for each.

    Prompts hold `prompted` (B, S, H), where that is given, in their place. Where it is `silent`, prompts hold one audio
    token without sound each: the others are known to aligned canvases alone, by their drafts and what CTC finds likely.
    """
    ctc = None
    if options.ctc > 0:
        head = model.head
        with torch.autocast(slots.device.type, enabled=False):  # logits in the head's own precision
            hidden = slots.to(head.weight.dtype)
            ctc = ctc_loss(head, hidden, text.canvas, slot_lengths, text.counts, model.blank)
    if not options.uses_backbone:
        return Losses(ctc=ctc)
    aligned, drafts = model.config.canvas == "aligned" and options.diffusion > 0, None
    silence = slots.new_empty(0)
    quiet = model.config.causal_share > 0 and model.config.silent_drafts
    if silent or quiet:
        silence = model.projector.without_sound(len(slots))[:, None].to(slots)  # (B, 1, H)
    heard = model.greedy.of_slots(slots.detach(), slot_lengths) if aligned else None
    kept = model.read_mask(slots.detach(), slot_lengths, heard)
    if heard is not None:
        drafts = aligned_edits(model, slots.detach(), heard, kept, text)
    elif options.draft_share > 0:
        drafts = draft_edits(model, slots.detach(), slot_lengths, text)
    whole = slots if prompted is None else prompted, slot_lengths
    slots, slot_lengths = only(slots, kept)
    conditioned, share = aligned and model.config.draft_conditioning, model.config.canvas_share
    under = Under(slots.detach(), slot_lengths, share) if conditioned else None
    if silent:
        slots, slot_lengths = silence, slot_lengths.clamp(max=1)
    elif model.config.projector.acoustic:
        slots, slot_lengths = whole
    text = text.with_slots(slot_lengths)
    if options.autoregressive == 0:
        text = text.without_transcripts()
    embeds = fill_slots(model.backbone.embed(text.ids), text.slot_mask, slots, slot_lengths)
    if under is not None and quiet:
        one = slot_lengths.clamp(max=1)
        alone = text.with_slots(one).without_transcripts()
        prompts = fill_slots(model.backbone.embed(alone.ids), alone.slot_mask, silence, one)
        read = model.backbone.prefill(prompts, alone.mask, alone.lengths)
        under = under._replace(expected=lambda *_: batch_expectation(model, *read))
    elif under is not None and model.config.causal_share:
        under = under._replace(expected=partial(batch_expectation, model))
    of_backbone = backbone_losses(model.backbone, embeds, text, options, drafts, None, aligned, under)
    return Losses(**of_backbone.__dict__ | {"ctc": ctc})


@torch.no_grad()
def draft_edits(model: DiffusionGemmaASR, slots: Tensor, slot_lengths: Tensor, text: TextBatch) -> EditCanvases:
    """Canvases with the greedy CTC drafts, and their corrections.

    Args:
        model: whose head makes the drafts.
        slots: (B, S, H) audio tokens; slot_lengths: (B,).
        text: the same rows.

    Returns:
        drafted and corrected canvases, on the model's device; see `edit_canvases`.
    """
    special = model.prompts.special
    drafts = [[token.id for token in draft] for draft in model.greedy.of_slots(slots, slot_lengths).drafts]
    ending = special["end_of_turn"], special["eos"]
    canvases = edit_canvases(drafts, text.transcripts(), ending, model.blank, text.canvas.shape[1])
    return EditCanvases(*(part.to(model.device) for part in canvases))


@torch.no_grad()
def aligned_edits(model: DiffusionGemmaASR, slots: Tensor, heard: Heard, kept: Tensor, text: TextBatch) -> EditCanvases:
    """As `draft_edits`, with a position for each audio token that the prompt holds: those of `kept` (B, S) bool.

    A token of the transcript stands where CTC aligns it, one of the draft where it is heard. Rows whose transcripts need
    more audio tokens than their prompts hold are not usable.
    """
    special = model.prompts.special
    shown, wanted, usable = [], [], []
    for row, mask, draft, tokens in zip(slots, kept, heard.drafts, text.transcripts(), strict=True):
        size = int(mask.sum())
        places = model.places(row[mask], tokens) if size else None
        usable.append(places is not None)
        right = aligned_layout(tokens if places else [], places or [], size, model.blank)
        wanted.append([*right, special["end_of_turn"]])
        shown.append([*aligned_layout(*kept_spans(draft, mask), size, model.blank), special["end_of_turn"]])
    length = max(map(len, wanted)) + int(torch.randint(ALIGNED_MARGIN, ()))
    canvases = [write_canvas(rows, length, special["eos"]) for rows in (shown, wanted)]
    return EditCanvases(*(part.to(model.device) for part in (*canvases, torch.tensor(usable))))


def backbone_losses(
    backbone: Backbone,
    embeds: Tensor,
    batch: TextBatch,
    options: LossRecipe,
    drafts: EditCanvases | None = None,
    generator: torch.Generator | None = None,
    aligned: bool = False,
    under: Under | None = None,
) -> Losses:
    """Computes the diffusion and the autoregressive loss of a batch.

    The backbone's encoder reads prompt and transcript in one causal pass. The canvas attends only to the prompt's part of
    the cache; its positions follow those of the prompt.

    Args:
        backbone: to train.
        embeds: (B, P, H), embeddings of `batch.ids` with the audio tokens in their slots.
        batch: the same rows.
        options: weights, and how canvases are corrupted.
        drafts: canvases of C' >= C positions with drafts of the same rows, with which a share of the rows start.
        generator: on the device of `embeds`; None is torch's default.
        aligned: canvases have a position for each audio token, and the positions of these; `drafts` then holds all canvases.
        under: what stands under canvases.

    Returns:
        the losses; `ctc` is None.
    """
    prefill, hidden = backbone.prefill(embeds, batch.mask, batch.lengths)
    ar = ar_accuracy = diffusion = accuracy = None
    if options.autoregressive > 0:
        ar, ar_accuracy = autoregressive_loss(backbone.head, hidden, batch.ids, batch.target_mask)
    if options.diffusion > 0:
        canvas, counted = batch.canvas, torch.ones_like(batch.lengths, dtype=torch.bool)
        if aligned:
            assert drafts is not None
            canvas, counted = drafts.corrected, drafts.usable
            prefill = prefill.under_slots(batch.slot_mask)
            drafts = drafts if options.draft_share > 0 else None
        noisy, clean, drafted = noisy_canvases(canvas, backbone.vocab_size, options, drafts, generator)
        soft = heard = added = share = expected = None
        if under is not None:
            size = under.slots.shape[1]
            expected = None if under.expected is None else under.expected(prefill, hidden)
            spoken = length_mask(under.counts, noisy.shape[1])  # (B, C), places of audio tokens
            used = spoken & drafted[:, None]
            share = torch.where(used, under.share, 1.0)
            soft, heard = conditions(backbone.head, under.slots, used[:, :size], noisy.shape[1])
            added = heard if expected is None or drafts is None else heard + expected(drafts.shown, used)
        noisy, signal = first_pass(backbone, noisy, prefill, options, generator, soft, added, share)
        if expected is not None and heard is not None and signal is not None:
            added = heard + expected(signal.argmax(-1), spoken)
        elif expected is not None and options.self_conditioning > 0:
            skip_pass(backbone)  # another worker may read its canvases again
        hidden = backbone.denoise_hidden(noisy, prefill, signal, soft, added, share)
        diffusion, accuracy = diffusion_loss(backbone.head, hidden, clean, counted[:, None].expand(noisy.shape))
    return Losses(diffusion, ar, canvas_accuracy=accuracy, next_token_accuracy=ar_accuracy)


@torch.no_grad()
def first_pass(
    backbone: Backbone,
    noisy: Tensor,
    prefill: Prefill,
    options: LossRecipe,
    generator: torch.Generator | None = None,
    soft: Tensor | None = None,
    slots: Tensor | None = None,
    share: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """With probability `self_conditioning`, runs a pass without gradient for self-conditioning and unrolled training.

    With probability `unroll` a row then continues from the canvas after a denoising step with these logits, so that training
    sees the model's errors as inference does (Savinov et al. 2021, arXiv 2112.06749).

    Args:
        backbone: see `Backbone.denoise_logits`.
        noisy: (B, C) long, corrupted canvases.
        prefill: see `Backbone.denoise_logits`.
        options: the probabilities.
        generator: on the device of `noisy`; None is torch's default.
        soft: (B, C, H), what the first pass is conditioned on; None: nothing.
        slots, share: see `Backbone.denoise_seen`.

    Returns:
        canvases (B, C) for the second pass, and the self-conditioning signal: the first pass's logits (B, C, V), divided by
        a random temperature; None without a first pass.
    """
    if float(torch.rand((), generator=generator, device=noisy.device)) >= options.self_conditioning:
        if options.self_conditioning > 0:
            skip_pass(backbone)  # another worker may have drawn otherwise
        return noisy, None
    hidden = backbone.denoise_hidden(noisy, prefill, None, soft, slots, share)
    signal = backbone.logits(hidden) / draw_temperature(generator, noisy.device)
    if options.unroll > 0:
        stepped = one_step(signal, generator)
        unrolled = torch.rand(len(noisy), generator=generator, device=noisy.device) < options.unroll
        noisy = torch.where(unrolled[:, None], stepped, noisy)
    return noisy, signal
