"""How a model turns clips into text: the options of decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import AsrError
from ..languages import AUTO, language_code
from ..model.config import Start
from ..model.prompt import context_of
from ..strict import check_types, option
from .steps import DenoiseOptions

if TYPE_CHECKING:
    from ..model.model import DiffusionGemmaASR

DEFAULT_STEPS = 8
MAX_SEED = 1 << 53  # below which every whole number is exact in JSON
MAX_CANDIDATES = 256  # each takes memory before the first is read


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
        None,
        "First canvas: random tokens, or the CTC draft. ctc: what CTC hears is the text, nothing is denoised.",
        show_default="as the checkpoint was trained",
    )
    seed: int = option(0, "Of the random draws; the same seed gives the same transcript.")
    candidates: int | None = option(
        None,
        "Transcripts of which the backbone chooses one: drafts by CTC, or where canvases start from noise, seeds.",
        min=1,
        max=MAX_CANDIDATES,
        show_default="the checkpoint's for drafts, else 1",
    )
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
        if self.candidates is not None and not 1 <= self.candidates <= MAX_CANDIDATES:
            raise AsrError(f"candidates is {self.candidates}; it must be from 1 to {MAX_CANDIDATES}")
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

    def codes_among(self, known: tuple[str, ...]) -> tuple[str, ...]:
        """The codes among which the language is to be found, of a model that knows these; one alone is the language."""
        return known if self.codes == (AUTO,) else self.codes

    def check(self, model: DiffusionGemmaASR, languages: Sequence[str] | None = None) -> tuple[str, ...]:
        """Those of `codes_among`, if the model can do what is asked.

        Args:
            model: that is to decode.
            languages: of each clip, where they are known and the options' language does not count.

        Raises:
            AsrError: the model was not trained for what is asked, or the context is too long for it.
        """
        config = model.config
        known = ", ".join(config.languages)
        codes = self.codes_among(config.languages)
        if odd := [code for code in languages or codes if code not in config.languages]:
            raise AsrError(f"the model {config.name} was not trained for language {odd[0]!r}; it knows {known}")
        if len(codes) > 1 and languages is None and not config.finds_language:
            raise AsrError(f"the model {config.name} was not trained to find the language; name one of {known}")
        if self.context and not config.reads_context:
            raise AsrError(
                f"the model {config.name} was not trained to read context in its prompt; "
                "leave out initial_prompt and hotwords"
            )
        model.check_context(self.context)
        return codes
