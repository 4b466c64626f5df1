"""What the real composition needs in memory, by arithmetic, beside what was measured of it on a GPU.

    python benchmarks/memory.py             fills the tables of docs/memory.md; a minute, no GPU, no download

The estimates are those of `diffusion-gemma-asr info --recipe small --memory`. Measured are the peaks that
benchmarks/full_size.py has stored.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from pages import RESULTS, ROOT, fill, markdown, read_results, stated

from diffusion_gemma_asr.app.memory import WORKERS, Estimate, Load, Packing, Task, lines, loads
from diffusion_gemma_asr.train.recipe import load_recipe

PAGE, MEASURED = ROOT / "docs/memory.md", RESULTS / "full_size.json"
CUDA = 1_000_000_000  # bytes that CUDA and its libraries hold
CARDS = ((1, 80), (1, 24), (8, 24))  # number, GB of each
ROWS = 8  # a batch of the recipe
SHOWN = {0: "–", ROWS: f"{ROWS} or more"}
COMPARED = (  # parts of full_size.json
    "ours 10 s, batch 1, canvas 48, 8 steps",
    "ours 30 s, batch 8, canvas 128, 8 steps",
    "ours 10 s, batch 64, canvas 256, 8 steps",
    "ours 30 s, batch 32, canvas 256, 8 steps",
)


def rows_that_fit(estimate: Estimate, task: Task, packing: Packing, load: Load, workers: int, card_gb: int) -> int:
    """Rows that a card has room for, ROWS at most, what a row takes being the mean of rows 2 to ROWS."""

    def total(batch: int) -> int:
        return estimate.need(task, packing, load._replace(batch=batch), workers).total

    first, row = total(1), (total(ROWS) - total(1)) / (ROWS - 1)
    return min(ROWS, max(0, 1 + int((card_gb * 1_000_000_000 - CUDA - first) // row)))


def estimates(estimate: Estimate, largest: dict[Task, Load]) -> str:
    """A line for each task and packing: bytes with one row, and the rows that cards hold."""
    heading = ["", "frozen", "trained", "passes, 1 row", "together", *(f"{n} × {gb} GB" for n, gb in CARDS)]
    body = []
    for task, packing, workers in lines():
        need = estimate.need(task, packing, largest[task]._replace(batch=1), workers)
        sizes = [f"{size / 1e9:.1f} GB" for size in (need.frozen, need.trained, need.passes, need.total)]
        fit = partial(rows_that_fit, estimate, task, packing, largest[task], workers)
        counts = [fit(gb) if workers in (1, number) else 0 for number, gb in CARDS]
        name = f"{task}, {packing}" + (", experts shared by 8" if workers == WORKERS else "")
        body.append([name, *sizes, *(SHOWN.get(count, str(count)) for count in counts)])
    return markdown(heading, body)


def comparison(estimate: Estimate, measured: dict[str, Any]) -> str:
    """Peaks on a GPU beside their estimates; the model there had no LoRA."""
    weights = 2 * (estimate.experts + estimate.others + estimate.encoder + estimate.projector)
    body = []
    for name in COMPARED:
        part = measured["parts"][name]
        prompt = loads(load_recipe("small"), part["canvas"])["inference"].prompt
        load = Load(part["batch"], prompt * part["clip_s"] // 30, part["canvas"])
        guess = weights + estimate.passes(load, training=False, packed=False)
        shape = f"{part['batch']} × {part['clip_s']} s, canvas {part['canvas']}"
        body.append([shape, f"{guess / 1e9:.1f} GB", f"{part['peak_gb']:.1f} GB"])
    return "\n".join([markdown(["clips", "estimate", "measured"], body), "", f"{stated(measured['circumstances'])}."])


def main() -> None:
    """Fills the page."""
    recipe = load_recipe("small")
    estimate = Estimate(recipe.model)
    largest = loads(recipe, estimate.config.canvas_length)
    tables = {"memory": estimates(estimate, largest), "measured": comparison(estimate, read_results(MEASURED))}
    fill(PAGE, tables)


if __name__ == "__main__":
    main()
