from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from rich.console import Console
from sounds import PitchModel, tone, write, write_wav

import diffusion_gemma_asr as asr
from diffusion_gemma_asr import terminal, transcribe_command
from diffusion_gemma_asr.checkpoint import save_checkpoint
from diffusion_gemma_asr.cli import main
from diffusion_gemma_asr.writers import FORMATS


@dataclass(frozen=True)
class Outcome:
    status: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """The command with these arguments: its exit status and what it printed. A tone passes for speech."""

    def run(*arguments: str | Path) -> Outcome:
        with pytest.raises(SystemExit) as left:
            main([*map(str, arguments), *(["--vad_method", "energy"] if arguments[0] == "transcribe" else [])])
        return Outcome(left.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> PitchModel:
    """The model that the command loads whatever it is asked for."""
    pitch_model = PitchModel()
    monkeypatch.setattr(asr, "load", lambda name, **how: pitch_model)
    return pitch_model


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    return write(tmp_path / "a.wav", tone(440, 0.5))


def test_one_file_prints_its_text_alone(run: Run, model: PitchModel, sound: Path) -> None:
    outcome = run("transcribe", sound)
    assert outcome.out == "440 hertz\n"
    assert outcome.status == 0
    assert outcome.err.startswith("0.5 s of sound in ")


def test_several_files_print_path_and_text_in_order(
    run: Run, model: PitchModel, sound: Path, tmp_path: Path
) -> None:
    silent = write(tmp_path / "silent.flac", np.zeros(16_000, np.float32))
    other = write(tmp_path / "b.ogg", tone(880, 0.3))
    outcome = run("transcribe", other, silent, sound)
    assert outcome.out == f"{other}\t880 hertz\n{silent}\t\n{sound}\t440 hertz\n"
    assert outcome.status == 0


def test_bad_files_are_named_and_the_others_transcribed(
    run: Run, model: PitchModel, sound: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.wav"
    text.write_text("hello")
    empty = tmp_path / "empty.wav"
    empty.touch()
    short = write(tmp_path / "short.wav", tone(440, 0.05))
    nan = write(tmp_path / "nan.wav", np.full(8000, np.nan, np.float32), codec="pcm_f32le")
    missing = tmp_path / "missing.wav"
    bad = [missing, text, tmp_path, empty, short, nan]
    outcome = run("transcribe", *bad[:3], sound, *bad[3:])
    assert outcome.status == 1
    assert outcome.out == f"{sound}\t440 hertz\n"
    complaints = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert complaints.pop() == f"error: 6 of 7 files failed: {', '.join(map(str, bad))}"
    assert len(complaints) == len(bad)
    for path, line in zip(bad, complaints, strict=True):
        assert line.startswith(f"error: {path}: ")
    assert "Traceback" not in outcome.err


def test_a_single_bad_file_prints_no_speed(run: Run, model: PitchModel, tmp_path: Path) -> None:
    path = tmp_path / "missing.wav"
    outcome = run("transcribe", path)
    assert (outcome.status, outcome.out, outcome.err) == (1, "", f"error: {path}: no such file\n")


def test_json_lines(run: Run, model: PitchModel, sound: Path) -> None:
    outcome = run("transcribe", sound, sound, "-f", "json")
    first, second = (json.loads(line) for line in outcome.out.splitlines())
    assert first == second
    assert first["audio"] == str(sound)
    assert first["text"] == "440 hertz"
    assert first["segments"][0]["end"] == 0.5


def test_output_folder(run: Run, model: PitchModel, sound: Path, tmp_path: Path) -> None:
    folder = tmp_path / "made" / "here"
    outcome = run("transcribe", sound, "--output_dir", folder)
    assert (outcome.status, outcome.out) == (0, "")
    assert (folder / "a.txt").read_text() == "440 hertz\n"
    run("transcribe", sound, "-o", folder, "-f", "json")
    assert json.loads((folder / "a.json").read_text())["text"] == "440 hertz"


def test_what_is_there_is_not_done_again(run: Run, model: PitchModel, sound: Path, tmp_path: Path) -> None:
    other, folder = write(tmp_path / "b.wav", tone(880, 0.5)), tmp_path / "out"
    folder.mkdir()
    (folder / "a.srt").write_text("mine")
    outcome = run("transcribe", sound, other, "-o", folder, "-f", "srt")
    assert outcome.status == 0 and "a.srt exists" in outcome.err
    assert (folder / "a.srt").read_text() == "mine" and "880 hertz" in (folder / "b.srt").read_text()
    assert model.batches == [[8_000]]
    run("transcribe", sound, other, "-o", folder, "-f", "all")
    assert {path.name for path in folder.iterdir()} == {f"{name}.{form}" for name in "ab" for form in FORMATS}
    assert (folder / "a.srt").read_text() == "mine"
    run("transcribe", sound, "-o", folder, "-f", "srt", "--overwrite")
    assert "440 hertz" in (folder / "a.srt").read_text()


def test_formats_that_want_a_folder(run: Run, model: PitchModel, sound: Path) -> None:
    assert run("transcribe", sound, "-f", "srt").out.startswith("1\n00:00:00,000 --> 00:00:00,500\n440 hertz\n")
    for arguments in ((sound, "-f", "all"), (sound, sound, "-f", "vtt")):
        outcome = run("transcribe", *arguments)
        assert outcome.status == 2 and "give --output_dir" in " ".join(outcome.err.replace("│", " ").split())


def test_two_inputs_never_share_an_output(run: Run, model: PitchModel, sound: Path, tmp_path: Path) -> None:
    twin = write(tmp_path / "a.flac", tone(880, 0.5))
    outcome = run("transcribe", sound, twin, "-o", tmp_path / "out")
    assert outcome.status == 2
    assert "would both be written" in " ".join(outcome.err.replace("│", " ").split())  # out of its box
    assert model.batches == []


def test_an_output_that_cannot_be_written(run: Run, model: PitchModel, sound: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "a.txt").mkdir(parents=True)
    outcome = run("transcribe", sound, "-o", tmp_path / "out")
    assert outcome.status == 0 and "a.txt exists and is left as it is; --overwrite" in outcome.err
    outcome = run("transcribe", sound, "-o", tmp_path / "out", "--overwrite")
    assert outcome.status == 1 and "a.txt: cannot be written" in outcome.err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.txt"]
    assert run("transcribe", sound, "-o", sound).status == 2  # a file where the folder should be


@pytest.mark.parametrize("style", ["_", "-"])
def test_options_reach_the_model_with_underscores_or_dashes(
    run: Run, model: PitchModel, sound: Path, tmp_path: Path, style: str
) -> None:
    other = write(tmp_path / "b.wav", tone(880, 0.5))
    outcome = run(
        *("transcribe", sound, other, "--language", "de", "--steps", "3", "--seed", "7", "--start", "noise"),
        *(f"--batch{style}size", "1", f"--output{style}format", "json", "--engine", "reference"),
    )
    assert outcome.status == 0
    assert model.calls == [("de", 3, 7, "noise", "reference", 1)] * 2
    assert json.loads(outcome.out.splitlines()[0])["language"] == "de"


def test_defaults_are_those_of_the_library(run: Run, model: PitchModel, sound: Path) -> None:
    run("transcribe", sound)
    assert model.calls == [("auto", 8, 0, None, "fast", 16)]


def test_what_is_loaded(run: Run, model: PitchModel, sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def load(name: str, *, device: str, dtype: str | None, quantization: str | None) -> PitchModel:
        asked.append((name, device, dtype, quantization))
        return model

    monkeypatch.setattr(asr, "load", load)
    run("transcribe", sound)
    run("transcribe", sound, "--model", "folder", "--device", "cpu", "--dtype", "bfloat16")
    run("transcribe", sound, "--compute_type", "float16", "--quantization", "bnb-4bit")
    assert asked == [
        ("mini6", "auto", None, None),
        ("folder", "cpu", "bfloat16", None),
        ("mini6", "auto", "float16", "bnb-4bit"),
    ]


def test_options_of_the_transcript(run: Run, model: PitchModel, tmp_path: Path) -> None:
    sound = write(tmp_path / "long.wav", np.concatenate([tone(hertz, 2.0) for hertz in (400, 500, 600)]))
    assert run("transcribe", sound, "--clip_timestamps", "2,4").out == "500 hertz\n"
    assert run("transcribe", sound, "--clip_timestamps", "0,2,4").out == "400 hertz\n600 hertz\n"
    assert len(run("transcribe", sound, "--chunk_size", "2.5").out.splitlines()) > 2
    whole = json.loads(run("transcribe", sound, "-f", "json", "--word_timestamps", "True").out)
    assert [word["word"].strip() for word in whole["segments"][0]["words"]][1] == "7"
    whole = json.loads(run("transcribe", sound, "-f", "json", "--word_timestamps", "False").out)
    assert whole["segments"][0]["words"] is None
    marked = run("transcribe", sound, "-f", "vtt", "--word_timestamps", "True", "--highlight_words", "True").out
    assert "<u>7</u>" in marked
    narrow = run("transcribe", sound, "-f", "srt", "--word_timestamps", "--max_line_width", "4", "--max_line_count", "1").out
    assert narrow.count("-->") == 2
    wrong = (
        ("--clip_timestamps", "2,1"), ("--clip_timestamps", "a,b"), ("--max_line_count", "2"), ("--highlight_words", "True"),
        ("--vad_onset", "2"), ("--chunk_length", "40"),
    )  # fmt: skip
    for arguments in wrong:
        outcome = run("transcribe", sound, *arguments)
        assert outcome.status == 2 and arguments[0].strip("-") in outcome.err and not outcome.out


def test_standard_input(run: Run, model: PitchModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for output in ((), ("-o", tmp_path / "out")):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(write_wav(tone(440, 0.5)))))
        outcome = run("transcribe", "-", *output)
        assert outcome.status == 0 and outcome.out == ("" if output else "440 hertz\n")
    assert (tmp_path / "out" / "stdin.txt").read_text() == "440 hertz\n"
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"")))
    assert run("transcribe", "-").status == 1


