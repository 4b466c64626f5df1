"""`transcribe --microphone` with a fake sounddevice: what is printed, shown and written, and what goes wrong."""

from __future__ import annotations

import io
import json
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from rich.console import Console
from sounds import tone, write
from spoken import RATE, WORDS, Sound, WordModel, blocks, live, pause, said

from diffusion_gemma_asr.app.cli import main
from diffusion_gemma_asr.app.microphone import Microphone, Notes, listen
from diffusion_gemma_asr.app.terminal import Line
from diffusion_gemma_asr.errors import AudioError
from diffusion_gemma_asr.transcribe.recognizer import Recognizer
from diffusion_gemma_asr.transcribe.recordings import TranscribeOptions


class FakeStream:
    """Gives its sound at once, and then presses Ctrl-C, or goes away; on the way it may say that it lost some."""

    def __init__(self, sound: Sound, ends: str, status: object, callback: Callable[..., None], **how: object):
        self._sound, self._ends, self._status, self._callback, self.how = sound, ends, status, callback, how
        self.active = True

    def __enter__(self) -> FakeStream:
        memory = np.zeros((800, 1), np.float32)  # used again, as PortAudio does
        for block in blocks(self._sound, 0.05):
            memory[: len(block), 0] = block
            self._callback(memory[: len(block)], len(block), None, self._status)
        if self._ends == "interrupt":
            signal.raise_signal(signal.SIGINT)
        self.active = False
        return self

    def __exit__(self, *error: object) -> None:
        pass


def plug_in(monkeypatch: pytest.MonkeyPatch, sound: Sound, ends: str = "interrupt", status: object = None) -> None:
    """A library whose device hears this sound."""
    library = ModuleType("sounddevice")
    library.PortAudioError = RuntimeError  # type: ignore[attr-defined]
    library.query_devices = lambda kind: {"default_samplerate": 16_000.0}  # type: ignore[attr-defined]
    library.InputStream = lambda **how: FakeStream(sound, ends, status, **how)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sounddevice", library)


