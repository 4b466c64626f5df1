"""From clips to transcripts: which language, what canvases start with, how they are denoised, what follows a full one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..errors import AsrError
from ..languages import AUTO, language_code
from ..model.backbone import Prefill
from ..model.config import ModelConfig, Start
from ..model.ctc import DraftToken, TokenSpan
from ..model.drafter import Encoded
from ..model.model import DiffusionGemmaASR
from ..model.prompt import context_of, token_pieces
from ..strict import check_types, option
from .canvas import edit_layout, uniform_canvas, write_canvas
from .engine import Finished, Job
from .queue import run_queue
from .steps import DenoiseOptions, cut_at_end

CANVAS_STEP = 8  # canvases are rounded up to a multiple, so that utterances of like length share a batch
DEFAULT_STEPS = 8


@dataclass(frozen=True)
class DecodeOptions:
    """How a model turns clips into text. Raises AsrError on impossible values."""

    language: str | None = option(
        AUTO, "Code of the language spoken; en,de: one of these; auto: one that the model knows.", show_default=AUTO
    )
    initial_prompt: str | None = option(None, "Text that came before, for the prompt.")
    hotwords: str | None = option(None, "Words that may occur, for the prompt.")
    steps: int = option(DEFAULT_STEPS, "Denoising steps at most.", min=1)
    start: Start | None = option(
        None, "First canvas: random tokens, or the CTC draft.", show_default="as the checkpoint was trained"
    )
    seed: int = option(0, "Of the random draws; the same seed gives the same transcript.")
    entropy_bound: float | None = option(
        None, "Nats; how dependent on each other the tokens kept in one step may be.", show_default="the checkpoint's"
    )
    t_max: float | None = option(None, "Temperature of the first step.", show_default="the checkpoint's")
    t_min: float | None = option(None, "Temperature towards which it falls.", show_default="the checkpoint's")
    stability_threshold: int | None = option(
        None, "Steps for which a canvas must not change before it stops early.", show_default="the checkpoint's"
    )
    confidence_threshold: float | None = option(
        None, "Nats; mean entropy under which a canvas may stop early.", show_default="the checkpoint's"
    )
    canvas_length: int | None = option(None, "Tokens of a canvas.", min=1, show_default="as the draft suggests")

    def __post_init__(self) -> None:
        if isinstance(self.language, list | tuple):
            object.__setattr__(self, "language", ",".join(map(str, self.language)))
        check_types(self)
        if len(self.codes) > 1 and AUTO in self.codes:
            raise AsrError(f"language is {self.language!r}; give {AUTO} alone, or codes")
        if self.canvas_length is not None and self.canvas_length < 1:
            raise AsrError(f"canvas_length is {self.canvas_length}; it must be at least 1")
        self.denoising({})

    @property
    def codes(self) -> tuple[str, ...]:
        """What `language` names: codes, or AUTO alone; any name of a language that people use, see `language_code`."""
        return tuple(language_code(name, auto=True) for name in (self.language or AUTO).split(","))

    @property
    def context(self) -> str:
        """What the prompt says about the recording."""
        return context_of(self.initial_prompt or "", self.hotwords or "")

    def denoising(self, settings: dict[str, float]) -> DenoiseOptions:
        """The options of the loop; what is None here is as a checkpoint's `settings` say, else as in `DenoiseOptions`."""
        names = ("entropy_bound", "t_max", "t_min", "stability_threshold", "confidence_threshold")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return DenoiseOptions(**{"steps": self.steps} | settings | given)

    def check(self, config: ModelConfig, languages: Sequence[str] | None = None) -> tuple[str, ...]:
        """The codes among which the language is to be found; one alone is the language.

        Args:
            config: of the model.
            languages: of each clip, where they are known and the options' language does not count.

        Raises:
            AsrError: the model was not trained for what is asked.
        """
        known = ", ".join(config.languages)
        codes = config.languages if self.codes == (AUTO,) else self.codes
        if odd := [code for code in languages or codes if code not in config.languages]:
            raise AsrError(f"the model {config.name} was not trained for language {odd[0]!r}; it knows {known}")
        if len(codes) > 1 and languages is None and not config.finds_language:
            raise AsrError(f"the model {config.name} was not trained to find the language; name one of {known}")
        if self.context and not config.reads_context:
            raise AsrError(
                f"the model {config.name} was not trained to read context in its prompt; "
                "leave out initial_prompt and hotwords"
            )
        return codes


class Shown(NamedTuple):
    """A piece of the text on a canvas.

    Attributes:
        text: what a token adds to the text.
        confidence: e^-entropy, 1 where one token alone is likely.
    """

    text: str
    confidence: float


