"""The command line, in process: standard input, progress, and what an interruption leaves behind."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from cli_runs import Impatient, Loader, Outcome, Run, loader, model, run, sound  # noqa: F401
from rich.console import Console
from sounds import tone, write, write_wav
from spoken import PitchModel, SoundModel

import diffusion_gemma_asr as asr
from diffusion_gemma_asr.app import terminal
from diffusion_gemma_asr.transcribe.recognizer import Recognizer

# -- standard input, progress ----------------------------------------------------------------------------------


def test_standard_input(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for output in ((), ("-o", tmp_path / "out")):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(write_wav(tone(440, 0.5)))))
        outcome = run("transcribe", "-", *output)
        assert outcome.status == 0 and outcome.out == ("" if output else "440 hertz\n")
    assert (tmp_path / "out" / "stdin.txt").read_text() == "440 hertz\n"
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"")))
    assert run("transcribe", "-").status == 1


PIPE_BYTES = 65_536


def test_standard_input_is_a_stream(run: Run, model: SoundModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read as it comes: what was said is transcribed before the end is there."""
    pause = np.zeros(16_000, np.float32)
    sound = np.concatenate([part for hertz in (400, 500, 600) for part in (tone(hertz, 8.0), pause)])
    whole = write_wav(sound)

    class Pipe(io.BytesIO):
        """Not seekable, gives what a pipe holds at a time; notes what was transcribed when its last byte was read."""

        transcribed = -1

        def seekable(self) -> bool:
            return False

        def read(self, size: int | None = -1) -> bytes:
            data = super().read(min(size or PIPE_BYTES, PIPE_BYTES))
            if super().tell() == len(whole) and self.transcribed < 0:
                self.transcribed = model.calls
            return data

        read1 = read  # type: ignore[assignment]

        def seek(self, *_: int) -> int:
            raise io.UnsupportedOperation("seek")

        def tell(self) -> int:
            raise io.UnsupportedOperation("tell")

    pipe = Pipe(whole)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=pipe))
    outcome = run("transcribe", "-", "--batch_size", "1")
    assert outcome.out == "400 hertz\n500 hertz\n600 hertz\n"
    assert pipe.transcribed > 0


def test_progress_in_lines(run: Run, sound: Path) -> None:
    lines = run("transcribe", sound, "--print_progress").err.splitlines()
    assert lines[0].startswith("progress: 100.0 %, ") and lines[0].endswith("s left")


def test_the_canvas_can_be_watched(run: Run, sound: Path) -> None:
    outcome = run("transcribe", sound, sound, "--watch")
    assert outcome.out == f"{sound}\t440 hertz\n" * 2
    shown = [line for line in outcome.err.splitlines() if line.startswith(" 0  ")]
    assert [line.split() for line in shown] == [["0", "440", "hertz"]] * 2


def test_the_bar_shows_speed_and_time_left() -> None:
    screen = io.StringIO()
    bar = terminal.Bar(60.0, lines=False, console=Console(file=screen, force_terminal=True, width=100))
    bar.update(asr.Progress(10.0, 20.0))
    bar.next_run()
    bar.update(asr.Progress(10.0, 25.0))
    with bar.aside():
        pass
    bar.close()
    assert "30 of 60 s" in screen.getvalue() and "times real time" in screen.getvalue()


def test_verbose_shows_segments_on_standard_error(run: Run, sound: Path) -> None:
    outcome = run("transcribe", sound, "--verbose")
    assert outcome.out == "440 hertz\n"
    assert "[00:00.000 --> 00:00.500] 440 hertz (mean log-probability -0.50, speech 1.00)" in outcome.err


# -- Ctrl-C ----------------------------------------------------------------------------------------------------


def recording(path: Path, pitches: Sequence[float] = (400, 500, 600, 700, 800)) -> Path:
    """Tones of 2 s with a second of silence behind each."""
    pause = np.zeros(16_000, np.float32)
    return write(path, np.concatenate([part for hertz in pitches for part in (tone(hertz, 2.0), pause)]))


