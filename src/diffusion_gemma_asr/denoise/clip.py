"""One clip on its way from audio tokens to its transcript: what its canvases start with, and what follows a full one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..memory import of_device
from ..model.config import Start
from ..model.ctc import DraftToken, TokenSpan
from ..model.model import DiffusionGemmaASR
from ..model.prefill import Prefill
from ..model.prompt import token_pieces
from .candidates import chosen, prompt_without_sound, proposed_draft
from .canvas import aligned_layout, edit_layout, token_starts, uniform_canvas, without_ends, write_canvas
from .engine import BLOCK, Finished, Job, in_blocks
from .expected import Read, expectation
from .options import DecodeOptions
from .steps import cut_at_end

CANVAS_STEP = 8  # canvases are rounded up to a multiple, so that utterances of like length share a batch


class Shown(NamedTuple):
    """A piece of the text on a canvas.

    Attributes:
        text: what a token adds to the text.
        confidence: e^-entropy, 1 where one token alone is likely.
    """

    text: str
    confidence: float


class DraftedClip(NamedTuple):
    """A clip before it is denoised.

    Attributes:
        slots: (S, H) audio tokens.
        draft: of the clip.
        kept: (S,) bool, audio tokens that the prompt holds, and that an aligned canvas has places for.
        acoustic: (S, H), what the prompt holds in their place, all of them; None: nothing.
    """

    slots: Tensor
    draft: list[DraftToken]
    kept: Tensor
    acoustic: Tensor | None = None

    @property
    def prompted(self) -> Tensor:
        """(S, H), the audio tokens that prompts hold."""
        return self.slots if self.acoustic is None else self.acoustic


@dataclass(frozen=True)
class Decoded:
    """What the model made of one clip.

    Attributes:
        text: the transcript.
        tokens: its ids.
        logprobs: nats, of the tokens at temperature 1, in the last pass; CTC's where nothing was denoised.
        draft: the text of the draft.
        draft_tokens: its tokens, with their slots.
        steps: denoising passes used, over all canvases; 0 where nothing was denoised.
        language: the code that was asked for, or the one that was recognised.
        decoder: what wrote the text.
        spans: where CTC places the tokens, None where that was not asked for or there are more tokens than slots.
    """

    text: str
    tokens: list[int]
    logprobs: list[float]
    draft: str
    draft_tokens: list[DraftToken]
    steps: int
    language: str
    decoder: Literal["denoising", "draft"] = "denoising"
    spans: list[TokenSpan] | None = None

    def as_drafted(self) -> Decoded:
        """The draft in place of what was denoised."""
        drafted = self.draft_tokens
        logprobs = [math.log(max(token.probability, 1e-10)) for token in drafted]
        spans = [TokenSpan(token.start, token.end, value) for token, value in zip(drafted, logprobs, strict=True)]
        tokens = [token.id for token in drafted]
        return replace(self, text=self.draft, tokens=tokens, logprobs=logprobs, spans=spans, decoder="draft")


def start_of(model: DiffusionGemmaASR, options: DecodeOptions) -> Start:
    """What first canvases hold."""
    return options.start or model.config.start


def candidates_of(model: DiffusionGemmaASR, options: DecodeOptions) -> int:
    """Transcripts of which one is chosen; the checkpoint's number is that of drafts which are then denoised."""
    if options.candidates is not None:
        return options.candidates
    return model.config.candidates if start_of(model, options) == "draft" else 1


class _Canvas(NamedTuple):
    """What stands on a denoised canvas before its end, and whether it is full: has no end, and its last place is used."""

    tokens: list[int]
    logprobs: list[float]
    steps: int
    full: bool


