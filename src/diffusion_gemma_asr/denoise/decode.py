"""From clips to transcripts: which language, which draft, and all canvases of all clips through one queue."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..languages import AUTO
from ..model.drafts import Encoded
from ..model.model import DiffusionGemmaASR
from ..model.prefill import Prefill
from .candidates import chosen
from .clip import ClipDecoding, Decoded, DraftedClip, Shown, candidates_of, padded, read_prompts, start_of
from .options import DecodeOptions
from .queue import run_queue

OnStep = Callable[[int, int, list[Shown]], None]
"""Takes a clip's index, the step of its canvas (0 before the first one), and what is on the canvas, token by token."""


@torch.no_grad()
def decode_clips(
    model: DiffusionGemmaASR,
    clips: Sequence[np.ndarray],
    options: DecodeOptions,
    *,
    batch_size: int = 16,
    align: bool = False,
    languages: Sequence[str] | None = None,
    on_done: Callable[[int], None] | None = None,
    on_step: OnStep | None = None,
) -> list[Decoded]:
    """Transcribes clips; each gives the same whatever else is in the batch.

    Args:
        clips: float32 arrays (n,), 16 kHz, at most 30 s each, as many as there are.
        batch_size: clips that the encoder and the backbone take at once.
        align: whether to find out where in the sound the tokens are.
        languages: a code for each clip, in place of the options' language.
        on_done: called with a clip's index when its transcript is there.
        on_step: called before the first denoising step of each canvas and after every one.

    Raises:
        AsrError: the model was not trained for what is asked.
        AudioError: a clip is too long or too short.
    """
    options.check(model, languages)
    order = sorted(range(len(clips)), key=lambda i: len(clips[i]))
    drafted: dict[int, DraftedClip] = {}
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        drafted |= zip(batch, draft_clips(model, model.encode([clips[i] for i in batch])), strict=True)
    rows = [drafted[i] for i in range(len(clips))]
    decoded = decode(model, rows, options, batch_size=batch_size, languages=languages, on_done=on_done, on_step=on_step)
    if not align:
        return decoded
    return [replace(one, spans=model.align(row.slots, one.tokens)) for one, row in zip(decoded, rows, strict=True)]


@torch.no_grad()
def draft_clips(model: DiffusionGemmaASR, encoded: Encoded) -> list[DraftedClip]:
    """The clips of a batch, each with its draft."""
    heard = model.greedy.hear(encoded)
    kept = model.read_mask(encoded.slots, encoded.slot_lengths, heard).cpu()
    rows = zip(encoded.slots, encoded.slot_lengths.tolist(), heard.drafts, kept, strict=True)
    clips = [DraftedClip(slots[:n], draft, mask[:n]) for slots, n, draft, mask in rows]
    if encoded.acoustic is None:
        return clips
    return [clip._replace(acoustic=row[: len(clip.slots)]) for clip, row in zip(clips, encoded.acoustic, strict=True)]


@torch.no_grad()
def decode(
    model: DiffusionGemmaASR,
    clips: Sequence[DraftedClip],
    options: DecodeOptions,
    *,
    batch_size: int = 16,
    languages: Sequence[str] | None = None,
    on_done: Callable[[int], None] | None = None,
    on_step: OnStep | None = None,
) -> list[Decoded]:
    """As `decode_clips`, from audio tokens and drafts."""
    codes = options.check(model, languages)
    if languages is None:
        languages = codes * len(clips) if len(codes) == 1 else find_languages(model, clips, codes, options, batch_size)
    seeds = candidates_of(model, options) if start_of(model, options) == "noise" else 1
    decodings = [
        ClipDecoding(model, clip, replace(options, seed=options.seed + seed), code)
        for clip, code in zip(clips, languages, strict=True)
        for seed in range(seeds)
    ]
    owners = [index for index, decoding in enumerate(decodings) if not decoding.done]  # of each job

    def done(index: int) -> None:
        clip = index // seeds
        if on_done is not None and all(one.done for one in decodings[clip * seeds : (clip + 1) * seeds]):
            on_done(clip)

    for index, decoding in enumerate(decodings):
        if decoding.done:
            if on_step is not None:
                on_step(index // seeds, 0, decoding.shown_draft())
            done(index)
    jobs = [decodings[index].job() for index in owners]

    def read(numbers: Sequence[int]) -> Prefill:
        return read_prompts([decodings[owners[number]] for number in numbers])

    def show(number: int, step: int, canvas: Tensor, entropy: Tensor) -> None:
        clip, seed = divmod(owners[number], seeds)
        if on_step is not None and seed == 0:
            on_step(clip, step, decodings[owners[number]].shown(canvas, entropy))

    denoising = options.denoising(model.backbone.sampler_settings())
    shown = None if on_step is None else show
    for number, finished in run_queue(model.backbone, jobs, read, denoising, batch_size, shown):
        index = owners[number]
        decodings[index].take(finished)
        if not decodings[index].done:  # a full canvas: the transcript goes on on another one
            owners.append(index)
            jobs.append(decodings[index].job())
        else:
            done(index)
    decoded = [decoding.decoded() for decoding in decodings]
    if seeds == 1:
        return decoded
    found = []
    for row, clip in enumerate(clips):
        ones = decoded[row * seeds : (row + 1) * seeds]
        best = chosen(model, clip.slots, [one.tokens for one in ones], ones[0].language, options.context)
        found.append(replace(ones[best], steps=sum(one.steps for one in ones)))
    return found


@torch.no_grad()
def find_languages(
    model: DiffusionGemmaASR, clips: Sequence[DraftedClip], codes: Sequence[str], options: DecodeOptions, batch_size: int
) -> list[str]:
    """The language of each clip: of `codes`, the one whose marker the backbone finds likeliest as the first token behind a
    prompt that names no language, read as an autoregressive model."""
    first = torch.tensor(model.prompts.language_tokens(codes), device=model.device)
    languages: list[str] = []
    for at in range(0, len(clips), batch_size):
        slots, lengths, kept = padded(clips[at : at + batch_size])
        prefill, hidden = model.read_prompts(slots, lengths, [AUTO] * len(slots), context=options.context, kept=kept)
        last = hidden[torch.arange(len(slots), device=hidden.device), prefill.lengths - 1]  # (B, H)
        languages += [codes[i] for i in model.head.logits(last)[:, first].argmax(-1).tolist()]
    return languages
