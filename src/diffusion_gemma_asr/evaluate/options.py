"""Options of `evaluate`, for Python and the command line."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from ..checkpoint.load import BUNDLED, DEFAULT_MODEL, DTYPE_HELP
from ..errors import AsrError
from ..strict import option
from ..transcribe.recordings import TranscribeOptions


@dataclass(frozen=True)
class EvaluateOptions:
    """How to evaluate. Raises AsrError on impossible values.

    As flat options, on the command line, two fields hide those of the same name in `transcribe.decode`: `steps`, which may
    list several numbers, and `language`, here the language of folders of sounds.
    """

    transcribe: TranscribeOptions = field(default_factory=TranscribeOptions)
    model: str = option(
        DEFAULT_MODEL, f"A bundled model ({', '.join(BUNDLED)}), a checkpoint folder or a hub repository; or a Whisper."
    )
    system: Literal["diffusion", "ctc", "autoregressive", "whisper"] = option(
        "diffusion",
        "diffusion: as `transcribe` does; ctc: the draft alone; autoregressive: the backbone token after token; whisper: a "
        "Whisper with its own decoder.",
    )
    steps: str = option("8", "Denoising steps at most; 1,2,4,8 measures each.")
    device: str = option("auto", "auto, cpu, cuda, cuda:1 or mps.")
    dtype: str = option("auto", DTYPE_HELP)
    encoder: str | None = option(
        None, "Whisper's encoder: a folder or a hub name in place of the one that the model names.", show_default="its own"
    )
    quantization: str | None = option(None, "Packs the backbone's experts, for instance bnb-4bit.", show_default="none")
    language: str = option("en", "Spoken in folders of sounds; manifests and corpora say it themselves.")
    find_language: bool = option(False, "Do not name the language to the model; measures how often it finds it.")
    clips: bool = option(False, "Decode clips of at most 30 s whole, without voice activity detection and thresholds.")

    def __post_init__(self) -> None:
        if self.find_language and self.system != "diffusion":
            raise AsrError(f"find_language is for the system diffusion; leave it out with {self.system}")
        self.sweep()

    def sweep(self) -> dict[int, TranscribeOptions]:
        """The decoding options of each run, by its number of denoising steps.

        Raises:
            AsrError: `steps` is not a list of numbers, or one is less than 1.
        """
        try:
            counts = [int(count) for count in self.steps.split(",")]
        except ValueError:
            raise AsrError(f"steps is {self.steps!r}; give numbers such as 8 or 1,2,4,8") from None
        return {n: replace(self.transcribe, decode=replace(self.transcribe.decode, steps=n)) for n in counts}
