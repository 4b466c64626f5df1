"""Hours of sound in an hour of several GPUs, and what they cost: arithmetic from what one GPU was measured to do.

    python benchmarks/scale.py --price 2.5      fills the table in docs/scale.md

Nothing is measured here. That n GPUs do n times as much holds for processes that share nothing but a folder; reading files,
loading the model, and the end, where some have nothing left to do, come on top.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pages import RESULTS, ROOT, fill, markdown, read_results, stated

PAGE = ROOT / "docs" / "scale.md"
GPUS = (1, 8, 64)


def table(measured: dict[str, Any], price: float) -> str:
    """A line for each way of decoding clips of 30 s on canvases that fit them.

    Args:
        measured: a data file of full_size.py.
        price: of a GPU for an hour, in dollars.
    """
    parts = [part for name, part in measured["parts"].items() if name.startswith("ours") and "error" not in part]
    longest = max(part["clip_s"] for part in parts)
    fitted = min(part["canvas"] for part in parts if part["clip_s"] == longest)
    rows = []
    for part in parts:
        if (part["clip_s"], part["canvas"]) != (longest, fitted):
            continue
        speeds = [f"{gpus * part['rtfx']:,.0f}" for gpus in GPUS]
        times = [f"{10_000 / (gpus * part['rtfx']):,.1f} h" for gpus in GPUS]
        cost = f"${1000 / part['rtfx'] * price:,.2f}"
        rows.append([f"{part['batch']} × {longest} s, {part['steps']} steps", *speeds, *times, cost])
    heading = ["clips at once", *(f"{gpus} GPU{'s' * (gpus > 1)}" for gpus in GPUS)]
    heading += [f"10,000 h on {gpus}" for gpus in GPUS] + ["1,000 h of sound cost"]
    note = "Hours of sound in an hour: arithmetic, n times what one GPU was measured to do"
    notes = [f"{note} ({stated(measured['circumstances'])}).", f"Assumed: ${price:.2f} for an hour of a GPU."]
    return "\n".join([markdown(heading, rows), "", *notes])


def main(arguments: list[str] | None = None) -> None:
    """Fills the table."""
    parser = argparse.ArgumentParser(description="Hours of sound and cost of several GPUs, by arithmetic.")
    parser.add_argument("--price", type=float, default=2.5, help="of a GPU for an hour, in dollars: an assumption")
    parser.add_argument("--data", type=Path, default=RESULTS / "full_size.json")
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args(arguments)
    fill(args.page, {"scale": table(read_results(args.data), args.price)})


if __name__ == "__main__":
    main()
