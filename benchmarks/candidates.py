"""How many candidates, and which weights choose best among them: those of denoise/candidates.py, fitted.

    python benchmarks/candidates.py measure mini        adds the model to benchmarks/results/candidates.json
    python benchmarks/candidates.py report              fills the tables of docs/results/candidates.md

On utterances of the lists of languages.py that its tables leave out: of each list those behind the first 60. Errors are
those of the draft that is put together, before it is denoised.
"""

from __future__ import annotations

import argparse
import time
from itertools import product
from typing import Any

import numpy as np
import torch
from languages import in_batches, lists
from pages import RESULTS, ROOT, add_results, fill, markdown, measure_or_report, read_results, stated

from diffusion_gemma_asr.checkpoint.load import load_checkpoint
from diffusion_gemma_asr.data.sound import read_utterance
from diffusion_gemma_asr.denoise.candidates import WEIGHTS, Weights, proposed
from diffusion_gemma_asr.denoise.decode import draft_clips
from diffusion_gemma_asr.evaluate.metrics import error_rate, percent

DATA, PAGE = RESULTS / "candidates.json", ROOT / "docs/results/candidates.md"
REPORTED = 60  # utterances of each list in other tables
COUNTS, FITTED = (4, 8, 16, 32), 8  # candidates; for the table of weights
GRID = [Weights(*pair) for pair in product((0.2, 0.3, 0.45), (1.0, 1.5, 2.5))]


@torch.no_grad()
def measure(args: argparse.Namespace) -> None:
    """Puts drafts together for all lists, with all counts and all weights."""
    model = load_checkpoint(args.model, device="cpu", dtype="auto")
    settings = [(count, WEIGHTS) for count in COUNTS] + [(FITTED, weights) for weights in GRID if weights != WEIGHTS]
    tables: dict[str, Any] = {}
    relative = []
    for title, rows in lists(model.config.languages).items():
        chosen = [utterance for batch in in_batches(rows[REPORTED : REPORTED + args.count]) for utterance in batch]
        if not chosen:
            continue
        clips = [clip for u in chosen for clip in draft_clips(model, model.encode([read_utterance(u)]))]
        language, said = chosen[0].language, [u.text for u in chosen]
        draft = error_rate(said, [model.text([token.id for token in clip.draft]) for clip in clips], language)
        rates, seconds = {}, {}
        for count, weights in settings:
            start = time.process_time()
            found = [model.text(proposed(model, clip.slots, count, language, "", weights)) for clip in clips]
            rates[count, weights], seconds[count, weights] = error_rate(said, found, language), time.process_time() - start
        tables[title] = {
            "utterances": len(chosen),
            "draft": round(draft, 5),
            "chosen": {str(count): round(rates[count, WEIGHTS], 5) for count in COUNTS},
            "audio_s": round(sum(len(clip.slots) for clip in clips) * model.slot_s, 1),
            "seconds": {str(count): round(seconds[count, WEIGHTS], 2) for count in COUNTS},
        }
        relative.append([rates[FITTED, weights] / draft for weights in GRID] if draft else [1.0] * len(GRID))
        print(title, tables[title], flush=True)
    means = [[*weights, round(float(mean), 4)] for weights, mean in zip(GRID, np.mean(relative, 0), strict=True)]
    add_results(DATA, args.model, {"lists": tables, "weights": means})


def report() -> None:
    """Two tables a model: the lists, and the weights."""
    parts = {}
    for name, content in read_results(DATA).items():
        heading = ["list", "utterances", "draft", *(f"of {count}" for count in COUNTS)]
        tables = content["lists"]
        lines = [
            [title, str(row["utterances"]), percent(row["draft"])] + [percent(row["chosen"][str(n)]) for n in COUNTS]
            for title, row in tables.items()
        ]
        audio = sum(row["audio_s"] for row in tables.values())
        spent = [sum(row["seconds"][str(n)] for row in tables.values()) for n in COUNTS]
        lines.append(["ms of one core a second of sound", "", "", *(f"{1000 * one / audio:.0f}" for one in spent)])
        weights = markdown(
            ["language", "length", "errors, drafts are 1"], [list(map(str, row)) for row in content["weights"]]
        )
        parts[name] = f"{markdown(heading, lines)}\n\n{weights}\n\n{stated(content['circumstances'])}."
    fill(PAGE, parts)


def main() -> None:
    """Parses arguments and runs a part."""
    parser, measuring = measure_or_report("Weights of the scores that choose among candidates.", measure, report)
    measuring.add_argument("model")
    measuring.add_argument("--count", type=int, default=40, help="utterances of each list")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