class ClipDecoding:
    """One clip on its way from audio tokens to its transcript: canvas after canvas, until one is not full.

    Where there are candidates, its draft is the best of so many, and what is denoised takes its place unless the draft is
    better by the same scores.

    Args:
        model: that made the audio tokens.
        clip: with the draft of greedy CTC.
        options: how to decode.
        language: code, as the prompt names it.
    """

    def __init__(self, model: DiffusionGemmaASR, clip: DraftedClip, options: DecodeOptions, language: str):
        self.start = start_of(model, options)
        count = candidates_of(model, options)
        self.proposes = self.start != "noise" and count > 1
        if self.proposes:
            draft = proposed_draft(model, clip.slots, clip.draft, count, language, options.context)
            clip = clip._replace(draft=draft)
        self.model, self.clip, self.options, self.language = model, clip, options, language
        self.aligned = model.config.canvas == "aligned"
        self.denoising = options.denoising(model.backbone.sampler_settings())
        self._generator = torch.Generator(model.device).manual_seed(options.seed)
        self._canvases: list[_Canvas] = []
        self._read: Read | None = None

    @property
    def done(self) -> bool:
        """Whether there is nothing left to denoise."""
        if self.start == "ctc":
            return True
        return bool(self._canvases) and not (self._canvases[-1].full and len(self.written) < len(self.clip.slots))

    @property
    def conditioned(self) -> bool:
        """Whether what CTC hears is added to the canvas's own logits."""
        return self.model.config.draft_conditioning and self.start == "draft"

    @property
    def silent(self) -> bool:
        """Whether the prompt holds no sound."""
        return self.model.config.silent_drafts and self.conditioned

    def prompt(self) -> Read:
        """What the backbone has read before the canvas: the prompt, or one without sound."""
        if self.model.config.silent_drafts:
            return prompt_without_sound(self.model, self.language, self.options.context)
        if self._read is None:
            prefill, hidden = _read_together([self])
            self._read = prefill, hidden[0, int(prefill.lengths[0]) - 1][None]
        return self._read

    @property
    def written(self) -> list[int]:
        """The transcript so far."""
        return [token for canvas in self._canvases for token in canvas.tokens]

    def job(self) -> Job:
        """The next canvas to denoise."""
        if self.aligned:
            canvas, config = self._aligned_canvas().to(self.model.device), self.model.config
            kept = self.clip.slots[self.clip.kept.to(canvas.device)]
            expected = None
            if config.causal_share > 0:
                expected = expectation(self.model, len(kept), self.prompt)
            return Job(canvas, self._generator, kept if self.conditioned else None, config.canvas_share, expected)
        draft, blank = [token.id for token in self.clip.draft], self.model.blank
        if self._canvases or self.start == "noise":
            written = len(self.written)
            left = max(0, len(draft) - written) if self.model.config.ctc else None
            length = self.options.canvas_length or fitted_canvas(len(self.clip.slots) - written, left)
            canvas = uniform_canvas(1, length, self.model.backbone.vocab_size, self._generator, self.model.device)
        else:
            special = self.model.prompts.special
            layout = [*edit_layout(draft, blank), special["end_of_turn"]]
            canvas = write_canvas([layout], self.options.canvas_length or rounded(len(layout)), special["eos"])
        return Job(canvas[0].to(self.model.device), self._generator)

    def _aligned_canvas(self) -> Tensor:
        """The canvas (C,) with a position for each audio token that the prompt holds."""
        kept, special = self.clip.kept, self.model.prompts.special
        slots = int(kept.sum())
        length = max(self.options.canvas_length or 0, rounded(slots + 1))
        if self.start == "noise":
            return uniform_canvas(1, length, self.model.backbone.vocab_size, self._generator, self.model.device)[0]
        layout = [*aligned_layout(*kept_spans(self.clip.draft, kept), slots, self.model.blank), special["end_of_turn"]]
        return write_canvas([layout], length, special["eos"])[0]

    def take(self, finished: Finished) -> None:
        """What became of the last job."""
        written = self._before_end(finished.canvas)
        kept = self._said(written)
        logprobs = finished.logprobs.tolist()
        full = 0 < len(written) == len(finished.canvas) and written[-1] != self.model.blank and not self.aligned
        canvas = _Canvas([written[i] for i in kept], [logprobs[i] for i in kept], finished.steps, full)
        self._canvases.append(canvas)

    def decoded(self) -> Decoded:
        """The transcript, once all is done."""
        draft, tokens = self.clip.draft, self.written
        decoded = Decoded(
            text=self.model.text(tokens),
            tokens=tokens,
            logprobs=[value for canvas in self._canvases for value in canvas.logprobs],
            draft=self.model.text([token.id for token in draft]),
            draft_tokens=draft,
            steps=sum(canvas.steps for canvas in self._canvases),
            language=self.language,
        )
        return decoded.as_drafted() if self.start == "ctc" or self._draft_is_better(tokens) else decoded

    def _draft_is_better(self, tokens: Sequence[int]) -> bool:
        """Whether the draft is, than what was denoised."""
        drafted = [token.id for token in self.clip.draft]
        if not self.proposes or list(tokens) == drafted:
            return False
        return chosen(self.model, self.clip.slots, [tokens, drafted], self.language, self.options.context) == 1

    def shown_draft(self) -> list[Shown]:
        """What a canvas would show that holds the draft, as sure as CTC is of it."""
        draft = self.clip.draft
        return self._pieces([token.id for token in draft], [token.probability for token in draft], range(len(draft)))

    def shown(self, canvas: Tensor, entropy: Tensor) -> list[Shown]:
        """What is on a canvas (C,) before its end, with the entropy (C,) of its positions."""
        tokens = self._before_end(canvas)
        return self._pieces(tokens, (-entropy).exp().tolist(), self._said(tokens))

    def _before_end(self, canvas: Tensor) -> list[int]:
        """What stands on a canvas (C,) before its end: of an aligned one, at the places of audio tokens."""
        ends = self.model.prompts.end_ids
        if self.aligned:
            return without_ends(canvas[: int(self.clip.kept.sum())].tolist(), self.model.blank, ends)
        return cut_at_end(canvas[None], ends)[0]

    def _said(self, tokens: Sequence[int]) -> list[int]:
        """The places of tokens on a canvas that are text: no blanks, and on an aligned canvas one place of each token."""
        blank = self.model.blank
        return token_starts(tokens, blank) if self.aligned else [i for i, token in enumerate(tokens) if token != blank]

    def _pieces(self, tokens: Sequence[int], confidence: Sequence[float], kept: Sequence[int]) -> list[Shown]:
        """Pieces of the text that the tokens at these places make."""
        pieces = token_pieces([tokens[i] for i in kept], self.model.text)
        return [Shown(text, min(confidence[kept[i]] for i in places)) for text, places in pieces]


