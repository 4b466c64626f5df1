"""Measures the mini model and what it is compared with, and writes the tables of docs/results/mini.md.

    python benchmarks/mini_results.py measure heldout-en runs/mini/heldout-en/manifest.jsonl
    python benchmarks/mini_results.py measure real-en-dev ../shared/speech/en-dev.jsonl --steps 1,8 --starts draft \\
        --count 300 --without "like TransFusion"
    python benchmarks/mini_results.py report

`measure` evaluates every system on one list into runs/results/LIST/ and goes on where it was killed; what it found goes to
docs/results/mini-runs.json. With --repeats N every system runs N times, in turn, and the time is the median. `report` draws
the plot and fills what stands between the markers of mini.md, so that no figure there is typed by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from pages import circumstances, fill

from diffusion_gemma_asr.data.sources import read_source
from diffusion_gemma_asr.decoding import Start
from diffusion_gemma_asr.evaluate.command import load_systems
from diffusion_gemma_asr.evaluate.metrics import count, total
from diffusion_gemma_asr.evaluate.run import MAX_CLIP_S, evaluate, read_predictions, write_whole
from diffusion_gemma_asr.evaluate.systems import System

OUT = Path("docs/results")
FOUND = OUT / "mini-runs.json"
PUBLISHED = OUT / "published.json"  # copied from the sources it names
RUNS = Path("runs/results")
STEPS = "1,2,4,8,16,32,48"
STEPS_OF_OTHERS = 8  # of the adapters that do not sweep
BATCH = 32  # utterances in a training step, in every recipe
READING = {"runs/mini/reading-v1": 1, "runs/mini/reading-v1b": 1, "runs/mini/reading": 1}  # stage 3: threads by run folder
OURS = READING | {"runs/mini": 2}


@dataclass(frozen=True)
class Row:
    """Rows of the table: one system, or our decoder at several numbers of steps.

    system, model and start are those of `evaluate`; trained are the run folders of what was trained for it beyond the
    encoder and the text model, with the threads that each had.
    """

    system: str
    model: str
    trained: dict[str, int]
    start: Start | None = None
    sweep: bool = False


def rows_of(model: str, starts: list[Start]) -> dict[str, Row]:
    """Every row by the name it bears; `model` is the one that sweeps over the steps, from each of `starts`."""
    whole = {f"denoising from {start}": Row("diffusion", model, OURS, start, sweep=True) for start in starts}
    folder = "runs/mini-{}/checkpoint".format
    return whole | {
        "CTC draft alone": Row("ctc", model, OURS),
        "backbone, autoregressive": Row("autoregressive", model, OURS),
        "Whisper decoder": Row("baseline", folder("whisper"), {"runs/mini-whisper": 1}),
        "like Whisfusion": Row("baseline", folder("whisfusion"), {"runs/mini-whisfusion": 1}),
        "like TransFusion": Row("baseline", folder("transfusion"), {"runs/mini-transfusion": 1}),
        "new projector, from noise": _adapter("new-projector", "noise"),
        "new projector, its CTC draft": Row("ctc", folder("new-projector"), READING | {"runs/mini-new-projector": 1}),
        "no CTC, from noise": _adapter("no-ctc", "noise"),
        "raw waveform, from noise": _adapter("waveform", "noise"),
        "raw waveform, its CTC draft": Row("ctc", folder("waveform"), READING | {"runs/mini-waveform": 1}),
    }


def _adapter(name: str, start: Start) -> Row:
    return Row("diffusion", f"runs/mini-{name}/checkpoint", READING | {f"runs/mini-{name}": 1}, start)


def training(folders: dict[str, int]) -> dict[str, Any] | None:
    """What was trained in some runs: parameters, each counted once, utterances heard, minutes of one core."""
    if not all((Path(folder) / "state.pt").exists() for folder in folders):
        return None
    sizes: dict[str, int] = {}
    utterances, minutes = 0, 0.0
    for folder, threads in folders.items():
        state = torch.load(Path(folder) / "state.pt", map_location="cpu", weights_only=True)
        sizes |= {name: value.numel() for name, value in state["weights"].items()}
        utterances += state["step"] * BATCH
        lines = (Path(folder) / "log.jsonl").read_text(encoding="utf-8").splitlines()
        minutes += threads * sum(json.loads(line)["seconds"] for line in lines) / 60
    return {"parameters": sum(sizes.values()), "utterances": utterances, "core_minutes": round(minutes)}


def measure(args: argparse.Namespace) -> None:
    """Evaluates the systems, in turn as often as asked; a row whose model has not been trained is left out."""
    utterances = read_source(args.source, max_duration_s=MAX_CLIP_S)[: args.count]
    chosen: dict[str, tuple[Row, System]] = {}
    for name, wanted in rows_of(args.model, args.starts.split(",")).items():
        if name in args.without:
            continue
        if wanted.model.startswith("runs/") and not Path(wanted.model).exists():
            print(f"{name}: left out, {wanted.model} is not there")
            continue
        steps = [int(n) for n in args.steps.split(",")] if wanted.sweep else [STEPS_OF_OTHERS]
        loaded = load_systems(wanted.system, wanted.model, "cpu", RUNS, steps, wanted.start, 0).values()
        for n, system in zip(steps, loaded, strict=True):
            chosen[f"{name}, {n} steps" if wanted.system == "diffusion" else name] = wanted, system
    found: dict[str, list[dict[str, Any]]] = {}
    for repeat in range(args.repeats):
        for name, (_, system) in chosen.items():
            folder = RUNS / args.list / f"{re.sub('[^a-z0-9]+', '-', name.lower())}-{repeat}"
            summary = evaluate(system, utterances, folder, args.batch_size)
            found.setdefault(name, []).append(summary | {"cer": character_error_rate(folder)})
            print(name, found[name][-1]["languages"]["en"]["error_rate"], flush=True)
    kept = json.loads(FOUND.read_text(encoding="utf-8")) if FOUND.exists() else {}
    kept[args.list] = {name: row(runs) | {"training": training(chosen[name][0].trained)} for name, runs in found.items()}
    write_whole(FOUND, json.dumps(kept, indent=1, ensure_ascii=False) + "\n")


def character_error_rate(folder: Path) -> float:
    """Of the normalised texts of a run."""
    lines = read_predictions(folder)
    edits = total([count(line.reference_normalised, line.hypothesis_normalised, "character") for line in lines])
    return round(edits.rate, 5)


def row(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What the table says of a system: its first run's errors, and its median speed."""
    first = runs[0]
    seconds = statistics.median(run["speed"]["seconds"] for run in runs)
    return {
        "errors": first["languages"]["en"], "cer": first["cer"], "passes": first["passes"], "seconds": seconds,
        "sound_s": first["sound_s"], "rtfx": round(first["sound_s"] / seconds, 1), "repeats": len(runs),
        "settings": first["settings"], "machine": first["machine"],
    }  # fmt: skip


