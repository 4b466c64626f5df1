"""Error rates over the number of denoising steps, from the draft and from noise.

    python benchmarks/steps.py measure mini             adds the model to benchmarks/results/steps.json
    python benchmarks/steps.py report                   fills the tables of docs/results/steps.md

On the first 60 utterances of some lists of languages.py. Passes are what a clip took on average: most stop early.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from languages import in_batches, lists
from pages import RESULTS, ROOT, add_results, fill, markdown, measure_or_report, read_results, stated

from diffusion_gemma_asr.checkpoint.load import load_checkpoint
from diffusion_gemma_asr.data.sound import read_utterance
from diffusion_gemma_asr.denoise.decode import decode, draft_clips
from diffusion_gemma_asr.denoise.options import DecodeOptions
from diffusion_gemma_asr.evaluate.metrics import error_rate, percent

DATA, PAGE = RESULTS / "steps.json", ROOT / "docs/results/steps.md"
STEPS, STARTS = (1, 2, 4, 8, 16, 48), ("draft", "noise")
LISTS = ("real en, librispeech", "real en, common-voice-en", "real fr, common-voice-deltas", "synthetic en")


@torch.no_grad()
def measure(args: argparse.Namespace) -> None:
    """Decodes the lists once for each number of steps and start."""
    model = load_checkpoint(args.model, device="cpu", dtype="auto", encoder=args.encoder)
    tables: dict[str, Any] = {}
    for title, rows in lists(model.config.languages).items():
        if not title.startswith(LISTS):
            continue
        batches = in_batches(rows[: args.count])
        order = [u for batch in batches for u in batch]
        codes, said = [u.language for u in order], [u.text for u in order]
        clips = [c for batch in batches for c in draft_clips(model, model.encode([read_utterance(u) for u in batch]))]
        tables[title] = {"utterances": len(order)}
        for start in STARTS:
            for steps in STEPS:
                how = DecodeOptions(start=start, steps=steps, candidates=1)
                decoded = decode(model, clips, how, languages=codes)
                tables[title][f"{start} {steps}"] = {
                    "error_rate": round(error_rate(said, [row.text for row in decoded], codes[0]), 5),
                    "passes": round(sum(row.steps for row in decoded) / len(decoded), 2),
                }
            print(title, start, tables[title], flush=True)
    add_results(DATA, Path(args.model).name, {"lists": tables})


def report() -> None:
    """A table a model."""
    parts = {}
    for name, content in read_results(DATA).items():
        lines = [
            [f"{title} ({row['utterances']})", start]
            + [
                f"{percent(row[f'{start} {steps}']['error_rate'])} ({row[f'{start} {steps}']['passes']:.1f})"
                for steps in STEPS
            ]
            for title, row in content["lists"].items()
            for start in STARTS
        ]
        heading = ["errors (passes)", "from", *(f"{steps} step{'s' * (steps > 1)}" for steps in STEPS)]
        parts[name] = f"{markdown(heading, lines)}\n\n{stated(content['circumstances'])}."
    fill(PAGE, parts)


def main() -> None:
    """Parses arguments and runs a part."""
    parser, measuring = measure_or_report("Error rates over denoising steps.", measure, report)
    measuring.add_argument("model")
    measuring.add_argument("--encoder", help="folder or hub name in place of the encoder that the model names")
    measuring.add_argument("--count", type=int, default=60, help="utterances of each list")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
