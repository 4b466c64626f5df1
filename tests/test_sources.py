"""data/sources.py and data/hub.py: folders of sounds, and hub corpora, here tiny ones in the real column layout."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from sounds import tone, write

from diffusion_gemma_asr.data import hub
from diffusion_gemma_asr.data.hub import CORPORA, Corpus, Share, store
from diffusion_gemma_asr.data.manifest import read_manifest
from diffusion_gemma_asr.data.sources import corpus_parts, read_source
from diffusion_gemma_asr.errors import AsrError, DataError

datasets = pytest.importorskip("datasets")

AUDIO = datasets.Audio(sampling_rate=16_000)
TEXT, NUMBER = datasets.Value("string"), datasets.Value("int64")
LAYOUTS: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]]]] = {  # configuration, columns, rows without sound
    "librispeech": (
        "clean",
        {"file": TEXT, "audio": AUDIO, "text": TEXT, "speaker_id": NUMBER, "chapter_id": NUMBER, "id": TEXT},
        [
            {"file": "6930-75918-0000.flac", "text": "CONCORD RETURNED", "speaker_id": 6930, "chapter_id": 75918, "id": "a"},
            {"file": "6930-75918-0001.flac", "text": "TO ITS PLACE", "speaker_id": 6930, "chapter_id": 75918, "id": "b"},
        ],
    ),
    "fleurs": (
        "hi_in",
        {"id": datasets.Value("int32"), "num_samples": datasets.Value("int32"), "path": TEXT, "audio": AUDIO,
         "transcription": TEXT, "raw_transcription": TEXT, "gender": datasets.ClassLabel(names=["male", "female", "other"]),
         "lang_id": datasets.ClassLabel(names=["hi_in"]), "language": TEXT, "lang_group_id": NUMBER},
        [
            {"id": 1, "num_samples": 8000, "path": "1.wav", "transcription": "हिन्दी", "raw_transcription": "हिन्दी।",
             "gender": 1, "lang_id": 0, "language": "Hindi", "lang_group_id": 3},
            {"id": 2, "num_samples": 8000, "path": "2.wav", "transcription": "भाषा", "raw_transcription": "भाषा।",
             "gender": 0, "lang_id": 0, "language": "Hindi", "lang_group_id": 3},
        ],
    ),
    "voxpopuli": (
        "de",
        {"audio_id": TEXT, "language": datasets.ClassLabel(names=["en", "de"]), "audio": AUDIO, "raw_text": TEXT,
         "normalized_text": TEXT, "gender": TEXT, "speaker_id": TEXT, "is_gold_transcript": datasets.Value("bool"),
         "accent": TEXT},
        [
            {"audio_id": "x", "language": 1, "raw_text": "", "normalized_text": "herr präsident", "gender": "male",
             "speaker_id": "11", "is_gold_transcript": True, "accent": "None"},
            {"audio_id": "y", "language": 1, "raw_text": "Danke.", "normalized_text": "", "gender": "male",
             "speaker_id": "11", "is_gold_transcript": True, "accent": "None"},
        ],
    ),
}  # fmt: skip


@pytest.fixture
def corpus(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, dict[str, Corpus]]:
    """A corpus of two utterances as a folder in the hub's layout, and the table that says where it lies."""
    name: str = request.param
    part, columns, rows = LAYOUTS[name]
    folder = tmp_path / "hub"
    sounds = [write(tmp_path / f"{i}.flac", tone(220 * (i + 1), 0.5 + i)).read_bytes() for i in range(2)]
    filled = [rows[i] | {"audio": {"bytes": sounds[i], "path": f"{i}.flac"}} for i in range(2)]
    # As Audio only afterwards: the library wants an encoder for sound that it writes itself.
    plain = columns | {"audio": {"bytes": datasets.Value("binary"), "path": TEXT}}
    table = datasets.Dataset.from_list(filled, features=datasets.Features(plain)).cast_column("audio", AUDIO)
    (folder / part).mkdir(parents=True)
    table.to_parquet(folder / part / "test-00000-of-00001.parquet")
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: {part}\n  data_files:\n  - split: test\n    path: {part}/test-*\n---\n"
    )
    return name, {name: replace(CORPORA[name], repository=str(folder))}


@pytest.mark.parametrize("corpus", LAYOUTS, indirect=True)
def test_a_corpus_is_stored_once_as_sounds_with_a_manifest(corpus: tuple[str, dict[str, Corpus]], tmp_path: Path) -> None:
    name, corpora = corpus
    part = LAYOUTS[name][0]
    manifest = store(name, part, "test", tmp_path / "stored", corpora)
    rows = read_manifest(manifest)
    expected = {
        "librispeech": [("CONCORD RETURNED", "en", 0.5, "6930"), ("TO ITS PLACE", "en", 1.5, "6930")],
        "fleurs": [("हिन्दी।", "hi", 0.5, ""), ("भाषा।", "hi", 1.5, "")],
        "voxpopuli": [("herr präsident", "de", 0.5, "11")],  # the other has no transcript
    }
    assert [(u.text, u.language, u.duration, u.speaker) for u in rows] == expected[name]
    assert Path(rows[0].audio_filepath).read_bytes() == (tmp_path / "0.flac").read_bytes()
    gone = {name: replace(corpora[name], repository="nowhere")}
    assert store(name, part, "test", tmp_path / "stored", gone) == manifest  # nothing is loaded a second time


