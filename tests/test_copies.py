"""data/synthetic/copies.py: each utterance once more, different and the same by seed, with its text and its new length."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sounds import tone, write

from diffusion_gemma_asr.data.manifest import Utterance, read_manifest
from diffusion_gemma_asr.data.synthetic.copies import Distortion, distorted, draw_distortion, joined, make_copies
from diffusion_gemma_asr.data.synthetic.synth import sound_duration

PLAIN = Distortion(1.0, -6.0, None, None, False, 0)


def test_a_plain_copy_is_the_sound_at_another_loudness() -> None:
    sound = tone(300, 0.5)
    copy = distorted(sound, PLAIN)
    assert np.abs(copy).max() == pytest.approx(10 ** (-6 / 20), abs=1e-4)
    np.testing.assert_allclose(copy / np.abs(copy).max(), sound / np.abs(sound).max(), atol=1e-5)


def test_each_part_of_a_distortion_is_heard() -> None:
    sound = tone(300, 0.5)
    parts = ({"speed": 1.1}, {"snr_db": 10.0}, {"reverberation_s": 0.3}, {"telephone": True})
    for how in (replace(PLAIN, **part) for part in parts):  # type: ignore[arg-type]
        copy = distorted(sound, how)
        assert len(copy) != len(sound) or np.abs(copy - distorted(sound, PLAIN)).max() > 1e-3
        assert np.array_equal(copy, distorted(sound, how))


def test_drawn_distortions_are_as_frequent_as_asked() -> None:
    rng = random.Random(0)
    drawn = [draw_distortion(rng) for _ in range(2000)]
    assert 0.46 < sum(d.snr_db is not None for d in drawn) / 2000 < 0.54
    assert 0.26 < sum(d.reverberation_s is not None for d in drawn) / 2000 < 0.34
    assert 0.12 < sum(d.telephone for d in drawn) / 2000 < 0.18
    assert min(d.speed for d in drawn) >= 0.88 and max(d.speed for d in drawn) <= 1.14


def test_a_corpus_is_copied_once_and_by_seed(tmp_path: Path) -> None:
    rows = [
        Utterance(str(write(tmp_path / f"{hertz}.wav", tone(hertz, 1.0))), f"tone {hertz}", "de", 1.0, "her")
        for hertz in (300, 500)
    ]
    manifest = make_copies(rows, tmp_path / "copies", seed=3, workers=1)
    copies = read_manifest(manifest)
    assert [(u.text, u.language, u.speaker) for u in copies] == [("tone 300", "de", "her"), ("tone 500", "de", "her")]
    for copy in copies:
        assert copy.duration == pytest.approx(sound_duration(Path(copy.audio_filepath)), abs=1e-3)
        assert 1 / 1.15 < copy.duration < 1 / 0.87
    first = [Path(u.audio_filepath).stat().st_mtime_ns for u in copies]
    assert read_manifest(make_copies(rows, tmp_path / "copies", seed=3, workers=1)) == copies
    assert [Path(u.audio_filepath).stat().st_mtime_ns for u in copies] == first
    again = read_manifest(make_copies(rows[::-1], tmp_path / "copies", seed=4, workers=1))
    assert not {u.audio_filepath for u in again} & {u.audio_filepath for u in copies}, "a sound of another text is kept"


def test_neighbours_of_one_speaker_become_one_utterance(tmp_path: Path) -> None:
    rows = [
        Utterance(str(write(tmp_path / f"{i}.wav", tone(300 + i, 1.0))), f"tone {i}", "de", 1.0, speaker)
        for i, speaker in enumerate(["her"] * 30 + ["him"] * 30)
    ]
    groups = joined(rows, 8.0, random.Random(1))
    assert [u for group in groups for u in group] == rows
    assert all(len({u.speaker for u in group}) == 1 for group in groups)
    sizes = {len(group) for group in groups}
    assert min(sizes) == 1 and 3 < max(sizes) <= 5  # 5 s of sound and 4 pauses of up to 0.6 s

    copies = read_manifest(make_copies(rows, tmp_path / "copies", seed=1, workers=1, join_s=8.0))
    assert len(copies) == len(groups) and max(u.duration for u in copies) < 8.0 / 0.87
    assert [u.text for u in copies] == [" ".join(u.text for u in group) for group in groups]


def test_characters_are_joined_without_a_space(tmp_path: Path) -> None:
    rows = [
        Utterance(str(write(tmp_path / f"{i}.wav", tone(300, 1.0))), text, "zh", 1.0)
        for i, text in enumerate("你好吗我好" * 4)
    ]
    copies = read_manifest(make_copies(rows, tmp_path / "copies", seed=1, workers=1, join_s=8.0))
    assert "".join(u.text for u in copies) == "你好吗我好" * 4 and any(len(u.text) > 1 for u in copies)
