"""data/manifest.py: what is written is read again wherever the folder stands, and a bad line is named."""

from __future__ import annotations

import gzip
import json
import logging
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sounds import tone, write

from diffusion_gemma_asr.data.manifest import Utterance, read_manifest, write_manifest
from diffusion_gemma_asr.errors import DataError

GOOD: dict[str, Any] = {"audio_filepath": "a.wav", "text": "one", "language": "en", "duration": 1.5}


def rows_in(folder: Path) -> list[Utterance]:
    return [
        Utterance(str(folder / "wav" / "a.wav"), "one two", "en", 1.25, "en-us+Alex"),
        Utterance(str(folder / "wav" / "b c.wav"), 'stra\u00dfe \u4e2d\u6587 "quoted"', "de", 30.0),
        Utterance(str(folder.parent / "elsewhere" / "d.flac"), "", "en", 2.0, offset=17.125),
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
    path = write_lines(tmp_path / "m.jsonl", *(GOOD | {"language": code} for code in ["en", "de", "fr", "de"]))
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
        (GOOD | {"duration": None}, "no duration.*a.wav: no such file"),
        (GOOD | {"duration": 0}, "no duration.*a.wav: no such file"),
        (GOOD | {"duration": -1}, "wrong field duration: -1"),
        (GOOD | {"duration": math.nan}, "wrong field duration: NaN"),
        (GOOD | {"duration": True}, "wrong field duration: true"),
        (GOOD | {"duration": [1]}, "wrong field duration"),
        (GOOD | {"offset": math.inf}, "wrong field offset: Infinity"),
        (GOOD | {"offset": -0.5}, "wrong field offset: -0.5"),
        (GOOD | {"audio_filepath": 3}, "wrong field"),
        (GOOD | {"audio_filepath": ""}, "wrong field audio_filepath"),
        (GOOD | {"text": None}, "wrong field.*text"),
        (GOOD | {"text": math.nan}, "wrong field text: NaN"),
        ("[" * 100_000, "not JSON"),
        (GOOD | {"language": ["en"]}, "wrong field.*language"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, line: object, complaint: str) -> None:
    path = write_lines(tmp_path / "m.jsonl", GOOD, "", line, GOOD)  # the blank line counts, as in an editor
    with pytest.raises(DataError, match=rf"m\.jsonl, line 3: .*{complaint}"):
        read_manifest(path)


def test_every_line_that_is_left_out_is_named_with_its_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [GOOD, GOOD | {"duration": 31}, "{", GOOD | {"language": "tlh"}, GOOD | {"language": "de"}, GOOD]
    path = write_lines(tmp_path / "m.jsonl", *rows)
    skipped = ["from before"]
    assert len(read_manifest(path, ["English"], skipped=skipped)) == 2
    assert [message.replace(str(path), "m") for message in skipped] == [
        "from before",
        "m, line 3: not JSON (Expecting property name enclosed in double quotes)",
        "m, line 2: 31 s long; at most 30 s are kept",
        "m, line 4: language 'tlh' is not one of those kept, en",
        "m, line 5: language 'de' is not one of those kept, en",
    ]
    path = write_lines(tmp_path / "m.jsonl", *(row for row in rows if row != "{"))
    with caplog.at_level(logging.WARNING):
        assert len(read_manifest(path, ["en"])) == 2
    assert "left out: 3, the first is " + str(path) + ", line 2: 31 s long" in caplog.text


def test_names_of_languages_are_codes_and_strange_ones_stay(tmp_path: Path) -> None:
    written = ["en-US", "English", "cmn_hans_cn", "deu", "klingon", ""]
    path = write_lines(tmp_path / "m.jsonl", *(GOOD | {"language": name} for name in written), {
        "lang" if key == "language" else key: value for key, value in GOOD.items()
    })  # fmt: skip
    assert [u.language for u in read_manifest(path)] == ["en", "en", "zh", "de", "klingon", "", "en"]
    assert [u.language for u in read_manifest(path, ["Mandarin", "fr-FR"])] == ["zh"]


def test_a_duration_that_is_missing_is_the_rest_of_the_file(tmp_path: Path) -> None:
    for name in ("a.wav", "a.mp3", "a.flac"):
        write(tmp_path / name, tone(440, 2.0))
    bare = {key: value for key, value in GOOD.items() if key != "duration"}
    path = write_lines(
        tmp_path / "m.jsonl", bare, bare | {"duration": None, "offset": 0.75}, bare | {"audio_filepath": "a.flac"},
        bare | {"audio_filepath": "a.mp3", "offset": None}, bare | {"offset": 5},
    )  # fmt: skip
    skipped: list[str] = []
    rows = read_manifest(path, skipped=skipped)
    assert [(u.offset, u.duration) for u in rows[:3]] == [(0.0, 2.0), (0.75, 1.25), (0.0, 2.0)]
    assert rows[3].duration == pytest.approx(2.0, abs=0.1)
    assert len(skipped) == 1 and "line 5: offset 5 s is behind the end of" in skipped[0]


def test_an_utterance_is_known_by_all_that_it_is() -> None:
    one = Utterance("/a.wav", "one", "en", 1.5, "Ann", 2.0)
    assert one.key == replace(one, speaker="Bob").key == Utterance("/a.wav", "one", "en", 1.5, "", 2).key
    others = [
        replace(one, **{name: value})
        for name, value in {
            "audio_filepath": "/b.wav", "text": "two", "language": "de", "duration": 1.25, "offset": 0.0
        }.items()
    ]  # fmt: skip
    assert len({one.key, *(other.key for other in others)}) == 6
    assert one.key == "6438a845eb84de047c9e61701afadf36"  # in every run: caches and results are found by it


def cut(**changes: Any) -> dict[str, Any]:
    """A line of a lhotse CutSet: a cut of a long recording with two supervisions."""
    sources = [{"type": "file", "channels": [0], "source": "long.wav"}]
    return {
        "id": "cut-1", "start": 12.5, "duration": 4.0, "channel": 0, "type": "MonoCut",
        "supervisions": [
            {"id": "b", "start": 2.0, "duration": 1.5, "channel": 0, "text": "two", "language": "German"},
            {"id": "a", "start": 0.5, "duration": 1.0, "channel": 0, "text": "one", "language": "English", "speaker": "Ann"},
        ],
        "recording": {"id": "r", "sources": sources, "sampling_rate": 16000, "num_samples": 960000, "duration": 60.0},
    } | changes  # fmt: skip


def test_cuts_of_lhotse(tmp_path: Path) -> None:
    stereo = cut()
    stereo["recording"]["sources"][0]["channels"] = [0, 1]
    path = write_lines(tmp_path / "cuts.jsonl", cut(), stereo, cut(supervisions=[]), cut(start="x"), cut(recording=None))
    skipped: list[str] = []
    rows = read_manifest(path, skipped=skipped)
    assert rows == [Utterance(str(tmp_path / "long.wav"), "one two", "en", 4.0, "Ann", 12.5)]
    for message, why in zip(skipped, ("one channel of several", "text: null", "offset", "lhotse cut"), strict=True):
        assert why in message
    packed = tmp_path / "cuts.jsonl.gz"
    packed.write_bytes(gzip.compress(json.dumps(cut()).encode()))
    assert read_manifest(packed) == rows


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "utf-16-be"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_what_other_systems_write(tmp_path: Path, encoding: str, newline: str) -> None:
    rows = [GOOD | {"text": "Müller 中\u2028文"}, GOOD]
    text = "".join(json.dumps(row, ensure_ascii=False) + newline for row in rows)
    path = tmp_path / "m.jsonl"
    path.write_bytes((b"\xfe\xff" if encoding == "utf-16-be" else b"") + text.encode(encoding))
    assert [u.text for u in read_manifest(path)] == ["Müller 中\u2028文", "one"]


def test_an_encoding_that_cannot_be_told_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    text = "".join(json.dumps(GOOD | {"text": word}, ensure_ascii=False) + "\n" for word in ("one", "Müller"))
    path.write_bytes(text.encode("latin-1"))
    for skipped in (None, []):
        with pytest.raises(DataError, match=r"m\.jsonl: no UTF-8 in line 2 \(byte 0xfc\); save the file as UTF-8"):
            read_manifest(path, skipped=skipped)


def test_writing_that_breaks_off_leaves_the_manifest_before(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    write_manifest(path, rows_in(tmp_path))

    def broken() -> Iterator[Utterance]:
        yield rows_in(tmp_path)[1]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_manifest(path, broken())
    assert read_manifest(path) == rows_in(tmp_path)
