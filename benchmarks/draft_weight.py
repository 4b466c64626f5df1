"""How much CTC's own probabilities are to count beside the denoiser's on canvases that start from the draft.

    python benchmarks/draft_weight.py measure mini                 or mini6, mini-whisper-base --encoder FOLDER
    python benchmarks/draft_weight.py report                       fills the table of docs/results/draft_weight.md

Error rates of a checkpoint at several weights (draft_prior.py), over the synthetic monitor lists of its languages: sentences
and voices that training never meets, and other ones than those of the figures that are reported. Drafts are greedy
(draft_lm.py measures their language model).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pages import circumstances, fill, measured

import diffusion_gemma_asr as asr
from diffusion_gemma_asr.data.manifest import Utterance, read_manifest
from diffusion_gemma_asr.evaluate.run import machine, write_whole
from diffusion_gemma_asr.train.adapter import frame_cache, transcribe_cached
from diffusion_gemma_asr.train.monitor import error_rate

WEIGHTS = (0.0, 0.5, 1.0, 2.0)
COUNT = 100
PAGE, DATA = Path("docs/results/draft_weight.md"), Path("docs/results/draft_weight.json")


def measure(name: str, checkpoint: str, encoder: str | None, frames: Path) -> None:
    """Adds a model's figures to the data, in place of older ones."""
    model = asr.load(checkpoint, device="cpu", encoder=encoder)
    model.lm = None
    lists: dict[str, list[Utterance]] = {
        code: read_manifest(f"runs/mini/dev-{code}/manifest.jsonl", [code])[:COUNT] for code in model.languages
    }
    cache = frame_cache(frames, model.encoder, [u for rows in lists.values() for u in rows])
    errors: dict[str, dict[str, float]] = {}
    for weight in WEIGHTS:
        model.draft_weight = weight
        for code, rows in lists.items():
            found, said = transcribe_cached(model, rows, cache), [u.text for u in rows]
            errors.setdefault(str(weight), {})[code] = round(error_rate(said, [d.text for d in found], code), 4)
            errors.setdefault("draft", {})[code] = round(error_rate(said, [d.draft for d in found], code), 4)
        print(name, weight, errors[str(weight)], flush=True)
    data = measured(DATA)
    data[name] = {"errors": errors, "count": COUNT, "machine": machine()}
    write_whole(DATA, json.dumps(data, indent=1) + "\n")


def table(held: dict[str, Any]) -> str:
    """One line a language, and their mean."""
    errors = held["errors"]
    names = [*(str(weight) for weight in WEIGHTS), "draft"]
    head = [*(f"weight {name}" for name in names[:-1]), "CTC draft"]
    lines = [f"| list | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    codes = list(errors["draft"])
    for code in codes:
        lines.append(f"| {code} ({held['count']}) | {' | '.join(f'{errors[name][code]:.1%}' for name in names)} |")
    means = [sum(errors[name].values()) / len(codes) for name in names]
    if len(codes) > 1:
        lines.append(f"| mean | {' | '.join(f'{value:.1%}' for value in means)} |")
    return "\n".join([*lines, "", f"{circumstances(held['machine'])}."])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("name", help="of the model in the tables")
    measuring.add_argument("--checkpoint", help="folder (default: the bundled model of that name)")
    measuring.add_argument("--encoder", help="folder of the encoder, where the checkpoint names one of a hub")
    measuring.add_argument("--frames", type=Path, help="cache of its frames (default: one in runs/results)")
    commands.add_parser("report")
    args = parser.parse_args()
    if args.command == "measure":
        frames = args.frames or Path("runs/results") / f"frames-{args.name}"
        measure(args.name, args.checkpoint or args.name, args.encoder, frames)
    else:
        fill(PAGE, {name: table(held) for name, held in measured(DATA).items()})
