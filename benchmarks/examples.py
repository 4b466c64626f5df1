"""The examples: sentences that nobody trained on, by espeak-ng in a voice that training never hears.

python benchmarks/examples.py render       writes examples/CODE.flac from examples/CODE.txt where it is missing
python benchmarks/examples.py transcribe   shows what the bundled model makes of each, with its character error rate
"""

from __future__ import annotations

import argparse
from pathlib import Path

import av
import jiwer
import numpy as np

import diffusion_gemma_asr as asr
from diffusion_gemma_asr.audio import SAMPLE_RATE
from diffusion_gemma_asr.data.synth import ACCENTS, Line, render
from diffusion_gemma_asr.data.text import plain_text

EXAMPLES = Path("examples")
VOICE = "Andy"  # one of synth.HELD_OUT_VARIANTS


def said(code: str) -> str:
    """The sentence of a language."""
    return (EXAMPLES / f"{code}.txt").read_text(encoding="utf-8").strip()


def write_flac(path: Path, samples: np.ndarray) -> None:
    """Writes (n,) samples in [-1, 1] at 16 kHz."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("flac", rate=SAMPLE_RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray((samples * 32767).astype(np.int16)[None], format="s16", layout="mono")
        frame.sample_rate = SAMPLE_RATE
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            file.mux(packet)


def render_missing() -> None:
    """Speaks what has no sound yet."""
    for code, accents in ACCENTS.items():
        path = EXAMPLES / f"{code}.flac"
        if not path.exists():
            line = Line(said(code), code, f"{accents[0]}+{VOICE}", 150, 50, -3.0, 30.0, 1)
            write_flac(path, render(line))
            print(path)


def transcribe(name: str) -> None:
    """The language is named."""
    model = asr.load(name)
    for code in ACCENTS:
        written = asr.transcribe(EXAMPLES / f"{code}.flac", model, language=code).text
        rate = jiwer.cer(plain_text(said(code), code), plain_text(written, code))
        print(f"{code}  CER {rate:.1%}\n    {said(code)}\n    {written}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("command", choices=["render", "transcribe"])
    if parser.parse_args().command == "render":
        render_missing()
    else:
        transcribe("mini6")
