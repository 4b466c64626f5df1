"""What the backbone is trained on: prompt and transcript in one causal row, the transcript once more on a noisy
canvas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .backbone import Backbone
from .denoise import accept, renoise, sample
from .edits import EditCanvases
from .losses import autoregressive_loss, diffusion_loss
from .noise import q_xt, sample_t
from .prompt import AUTO, PromptBuilder, pad_prompts


@dataclass(frozen=True)
class TextBatch:
    """Prompts followed by their transcripts, and the clean canvases.

    ids, mask, slot_mask, target_mask (B, P): tokens, real ones, placeholders of audio tokens, transcript (with its end of
    turn); lengths (B,): tokens of the prompt alone; canvas (B, C) long: transcript, end of turn, then end of sequence.
    leads (B,): how many of the transcript's tokens come before what is spoken: a language's code and a newline where the
    prompt does not name it, else 0.
    """

    ids: Tensor
    mask: Tensor
    slot_mask: Tensor
    target_mask: Tensor
    lengths: Tensor
    canvas: Tensor
    leads: Tensor

    def spoken(self) -> tuple[Tensor, Tensor]:
        """What is spoken, without the lead and the end of the turn: ids (B, C), of meaning up to counts (B,)."""
        counts = self.target_mask.sum(1) - 1 - self.leads
        at = torch.arange(self.canvas.shape[1], device=self.canvas.device) + self.leads[:, None]
        return self.canvas.gather(1, at.clamp(max=self.canvas.shape[1] - 1)), counts

    def to(self, device: torch.device) -> TextBatch:
        """The same batch on another device."""
        return TextBatch(**{name: value.to(device) for name, value in self.__dict__.items()})


@dataclass(frozen=True)
class SpeechBatch:
    """Training examples: frames (B, F, D) of the frozen encoder, frame_lengths (B,), and the text side of the same
    rows; phonemes: the classes of each row's (lexicon.py), for a speller that writes them."""

    frames: Tensor
    frame_lengths: Tensor
    text: TextBatch
    phonemes: Sequence[Sequence[int]] = ()

    def to(self, device: torch.device) -> SpeechBatch:
        """The same batch on another device."""
        return SpeechBatch(self.frames.to(device), self.frame_lengths.to(device), self.text.to(device), self.phonemes)


def text_batch(
    prompts: PromptBuilder, slots: Sequence[int], targets: Sequence[Sequence[int]], languages: Sequence[str], margin: int,
    unnamed: Sequence[bool] | None = None, contexts: Sequence[str] | None = None,
) -> TextBatch:  # fmt: skip
    """Joins prompts and targets.

    Args:
        slots: audio tokens of each row.
        targets: transcript and end of turn of each row, as `PromptBuilder.target` gives them.
        languages: spoken in each row.
        margin: canvas positions beyond the longest target.
        unnamed: rows whose prompt does not name the language; their transcripts begin with its code. None: no row.
        contexts: what each prompt says behind the instruction. None: nothing.
    """
    unnamed = unnamed or [False] * len(targets)
    asked = [AUTO if hidden else language for hidden, language in zip(unnamed, languages, strict=True)]
    leads = [prompts.marker(language) if hidden else [] for hidden, language in zip(unnamed, languages, strict=True)]
    written = [[*lead, *target] for lead, target in zip(leads, targets, strict=True)]
    said = contexts or [""] * len(targets)
    rows = [prompts.row(n, language, context) for n, language, context in zip(slots, asked, said, strict=True)]
    joined = pad_prompts([[*row, *target] for row, target in zip(rows, written, strict=True)], prompts.special)
    lengths = torch.tensor([len(row) for row in rows])
    canvas = write_canvas(written, max(map(len, written)) + margin, prompts.special["eos"])
    target_mask = joined.mask & (torch.arange(joined.ids.shape[1]) >= lengths[:, None])
    sizes = torch.tensor([len(lead) for lead in leads])
    return TextBatch(joined.ids, joined.mask, joined.slot_mask, target_mask, lengths, canvas, sizes)


