"""From audio tokens to transcripts: what a canvas starts with, on which engine it is denoised, what follows a full one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from .ctc import DraftToken, TokenSpan
from .denoise import DenoiseOptions, cut_at_end
from .draft_prior import Heard, Prior, draft_prior
from .edits import edit_layout
from .engine import Finished, Job, run_fast, run_reference
from .lm_head import logprobs_of
from .noise import uniform_canvas
from .objective import write_canvas
from .prompt import AUTO
from .words import pieces

if TYPE_CHECKING:
    from .backbone import Prefill
    from .model import DiffusionGemmaASR

CANVAS_STEP = 8  # canvases are rounded up to a multiple, so that utterances of like length share a batch

Start = Literal["noise", "draft"]
EngineName = Literal["reference", "fast"]


class Shown(NamedTuple):
    """A piece of the text on a canvas, and how sure the denoiser is of it: e^-entropy, 1 where one token alone is likely."""

    text: str
    confidence: float


OnStep = Callable[[int, list[list[Shown]]], None]


@dataclass(frozen=True)
class Decoded:
    """What the model made of one clip.

    tokens and their log-probabilities (nats, at temperature 1, in the last pass; of tokens that a speller's draft had, those
    of their characters, if they are lower); draft: the CTC head's transcript, which the canvas' length comes from, and
    draft_tokens, its tokens; steps: denoising passes used, over all canvases;
    spans: where CTC places the tokens, None where that was not asked for or there are more tokens than slots; language: the
    code that was asked for, or the one that was found.
    """

    text: str
    tokens: list[int]
    logprobs: list[float]
    draft: str
    steps: int
    draft_tokens: list[DraftToken]
    spans: list[TokenSpan] | None = None
    language: str = "en"

    def as_drafted(self) -> Decoded:
        """The draft in place of what was denoised."""
        drafted = self.draft_tokens
        logprobs = [math.log(max(token.probability, 1e-10)) for token in drafted]
        spans = [TokenSpan(token.start, token.end, value) for token, value in zip(drafted, logprobs, strict=True)]
        return replace(self, text=self.draft, tokens=[token.id for token in drafted], logprobs=logprobs, spans=spans)


class _Canvas(NamedTuple):
    """What stands on a denoised canvas before its end, and whether it is full: has no end, and its last place is used."""

    tokens: list[int]
    logprobs: list[float]
    steps: int
    full: bool


class Decoding:
    """Some clips on their way from audio tokens to transcripts.

    Args:
        model: that made the slots.
        slots: (B, S, H); slot_lengths: (B,).
        languages: one a row; where it is AUTO, the canvas begins with a marker (`PromptBuilder.marker`). The language is the
            one whose marker stands there. Where none of `among` does, it is the one whose marker the backbone, read as an
            autoregressive model, finds likeliest behind the prompt.
        options, seed, canvas_length, start: see `DiffusionGemmaASR.transcribe_batch`.
        among: codes that AUTO may find.
        context: see `prompt.context_of`.
        drafts: see `DiffusionGemmaASR.transcribe_slots`.
    """

    def __init__(
        self, model: DiffusionGemmaASR, slots: Tensor, slot_lengths: Tensor, languages: Sequence[str],
        options: DenoiseOptions, seed: int, canvas_length: int | None, start: Start, among: Sequence[str] = (),
        context: str = "", drafts: Sequence[list[DraftToken]] | None = None,
    ):  # fmt: skip
        self.model, self.slots, self.slot_lengths, self.languages = model, slots, slot_lengths, languages
        self.options, self.canvas_length, self.start, self.among = options, canvas_length, start, among
        self.context = context
        self.counts: list[int] = slot_lengths.tolist()
        self.heard: Heard | None = None
        if start == "draft" and (model.draft_weight > 0 or model.lm is not None):
            self.heard = model.hear(slots)
        spelled = drafts if start == "draft" else None
        self.spelled = spelled is not None
        if spelled is not None:
            self.drafts = list(spelled)
        elif self.heard is not None:
            self.drafts = self.heard.draft(slot_lengths, model.blank, model.lm)
        else:
            self.drafts = model.draft(slots, slot_lengths)
        self.generators = [torch.Generator(model.device).manual_seed(seed) for _ in self.counts]
        self.canvases: list[list[_Canvas]] = [[] for _ in self.counts]  # of each row, denoised
        self.found = [None if language == AUTO else language for language in languages]  # of each row, once it is known

    def run(
        self, engine: EngineName, rows: int, on_step: OnStep | None = None, on_done: Callable[[int], None] | None = None
    ) -> list[Decoded]:
        """Denoises canvas after canvas until no transcript fills its last one, or has a token for each slot."""
        unfinished = list(range(len(self.counts)))
        while unfinished:
            full = []
            for row, found in self._denoise(unfinished, engine, rows, on_step):
                self.canvases[row].append(self._read(row, found))
                if self.canvases[row][-1].full and len(self._written(row)) < self.counts[row]:
                    full.append(row)
                elif on_done is not None:
                    on_done(row)
            unfinished = full
        return [self._decoded(row) for row in range(len(self.counts))]

    def _denoise(
        self, rows: Sequence[int], engine: EngineName, at_once: int, on_step: OnStep | None
    ) -> Iterator[tuple[int, Finished]]:
        """One canvas of each of these rows."""
        jobs = [self._next_job(row) if self.canvases[row] else self._first_job(row) for row in rows]

        def read(wanted: Sequence[int]) -> Prefill:
            chosen = [rows[job] for job in wanted]
            lengths = self.slot_lengths[chosen]
            slots = self.slots[chosen, : int(lengths.max())]
            written = [[*self._lead(row), *self._written(row)] if self.canvases[row] else [] for row in chosen]
            languages = [self.languages[row] for row in chosen]
            return self.model.read_prompts(slots, lengths, languages, written, self.context)[0]

        if engine == "reference" or on_step is not None:
            shown = None if on_step is None else self._shown(on_step)
            finished = run_reference(self.model.backbone, jobs, read, self.options, at_once, shown)
        else:
            finished = run_fast(self.model.backbone, jobs, read, self.options, at_once)
        for job, found in finished:
            yield rows[job], found

    def _first_job(self, row: int) -> Job:
        draft, slots = self.drafts[row], self.counts[row]
        if self.start == "noise":
            fitting = fitted_canvas(slots, len(draft) if self.model.drafts else None)
            return self._random_job(row, rounded(fitting + self._lead_size(row)))
        return self._draft_job(row, draft)

    def _next_job(self, row: int) -> Job:
        """For what a full canvas had no room for."""
        written = len(self._written(row))
        left = max(0, len(self.drafts[row]) - written) if self.model.drafts else None
        return self._random_job(row, fitted_canvas(self.counts[row] - written, left))

    def _random_job(self, row: int, fitting: int) -> Job:
        generator, length = self.generators[row], self.canvas_length or fitting
        canvas = uniform_canvas(1, length, self.model.backbone.vocab_size, generator, self.model.device)
        return Job(canvas[0], generator)

    def _draft_job(self, row: int, draft: Sequence[DraftToken]) -> Job:
        """The draft, laid out for corrections (edits.py)."""
        special = self.model.prompts.special
        lead = [self.model.blank] * self._lead_size(row)
        layout = [*lead, *edit_layout([token.id for token in draft], self.model.blank), special["end_of_turn"]]
        canvas = write_canvas([layout], self.canvas_length or rounded(len(layout)), special["eos"])
        return Job(canvas[0].to(self.model.device), self.generators[row], self._prior(row, draft, canvas.shape[1]))

    def _prior(self, row: int, draft: Sequence[DraftToken], size: int) -> Prior | None:
        model = self.model
        if self.heard is None or model.draft_weight == 0:
            return None
        heard = Heard(*(part[row, : self.counts[row]] for part in self.heard))
        told = self._lead_size(row), size, model.blank, model.draft_weight, model.lm, self.spelled
        return draft_prior(heard, draft, *told)

    def _written(self, row: int) -> list[int]:
        return [token for canvas in self.canvases[row] for token in canvas.tokens]

    def _lead_size(self, row: int) -> int:
        """Positions before the transcript on a row's first canvas."""
        return len(self.model.prompts.markers["en"]) if self.languages[row] == AUTO else 0

    def _lead(self, row: int) -> list[int]:
        """What stands before the transcript where the prompt does not name the language, which is known by now."""
        code = self.found[row]
        return self.model.prompts.marker(code) if self.languages[row] == AUTO and code is not None else []

    def _read(self, row: int, found: Finished) -> _Canvas:
        lead = 0 if self.canvases[row] else self._lead_size(row)
        if lead:
            marked = found.canvas[:lead].tolist()
            codes = [code for code in self.among if self.model.prompts.markers[code] == marked]
            self.found[row] = codes[0] if codes else self._likeliest(row)
        (written,) = cut_at_end(found.canvas[None, lead:], self.model.prompts.end_ids)
        kept = [place for place, token in enumerate(written) if token != self.model.blank]
        logprobs = found.logprobs[lead:].tolist()
        if self.spelled and not self.canvases[row]:  # with a prior so sure, the denoiser's own probabilities say little
            for place, token in zip(range(1, len(written), 2), self.drafts[row], strict=False):
                if written[place] == token.id:
                    logprobs[place] = min(logprobs[place], math.log(max(token.probability, 1e-10)))
        full = 0 < len(written) == len(found.canvas) - lead and written[-1] != self.model.blank
        return _Canvas([written[i] for i in kept], [logprobs[i] for i in kept], found.steps, full)

    def _likeliest(self, row: int) -> str:
        """The language whose marker is likeliest as the first tokens behind the prompt."""
        markers = torch.tensor([self.model.prompts.markers[code] for code in self.among], device=self.model.device)
        count, size = markers.shape
        lengths = self.slot_lengths[row].expand(count)
        slots = self.slots[row, : self.counts[row]].expand(count, -1, -1)
        _, hidden = self.model.read_prompts(slots, lengths, [AUTO] * count, markers.tolist(), self.context)
        before = hidden[:, -size - 1 : -1].flatten(0, 1)  # prompts are of one length here
        backbone = self.model.backbone
        logprobs = logprobs_of(before, backbone.lm_head_weight, backbone.softcap, markers.flatten())
        return self.among[int(logprobs.view(count, size).sum(1).argmax())]

    def _decoded(self, row: int) -> Decoded:
        tokens = self._written(row)
        draft = self.model.text([token.id for token in self.drafts[row]])
        logprobs = [value for canvas in self.canvases[row] for value in canvas.logprobs]
        steps = sum(c.steps for c in self.canvases[row])
        text, language = self.model.text(tokens), self.found[row]
        assert language is not None  # the first canvas has told
        return Decoded(text, tokens, logprobs, draft, steps, self.drafts[row], language=language)

    def _shown(self, on_step: OnStep) -> Callable[[int, Tensor, Tensor], None]:
        def show(step: int, canvas: Tensor, entropy: Tensor) -> None:
            rows = zip(cut_at_end(canvas, self.model.prompts.end_ids), (-entropy).exp().tolist(), strict=True)
            on_step(step, [self._pieces(row, sure) for row, sure in rows])

        return show

    def _pieces(self, row: Sequence[int], confidence: Sequence[float]) -> list[Shown]:
        """What is on a canvas; a gap in the layout of a draft is nothing."""
        kept = [place for place, token in enumerate(row) if token != self.model.blank]
        found = pieces([row[i] for i in kept], self.model.text)
        return [Shown(text, min(confidence[kept[i]] for i in own)) for text, own in found]


def rounded(positions: int) -> int:
    """The next multiple of CANVAS_STEP."""
    return math.ceil(positions / CANVAS_STEP) * CANVAS_STEP


def fitted_canvas(slots: int, draft: int | None) -> int:
    """Tokens a canvas needs: a fifth more than the draft and some, or one a slot (CTC's own limit) without a draft."""
    room = slots + 2 if draft is None else min(slots + 2, math.ceil(1.2 * draft) + 4)
    return rounded(room)
