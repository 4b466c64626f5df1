"""Files are whole or not there."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from diffusion_gemma_asr.errors import AsrError
from diffusion_gemma_asr.files import whole_file, write_whole


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with whole_file(path) as part:
        part.write_text("half")
        assert not path.exists() and part.parent == tmp_path
        part.write_text("whole")
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


def test_a_block_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="interrupted"), whole_file(path) as part:
        part.write_text("half")
        raise RuntimeError("interrupted")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_text_replaces_text_at_once(tmp_path: Path) -> None:
    """Whoever reads meanwhile sees one of the texts, never a part."""
    path = tmp_path / "a.txt"
    texts = ["short\n", "ünïcode " * 20_000]
    write_whole(path, texts[0])
    seen, done = set(), threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.add(path.read_text(encoding="utf-8"))

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(60):
        write_whole(path, texts[number % 2])
    done.set()
    reader.join()
    assert seen <= set(texts)
    assert list(tmp_path.iterdir()) == [path]


def test_names_as_long_as_file_systems_allow(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 250)
    write_whole(path, "whole")
    assert path.read_text() == "whole"


def test_what_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "missing" / "a.txt", tmp_path / "file" / "a.txt", tmp_path):
        with pytest.raises(AsrError, match=r"cannot be written .*; choose another folder, or free some space") as caught:
            write_whole(path, "text")
        assert "\n" not in str(caught.value)