ONE_BY_ONE = ("--batch_size", "1", "-f", "json", "--word_timestamps")


@pytest.mark.parametrize("clips", ["", "0,5,6,9,12"])
@pytest.mark.parametrize("patience", [0, 1, 2, 3])
def test_an_interrupted_run_goes_on(run: Run, tmp_path: Path, patience: int, clips: str) -> None:
    """Whenever it is interrupted, both runs together write what one would have written, and hear little twice."""
    files = [recording(tmp_path / "long.wav"), recording(tmp_path / "other.wav", (440, 880))]
    chosen = (*ONE_BY_ONE, *(("--clip_timestamps", clips) if clips else ()))
    run("transcribe", *files, *chosen, "-o", tmp_path / "whole", load=Loader(PitchModel()))
    command, folder = ("transcribe", *files, *chosen, "-o", tmp_path / "out"), tmp_path / "out"
    outcome = run(*command, load=Loader(Impatient(patience)))
    assert outcome.status == 130 and "of 2 files are done" in outcome.err and "same command" in outcome.err
    second = PitchModel()
    outcome = run(*command, load=Loader(second))
    assert outcome.status == 0
    assert ("long.wav: goes on at" in outcome.err) == (patience > 0)
    for name in ("long.json", "other.json"):
        assert json.loads((folder / name).read_text()) == json.loads((tmp_path / "whole" / name).read_text())
    assert sorted(path.name for path in folder.iterdir()) == ["long.json", "other.json"]
    whole = PitchModel()
    run(*command, "--overwrite", load=Loader(whole))
    assert sum(map(len, second.batches)) < sum(map(len, whole.batches)) or patience == 0


def test_an_interrupted_run_of_something_else_does_not_go_on(run: Run, tmp_path: Path) -> None:
    """Other options, another model or another recording: from the beginning."""
    sound = recording(tmp_path / "long.wav")
    command = ("transcribe", sound, *ONE_BY_ONE, "-o")
    changes = [("--hotwords", ""), ("--model", "other"), ("--chunk_length", "20"), ()]
    for number, change in enumerate(changes):
        folder = tmp_path / str(number)
        assert run(*command, folder, load=Loader(Impatient(2))).status == 130
        if not change:
            recording(sound, (440, 880))
        outcome = run(*command, folder, *change, load=Loader(PitchModel()))
        assert outcome.status == 0 and "goes on at" not in outcome.err
        assert [path.name for path in folder.iterdir()] == ["long.json"]
    assert json.loads((folder / "long.json").read_text())["text"] == "440 hertz 880 hertz"


def test_a_damaged_file_of_segments(run: Run, tmp_path: Path) -> None:
    """What a kill cut in the middle of a line costs that line alone."""
    sound, folder = recording(tmp_path / "long.wav"), tmp_path / "out"
    command = ("transcribe", sound, *ONE_BY_ONE, "-o", folder)
    run(*command, load=Loader(Impatient(3)))
    (kept,) = folder.iterdir()
    kept.write_bytes(kept.read_bytes()[:-10])
    outcome = run(*command, load=Loader(PitchModel()))
    assert "goes on at" in outcome.err
    assert json.loads((folder / "long.json").read_text())["text"] == "400 hertz 500 hertz 600 hertz 700 hertz 800 hertz"


def test_an_interruption_without_a_folder(run: Run, sound: Path) -> None:
    outcome = run("transcribe", sound, load=Loader(Impatient(0)))
    assert outcome.status == 130 and "0 of 1 files are done: the same command with --output_dir goes on" in outcome.err


def test_an_interruption_before_there_is_anything(run: Run, sound: Path) -> None:
    def load(name: str, **how: object) -> Recognizer:
        raise KeyboardInterrupt

    assert run("transcribe", sound, load=load).status == 130