def table(rows: dict[str, dict[str, Any]]) -> str:
    """One list's systems as Markdown, with the circumstances under it."""
    lines = [
        "| system | WER | 95 % interval | wrong / missing / extra | CER | passes | RTFx | trained | heard | core-min |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in rows.items():
        e = found["errors"]
        counts = " / ".join(f"{e[key] / e['reference']:.1%}" for key in ("substitutions", "deletions", "insertions"))
        interval = f"{e['low']:.1%} – {e['high']:.1%}"
        passes = f"{found['passes']:.1f}".removesuffix(".0")
        t = found["training"]
        cost = f"{t['parameters'] / 1e6:.1f}M | {t['utterances']:,} | {t['core_minutes']}" if t else "– | – | –"
        cells = f"{name} | {e['error_rate']:.1%} | {interval} | {counts} | {found['cer']:.1%} | {passes} | {found['rtfx']}"
        lines.append(f"| {cells} | {cost} |")
    some = next(iter(rows.values()))
    lines.append(
        f"\n{some['errors']['utterances']} utterances, {some['sound_s']:.0f} s of sound, batch size "
        f"{some['settings']['batch_size']}, {some['settings']['dtype']}, {circumstances(some['machine'])}; "
        f"time from samples to text, median of "
        f"{some['repeats']} run(s)."
    )
    return "\n".join(lines)


def published_table(rows: list[dict[str, str]]) -> str:
    """What others report of the real systems, as Markdown."""
    lines = ["| system | test set | error | steps, speed | source |", "|---|---|---|---|---|"]
    for row in rows:
        cells = row["system"], row["test_set"], f"{row['metric']} {row['error']}", row["speed"], row["source"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def report() -> None:
    """Writes the tables and the plot from the stored figures."""
    found = json.loads(FOUND.read_text(encoding="utf-8"))
    published = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    fill(OUT / "mini.md", {name: table(rows) for name, rows in found.items()} | {"published": published_table(published)})
    figure, axes = plt.subplots(1, len(found), figsize=(6 * len(found), 4.5), constrained_layout=True, squeeze=False)
    for axis, (title, rows) in zip(axes.flat, found.items(), strict=True):
        axis.set_prop_cycle(color=plt.get_cmap("tab20").colors)  # type: ignore[attr-defined]  # more rows than ten
        curves: dict[str, list[tuple[float, float]]] = {}
        for name, cell in rows.items():
            point = cell["rtfx"], 100 * cell["errors"]["error_rate"]
            curves.setdefault(re.sub(r", \d+ steps$", "", name), []).append(point)
        for name, points in curves.items():
            axis.plot(*zip(*sorted(points), strict=True), "o-", label=name)
        axis.set(title=title, xscale="log", xlabel="times real time", ylabel="WER, %")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.savefig(OUT / "mini-error-speed.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="The mini model's figures.")
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("list", help="name of the list in the tables")
    measuring.add_argument("source", help="manifest, folder or corpus")
    measuring.add_argument("--model", default="mini")
    measuring.add_argument("--steps", default=STEPS)
    measuring.add_argument("--starts", default="draft,noise")
    measuring.add_argument("--repeats", type=int, default=1)
    measuring.add_argument("--batch_size", type=int, default=8)
    measuring.add_argument("--without", action="append", default=[], metavar="ROW", help="a row to leave out")
    measuring.add_argument("--count", type=int, help="the first so many utterances (default: all)")
    commands.add_parser("report")
    args = parser.parse_args()
    if args.command == "measure":
        measure(args)
    else:
        report()


if __name__ == "__main__":
    main()