Run = Callable[..., SimpleNamespace]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command with a fake model, where the fake device hears this sound."""

    def run(sound: Sound, *arguments: str | Path, ends: str = "interrupt", status: object = None) -> SimpleNamespace:
        plug_in(monkeypatch, sound, ends, status)
        command = ["transcribe", "--microphone", "--vad_method", "energy", *map(str, arguments)]
        with pytest.raises(SystemExit) as left:
            main(command, load=lambda name, **how: Recognizer(WordModel()))  # type: ignore[arg-type]
        out, err = capsys.readouterr()
        return SimpleNamespace(status=left.value.code or 0, out=out, err=err)

    return run


SPOKEN = np.concatenate([pause(0.3), said(WORDS[:4]), pause(1.0), said(WORDS[4:7])])


def test_the_command_prints_what_is_said_until_ctrl_c(run: Run) -> None:
    before = signal.getsignal(signal.SIGINT)
    outcome = run(SPOKEN)
    assert outcome.out == "400 700 500 900\n600 1100 800\n"
    assert outcome.err == "listening; Ctrl-C ends it\n"
    assert outcome.status == 0
    assert signal.getsignal(signal.SIGINT) is before


def test_the_whole_transcript_at_the_end(run: Run, tmp_path: Path) -> None:
    outcome = run(SPOKEN, "-f", "json")
    whole = json.loads(outcome.out)
    assert [segment["text"] for segment in whole["segments"]] == ["400 700 500 900", "600 1100 800"]
    assert whole["duration"] == pytest.approx(len(SPOKEN) / RATE)
    outcome = run(SPOKEN, "-o", tmp_path, "-f", "all", "--every", "0.5")
    assert outcome.out == "400 700 500 900\n600 1100 800\n"
    written = {path.suffix: path for path in tmp_path.iterdir()}
    assert sorted(written) == [".json", ".srt", ".tsv", ".txt", ".vtt"]
    assert all(path.stem.startswith("microphone-2") for path in written.values())
    assert "600 1100 800" in written[".srt"].read_text()


def test_what_was_said_is_kept_when_the_device_goes_away(run: Run, tmp_path: Path) -> None:
    outcome = run(SPOKEN, "-o", tmp_path, ends="unplugged")
    assert outcome.status == 1 and outcome.err.endswith(
        "error: microphone: it gives no more sound; see whether it is still connected\n"
    )
    (written,) = tmp_path.iterdir()
    assert written.read_text() == "400 700 500 900\n600 1100 800\n"


def test_a_model_that_cannot_keep_up_ends_the_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, SPOKEN)  # gives all of its sound at once
    out, options = io.StringIO(), TranscribeOptions(vad_method="energy")
    recognizer = Recognizer(WordModel())  # type: ignore[arg-type]
    with pytest.raises(AudioError, match="the model is 1 s behind the sound"):
        listen(Microphone(behind_s=1.0), recognizer, options, 1.0, Notes(out, Line()))
    assert out.getvalue() == "400\n"


def test_lost_sound_is_reported(run: Run) -> None:
    assert "the device dropped sound" in run(SPOKEN, status="input overflow").err


def test_misuse_of_the_microphone(run: Run, tmp_path: Path) -> None:
    for wrong in (
        (write(tmp_path / "a.wav", tone(440, 0.5)),),
        ("--watch",),
        ("--clip_timestamps", "1,2"),
        ("--every", "0"),
    ):
        outcome = run(SPOKEN, *wrong)
        assert outcome.status == 2 and not outcome.out and ("--microphone" in outcome.err or "--every" in outcome.err)


@pytest.mark.parametrize("missing", ["sounddevice", "portaudio", "device"])
def test_without_a_microphone(missing: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def no_device(kind: str) -> None:
        raise RuntimeError("Error querying device -1\nin C")

    class NoPortAudio:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name == "sounddevice":
                raise OSError("PortAudio library not found")

    if missing == "device":
        library = ModuleType("sounddevice")
        library.PortAudioError, library.query_devices = RuntimeError, no_device  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "sounddevice", library)
    elif missing == "sounddevice":
        monkeypatch.setitem(sys.modules, "sounddevice", None)
    else:
        monkeypatch.delitem(sys.modules, "sounddevice", raising=False)
        monkeypatch.setattr(sys, "meta_path", [NoPortAudio(), *sys.meta_path])
    with pytest.raises(SystemExit) as left:
        main(["transcribe", "--microphone"])
    out, err = capsys.readouterr()
    assert (left.value.code, out) == (1, "")
    assert (
        err
        == {
            "sounddevice": "error: --microphone needs sounddevice, which is not installed: "
            "pip install 'diffusion-gemma-asr[microphone]'\n",
            "portaudio": "error: --microphone needs PortAudio (PortAudio library not found); "
            "on Debian: apt-get install libportaudio2\n",
            "device": "error: microphone: no input device can be used (Error querying device -1); "
            "connect one and make it the system's default\n",
        }[missing]
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("out", [Terminal(), io.StringIO()])
def test_on_a_terminal_unsure_text_is_dimmed_and_replaced(out: io.StringIO) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, color_system="standard")
    notes = Notes(out, Line(console))
    (first, *others) = (u for u in live(said(WORDS), WordModel()) if u.committed)
    notes(replace(first, partial="perhaps"))
    sure = "".join(word.word for word in first.committed)
    assert f"{sure} \x1b[2mperhaps" in screen.getvalue()
    assert out.getvalue() == ("" if out.isatty() else sure)  # the line under way is already on the screen
    for update in others:
        notes(update)
    notes.close()
    assert out.getvalue() == " ".join(map(str, WORDS)) + "\n"
    assert "\x1b[2K" in screen.getvalue()  # the line was taken away again
