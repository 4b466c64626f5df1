"""Files on remote file systems, as fsspec's memory:// has them; file:// is a path."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_runs import Loader, Run, loader, model, run, sound  # noqa: F401
from sounds import tone, write_wav
from spoken import PitchModel, SoundModel

from diffusion_gemma_asr.audio.read import duration_of, load_audio
from diffusion_gemma_asr.errors import AsrError, AudioError
from diffusion_gemma_asr.files import exists, is_remote, place_of, stem_of, write_whole
from diffusion_gemma_asr.transcribe.recognizer import Recognizer

fsspec = pytest.importorskip("fsspec", reason="needs the extra [remote]")


@pytest.fixture
def memory() -> Iterator[Any]:
    """A file system with three sounds in a folder."""
    system = fsspec.filesystem("memory")
    for hertz in (400, 500, 600):
        system.pipe_file(f"/sounds/{hertz}.wav", write_wav(tone(hertz, 0.5)))
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


@pytest.mark.parametrize(
    ("name", "remote", "stem"),
    [
        ("s3://bucket/a/talk.one.mp3", True, "talk.one"),
        ("hf://datasets/owner/name/a.flac", True, "a"),
        ("filecache::gs://bucket/a.wav", True, "a"),
        ("zip://in/a.wav::s3://bucket/b.zip", True, "a"),
        ("file:///tmp/a.wav", False, "a"),
        ("file://a.wav", False, "a"),
        ("https://example.org/a.wav", False, "a"),
        ("C://a.wav", False, "a"),
        ("s3:/a.wav", False, "a"),
        ("a.wav", False, "a"),
    ],
)
def test_places(name: str, remote: bool, stem: str) -> None:
    place = place_of(name)
    assert is_remote(place) == remote and isinstance(place, str if remote else Path)
    assert stem_of(place) == stem


def test_sound_is_read(memory: Any, tmp_path: Path) -> None:
    address = "memory://sounds/400.wav"
    assert len(load_audio(address)) == 8_000
    assert duration_of(address) is None  # that would take a request for each file of a list
    (tmp_path / "a.wav").write_bytes(memory.cat_file("/sounds/400.wav"))
    assert load_audio(f"file://{tmp_path}/a.wav").tolist() == load_audio(address).tolist()
    recognizer = Recognizer(PitchModel())  # type: ignore[arg-type]
    assert recognizer.transcribe(address, vad_method="energy").text == "400 hertz"


def test_the_command_reads_and_writes(run: Run, model: SoundModel, memory: Any) -> None:
    outcome = run("transcribe", "memory://sounds/500.wav", "memory://sounds/40*.wav")
    assert outcome.out == "memory://sounds/500.wav\t500 hertz\nmemory:///sounds/400.wav\t400 hertz\n"
    memory.pipe_file("/sounds/list.jsonl", b'{"audio_filepath": "600.wav"}\n{"audio_filepath": "memory://sounds/400.wav"}')
    command = ("transcribe", "--files_from", "memory://sounds/list.jsonl", "-o", "memory://new/out/", "-f", "json")
    assert run(*command, "--shard", "1/2").status == 0
    assert run(*command).err.startswith("memory://new/out/600.json exists and is left as it is")
    written = {name: json.loads(memory.cat_file(name)) for name in memory.ls("/new/out", detail=False)}
    assert {name: (content["audio"], content["text"]) for name, content in written.items()} == {
        "/new/out/600.json": ("memory://sounds/600.wav", "600 hertz"),
        "/new/out/400.json": ("memory://sounds/400.wav", "400 hertz"),
    }
    assert sum(map(len, model.batches)) == 4


def test_folders_are_kept(run: Run, model: SoundModel, memory: Any) -> None:
    memory.pipe_file("/sounds/more/400.wav", write_wav(tone(700, 0.5)))
    command = ("transcribe", "memory://sounds/**/*.wav", "-o", "memory://new/out")
    assert run(*command).status == 2
    for already in (0, 4):
        outcome = run(*command, "--keep_folders")
        assert outcome.status == 0 and outcome.err.count("exists and is left as it is") == already
    written = {name: memory.cat_file(name).decode() for name in memory.find("/new/out")}
    assert written["/new/out/400.txt"] == "400 hertz\n" and written["/new/out/more/400.txt"] == "700 hertz\n"
    assert len(written) == 4 and sum(map(len, model.batches)) == 4


def test_file_addresses_are_paths(run: Run, sound: Path, tmp_path: Path) -> None:
    outcome = run("transcribe", f"file://{sound}", "-o", f"file://{tmp_path}/out")
    assert outcome.status == 0 and (tmp_path / "out" / "a.txt").read_text() == "440 hertz\n"


def test_remote_files_that_are_not_there_or_no_sound(run: Run, memory: Any) -> None:
    memory.pipe_file("/sounds/text.wav", b"hello")
    memory.pipe_file("/sounds/empty.wav", b"")
    names = ["memory://sounds/missing.wav", "memory://sounds/text.wav", "memory://sounds/empty.wav"]
    outcome = run("transcribe", *names, "memory://sounds/400.wav")
    assert outcome.status == 1 and outcome.out == "memory://sounds/400.wav\t400 hertz\n"
    complaints = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert complaints.pop() == f"error: 3 of 4 files failed: {', '.join(names)}"
    assert complaints[0] == f"error: {names[0]}: no such file"
    for name, line in zip(names[1:], complaints[1:], strict=True):
        assert line.startswith(f"error: {name}: cannot be read as sound (")


def test_what_is_missing_is_named(run: Run, memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = run("transcribe", "telepathy://a.wav")
    assert outcome.status == 1 and outcome.err.startswith("error: telepathy://a.wav: cannot be reached (Protocol not known")
    for package in ("ocifs", "fsspec"):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(
            AudioError, match="another package .*ocifs" if package == "ocifs" else r"extra \[remote\]"
        ) as found:
            load_audio("oci://bucket/a.wav")
        assert "\n" not in str(found.value)
    outcome = run("transcribe", "memory://sounds/*.wav")
    assert (
        outcome.status == 1 and "pip install 'diffusion-gemma-asr[remote]'" in outcome.err and outcome.err.count("\n") == 1
    )


def test_what_cannot_be_written_is_one_line(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, content: bytes) -> None:
        raise PermissionError("Access Denied\nmore")

    write_whole("memory://out/a.txt", "whole")
    assert exists("memory://out/a.txt") and not exists("memory://out/b.txt")
    monkeypatch.setattr(memory, "pipe_file", refuse)
    with pytest.raises(AsrError, match=r"^memory://out/b.txt: cannot be written \(Access Denied\)$"):
        write_whole("memory://out/b.txt", "text")
