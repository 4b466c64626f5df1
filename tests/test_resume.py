"""A run over many files that is killed: what is finished is whole, and the same command does the rest."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sounds import write

import diffusion_gemma_asr as asr
from diffusion_gemma_asr.audio.read import load_audio

EXAMPLE = Path(__file__).parents[1] / "examples/en.flac"
FILES = 10


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    sound = load_audio(EXAMPLE)
    files = [write(tmp_path / f"{i:02}.wav", sound[200 * i :]) for i in range(FILES)]
    out = tmp_path / "out"
    command = [sys.executable, "-m", "diffusion_gemma_asr", "transcribe", *map(str, files), "-o", str(out), "-f", "json"]
    command += ["--model", "mini", "--language", "en"]
    command += ["--device", "cpu", "--batch_size", "1", "--threads", "1"]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while run.poll() is None and len(list(out.glob("*.json"))) < 3:
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    run.wait()
    done = {path: path.stat().st_mtime_ns for path in out.glob("*.json")}
    assert 3 <= len(done) < FILES, "the run ended before it could be killed"
    for path in done:
        assert json.loads(path.read_text())["segments"]

    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("exists and is left as it is") == len(done)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    model = asr.load("mini", device="cpu")
    for file in files[:2] + files[-2:]:
        written = json.loads((out / f"{file.stem}.json").read_text())
        assert written["audio"] == str(file)
        assert written["text"] == model.transcribe(file, language="en", batch_size=1).text
    assert len(list(out.glob("*.json"))) == FILES
