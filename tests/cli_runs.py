"""Running the command line in process, with a model that hears tones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from sounds import tone, write
from spoken import PitchModel, Sound, SoundModel

from diffusion_gemma_asr.app.cli import main
from diffusion_gemma_asr.model.drafts import Encoded
from diffusion_gemma_asr.transcribe.recognizer import Recognizer


@dataclass(frozen=True)
class Outcome:
    status: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """Standard error without the box that usage errors stand in."""
        return " ".join(self.err.replace("│", " ").split())


@dataclass
class Loader:
    """Stands in for `asr.load`: gives its model whatever it is asked for."""

    model: SoundModel = field(default_factory=PitchModel)
    asked: list[tuple[object, ...]] = field(default_factory=list)

    def __call__(self, name: str, *, device: str, dtype: str, quantization: str | None, encoder: str | None) -> Recognizer:
        self.asked.append((name, device, dtype, quantization, encoder))
        return Recognizer(self.model)  # type: ignore[arg-type]


class Impatient(PitchModel):
    """Somebody presses Ctrl-C when it is about to hear a sound for the nth time."""

    def __init__(self, patience: int):
        super().__init__()
        self.patience = patience

    def encode(self, audio: Sequence[Sound]) -> Encoded:
        if self.calls == self.patience:
            raise KeyboardInterrupt
        return super().encode(audio)


Run = Callable[..., Outcome]


@pytest.fixture
def loader() -> Loader:
    return Loader()


@pytest.fixture
def model(loader: Loader) -> SoundModel:
    return loader.model


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], loader: Loader) -> Run:
    """The command with these arguments: its exit status and what it printed. A tone passes for speech."""

    def run(*arguments: str | Path, load: Callable[..., Recognizer] | None = loader) -> Outcome:
        with pytest.raises(SystemExit) as left:
            main([*map(str, arguments), *(["--vad_method", "energy"] if arguments[0] == "transcribe" else [])], load)
        return Outcome(left.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    return write(tmp_path / "a.wav", tone(440, 0.5))