def test_progress_in_lines(run: Run, model: PitchModel, sound: Path) -> None:
    lines = run("transcribe", sound, "--print_progress").err.splitlines()
    assert lines[0].startswith("progress: 100.0 %, ") and lines[0].endswith("s left")


def test_the_canvas_can_be_watched(run: Run, model: PitchModel, sound: Path) -> None:
    outcome = run("transcribe", sound, sound, "--watch")
    assert outcome.out == f"{sound}\t440 hertz\n" * 2
    assert outcome.err.splitlines()[:4] == [" 0   440 hertz", " 1   440 hertz"] * 2


def test_the_bar_shows_speed_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(terminal, "Console", lambda **how: Console(file=screen, force_terminal=True, width=100))
    bar = terminal.Bar(60.0, lines=False)
    bar.update(asr.Progress(30.0, 45.0))
    with bar.aside():
        pass
    bar.close()
    assert "30 of 60 s" in screen.getvalue() and "times real time" in screen.getvalue()


def test_an_interruption_keeps_what_is_done(
    run: Run, model: PitchModel, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, folder = write(tmp_path / "b.wav", tone(880, 0.5)), tmp_path / "out"
    render = transcribe_command.render

    def interrupted(transcript: asr.Transcript, *others: object) -> str:
        if transcript.text.startswith("880"):
            raise KeyboardInterrupt
        return render(transcript, *others)

    monkeypatch.setattr(transcribe_command, "render", interrupted)
    outcome = run("transcribe", sound, other, "-o", folder)
    assert outcome.status == 130 and "1 of 2 files are done" in outcome.err
    assert [path.name for path in folder.iterdir()] == ["a.txt"]


def test_threads(run: Run, model: PitchModel, sound: Path) -> None:
    before = torch.get_num_threads()
    try:
        run("transcribe", sound, "--threads", "3")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_verbose_shows_segments_on_standard_error(run: Run, model: PitchModel, sound: Path) -> None:
    outcome = run("transcribe", sound, "--verbose")
    assert outcome.out == "440 hertz\n"
    assert "[00:00.000 --> 00:00.500] 440 hertz (mean log-probability -0.50, speech 1.00)" in outcome.err


def test_errors_of_the_model_are_one_line(run: Run, model: PitchModel, sound: Path) -> None:
    outcome = run("transcribe", sound, "--language", "xx")
    assert (outcome.status, outcome.out) == (1, "")
    assert outcome.err == "error: language xx is not one of en, de\n"


def test_a_model_that_cannot_be_loaded(run: Run, sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = run("transcribe", sound, "--device", "abacus")
    assert outcome.status == 1
    assert outcome.err.startswith("error: device abacus cannot be used")

    def load(name: str, **how: object) -> None:
        raise asr.CheckpointError("folder/config.json: no such file")

    monkeypatch.setattr(asr, "load", load)
    outcome = run("transcribe", sound)
    assert (outcome.status, outcome.err) == (1, "error: folder/config.json: no such file\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["transcribe"],
        ["transcribe", "a.wav", "--steps", "0"],
        ["transcribe", "a.wav", "--batch_size", "0"],
        ["transcribe", "a.wav", "-f", "docx"],
        ["transcribe", "a.wav", "--colour"],
        ["sing"],
        ["info"],
        ["train"],
    ],
)
def test_misuse_is_status_2(run: Run, arguments: list[str]) -> None:
    outcome = run(*arguments)
    assert outcome.status == 2
    assert outcome.out == "" and outcome.err


def test_version(run: Run) -> None:
    assert run("--version") == Outcome(0, f"diffusion-gemma-asr {asr.__version__}\n", "")


def test_help_names_every_command(run: Run) -> None:
    outcome = run("--help")
    assert outcome.status == 0
    for command in ("transcribe", "train", "info"):
        assert command in outcome.out


def test_info_and_train_call_their_modules(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[Path] = []

    def train_from_recipe(path: Path) -> None:
        if path.name == "bad.yaml":
            raise asr.RecipeError("bad.yaml: steps is -1")
        trained.append(path)

    info, adapter, baseline = ModuleType("info"), ModuleType("adapter"), ModuleType("baseline")
    baselines: list[Path] = []
    info.render = lambda recipe: f"table of {recipe}"  # type: ignore[attr-defined]
    adapter.train_from_recipe = train_from_recipe  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "diffusion_gemma_asr.info", info)
    baseline.is_baseline = lambda path: path.name == "whisfusion.yaml"  # type: ignore[attr-defined]
    baseline.train_baseline_from_recipe = baselines.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "diffusion_gemma_asr.train.adapter", adapter)
    monkeypatch.setitem(sys.modules, "diffusion_gemma_asr.train.baseline", baseline)
    assert run("info", "--recipe", "small") == Outcome(0, "table of small\n", "")
    assert run("train", "small.yaml").status == 0
    assert run("train", "whisfusion.yaml").status == 0
    assert (trained, baselines) == ([Path("small.yaml")], [Path("whisfusion.yaml")])
    assert run("train", "bad.yaml") == Outcome(1, "", "error: bad.yaml: steps is -1\n")


def test_a_real_checkpoint_with_random_weights(
    run: Run, sound: Path, tmp_path: Path, whisper_folder: Path, backbone_folder: Path
) -> None:
    recipe = tiny.model_recipe(whisper_folder, backbone_folder)
    checkpoint = save_checkpoint(tiny.build_model(recipe), tmp_path / "checkpoint", recipe)
    stereo = write(
        tmp_path / "stereo.mp3", np.stack([tone(440, 1.0, 44_100), tone(880, 1.0, 44_100)]), 44_100
    )
    command = (
        "transcribe",
        sound,
        stereo,
        "--model",
        checkpoint,
        "--device",
        "cpu",
        "--steps",
        "2",
        "--language",
        "en",
        "-f",
        "json",
    )
    both = run(*command)
    assert both.status == 0, both.err
    first, second = (json.loads(line) for line in both.out.splitlines())
    assert first["segments"][0]["tokens"] != second["segments"][0]["tokens"]
    assert run(*command).out == both.out


def test_help_does_not_import_torch() -> None:
    code = "import sys, diffusion_gemma_asr.cli; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_package_is_a_command() -> None:
    command = [sys.executable, "-m", "diffusion_gemma_asr", "--version"]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.startswith("diffusion-")
