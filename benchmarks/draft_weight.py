"""How much CTC's own probabilities are to count beside the denoiser's on canvases that start from the draft.

    python benchmarks/draft_weight.py measure mini                 or mini6, mini-whisper-base --encoder FOLDER
    python benchmarks/draft_weight.py report                       fills the table of docs/results/draft_weight.md

Error rates of a checkpoint at several weights (draft_prior.py), over the synthetic monitor lists of its languages: sentences
and voices that training never meets, and other ones than those of the figures that are reported. Drafts are greedy
(draft_lm.py measures their language model).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from checkpoints import command, error_lines, monitor_lists
from pages import circumstances, measured

import diffusion_gemma_asr as asr
from diffusion_gemma_asr.evaluate.run import machine, write_whole
from diffusion_gemma_asr.train.adapter import transcribe_cached
from diffusion_gemma_asr.train.monitor import error_rate

WEIGHTS = (0.0, 0.5, 1.0, 2.0)
COUNT = 100
PAGE, DATA = Path("docs/results/draft_weight.md"), Path("docs/results/draft_weight.json")


def measure(name: str, checkpoint: str, encoder: str | None, frames: Path) -> None:
    """Adds a model's figures to the data, in place of older ones."""
    model = asr.load(checkpoint, device="cpu", encoder=encoder)
    model.lm = None
    lists, cache = monitor_lists(model, COUNT, frames)
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
    columns = {f"weight {weight}": errors[str(weight)] for weight in WEIGHTS} | {"CTC draft": errors["draft"]}
    lines = error_lines(columns, held["count"])
    return "\n".join([*lines, "", f"{circumstances(held['machine'])}."])


if __name__ == "__main__":
    command(__doc__, PAGE, DATA, measure, table)
