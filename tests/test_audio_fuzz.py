"""A short part of the fuzz run of `fuzz_containers.py`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import diffusion_gemma_asr

SCRIPT = Path(__file__).with_name("fuzz_containers.py")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_some_damaged_files() -> None:
    source = Path(diffusion_gemma_asr.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, SCRIPT, "--count", "20", "--seed", "1"],
        capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": str(source)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    told = re.fullmatch(r"20 files: (\d+) heard, (\d+) refused, .*, 0 problems; .*\n", done.stdout)
    assert told and int(told[1]) >= 10 and int(told[1]) + int(told[2]) == 20
