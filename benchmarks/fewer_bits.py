"""What fewer bits in the experts change, with a bundled model on a CPU: the first pass over canvases of noise, and the text.

    python benchmarks/fewer_bits.py measure LIST.jsonl  writes benchmarks/results/fewer_bits.json
    python benchmarks/fewer_bits.py report              fills the table of docs/performance.md

The libraries of the extra `quantization` must be there. Where a GPU would multiply 8-bit floats, a CPU multiplies the same
rounded numbers in float32.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from pages import RESULTS, ROOT, circumstances, fill, markdown, measure_or_report, read_results, stated, write_results
from torch import Tensor

from diffusion_gemma_asr.checkpoint.load import load_checkpoint
from diffusion_gemma_asr.checkpoint.quantization import QUANTIZATIONS
from diffusion_gemma_asr.data.sound import read_utterance
from diffusion_gemma_asr.data.sources import read_source
from diffusion_gemma_asr.denoise.clip import ClipDecoding, DraftedClip, read_prompts
from diffusion_gemma_asr.denoise.decode import decode, draft_clips
from diffusion_gemma_asr.denoise.options import DecodeOptions
from diffusion_gemma_asr.evaluate.metrics import error_rate, percent
from diffusion_gemma_asr.evaluate.normalise import NORMALISER
from diffusion_gemma_asr.model.model import DiffusionGemmaASR

DATA, PAGE = RESULTS / "fewer_bits.json", ROOT / "docs/performance.md"
DRAFT = DecodeOptions(language="en", start="draft", candidates=1)


@torch.no_grad()
def first_pass(model: DiffusionGemmaASR, clips: Sequence[DraftedClip]) -> list[Tensor]:
    """Log-probabilities (C, V) of the first pass over a canvas of noise, for each clip."""
    found = []
    for clip in clips:
        decoding = ClipDecoding(model, clip, replace(DRAFT, start="noise"), "en")
        canvas = decoding.job().canvas[None]
        found.append(model.backbone.denoise_logits(canvas, read_prompts([decoding]))[0].log_softmax(-1))
    return found


def measure(args: argparse.Namespace) -> None:
    """Each packing beside the experts as they are."""
    utterances = read_source(args.source)[: args.count]
    said = [u.text for u in utterances]
    plain: list[Tensor] = []
    clips: list[DraftedClip] = []
    rows: dict[str, Any] = {}
    for name in (None, *QUANTIZATIONS):
        model = load_checkpoint(args.model, device="cpu", dtype="float32", quantization=name)
        if name is None:  # packing changes neither encoder nor projector
            clips = [draft_clips(model, model.encode([read_utterance(u)]))[0] for u in utterances]
        passes = first_pass(model, clips)
        plain = plain or passes
        pairs = list(zip(plain, passes, strict=True))
        kl = torch.cat([(a.exp() * (a - b)).sum(-1) for a, b in pairs])
        same = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in pairs])
        texts = [row.text for row in decode(model, clips, DRAFT, languages=["en"] * len(clips))]
        rows[name or "float32"] = {
            "divergence": round(float(kl.mean()), 6),
            "same_best": round(float(same.float().mean()), 4),
            "wer": round(error_rate(said, texts, "en"), 5),
        }
        print(name, rows[name or "float32"], flush=True)
    write_results(DATA, {"model": args.model, "utterances": len(said), "rows": rows, "circumstances": circumstances()})


def report() -> None:
    """The table."""
    content = read_results(DATA)
    heading = ["experts in", "divergence of the first pass, nats", "same best token", f"WER, {NORMALISER}"]
    lines = [
        [name, f"{row['divergence']:.5f}", percent(row["same_best"]), percent(row["wer"])]
        for name, row in content["rows"].items()
    ]
    note = f"`{content['model']}`, {content['utterances']} utterances; {stated(content['circumstances'])}."
    fill(PAGE, {"fewer_bits": f"{markdown(heading, lines)}\n\n{note}"})


def main() -> None:
    """Parses arguments and runs a part."""
    parser, measuring = measure_or_report("Fewer bits in the experts.", measure, report)
    measuring.add_argument("source")
    measuring.add_argument("--model", default="mini")
    measuring.add_argument("--count", type=int, default=60)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