@pytest.mark.parametrize("corpus", ["librispeech"], indirect=True)
def test_what_a_kill_left_behind_is_stored_again(corpus: tuple[str, dict[str, Corpus]], tmp_path: Path) -> None:
    name, corpora = corpus
    manifest = store(name, "clean", "test", tmp_path / "stored", corpora)
    manifest.unlink()
    stray = manifest.parent / "audio" / "000007.flac"
    stray.write_bytes(b"half")
    assert len(read_manifest(store(name, "clean", "test", tmp_path / "stored", corpora))) == 2
    assert not stray.exists()


@pytest.mark.parametrize("corpus", ["librispeech"], indirect=True)
@pytest.mark.parametrize("count", [2, 3])
def test_workers_share_the_download(corpus: tuple[str, dict[str, Corpus]], tmp_path: Path, count: int) -> None:
    """Of two rows in one file each worker takes some, a third one none, and all get the list that one alone makes."""
    name, corpora = corpus
    written = list[set[str]]()
    sounds = tmp_path / "shared" / name / "clean" / "test" / "audio"

    def look() -> None:
        if sounds.exists():
            written.append({path.name for path in sounds.iterdir()})

    meeting = threading.Barrier(count, look, timeout=60)  # it looks before anybody goes on

    def wait() -> None:
        meeting.wait()

    def work(worker: int) -> Path:
        return store(name, "clean", "test", tmp_path / "shared", corpora, Share(worker, count, wait))

    with ThreadPoolExecutor(count) as pool:
        (manifest,) = set(pool.map(work, range(count)))
    assert {"000000.flac", "000001.flac", *(f"{worker}.jsonl" for worker in range(count))} in written
    alone = read_manifest(store(name, "clean", "test", tmp_path / "alone", corpora))
    assert [replace(u, audio_filepath=Path(u.audio_filepath).name) for u in read_manifest(manifest)] == [
        replace(u, audio_filepath=Path(u.audio_filepath).name) for u in alone
    ]
    assert {path.name for path in sounds.iterdir()} == {"000000.flac", "000001.flac"}


@pytest.mark.parametrize("corpus", ["librispeech"], indirect=True)
def test_a_second_run_waits_for_the_first(corpus: tuple[str, dict[str, Corpus]], tmp_path: Path) -> None:
    name, corpora = corpus
    place = tmp_path / name / "clean" / "test"
    place.mkdir(parents=True)
    with ThreadPoolExecutor(1) as pool:
        with FileLock(place / ".lock"):
            second = pool.submit(store, name, "clean", "test", tmp_path, corpora)
            with pytest.raises(TimeoutError):
                second.result(0.5)
            assert not (place / "audio").exists()
            (place / "manifest.jsonl").write_text("of the first\n", encoding="utf-8")
        assert second.result(60) == place / "manifest.jsonl"
    assert not (place / "audio").exists()


@pytest.mark.parametrize("corpus", ["librispeech"], indirect=True)
def test_workers_that_do_not_see_each_other(corpus: tuple[str, dict[str, Corpus]], tmp_path: Path) -> None:
    name, corpora = corpus
    with pytest.raises(DataError, match="a worker has not written there; let XDG_CACHE_HOME be a folder that all"):
        store(name, "clean", "test", tmp_path, corpora, Share(0, 2))


