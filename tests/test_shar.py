"""data/shar.py: Shar folders, as lhotse writes them and with every fault that a shard can have."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sounds import tone, write, write_wav
from tiny_model import loud_encoder

from diffusion_gemma_asr.data.features import FeatureCache
from diffusion_gemma_asr.data.manifest import Utterance, write_manifest
from diffusion_gemma_asr.data.sound import read_utterance
from diffusion_gemma_asr.data.sources import read_source
from diffusion_gemma_asr.errors import AudioError, DataError
from diffusion_gemma_asr.train.recipe import DataRecipe, TrainList, TrainRecipe
from diffusion_gemma_asr.train.speech import SpeechData

PITCHES = {"a": 220, "deep/b.1": 330, "c": 440, "d": 550, "e": 660}  # Hz, by the name of a cut; each a little longer


def sound_of(name: str) -> np.ndarray:
    return tone(PITCHES[name], 0.5 + 0.1 * list(PITCHES).index(name))


def cut_of(name: str, language: str | None = "English") -> dict[str, Any]:
    duration = len(sound_of(name)) / 16_000
    said = {"id": name, "recording_id": name, "start": 0, "duration": duration, "text": f"cut {name}", "speaker": "s"}
    return {
        "id": name, "start": 0, "duration": duration, "channel": 0, "type": "MonoCut",
        "supervisions": [said | ({"language": language} if language else {})],
        "recording": {"id": name, "sources": [{"type": "shar", "channels": [0], "source": ""}], "sampling_rate": 16_000,
                      "num_samples": len(sound_of(name)), "duration": duration, "channel_ids": [0]},
    }  # fmt: skip


def write_shard(folder: Path, number: int, cuts: list[dict[str, Any]]) -> Path:
    """A shard in the layout of lhotse 1.33; returns its tar file."""
    folder.mkdir(exist_ok=True)
    lines = "".join(json.dumps(cut) + "\n" for cut in cuts)
    (folder / f"cuts.{number:06d}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    path = folder / f"recording.{number:06d}.tar"
    with tarfile.open(path, "w") as tar:
        for cut in cuts:
            for ending, content in (
                (".wav", write_wav(sound_of(cut["id"]))),
                (".json", json.dumps(cut["recording"]).encode()),
            ):
                member = tarfile.TarInfo(cut["id"] + ending)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def shar(tmp_path: Path) -> Path:
    names = list(PITCHES)
    for number in range(3):
        write_shard(tmp_path / "shar", number, [cut_of(name) for name in names[2 * number : 2 * number + 2]])
    return tmp_path / "shar"


def test_cuts_become_utterances_whose_sound_is_read_where_it_lies(shar: Path) -> None:
    rows = read_source(shar)
    assert [(u.text, u.language, u.speaker) for u in rows] == [(f"cut {name}", "en", "s") for name in PITCHES]
    assert [u.duration for u in rows] == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9])
    assert rows[1].audio_filepath == str(shar / "recording.000000.tar" / "deep" / "b.1")
    for utterance, name in reversed(list(zip(rows, PITCHES, strict=True))):
        np.testing.assert_allclose(read_utterance(utterance), sound_of(name), atol=1e-4)
    part = replace(rows[4], offset=0.25, duration=0.5)
    np.testing.assert_allclose(read_utterance(part), sound_of("e")[4_000:12_000], atol=1e-4)


def test_a_cut_without_a_language_has_that_of_the_source(tmp_path: Path) -> None:
    write_shard(tmp_path / "shar", 0, [cut_of("a", None), cut_of("c", "German")])
    assert [u.language for u in read_source(tmp_path / "shar", folder_language="fr")] == ["fr", "de"]
    skipped: list[str] = []
    assert len(read_source(tmp_path / "shar", ["fr"], skipped=skipped, folder_language="fr")) == 1
    assert skipped == [f"{tmp_path}/shar/cuts.000000.jsonl.gz, line 2: language 'de' is not one of those kept, fr"]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda cut: cut.update(recording=None), r"cuts\.000003\.jsonl\.gz, line 1: missing or wrong field in a lhotse cut"),
        (
            lambda cut: cut["recording"]["sources"][0].update(type="file"),
            "line 1: a cut of one channel of several, or of no",
        ),
        (lambda cut: cut["recording"]["sources"][0].update(channels=[0, 1]), "line 1: a cut of one channel of several"),
        (lambda cut: cut.update(supervisions=[]), "line 1: missing or wrong field text: null"),
        (lambda cut: cut.update(duration=40.0), "no utterance of at most 30.0 s .*line 1: 40 s long"),
    ],
)
def test_a_cut_that_cannot_be_used(tmp_path: Path, change: Callable[[dict[str, Any]], None], complaint: str) -> None:
    cut = cut_of("a")
    change(cut)
    sound = cut["recording"] or cut_of("a")["recording"]
    write_shard(tmp_path / "shar", 3, [{"id": "a", "recording": sound}])
    (tmp_path / "shar" / "cuts.000003.jsonl.gz").write_bytes(gzip.compress(json.dumps(cut).encode()))
    with pytest.raises(DataError, match=complaint):
        read_source(tmp_path / "shar")


def test_a_shard_that_is_not_whole(shar: Path) -> None:
    second, third = (shar / f"recording.00000{number}.tar" for number in (1, 2))
    rows = read_source(shar)
    second.write_bytes(second.read_bytes()[:30_000])
    with pytest.raises(AudioError, match=r"recording\.000001\.tar: (cannot be read|cut short)"):
        read_utterance(rows[3])
    write_shard(shar, 2, [cut_of("a")])
    with pytest.raises(AudioError, match=r"recording\.000002\.tar/e: the tar file has no sound of this name"):
        read_utterance(rows[4])
    third.unlink()
    with pytest.raises(DataError, match=r"cuts\.000002\.jsonl\.gz: no recording\.000002\.tar beside it"):
        read_source(shar)
    (shar / "cuts.000000.jsonl.gz").write_bytes(b"\x1f\x8b\x08 nothing")
    with pytest.raises(DataError, match=r"cuts\.000000\.jsonl\.gz: cannot be read"):
        read_source(shar)


def test_a_manifest_has_no_cuts_of_a_shar(tmp_path: Path) -> None:
    (tmp_path / "cuts.jsonl").write_text(json.dumps(cut_of("a")))
    with pytest.raises(DataError, match="line 1: a cut of one channel of several, or of no file"):
        read_source(tmp_path / "cuts.jsonl")


def test_training_gets_the_same_frames_as_from_files(shar: Path, tmp_path: Path, whisper_folder: Path) -> None:
    """And computes them once, and anew when the tar file is another."""
    rows = []
    for number, name in enumerate(PITCHES):
        file = tmp_path / f"{number}.wav"
        file.write_bytes(write_wav(sound_of(name)))
        rows.append(Utterance(str(file), f"cut {name}", "en", len(sound_of(name)) / 16_000))
    write_manifest(tmp_path / "files.jsonl", rows)
    encoder = loud_encoder(whisper_folder)

    def data_of(source: Path) -> SpeechData:
        recipe = DataRecipe(train=(TrainList(source),), dev=(source,))
        return SpeechData(recipe, TrainRecipe(steps=1, batch_size=2), ["en"], encoder, tmp_path / source.stem)

    ours, theirs = data_of(shar), data_of(tmp_path / "files.jsonl")
    assert ours.texts == theirs.texts and len(ours.dev) == 1
    frames, lengths = ours.cache.batch(ours.utterances)
    expected, expected_lengths = theirs.cache.batch(theirs.utterances)
    assert torch.equal(lengths, expected_lengths)
    torch.testing.assert_close(frames, expected, atol=1e-3, rtol=1e-3)
    cache = FeatureCache(tmp_path / "shar" / "frames")
    assert all(u in cache for u in ours.utterances)
    with (shar / "recording.000000.tar").open("ab") as tar:
        tar.write(bytes(512))
    assert [u in cache for u in ours.utterances] == [False, False, True, True, True]
    second = shar / "recording.000001.tar"
    content = bytearray(second.read_bytes())
    second.write_bytes(content)  # a copy
    assert [u in cache for u in ours.utterances] == [False, False, True, True, True]
    content[1_000] ^= 1
    second.write_bytes(content)
    assert [u in cache for u in ours.utterances] == [False, False, False, False, True]


@pytest.mark.parametrize("kind", ["flac", "wav", "opus"])
def test_what_lhotse_writes(tmp_path: Path, kind: str) -> None:
    lhotse = pytest.importorskip("lhotse", reason="needs the package lhotse")
    recording = lhotse.Recording.from_file(write(tmp_path / "long.wav", np.concatenate([sound_of(n) for n in PITCHES])))
    start, cuts = 0.0, []
    for name in PITCHES:
        duration = len(sound_of(name)) / 16_000
        said = lhotse.SupervisionSegment(name, recording.id, 0, duration, text=f"cut {name}", language="en")
        cuts.append(lhotse.MonoCut(name.replace("/", "-"), start, duration, 0, [said], recording=recording))
        start += duration
    (tmp_path / "shar").mkdir()
    lhotse.CutSet.from_cuts(cuts).to_shar(tmp_path / "shar", fields={"recording": kind}, shard_size=2)
    rows = read_source(tmp_path / "shar")
    assert [(u.text, u.offset) for u in rows] == [(f"cut {name}", 0.0) for name in PITCHES]
    for utterance, name in zip(rows, PITCHES, strict=True):
        samples = read_utterance(utterance)
        assert len(samples) == pytest.approx(len(sound_of(name)), abs=20)
        if kind != "opus":
            np.testing.assert_allclose(samples, sound_of(name)[: len(samples)], atol=1e-3)
