"""data/manifest.py: what is written is read again wherever the folder stands, and a bad line is named."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diffusion_gemma_asr.data.manifest import Utterance, read_manifest, write_manifest
from diffusion_gemma_asr.errors import DataError

GOOD: dict[str, Any] = {"audio_filepath": "a.wav", "text": "one", "language": "en", "duration": 1.5}


def rows_in(folder: Path) -> list[Utterance]:
    return [
        Utterance(str(folder / "wav" / "a.wav"), "one two", "en", 1.25, "en-us+Alex"),
        Utterance(str(folder / "wav" / "b c.wav"), 'stra\u00dfe \u4e2d\u6587 "quoted"', "de", 30.0),
        Utterance(str(folder.parent / "elsewhere" / "d.flac"), "", "en", 2.0),
    ]


def write_lines(path: Path, *lines: object) -> Path:
    """A manifest as another program would write it: text as it is, everything else as JSON."""
    text = "".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines)
    path.write_text(text, encoding="utf-8")
    return path


def test_round_trip(tmp_path: Path) -> None:
    folder = tmp_path / "corpus" / "nested"  # made by write_manifest
    write_manifest(folder / "manifest.jsonl", rows_in(folder))
    assert read_manifest(folder / "manifest.jsonl") == rows_in(folder)


def test_a_moved_corpus_finds_its_own_sounds(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "deeper" / "new"
    write_manifest(old / "manifest.jsonl", rows_in(old)[:2])
    new.parent.mkdir()
    old.rename(new)
    assert read_manifest(new / "manifest.jsonl") == rows_in(new)[:2]


def test_paths_are_absolute_wherever_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines(tmp_path / "m.jsonl", GOOD, GOOD | {"audio_filepath": "/data/b.wav"})
    monkeypatch.chdir(tmp_path)
    found = [u.audio_filepath for u in read_manifest("m.jsonl")]
    assert found == [os.path.abspath(tmp_path / "a.wav"), "/data/b.wav"]


def test_other_fields_and_blank_lines_are_no_trouble_and_speaker_is_optional(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "m.jsonl", GOOD | {"snr": 3, "duration": 2}, "", GOOD | {"speaker": 7})
    rows = read_manifest(path)
    assert [(u.speaker, u.duration) for u in rows] == [("", 2.0), ("7", 1.5)]


def test_only_the_languages_asked_for(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "m.jsonl", *(GOOD | {"language": code} for code in ["en", "de", "fr", "de"])
    )
    assert [u.language for u in read_manifest(path)] == ["en", "de", "fr", "de"]
    assert [u.language for u in read_manifest(path, ["fr", "de"])] == ["de", "fr", "de"]


def test_longer_ones_are_left_out_and_the_limit_itself_is_kept(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "m.jsonl", *(GOOD | {"duration": s} for s in (0.5, 10, 10.001, 30, 31)))
    assert [u.duration for u in read_manifest(path)] == [0.5, 10.0, 10.001, 30.0]
    assert [u.duration for u in read_manifest(path, max_duration_s=10)] == [0.5, 10.0]


def test_nothing_left_is_an_error_that_says_what_was_asked_for(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "m.jsonl", GOOD)
    with pytest.raises(DataError, match=r"m\.jsonl.*5\.0 s.*'hi'"):
        read_manifest(path, ["hi"], max_duration_s=5.0)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.jsonl: no such manifest"):
        read_manifest(tmp_path / "gone.jsonl")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"audio_filepath": ', "not JSON"),
        ([1, 2], "expected an object, found list"),
        ("null", "expected an object, found NoneType"),
        *(({key: GOOD[key] for key in GOOD if key != gone}, gone) for gone in GOOD),
        (GOOD | {"duration": "long"}, "wrong field.*long"),
        (GOOD | {"duration": None}, "wrong field"),
        (GOOD | {"audio_filepath": 3}, "wrong field"),
        (GOOD | {"text": None}, "wrong field.*text"),
        (GOOD | {"language": ["en"]}, "wrong field.*language"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, line: object, complaint: str) -> None:
    path = write_lines(tmp_path / "m.jsonl", GOOD, "", line, GOOD)  # the blank line counts, as in an editor
    with pytest.raises(DataError, match=rf"m\.jsonl, line 3: .*{complaint}"):
        read_manifest(path)


def test_writing_that_breaks_off_leaves_the_manifest_before(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    write_manifest(path, rows_in(tmp_path))

    def broken() -> Iterator[Utterance]:
        yield rows_in(tmp_path)[1]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_manifest(path, broken())
    assert read_manifest(path) == rows_in(tmp_path)
