"""What the language model of drafts brings, and how much it is to count.

    python benchmarks/draft_lm.py measure mini                 or mini6, mini-whisper-base --encoder FOLDER
    python benchmarks/draft_lm.py report                       fills the tables of docs/results/draft_lm.md

Error rates of drafts alone (beam.py), which denoising starts from, over the synthetic monitor lists of a checkpoint's
languages: other sentences than those of the figures that are reported.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from pages import circumstances, fill, measured

import diffusion_gemma_asr as asr
from diffusion_gemma_asr.beam import DraftLM
from diffusion_gemma_asr.data.manifest import read_manifest
from diffusion_gemma_asr.evaluate.run import machine, write_whole
from diffusion_gemma_asr.train.adapter import frame_cache
from diffusion_gemma_asr.train.monitor import error_rate

GREEDY = "greedy"
SETTINGS = ((0.0, 0.0), (0.35, 2.0), (0.5, 2.0), (0.5, 3.5), (0.5, 5.0), (0.65, 3.5))  # weight, bonus
COUNT = 60
PAGE, DATA = Path("docs/results/draft_lm.md"), Path("docs/results/draft_lm.json")


@torch.no_grad()
def measure(name: str, checkpoint: str, encoder: str | None, frames: Path) -> None:
    """Adds a model's figures to the data, in place of older ones."""
    model = asr.load(checkpoint, device="cpu", encoder=encoder)
    if model.lm is None:
        raise SystemExit(f"{checkpoint} has no language model")
    lists = {code: read_manifest(f"runs/mini/dev-{code}/manifest.jsonl", [code])[:COUNT] for code in model.languages}
    cache = frame_cache(frames, model.encoder, [u for rows in lists.values() for u in rows])
    special, lm = model.prompts.special, model.lm.lm
    errors: dict[str, dict[str, float]] = {}
    seconds: dict[str, float] = {}
    for code, rows in lists.items():
        slots, lengths = model.projector(*cache.batch(rows))
        heard, said = model.hear(slots), [u.text for u in rows]
        for setting in (None, *SETTINGS):
            start = time.perf_counter()
            chosen = None if setting is None else DraftLM(lm, *setting)
            drafts = heard.draft(lengths, model.blank, chosen, special["bos"], special["eos"])
            label = GREEDY if setting is None else f"{setting[0]:g} / {setting[1]:g}"
            seconds[label] = seconds.get(label, 0.0) + time.perf_counter() - start
            texts = [model.text([token.id for token in draft]) for draft in drafts]
            errors.setdefault(label, {})[code] = round(error_rate(said, texts, code), 4)
    sound = sum(u.duration for rows in lists.values() for u in rows)
    took = {label: round(1000 * value / sound, 2) for label, value in seconds.items()}
    print(name, errors, took)
    data = measured(DATA)
    sizes = {"sequences": sum(len(keys) for keys, _ in lm.sequences), "order": lm.order}
    data[name] = {"errors": errors, "ms_per_s": took, "count": COUNT, "lm": sizes, "machine": machine()}
    write_whole(DATA, json.dumps(data, indent=1) + "\n")


def table(held: dict[str, Any]) -> str:
    """One line a language, their mean, and the time."""
    errors = held["errors"]
    lines = [f"| list | {' | '.join(errors)} |", "|---" * (len(errors) + 1) + "|"]
    codes = list(errors[GREEDY])
    for code in codes:
        lines.append(f"| {code} ({held['count']}) | {' | '.join(f'{row[code]:.1%}' for row in errors.values())} |")
    if len(codes) > 1:
        lines.append(f"| mean | {' | '.join(f'{sum(row.values()) / len(codes):.1%}' for row in errors.values())} |")
    took, lm = held["ms_per_s"], held["lm"]
    lines.append(f"| ms a second of sound | {' | '.join(f'{took[label]:.1f}' for label in errors)} |")
    size = f"{lm['sequences']:,} sequences of up to {lm['order']} tokens"
    return "\n".join([*lines, "", f"{size}; {circumstances(held['machine'])}."])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("name", help="of the model in the tables")
    measuring.add_argument("--checkpoint", help="folder (default: the bundled model of that name)")
    measuring.add_argument("--encoder", help="folder of the encoder, where the checkpoint names a hub's")
    measuring.add_argument("--frames", type=Path, help="folder of cached frames (default: a new one under runs/results)")
    commands.add_parser("report")
    args = parser.parse_args()
    if args.command == "measure":
        frames = args.frames or Path(f"runs/results/frames-{args.name}")
        measure(args.name, args.checkpoint or args.name, args.encoder, frames)
    else:
        fill(PAGE, {name: table(held) for name, held in measured(DATA).items()})
