"""What the language model of drafts brings, and how much it is to count.

    python benchmarks/draft_lm.py measure mini                 or mini6, mini-whisper-base --encoder FOLDER
    python benchmarks/draft_lm.py report                       fills the tables of docs/results/draft_lm.md

Error rates of drafts alone (beam.py; draft_search.py where the model has a speller), which denoising starts from, over the
synthetic monitor lists of a checkpoint's languages: other sentences than those of the figures that are reported.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from checkpoints import command, error_lines, monitor_lists
from pages import circumstances, measured

import diffusion_gemma_asr as asr
from diffusion_gemma_asr.draft_search import spelled_drafts
from diffusion_gemma_asr.evaluate.run import machine, write_whole
from diffusion_gemma_asr.speller import Spellings
from diffusion_gemma_asr.train.monitor import error_rate

GREEDY = "greedy"
SETTINGS = ((0.0, 0.0), (0.35, 2.0), (0.5, 2.0), (0.5, 3.5), (0.5, 5.0), (0.65, 3.5))  # weight, bonus
SPELLED = ((0.0, 0.0), (0.5, 1.5), (0.5, 2.5), (0.7, 1.5), (0.7, 2.5), (0.9, 2.5))  # of a model with a speller
COUNT = 60
PAGE, DATA = Path("docs/results/draft_lm.md"), Path("docs/results/draft_lm.json")


@torch.no_grad()
def measure(name: str, checkpoint: str, encoder: str | None, frames: Path) -> None:
    """Adds a model's figures to the data, in place of older ones."""
    model = asr.load(checkpoint, device="cpu", encoder=encoder)
    if model.lm is None:
        raise SystemExit(f"{checkpoint} has no language model")
    lists, cache = monitor_lists(model, COUNT, frames)
    lm = model.lm.lm
    errors: dict[str, dict[str, float]] = {}
    seconds: dict[str, float] = {}
    bundled, speller = model.lm, model.projector.speller
    for setting in (None, *(SETTINGS if speller is None else SPELLED)):
        model.lm = None if setting is None else replace(bundled, weight=setting[0], bonus=setting[1])
        for code, rows in lists.items():
            said, (frames_of, frame_lengths) = [u.text for u in rows], cache.batch(rows)
            slots, lengths = model.projector(frames_of, frame_lengths)
            heard = model.hear(slots) if speller is None else speller.hear(frames_of, frame_lengths)
            start = time.perf_counter()
            if isinstance(heard, Spellings):
                drafts = spelled_drafts(model, heard, frame_lengths, slots, lengths)
            else:
                drafts = heard.draft(lengths, model.blank, model.lm)
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
    lines = error_lines(errors, held["count"])
    took, lm = held["ms_per_s"], held["lm"]
    lines.append(f"| ms a second of sound | {' | '.join(f'{took[label]:.1f}' for label in errors)} |")
    size = f"{lm['sequences']:,} sequences of up to {lm['order']} tokens"
    return "\n".join([*lines, "", f"{size}; {circumstances(held['machine'])}."])


if __name__ == "__main__":
    command(__doc__, PAGE, DATA, measure, table)
