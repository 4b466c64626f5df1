"""word_classes.py: kinds of words, and how they follow each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffusion_gemma_asr.errors import CheckpointError
from diffusion_gemma_asr.train.word_classes import count_classes
from diffusion_gemma_asr.word_classes import FIRST, UNKNOWN, ClassLM

SENTENCES = [f"{'les' if n else 'la'} {word}{'s' if n else ''} {'sont' if n else 'est'} là".split()
             for word in ("rose", "table", "chaise", "porte", "rue", "place") for n in (False, True)]  # fmt: skip


@pytest.fixture(scope="module")
def model() -> ClassLM:
    return ClassLM.count({"fr": SENTENCES}, {"fr": 5}, 3, 1)


def test_frequent_words_and_endings_are_classes(model: ClassLM) -> None:
    assert set(model.names) == {"là", "la", "les", "est", "sont", "-es"}  # of other endings there are too few
    classes = model.classes(["les", "lunes", "tables", "lune", "là"])
    assert classes[0] >= FIRST and classes[1] == classes[2] and classes[3] == UNKNOWN
    assert len(set(classes)) == 4


def test_words_agree_that_were_never_seen_together(model: ClassLM) -> None:
    right, wrong = model.scores([["les", "lunes", "sont", "là"], ["la", "lunes", "sont", "là"]])
    assert right > wrong + 1
    assert model.scores([["les", "lunes", "sont", "là"]]) == pytest.approx([right])
    assert model.scores([]) == [] and len(model.scores([[]])) == 1


def test_a_saved_model_is_the_same(model: ClassLM, tmp_path: Path) -> None:
    model.save(tmp_path / "classes.npz")
    loaded = ClassLM.load(tmp_path / "classes.npz")
    assert loaded.names == model.names and loaded.scores(SENTENCES) == model.scores(SENTENCES)
    (tmp_path / "classes.npz").write_bytes(b"no")
    with pytest.raises(CheckpointError, match=r"classes\.npz cannot be read as word classes"):
        ClassLM.load(tmp_path / "classes.npz")


def test_text_is_counted_but_for_what_is_kept_out(tmp_path: Path) -> None:
    (tmp_path / "fr.txt").write_text("\n".join(" ".join(row) for row in SENTENCES))
    (tmp_path / "zh.txt").write_text("我们每天看电视\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "fr.txt").write_text("la rose est là\n")
    files = [tmp_path / "fr.txt", tmp_path / "zh.txt"]
    model = count_classes(files, [tmp_path / "out" / "fr.txt"], 3, 3, 1)
    assert set("我们每天看电视") <= set(model.names)
    whole = count_classes(files, [], 3, 3, 1)
    said = [["la", "rose", "est", "là"]]
    assert model.lm.within is not None and model.scores(said)[0] < whole.scores(said)[0]