def kept_spans(draft: Sequence[DraftToken], kept: Tensor) -> tuple[list[int], list[tuple[int, int]]]:
    """The tokens of a draft, and their places [start, end) on an aligned canvas; `kept` (S,) bool, see `DraftedClip`."""
    before = [0, *kept.cumsum(0).tolist()]  # kept ones before each
    return [token.id for token in draft], [(before[token.start], before[token.end]) for token in draft]


def read_prompts(clips: Sequence[ClipDecoding]) -> Prefill:
    """Reads the prompts of clips of one model that are to be denoised next, with what is written of their transcripts."""
    model = clips[0].model
    groups: dict[tuple[str, str], list[int]] = {}  # clips with one prompt without sound, by language and context
    for row, clip in enumerate(clips):
        if clip.silent:
            groups.setdefault((clip.language, clip.options.context), []).append(row)
    heard = [row for row, clip in enumerate(clips) if not clip.silent]
    found = in_blocks([len(clips[row].clip.slots) for row in heard], of_device(BLOCK, model.device)) if heard else []
    blocks = [[heard[place] for place in rows] for rows in found]
    parts = [_read_together([clips[row] for row in rows])[0] for rows in blocks]
    parts += [prompt_without_sound(model, language, context)[0] for language, context in groups]
    shared = [[row] for rows in blocks for row in rows] + list(groups.values())  # the clips of each row of these parts
    places = {clip: row for row, those in enumerate(shared) for clip in those}
    order = [places[clip] for clip in range(len(clips))]
    prefill = reduce(Prefill.join, parts)
    if order == list(range(len(shared))):
        return prefill
    return prefill.keep(torch.tensor(order, device=model.device), prefill.visible.shape[1])


@torch.no_grad()
def _read_together(clips: Sequence[ClipDecoding]) -> tuple[Prefill, Tensor]:
    """The same in one batch, and the last hidden states (B, P, H)."""
    slots, lengths, kept = padded([clip.clip for clip in clips])
    languages, written = [clip.language for clip in clips], [clip.written for clip in clips]
    contexts = [clip.options.context for clip in clips]
    return clips[0].model.read_prompts(slots, lengths, languages, written, contexts, kept)


def padded(clips: Sequence[DraftedClip]) -> tuple[Tensor, Tensor, Tensor]:
    """The audio tokens of several clips as prompts hold them (B, S, H), zeros behind each end, their lengths (B,), and which
    of them prompts hold (B, S)."""
    device = clips[0].slots.device
    lengths = torch.tensor([len(clip.slots) for clip in clips], device=device)
    slots = pad_sequence([clip.prompted for clip in clips], batch_first=True)
    return slots, lengths, pad_sequence([clip.kept for clip in clips], batch_first=True).to(device)


def rounded(positions: int) -> int:
    """The next multiple of CANVAS_STEP."""
    return math.ceil(positions / CANVAS_STEP) * CANVAS_STEP


def fitted_canvas(slots: int, draft: int | None) -> int:
    """Tokens a canvas needs: a fifth more than the draft and some, or one a slot (CTC's own limit) without a draft."""
    room = slots + 2 if draft is None else min(slots + 2, math.ceil(1.2 * draft) + 4)
    return rounded(room)
