"""Whether recorded steps write what steps launched one by one write, for the bundled model on its examples.

python benchmarks/recorded_steps.py            on a GPU, CUDA graphs; exit status 1 where a transcript differs
python benchmarks/recorded_steps.py --device cpu   the same fixed shapes, not recorded
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import numpy as np
import torch
from pages import ROOT

from diffusion_gemma_asr.audio.read import load_audio
from diffusion_gemma_asr.checkpoint.load import DEFAULT_MODEL, load_checkpoint
from diffusion_gemma_asr.denoise.clip import ClipDecoding, read_prompts
from diffusion_gemma_asr.denoise.decode import draft_clips
from diffusion_gemma_asr.denoise.engine import Engine
from diffusion_gemma_asr.denoise.options import DecodeOptions
from diffusion_gemma_asr.denoise.queue import AnyEngine, run_queue
from diffusion_gemma_asr.denoise.static_engine import StaticEngine
from diffusion_gemma_asr.model.backbone import Backbone
from diffusion_gemma_asr.model.model import DiffusionGemmaASR

LANGUAGES = ("en", "de", "fr", "es", "hi", "zh")


@torch.no_grad()
def written(
    model: DiffusionGemmaASR, clips: Sequence[np.ndarray], options: DecodeOptions, engine: Callable[[Backbone], AnyEngine]
) -> list[list[int]]:
    """The tokens of the first canvas of each clip."""
    drafted = draft_clips(model, model.encode(clips))
    decodings = [ClipDecoding(model, clip, options, code) for clip, code in zip(drafted, LANGUAGES, strict=True)]
    jobs = [decoding.job() for decoding in decodings]
    denoising = decodings[0].denoising
    rows = run_queue(
        model.backbone,
        jobs,
        lambda numbers: read_prompts([decodings[number] for number in numbers]),
        denoising,
        4,
        engine=engine(model.backbone),
    )
    return [finished.canvas.tolist() for _, finished in sorted(rows, key=lambda row: row[0])]


def main() -> None:
    """Compares both engines."""
    parser = argparse.ArgumentParser(description="Recorded steps against steps launched one by one.")
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    model = load_checkpoint(DEFAULT_MODEL, device=device)
    clips = [load_audio(str(ROOT / f"examples/{code}.flac")) for code in LANGUAGES]
    odd = 0
    for start in ("noise", "draft"):
        options = DecodeOptions(start=start, steps=8)
        pairs = zip(*(written(model, clips, options, engine) for engine in (Engine, StaticEngine)), strict=True)
        for code, (one, other) in zip(LANGUAGES, pairs, strict=True):
            same = one == other
            odd += not same
            print(f"{start}, {code}: {'the same' if same else 'differ'}: {model.text(other)}")
            if not same:
                print(f"    one by one: {model.text(one)}")
    raise SystemExit(1 if odd else 0)


if __name__ == "__main__":
    main()