OnStep = Callable[[int, int, list[Shown]], None]
"""Takes a clip's index, the step of its canvas (0 before the first one), and what is on the canvas, token by token."""


class DraftedClip(NamedTuple):
    """A clip before it is denoised.

    Attributes:
        slots: (S, H) audio tokens.
        draft: of the clip.
        trusted: whether the draft is the transcript.
    """

    slots: Tensor
    draft: list[DraftToken]
    trusted: bool


@dataclass(frozen=True)
class Decoded:
    """What the model made of one clip.

    Attributes:
        text: the transcript.
        tokens: its ids.
        logprobs: nats, of the tokens at temperature 1, in the last pass; of a trusted draft those of the draft.
        draft: the text of the draft.
        draft_tokens: its tokens, with their slots.
        steps: denoising passes used, over all canvases; 0 where the draft was trusted.
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
    options.check(model.config, languages)
    order = sorted(range(len(clips)), key=lambda i: len(clips[i]))
    drafted: dict[int, DraftedClip] = {}
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        drafted |= zip(batch, draft_clips(model, model.encode([clips[i] for i in batch]), options), strict=True)
    rows = [drafted[i] for i in range(len(clips))]
    decoded = decode(model, rows, options, batch_size=batch_size, languages=languages, on_done=on_done, on_step=on_step)
    if not align:
        return decoded
    return [replace(one, spans=model.align(row.slots, one.tokens)) for one, row in zip(decoded, rows, strict=True)]


@torch.no_grad()
def draft_clips(model: DiffusionGemmaASR, encoded: Encoded, options: DecodeOptions) -> list[DraftedClip]:
    """The clips of a batch, each with its draft: the drafter's, or where canvases start from noise, greedy CTC's."""
    drafter = model.greedy if (options.start or model.config.start) == "noise" else model.drafter
    trusted = drafter.trusted and options.start is None
    rows = zip(encoded.slots, encoded.slot_lengths.tolist(), drafter.drafts(encoded), strict=True)
    return [DraftedClip(slots[:n], draft, trusted) for slots, n, draft in rows]


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
    codes = options.check(model.config, languages)
    if languages is None:
        languages = codes * len(clips) if len(codes) == 1 else find_languages(model, clips, codes, options, batch_size)
    decodings = [ClipDecoding(model, clip, options, code) for clip, code in zip(clips, languages, strict=True)]
    owners = [index for index, decoding in enumerate(decodings) if not decoding.done]  # of each job
    for index, decoding in enumerate(decodings):
        if decoding.done:
            if on_step is not None:
                on_step(index, 0, decoding.shown_draft())
            if on_done is not None:
                on_done(index)
    jobs = [decodings[index].job() for index in owners]

    def read(numbers: Sequence[int]) -> Prefill:
        return read_prompts([decodings[owners[number]] for number in numbers])

    def show(number: int, step: int, canvas: Tensor, entropy: Tensor) -> None:
        if on_step is not None:
            on_step(owners[number], step, decodings[owners[number]].shown(canvas, entropy))

    denoising = options.denoising(model.backbone.sampler_settings())
    shown = None if on_step is None else show
    for number, finished in run_queue(model.backbone, jobs, read, denoising, batch_size, shown):
        index = owners[number]
        decodings[index].take(finished)
        if not decodings[index].done:  # a full canvas: the transcript goes on on another one
            owners.append(index)
            jobs.append(decodings[index].job())
        elif on_done is not None:
            on_done(index)
    return [decoding.decoded() for decoding in decodings]


@torch.no_grad()
def find_languages(
    model: DiffusionGemmaASR, clips: Sequence[DraftedClip], codes: Sequence[str], options: DecodeOptions, batch_size: int
) -> list[str]:
    """The language of each clip: of `codes`, the one whose marker the backbone finds likeliest as the first token behind a
    prompt that names no language, read as an autoregressive model."""
    first = torch.tensor(model.prompts.language_tokens(codes), device=model.device)
    languages: list[str] = []
    for at in range(0, len(clips), batch_size):
        slots, lengths = _padded([clip.slots for clip in clips[at : at + batch_size]])
        prefill, hidden = model.read_prompts(slots, lengths, [AUTO] * len(slots), context=options.context)
        last = hidden[torch.arange(len(slots), device=hidden.device), prefill.lengths - 1]  # (B, H)
        languages += [codes[i] for i in model.head.logits(last)[:, first].argmax(-1).tolist()]
    return languages


class _Canvas(NamedTuple):
    """What stands on a denoised canvas before its end, and whether it is full: has no end, and its last place is used."""

    tokens: list[int]
    logprobs: list[float]
    steps: int
    full: bool


class ClipDecoding:
    """One clip on its way from audio tokens to its transcript: canvas after canvas, until one is not full.

    Args:
        model: that made the audio tokens.
        clip: with its draft.
        options: how to decode.
        language: code, as the prompt names it.
    """

    def __init__(self, model: DiffusionGemmaASR, clip: DraftedClip, options: DecodeOptions, language: str):
        self.model, self.clip, self.options, self.language = model, clip, options, language
        self.denoising = options.denoising(model.backbone.sampler_settings())
        self._generator = torch.Generator(model.device).manual_seed(options.seed)
        self._canvases: list[_Canvas] = []

    @property
    def done(self) -> bool:
        """Whether there is nothing left to denoise."""
        if self.clip.trusted:
            return True
        return bool(self._canvases) and not (self._canvases[-1].full and len(self.written) < len(self.clip.slots))

    @property
    def written(self) -> list[int]:
        """The transcript so far."""
        return [token for canvas in self._canvases for token in canvas.tokens]

    def job(self) -> Job:
        """The next canvas to denoise."""
        draft, blank = [token.id for token in self.clip.draft], self.model.blank
        if self._canvases or (self.options.start or self.model.config.start) == "noise":
            written = len(self.written)
            left = max(0, len(draft) - written) if self.model.config.ctc else None
            length = self.options.canvas_length or fitted_canvas(len(self.clip.slots) - written, left)
            canvas = uniform_canvas(1, length, self.model.backbone.vocab_size, self._generator, self.model.device)
        else:
            special = self.model.prompts.special
            layout = [*edit_layout(draft, blank), special["end_of_turn"]]
            canvas = write_canvas([layout], self.options.canvas_length or rounded(len(layout)), special["eos"])
        return Job(canvas[0].to(self.model.device), self._generator)

    def take(self, finished: Finished) -> None:
        """What became of the last job."""
        (written,) = cut_at_end(finished.canvas[None], self.model.prompts.end_ids)
        kept = [place for place, token in enumerate(written) if token != self.model.blank]
        logprobs = finished.logprobs.tolist()
        full = 0 < len(written) == len(finished.canvas) and written[-1] != self.model.blank
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
        return decoded.as_drafted() if self.clip.trusted else decoded

    def shown_draft(self) -> list[Shown]:
        """What a canvas would show that holds the draft, as sure as CTC is of it."""
        return self._pieces([token.id for token in self.clip.draft], [token.probability for token in self.clip.draft])

    def shown(self, canvas: Tensor, entropy: Tensor) -> list[Shown]:
        """What is on a canvas (C,) before its end, with the entropy (C,) of its positions."""
        (tokens,) = cut_at_end(canvas[None], self.model.prompts.end_ids)
        return self._pieces(tokens, (-entropy).exp().tolist())

    def _pieces(self, tokens: Sequence[int], confidence: Sequence[float]) -> list[Shown]:
        """Pieces of text; a gap in the layout of a draft is nothing."""
        kept = [place for place, token in enumerate(tokens) if token != self.model.blank]
        pieces = token_pieces([tokens[i] for i in kept], self.model.text)
        return [Shown(text, min(confidence[kept[i]] for i in places)) for text, places in pieces]


def read_prompts(clips: Sequence[ClipDecoding]) -> Prefill:
    """Reads the prompts of clips of one model that are to be denoised next, with what is written of their transcripts."""
    slots, lengths = _padded([clip.clip.slots for clip in clips])
    languages, written = [clip.language for clip in clips], [clip.written for clip in clips]
    contexts = [clip.options.context for clip in clips]
    return clips[0].model.read_prompts(slots, lengths, languages, written, contexts)[0]


def _padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Audio tokens (S_i, H) of several clips → (B, S, H), zeros behind each end, and their lengths (B,)."""
    lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
    return pad_sequence(list(rows), batch_first=True), lengths


def rounded(positions: int) -> int:
    """The next multiple of CANVAS_STEP."""
    return math.ceil(positions / CANVAS_STEP) * CANVAS_STEP


def fitted_canvas(slots: int, draft: int | None) -> int:
    """Tokens a canvas needs: a fifth more than the draft and some, or one a slot (CTC's own limit) without a draft."""
    room = slots + 2 if draft is None else min(slots + 2, math.ceil(1.2 * draft) + 4)
    return rounded(room)