@pytest.mark.parametrize("corpus", ["librispeech"], indirect=True)
def test_a_corpus_is_read_by_name(
    corpus: tuple[str, dict[str, Corpus]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(hub.CORPORA, "librispeech", corpus[1]["librispeech"])
    rows = read_source("librispeech:clean", max_duration_s=1.0)
    assert [u.text for u in rows] == ["CONCORD RETURNED"]
    assert rows[0].audio_filepath.startswith(
        str(tmp_path / "cache" / "diffusion-gemma-asr" / "librispeech" / "clean" / "test")
    )
    with pytest.raises(DataError, match=r"hub \(clean, tset\) cannot be loaded: .*tset"):
        read_source("librispeech:clean/tset")


def test_names_mean_parts_languages_and_splits() -> None:
    assert corpus_parts("librispeech") == [("librispeech", "clean", "test"), ("librispeech", "other", "test")]
    assert corpus_parts("librispeech:clean/train.100") == [("librispeech", "clean", "train.100")]
    assert (
        corpus_parts("fleurs:zh", "train")
        == corpus_parts("fleurs:cmn_hans_cn/train")
        == corpus_parts("fleurs:zh-CN/train")
        == corpus_parts("fleurs:Mandarin/train")
        == [("fleurs", "cmn_hans_cn", "train")]
    )
    assert len(corpus_parts("fleurs")) == 6 and len(corpus_parts("voxpopuli")) == 4


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("librispech", "librispech: no such manifest, folder or corpus; did you mean librispeech?"),
        ("libri speech", "did you mean librispeech?"),
        ("xyz", "corpora are librispeech, fleurs, voxpopuli"),
        ("librispeech:claen", "librispeech has no part claen; did you mean clean?"),
        ("voxpopuli:hi", "voxpopuli has no part hi; it has en, de, fr, es"),
        ("gone.jsonl", "gone.jsonl: no such manifest"),
    ],
)
def test_a_wrong_name_gets_the_nearest(source: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        read_source(source)
    assert message in str(caught.value)


def test_a_folder_of_sounds_with_their_texts(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name, text in (("a", "one\n two "), ("deep/b[1]", "three"), ("gone", "nothing")):
        (tmp_path / f"{name}.txt").write_text(text)
        if name != "gone":
            write(tmp_path / f"{name}.wav", tone(300, 0.5))
    (tmp_path / "no sound.txt").write_text("x")
    (tmp_path / "no sound.wav").write_text("not a sound")
    skipped: list[str] = []
    rows = read_source(tmp_path, skipped=skipped, folder_language="de")
    assert [(Path(u.audio_filepath).name, u.text, u.language, u.duration) for u in rows] == [
        ("a.wav", "one two", "de", 0.5),
        ("b[1].wav", "three", "de", 0.5),
    ]
    assert "gone.txt: no sound of the same name beside it" in skipped[0] and "no sound.wav" in skipped[1]
    with pytest.raises(DataError, match=r"gone.txt: no sound"):
        read_source(tmp_path)
    skipped = []
    assert read_source(tmp_path, ["fr"], skipped=skipped, folder_language="fr", max_duration_s=0.1) == []
    assert len(skipped) == 4 and "a.wav: 0.5 s long; at most 0.1 s are kept" in skipped[2]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: no sound file with its transcript beside it"):
        read_source(tmp_path / "empty")


def test_a_folder_as_people_have_it(tmp_path: Path) -> None:
    texts = {"a.txt": "eins".encode("utf-16"), "b.TXT": b"\xef\xbb\xbfzwei\r\n", "c.txt": "M\xfcller".encode("latin-1")}
    for name in ("a", "b", "c", "told by nobody"):
        write(tmp_path / f"{name}.wav", tone(300, 0.5))
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text)
    for name in ("a.json", "a.lab", "notes.md", "._a.txt", "._a.wav", ".DS_Store"):  # no business of ours
        (tmp_path / name).write_bytes(b"\x00\x05\x16\x07")
    skipped: list[str] = []
    rows = read_source(tmp_path, ["de"], skipped=skipped, folder_language="German")
    assert [(Path(u.audio_filepath).name, u.text, u.language) for u in rows] == [
        ("a.wav", "eins", "de"),
        ("b.wav", "zwei", "de"),
    ]
    assert len(skipped) == 2 and "c.txt: no UTF-8 in line 1 (byte 0xfc)" in skipped[0]
    assert "told by nobody.wav: no transcript beside it as told by nobody.txt" in skipped[1]


def test_the_language_of_a_folder_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in "ab":
        write(tmp_path / f"{name}.wav", tone(300, 0.5))
        (tmp_path / f"{name}.txt").write_text("one")
    skipped: list[str] = []
    assert read_source(tmp_path, ["fr", "de"], skipped=skipped) == []
    assert [message.split("/")[-1] for message in skipped] == [
        f"{name}.wav: language 'en' is not one of those kept, de, fr" for name in "ab"
    ]
    with pytest.raises(DataError, match=r"no sound file with .*a\.wav: language 'en' is not one of those kept, fr"):
        read_source(tmp_path, ["fr"])
    (tmp_path / "b.txt").unlink()
    assert len(read_source(tmp_path)) == 1
    assert "left out: 1, the first is " in caplog.text and "b.wav: no transcript beside it" in caplog.text
    with pytest.raises(AsrError, match="'klingon' is not one of en"):
        read_source(tmp_path, folder_language="klingon")


def test_a_corpus_says_what_has_no_transcript_and_what_cannot_be_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = write(tmp_path / "a.wav", tone(300, 0.5)).read_bytes()
    rows = [{"audio": {"bytes": data}, "text": text} for data, text in ((sound, "one"), (sound, " "), (b"no sound", "two"))]
    monkeypatch.setattr(hub, "_rows", lambda *_: rows)
    manifest = store("librispeech", "clean", "test", tmp_path / "stored")
    assert "openslr/librispeech_asr (clean, test): 1 utterances without a transcript left out" in caplog.text
    skipped: list[str] = []
    assert [u.text for u in read_manifest(manifest, skipped=skipped)] == ["one"]
    assert len(skipped) == 1 and "line 2: no duration, and the file does not tell it" in skipped[0]
