"""What the benchmarks of a checkpoint on the synthetic monitor lists share: the lists, their table, the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pages import fill, measured

from diffusion_gemma_asr.data.features import FeatureCache
from diffusion_gemma_asr.data.manifest import Utterance, read_manifest
from diffusion_gemma_asr.model import DiffusionGemmaASR
from diffusion_gemma_asr.train.adapter import frame_cache


def monitor_lists(model: DiffusionGemmaASR, count: int, frames: Path) -> tuple[dict[str, list[Utterance]], FeatureCache]:
    """The first utterances of the monitor list of each of the model's languages, and their frames, cached in a folder."""
    lists = {code: read_manifest(f"runs/mini/dev-{code}/manifest.jsonl", [code])[:count] for code in model.languages}
    return lists, frame_cache(frames, model.encoder, [u for rows in lists.values() for u in rows])


def error_lines(columns: Mapping[str, Mapping[str, float]], count: int) -> list[str]:
    """Lines of a table: a column for each label, of error rates by language, a line a language, and their mean."""
    lines = [f"| list | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    codes = list(next(iter(columns.values())))
    for code in codes:
        lines.append(f"| {code} ({count}) | {' | '.join(f'{rates[code]:.1%}' for rates in columns.values())} |")
    if len(codes) > 1:
        lines.append(f"| mean | {' | '.join(f'{sum(rates.values()) / len(codes):.1%}' for rates in columns.values())} |")
    return lines


def command(
    told: str | None, page: Path, data: Path, measure: Callable[[str, str, str | None, Path], None],
    table: Callable[[dict[str, Any]], str],
) -> None:  # fmt: skip
    """`measure NAME` adds a model's figures to the data file, `report` fills a table of each model in the page.

    Args:
        told: the benchmark's docstring.
        measure: of a model's name, checkpoint, encoder (None: its own) and folder of cached frames.
        table: of what the data file holds of a model.
    """
    parser = argparse.ArgumentParser(description=told.split("\n")[0] if told else None)
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
        fill(page, {name: table(held) for name, held in measured(data).items()})
