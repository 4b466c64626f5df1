"""app/inputs.py: which recordings a command takes, and which part of them; shards that are killed and started again."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from cli_runs import Loader, Run, loader, model, run, sound  # noqa: F401
from sounds import tone, write, write_wav
from spoken import PitchModel, Sound, SoundModel

from diffusion_gemma_asr.app.cli import main
from diffusion_gemma_asr.app.inputs import InputOptions, Recording, recordings
from diffusion_gemma_asr.errors import AsrError
from diffusion_gemma_asr.model.drafts import Encoded
from diffusion_gemma_asr.transcribe.recordings import POOL_BATCHES


@pytest.fixture
def sounds(tmp_path: Path) -> list[Path]:
    return [write(tmp_path / f"{hertz}.wav", tone(hertz, 0.3)) for hertz in (400, 500, 600, 700, 800)]


def listed(content: bytes, path: Path) -> list[Recording]:
    path.write_bytes(content)
    return recordings([], InputOptions(files_from=str(path)))


# -- parts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_every_file_is_in_one_part(count: int) -> None:
    items = list(range(5))
    parts = [InputOptions(shard=f"{number}/{count}").part(items) for number in range(1, count + 1)]
    assert sorted(item for part in parts for item in part) == items
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("shard", ["0/4", "5/4", "1/0", "0/0", "-1/4", "1", "a/b", "1/4/2", "1.0/2", ""])
def test_parts_that_are_none(run: Run, loader: Loader, sound: Path, shard: str) -> None:
    outcome = run("transcribe", sound, f"--shard={shard}")
    assert outcome.status == 2 and "shard is" in outcome.complaint and loader.asked == []
    assert ("counts from 1" in outcome.complaint) == shard.startswith("0/")


def test_parts_share_a_folder(run: Run, sounds: list[Path], tmp_path: Path) -> None:
    for number, names in (("2/3", ["500", "800"]), ("1/3", ["400", "500", "700", "800"])):
        assert run("transcribe", *sounds, "-o", tmp_path / "out", "--shard", number).status == 0
        assert sorted(path.stem for path in (tmp_path / "out").iterdir()) == names
    assert run("transcribe", *sounds, "--shard", "3/3").out == f"{sounds[2]}\t600 hertz\n"
    outcome = run("transcribe", sounds[0], "--shard", "2/2", "-o", tmp_path / "out", load=None)
    assert (outcome.status, outcome.out, outcome.err) == (0, "", "")  # nothing is left for it, and no model is loaded


def test_parts_count_before_what_is_there_is_left_out(
    run: Run, model: SoundModel, sounds: list[Path], tmp_path: Path
) -> None:
    """Else a process that is started again would take the files of another."""
    out = tmp_path / "out"
    run("transcribe", *sounds, "-o", out, "--shard", "1/2")
    model.batches.clear()
    run("transcribe", *sounds, "-o", out, "--shard", "1/2")
    assert model.batches == [] and len(list(out.iterdir())) == 3


def test_two_inputs_of_different_parts_never_share_an_output(run: Run, sounds: list[Path], tmp_path: Path) -> None:
    twin = write(tmp_path / "400.flac", tone(880, 0.3))
    outcome = run("transcribe", sounds[0], twin, "-o", tmp_path / "out", "--shard", "1/2")
    assert outcome.status == 2 and "would both be written" in outcome.complaint


def test_recordings_of_one_name_go_into_folders_of_their_own(run: Run, tmp_path: Path) -> None:
    archive, out = tmp_path / "archive", tmp_path / "out"
    files = []
    for folder, hertz in (("1998", 400), ("1999", 500), ("1999/tapes", 600)):
        (archive / folder).mkdir(parents=True, exist_ok=True)
        files.append(write(archive / folder / "a.wav", tone(hertz, 0.3)))
    assert "--keep_folders keeps files" in run("transcribe", *files, "-o", out).complaint and not out.exists()
    written = {"1998/a.txt": "400 hertz\n", "1999/a.txt": "500 hertz\n", "1999/tapes/a.txt": "600 hertz\n"}
    for number in (1, 2):
        assert run("transcribe", *files, "-o", out, "--keep_folders", "--shard", f"{number}/2").status == 0
    assert {str(path.relative_to(out)): path.read_text() for path in out.rglob("*.txt")} == written
    again = run("transcribe", *files, "-o", out, "--keep_folders")
    assert again.status == 0 and again.err.count("exists and is left as it is") == 3
    assert run("transcribe", files[0], "-o", tmp_path / "one", "--keep_folders").status == 0
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["a.txt"]
    twice = run("transcribe", files[0], files[0], "-o", out, "--keep_folders")
    assert twice.status == 2 and "would both be written" in twice.complaint and "keep_folders" not in twice.complaint


class SlowModel(PitchModel):
    """Takes its time, and counts in a file what it hears."""

    def __init__(self, log: Path):
        super().__init__()
        self.log = log

    def encode(self, audio: list[Sound]) -> Encoded:  # type: ignore[override]
        time.sleep(0.02)
        with self.log.open("a") as file:
            file.write("." * len(audio))
        return super().encode(audio)


@pytest.mark.skipif(os.name != "posix", reason="needs fork and SIGKILL")
def test_four_processes_that_are_killed_and_started_again(tmp_path: Path) -> None:
    count, out, log = 48, tmp_path / "out", tmp_path / "log"
    for number in range(count):
        write(tmp_path / f"{number:02}.wav", tone(400 + 40 * number, 0.3))
    context = multiprocessing.get_context("fork")

    def start() -> list[multiprocessing.process.BaseProcess]:
        processes = []
        for number in range(1, 5):
            command = ["transcribe", str(tmp_path / "*.wav"), "--shard", f"{number}/4", "-o", str(out), "-f", "json"]
            command += ["--vad_method", "energy", "--batch_size", "1"]
            processes.append(context.Process(target=main, args=(command, Loader(SlowModel(log)))))
            processes[-1].start()
        return processes

    first = start()
    while len(list(out.glob("*.json"))) < 8:
        time.sleep(0.01)
    for process in first:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    done = {path: path.stat().st_mtime_ns for path in out.glob("*.json")}
    assert 8 <= len(done) < count and all(json.loads(path.read_text())["segments"] for path in done)
    for process in start():
        process.join()
        assert process.exitcode == 0
    texts = {path.stem: json.loads(path.read_text())["text"] for path in out.glob("*.json")}
    assert texts == {f"{number:02}": f"{400 + 40 * number} hertz" for number in range(count)}
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert count <= len(log.read_text()) <= count + 4 * POOL_BATCHES  # what was heard, but not yet written, is heard again


# -- lists and patterns ----------------------------------------------------------------------------------------


def test_a_list_of_paths(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    wanted = [Recording(Path("a.wav")), Recording(Path("b c.wav")), Recording("s3://d/e.wav")]
    assert listed(b"# heading\na.wav\r\n\n  \nb c.wav\ns3://d/e.wav", path) == wanted
    assert listed(b"\xef\xbb\xbfa.wav\n", path) == wanted[:1]
    odd = [Recording(Path("#a\n.wav")), Recording(Path(os.fsdecode(b"M\xfcller.wav")))]
    assert listed(b"#a\n.wav\0M\xfcller.wav\0", path) == odd
    assert recordings(["z.wav"], InputOptions(files_from=str(path))) == [Recording(Path("z.wav")), *odd]


def test_a_list_on_standard_input(run: Run, sounds: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    content = "\n".join(map(str, sounds[:2])).encode()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    assert run("transcribe", "--files_from", "-").out == f"{sounds[0]}\t400 hertz\n{sounds[1]}\t500 hertz\n"
    outcome = run("transcribe", "-", "--files_from", "-")
    assert outcome.status == 1 and "standard input cannot be both" in outcome.err


def test_a_manifest(run: Run, model: SoundModel, tmp_path: Path) -> None:
    """Its paths start from its folder; parts are transcribed as parts, in one batch, and named after where they begin."""
    pause = np.zeros(8_000, np.float32)
    long = [part for hertz in (400, 500, 600) for part in (tone(hertz, 1.5), pause)]
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "long.wav", np.concatenate(long))
    write(tmp_path / "data" / "short.wav", tone(700, 0.5))
    rows: list[dict[str, object]] = [{"audio_filepath": "long.wav", "offset": 4.0}]
    rows.append({"audio_filepath": "long.wav", "offset": 2.0, "duration": 2.0, "text": "five hundred", "lang": "en"})
    rows += [{"audio_filepath": "long.wav", "duration": 2}, {"audio_filepath": "short.wav"}]
    manifest = tmp_path / "data" / "rows.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    outcome = run("transcribe", "--files_from", manifest, "-o", out)
    assert outcome.status == 0 and len(model.batches) == 1
    assert outcome.err.startswith("6.5 s of sound in ")
    texts = {path.name: path.read_text() for path in out.iterdir()}
    assert texts == {
        "long-4.000.txt": "600 hertz\n",
        "long-2.000.txt": "500 hertz\n",
        "long.txt": "400 hertz\n",
        "short.txt": "700 hertz\n",
    }
    outcome = run("transcribe", "--files_from", manifest, "--clip_timestamps", "0,1")
    assert outcome.status == 2 and "--clip_timestamps goes without" in outcome.complaint


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "names no files"),
        (b"# a\n\n", "names no files"),
        (b"{", "line 1: not JSON"),
        (b'{"audio_filepath": "a.wav"}\n[]', "line 2: expected an object"),
        (b'{"path": "a.wav"}', "line 1: missing or wrong field audio_filepath"),
        (b'{"audio_filepath": "a.wav", "offset": -1}', "line 1: missing or wrong field offset"),
        (b'{"audio_filepath": "\xff.wav"}', "not UTF-8"),
        ("a.wav\n".encode("utf-16"), "is UTF-16"),
        (b"fLaC\0\0\0\x22", "but binary"),
        (b"a.wav\n-\n", "'-' in a list is no file"),
    ],
)
def test_lists_that_cannot_be_used(run: Run, loader: Loader, tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "list"
    path.write_bytes(content)
    outcome = run("transcribe", "--files_from", path)
    assert outcome.status == 1 and loader.asked == []
    assert outcome.err.startswith(f"error: {path}") and complaint in outcome.err and outcome.err.count("\n") == 1


def test_a_list_that_is_not_there(run: Run, tmp_path: Path) -> None:
    for path in (tmp_path / "list.txt", tmp_path):
        outcome = run("transcribe", "--files_from", path)
        assert outcome.status == 1 and outcome.err.startswith(f"error: {path}: the list cannot be read (")


def test_standard_input_named_twice(run: Run, loader: Loader) -> None:
    outcome = run("transcribe", "-", "-")
    assert outcome.status == 1 and "named twice" in outcome.err and loader.asked == []


def test_the_address_of_a_page_and_too_many_candidates(run: Run, sound: Path) -> None:
    assert "web pages are not read" in run("transcribe", "https://example.com/a.mp3").err
    assert run("transcribe", sound, "--candidates", "257").status == 2


def test_patterns_that_the_shell_left(run: Run, sounds: list[Path], tmp_path: Path) -> None:
    assert run("transcribe", tmp_path / "[56]*.wav").out == f"{sounds[1]}\t500 hertz\n{sounds[2]}\t600 hertz\n"
    bracket = tmp_path / "a[1].wav"
    bracket.write_bytes(write_wav(tone(880, 0.3)))
    assert run("transcribe", bracket).out == "880 hertz\n"  # a file of that name is no pattern
    outcome = run("transcribe", tmp_path / "*.mp3")
    assert (outcome.status, outcome.err) == (1, f"error: {tmp_path / '*.mp3'}: no such file\n")


def test_many_outputs_that_are_there_are_counted(run: Run, sound: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    names = [tmp_path / f"{number}.wav" for number in range(30)]
    for name in names:
        (out / f"{name.stem}.txt").touch()
    assert (
        run("transcribe", *names, "-o", out).err == "30 outputs exist and are left as they are; --overwrite replaces them\n"
    )


def test_what_is_wrong_is_an_asr_error() -> None:
    for shard in ("0/2", "3/2", "x"):
        with pytest.raises(AsrError, match="shard is"):
            InputOptions(shard=shard)
