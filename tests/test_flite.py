"""data/synthetic/flite.py: plans are functions of their seed; what the program says becomes a list of utterances."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from diffusion_gemma_asr.audio.read import SAMPLE_RATE
from diffusion_gemma_asr.data.manifest import read_manifest
from diffusion_gemma_asr.data.synthetic import flite
from diffusion_gemma_asr.data.synthetic.copies import Distortion
from diffusion_gemma_asr.errors import SynthesisError

PLAIN = Distortion(1.0, -6.0, None, None, False, 0)
LINE = flite.Line("We met, at last.", "slt", stretch=1.2, distortion=PLAIN)
HUMS = """#!{python}
import io, sys, wave
text = sys.argv[sys.argv.index("-t") + 1]
if "refuse" in text:
    sys.exit(3)
with wave.open(sys.stdout.buffer, "wb") as file:
    file.setnchannels(1), file.setsampwidth(2), file.setframerate(8000)
    file.writeframes((b"\\0\\0" if "silent" in text else b"\\0\\x10\\0\\xf0") * 4000)
"""


@pytest.fixture
def humming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program flite that hums for a second, whatever it is told; it keeps silent, or fails, where the text says so."""
    program = tmp_path / "bin" / "flite"
    program.parent.mkdir()
    program.write_text(HUMS.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))


def test_a_plan_is_a_function_of_its_seed() -> None:
    sentences = [f"Sentence {number}." for number in range(50)]
    assert flite.plan(sentences, 3) == flite.plan(sentences, 3) != flite.plan(sentences, 4)
    assert {line.voice for line in flite.plan(sentences, 3)} == set(flite.VOICES)


@pytest.mark.usefixtures("humming")
def test_sentences_become_a_list(tmp_path: Path) -> None:
    lines = flite.plan(["We met, at last.", "It's five!"], 0)
    manifest = flite.synthesise(lines, tmp_path / "out", workers=1)
    rows = read_manifest(manifest)
    assert [(row.text, row.language) for row in rows] == [("we met at last", "en"), ("it's five", "en")]
    for row, line in zip(rows, lines, strict=True):
        assert row.speaker == f"flite-{line.voice}"
        assert row.duration == pytest.approx(1 / line.distortion.speed, rel=0.05), "a second, at the speed of the distortion"
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "wav").iterdir()}
    flite.synthesise(lines, tmp_path / "out", workers=1)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "wav").iterdir()} == made, "made anew"


@pytest.mark.usefixtures("humming")
@pytest.mark.parametrize("text", ["be silent", "refuse this"])
def test_a_text_that_makes_no_sound_is_told(text: str) -> None:
    with pytest.raises(SynthesisError, match=f"could not say '{text}'"):
        flite.speak(flite.Line(text, "slt", 1.0, PLAIN))


def test_without_the_program_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SynthesisError, match="apt-get install flite"):
        flite.speak(LINE)


@pytest.mark.skipif(shutil.which("flite") is None, reason="flite is not installed")
def test_a_slower_reading_lasts_longer() -> None:
    slow, fast = (flite.speak(flite.Line(LINE.text, "slt", stretch, PLAIN)) for stretch in (1.25, 0.8))
    assert slow.dtype == np.float32 and len(slow) > 1.3 * len(fast) > 0.5 * SAMPLE_RATE
