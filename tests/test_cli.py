"""The command line, in process: exit statuses, what is printed and written, what an interruption leaves behind."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from cli_runs import Impatient, Loader, Outcome, Run, loader, model, run, sound  # noqa: F401
from sounds import tone, write
from spoken import PitchModel, SoundModel

import diffusion_gemma_asr as asr
from diffusion_gemma_asr.app import terminal
from diffusion_gemma_asr.checkpoint.save import save_checkpoint
from diffusion_gemma_asr.transcribe.recognizer import Recognizer
from diffusion_gemma_asr.transcribe.writers import FORMATS

# -- what is printed and written -------------------------------------------------------------------------------


def test_one_file_prints_its_text_alone(run: Run, sound: Path) -> None:
    outcome = run("transcribe", sound)
    assert outcome.out == "440 hertz\n"
    assert outcome.status == 0
    assert outcome.err.startswith("0.5 s of sound in ")


def test_several_files_print_path_and_text_in_order(run: Run, sound: Path, tmp_path: Path) -> None:
    silent = write(tmp_path / "silent.flac", np.zeros(16_000, np.float32))
    other = write(tmp_path / "b.ogg", tone(880, 0.3))
    outcome = run("transcribe", other, silent, sound)
    assert outcome.out == f"{other}\t880 hertz\n{silent}\t\n{sound}\t440 hertz\n"
    assert outcome.status == 0


def test_bad_files_are_named_and_the_others_transcribed(run: Run, sound: Path, tmp_path: Path) -> None:
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


def test_a_single_bad_file_prints_no_speed(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "missing.wav"
    outcome = run("transcribe", path)
    assert (outcome.status, outcome.out, outcome.err) == (1, "", f"error: {path}: no such file\n")


def test_json_lines(run: Run, sound: Path) -> None:
    outcome = run("transcribe", sound, sound, "-f", "json")
    first, second = (json.loads(line) for line in outcome.out.splitlines())
    assert first == second
    assert first["audio"] == str(sound)
    assert first["text"] == "440 hertz"
    assert first["segments"][0]["end"] == 0.5


def test_output_folder(run: Run, sound: Path, tmp_path: Path) -> None:
    folder = tmp_path / "made" / "here"
    outcome = run("transcribe", sound, "--output_dir", folder)
    assert (outcome.status, outcome.out) == (0, "")
    assert (folder / "a.txt").read_text() == "440 hertz\n"
    run("transcribe", sound, "-o", folder, "-f", "json")
    assert json.loads((folder / "a.json").read_text())["text"] == "440 hertz"
    assert sorted(path.name for path in folder.iterdir()) == ["a.json", "a.txt"]


def test_what_is_there_is_not_done_again(run: Run, model: SoundModel, sound: Path, tmp_path: Path) -> None:
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


def test_formats_that_want_a_folder(run: Run, sound: Path) -> None:
    assert run("transcribe", sound, "-f", "srt").out.startswith("1\n00:00:00,000 --> 00:00:00,500\n440 hertz\n")
    for arguments in ((sound, "-f", "all"), (sound, sound, "-f", "vtt")):
        outcome = run("transcribe", *arguments)
        assert outcome.status == 2 and "give --output_dir" in outcome.complaint


def test_two_inputs_never_share_an_output(run: Run, loader: Loader, sound: Path, tmp_path: Path) -> None:
    twin = write(tmp_path / "a.flac", tone(880, 0.5))
    outcome = run("transcribe", sound, twin, "-o", tmp_path / "out")
    assert outcome.status == 2
    assert "would both be written" in outcome.complaint
    assert loader.asked == []


def test_an_output_that_cannot_be_written(run: Run, sound: Path, tmp_path: Path) -> None:
    other, folder = write(tmp_path / "b.wav", tone(880, 0.5)), tmp_path / "out"
    (folder / "a.txt").mkdir(parents=True)
    outcome = run("transcribe", sound, "-o", folder)
    assert outcome.status == 0 and "a.txt exists and is left as it is; --overwrite" in outcome.err
    outcome = run("transcribe", sound, other, "-o", folder, "--overwrite")
    assert outcome.status == 1 and "a.txt: cannot be written" in outcome.err
    assert outcome.err.endswith(f"error: 1 of 2 files failed: {sound}\n")
    assert sorted(path.name for path in folder.iterdir()) == ["a.txt", "b.txt"]  # the other is made, nothing is left over
    assert run("transcribe", sound, "-o", sound).status == 2  # a file where the folder should be


def test_names_that_are_no_text_or_very_long(run: Run, sound: Path, tmp_path: Path) -> None:
    odd, long = Path(os.fsdecode(os.fsencode(tmp_path / "M") + b"\xfcller.wav")), tmp_path / f"{'l' * 245}.wav"
    for name in (odd, long):
        shutil.copy(sound, name)
    folder = tmp_path / "out"
    outcome = run("transcribe", odd, long, sound, "-o", folder, "-f", "json")
    assert "Traceback" not in outcome.err
    written = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in folder.iterdir()}
    assert written.keys() - {f"{odd.stem}.json"} == {f"{'l' * 245}.json", "a.json"}
    assert written["a.json"]["text"] == "440 hertz"
    if odd.with_suffix(".json").name in written:
        assert written[f"{odd.stem}.json"]["audio"].endswith("M\ufffdller.wav")


def test_standard_output_takes_every_text(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for encoding in ("ascii", "cp1252"):
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
        terminal.replace_unprintable()
        terminal.print_out("沿着河 old\n")
        terminal.print_out(os.fsdecode(b"M\xfcller.wav\n"))
        assert written.getvalue() == b"??? old\nM\xfcller.wav\n"
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"standard output is {encoding}, which lacks some characters")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device that is always full")
def test_a_full_standard_output_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "diffusion_gemma_asr", "--version"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == f"error: standard output: cannot be written ({os.strerror(errno.ENOSPC)}); send it elsewhere\n"


# -- options ---------------------------------------------------------------------------------------------------


def test_what_is_loaded(run: Run, loader: Loader, sound: Path) -> None:
    run("transcribe", sound)
    run("transcribe", sound, "--model", "folder", "--device", "cpu", "--dtype", "bfloat16")
    run("transcribe", sound, "--compute_type", "float16", "--quantization", "bnb-4bit")
    run("transcribe", sound, "--model", "base", "--encoder", "models/whisper-base")
    assert loader.asked == [
        ("mini", "auto", "auto", None, None),
        ("folder", "cpu", "bfloat16", None, None),
        ("mini", "auto", "float16", "bnb-4bit", None),
        ("base", "auto", "auto", None, "models/whisper-base"),
    ]


@pytest.mark.parametrize("style", ["_", "-"])
def test_underscores_and_dashes(run: Run, sound: Path, tmp_path: Path, style: str) -> None:
    other, model = write(tmp_path / "b.wav", tone(880, 0.5)), PitchModel(languages=("en", "de"))
    options = ("--language", "de", f"--batch{style}size", "1", f"--output{style}format", "json")
    outcome = run("transcribe", sound, other, *options, load=Loader(model))
    assert outcome.status == 0
    assert [len(batch) for batch in model.batches] == [1, 1]
    assert [json.loads(line)["language"] for line in outcome.out.splitlines()] == ["de", "de"]


def test_options_of_the_transcript(run: Run, tmp_path: Path) -> None:
    loader = Loader(PitchModel())
    sound = write(tmp_path / "long.wav", np.concatenate([tone(hertz, 2.0) for hertz in (400, 500, 600)]))

    def written(*arguments: str) -> Outcome:
        return run("transcribe", sound, *arguments, load=loader)

    assert written("--clip_timestamps", "2,4").out == "500 hertz\n"
    assert written("--clip_timestamps", "0,2,4").out == "400 hertz\n600 hertz\n"
    assert len(written("--chunk_size", "2.5").out.splitlines()) > 2
    whole = json.loads(written("-f", "json", "--word_timestamps", "True").out)
    assert [word["word"].strip() for word in whole["segments"][0]["words"]][1] == "hertz"
    for flag in (["--word_timestamps", "False"], ["--word-timestamps=False"], []):
        assert json.loads(written("-f", "json", *flag).out)["segments"][0]["words"] is None
    marked = written("-f", "vtt", "--word_timestamps", "True", "--highlight_words", "True").out
    assert "<u>hertz</u>" in marked
    assert written("--task", "transcribe").status == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["--clip_timestamps", "2,1"],
        ["--clip_timestamps", "a,b"],
        ["--clip_timestamps", "nan"],
        ["--highlight_words", "True"],
        ["--vad_onset", "2"],
        ["--chunk_length", "40"],
        ["--language", "xx"],
        ["--task", "translate"],
        ["--device", "abacus"],
        ["--dtype", "int3"],
        ["--quantization", "bnb-3bit"],
        ["--start", "nowhere"],
        ["--steps", "0"],
        ["--batch_size", "0"],
        ["--output_format", "docx"],
        ["--colour"],
    ],
)
def test_impossible_values_are_misuse(run: Run, loader: Loader, sound: Path, arguments: list[str]) -> None:
    outcome = run("transcribe", sound, *arguments)
    assert outcome.status == 2 and not outcome.out
    assert arguments[0].strip("-") in outcome.complaint.replace("-f", "output_format")
    assert loader.asked == []  # before anything is loaded


@pytest.mark.parametrize(
    "arguments", [["transcribe"], ["sing"], ["info"], ["train"], ["evaluate", "--out", "x"], ["compare"]]
)
def test_misuse_is_status_2(run: Run, arguments: list[str]) -> None:
    outcome = run(*arguments)
    assert outcome.status == 2
    assert outcome.out == "" and outcome.err


def test_errors_of_the_model_are_one_line(run: Run, sound: Path) -> None:
    outcome = run("transcribe", sound, "--language", "hi")
    assert (outcome.status, outcome.out) == (1, "")
    assert outcome.err.startswith("error: the model fake was not trained for language 'hi'") and outcome.err.count("\n") == 1


def test_a_model_that_cannot_be_loaded(run: Run, sound: Path) -> None:
    def load(name: str, **how: object) -> Recognizer:
        raise asr.CheckpointError("folder/config.json: no such file")

    outcome = run("transcribe", sound, load=load)
    assert (outcome.status, outcome.err) == (1, "error: folder/config.json: no such file\n")


def test_threads(run: Run, sound: Path) -> None:
    before = torch.get_num_threads()
    try:
        run("transcribe", sound, "--threads", "3")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


# -- the other commands, and a real model ----------------------------------------------------------------------


def test_version(run: Run) -> None:
    assert run("--version") == Outcome(0, f"diffusion-gemma-asr {asr.__version__}\n", "")


def test_help_names_every_command(run: Run) -> None:
    outcome = run("--help")
    assert outcome.status == 0
    for command in ("transcribe", "train", "evaluate", "compare", "info"):
        assert command in outcome.out
        assert "Usage: diffusion-gemma-asr " + command in run(command, "--help").out


def test_errors_of_other_commands_are_one_line(run: Run, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("colour: red\n")
    for arguments in (("train", wrong), ("info", "--recipe", wrong), ("train", "nothing"), ("compare", tmp_path, tmp_path)):
        outcome = run(*arguments)
        assert outcome.status == 1 and outcome.err.startswith("error: ") and outcome.err.count("\n") == 1


def test_evaluate_takes_the_options_of_its_dataclass(run: Run, tmp_path: Path) -> None:
    help_text = run("evaluate", "--help").out
    for name in ("--system", "--steps", "--find_language", "--clips", "--vad_method", "--seed"):
        assert name in help_text
    outcome = run("evaluate", tmp_path, "--out", tmp_path / "run", "--steps", "a,b")
    assert outcome.status == 2 and "steps" in outcome.complaint
    outcome = run("evaluate", tmp_path, "--out", tmp_path / "run", "--find_language", "True", "--system", "ctc")
    assert outcome.status == 2 and "find_language" in outcome.complaint


def test_a_real_checkpoint_with_random_weights(
    run: Run, sound: Path, tmp_path: Path, whisper_folder: Path, backbone_folder: Path
) -> None:
    model = tiny.build_model(tiny.model_config(whisper_folder, backbone_folder))
    checkpoint = save_checkpoint(model, tmp_path / "checkpoint")
    stereo = write(tmp_path / "stereo.mp3", np.stack([tone(440, 1.0, 44_100), tone(880, 1.0, 44_100)]), 44_100)
    command = ("transcribe", sound, stereo, "--model", checkpoint, "--device", "cpu", "--language", "en", "-f", "json")
    both = run(*command, "--steps", "2", load=None)
    assert both.status == 0, both.err
    first, second = (json.loads(line) for line in both.out.splitlines())
    assert first["segments"][0]["tokens"] != second["segments"][0]["tokens"]
    assert run(*command, "--steps", "2", load=None).out == both.out
    assert run(*command, "--steps", "2", "--seed", "1", "--start", "noise", load=None).out != both.out


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys\nfrom diffusion_gemma_asr.app.cli import main\n"
        "for arguments in (['--help'], ['train', '--help']):\n"
        "    try: main(arguments)\n    except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