def write_canvas(rows: Sequence[Sequence[int]], length: int, eos: int) -> Tensor:
    """(B, length) canvases that hold `rows` from their first position on, cut at `length`, then end of sequence."""
    canvas = torch.full((len(rows), length), eos)
    for i, row in enumerate(rows):
        canvas[i, : len(row)] = torch.tensor(row[:length], dtype=torch.long)
    return canvas


@dataclass(frozen=True)
class BackboneLosses:
    """Scalars: the diffusion and the autoregressive loss, and the share of tokens that each gets right."""

    diffusion: Tensor
    autoregressive: Tensor
    canvas_accuracy: Tensor
    next_token_accuracy: Tensor


def backbone_losses(
    backbone: Backbone,
    embeds: Tensor,
    batch: TextBatch,
    self_conditioning: float,
    full_noise: float,
    generator: torch.Generator | None = None,
    autoregressive: bool = True,
    drafts: EditCanvases | None = None,
    draft_share: float = 0.0,
    unroll: float = 0.0,
) -> BackboneLosses:
    """Diffusion and autoregressive loss of a batch.

    The encoder reads prompt and transcript in one causal pass; the canvas sees the prompt's part of the cache alone and
    takes the positions that follow it.

    Args:
        embeds: (B, P, H), audio slots filled.
        self_conditioning: probability that a first pass, without gradient, hands its logits to the second, divided by a
            temperature as in denoising.
        full_noise: probability that a row starts from pure noise instead of t ~ U(eps, 1).
        autoregressive: leave that loss out (0) where its weight is 0.
        drafts: of the same rows, C' >= C positions.
        draft_share: probability that a row whose draft is usable starts from it instead, corrupted at a quarter of its
            level t.
        unroll: probability that a row whose first pass did so also goes on with the canvas that a denoising
            step makes of them, its own mistakes included, as inference does (Savinov et al. 2021, arXiv 2112.06749).
    """
    weight, softcap = backbone.lm_head_weight, backbone.softcap
    prefill, hidden = backbone.prefill(embeds, batch.mask, batch.lengths)
    zero = hidden.new_zeros(())
    ar, ar_accuracy = zero, zero
    if autoregressive:
        ar, ar_accuracy = autoregressive_loss(hidden, weight, softcap, batch.ids, batch.target_mask)
    t = sample_t(len(batch.canvas), generator, device=embeds.device)
    pure = torch.rand(t.shape, generator=generator, device=t.device) < full_noise
    clean = batch.canvas
    if drafts is not None:
        shown, corrected, usable = drafts
        filling = corrected[:, -1:].expand(-1, corrected.shape[1] - clean.shape[1])
        clean = torch.cat([clean, filling], dim=1)  # (B, C')
    noisy = q_xt(clean, torch.where(pure, 1.0, t), backbone.vocab_size, generator)
    if drafts is not None:
        drafted = (torch.rand(t.shape, generator=generator, device=t.device) < draft_share) & usable
        noisy = torch.where(drafted[:, None], q_xt(shown, t / 4, backbone.vocab_size, generator), noisy)
        clean = torch.where(drafted[:, None], corrected, clean)
    signal = None
    if float(torch.rand((), generator=generator, device=t.device)) < self_conditioning:
        with torch.no_grad():
            signal = backbone.denoise_logits(noisy, prefill) / draw_temperature(generator, embeds.device)
        if unroll > 0:
            stepped = one_step(signal, generator)
            own = torch.rand(t.shape, generator=generator, device=t.device) < unroll
            noisy = torch.where(own[:, None], stepped, noisy)
    hidden = backbone.denoise_hidden(noisy, prefill, signal)
    everywhere = torch.ones_like(noisy, dtype=torch.bool)
    diffusion, accuracy = diffusion_loss(hidden, weight, softcap, clean, everywhere)
    return BackboneLosses(diffusion, ar, accuracy, ar_accuracy)


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
