"""Measures the mini model and what it is compared with, and writes the tables of docs/results/mini.md.

    python benchmarks/mini_results.py measure heldout-en runs/mini/heldout-en/manifest.jsonl
    python benchmarks/mini_results.py measure real-en-dev ../shared/speech/en-dev.jsonl --steps 1,8
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
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from diffusion_gemma_asr import load
from diffusion_gemma_asr.baselines.autoregressive import Autoregressive
from diffusion_gemma_asr.baselines.trained import TrainedBaseline
from diffusion_gemma_asr.baselines.whisper import Whisper
from diffusion_gemma_asr.data.sources import read_source
from diffusion_gemma_asr.evaluate.run import MAX_CLIP_S, evaluate, write_whole
from diffusion_gemma_asr.evaluate.systems import CtcGreedy, Diffusion, System

OUT = Path("docs/results")
FOUND = OUT / "mini-runs.json"
PUBLISHED = OUT / "published.json"  # copied from the sources it names
RUNS = Path("runs/results")
STEPS = "1,2,4,8,16,32,48"
BASELINES = {  # left out where they have not been trained
    "like Whisfusion": "runs/mini-whisfusion/checkpoint",
    "like TransFusion": "runs/mini-transfusion/checkpoint",
}


def systems(model_name: str, whisper: str, steps: list[int], starts: list[str]) -> dict[str, System]:
    """Every system by the name that its row of the table bears."""
    model = load(model_name)
    chosen: dict[str, System] = {
        f"denoising from {start}, {n} steps": Diffusion(model, model_name, model.backbone.denoise_options(n), start)
        for start in starts
        for n in steps
    }
    chosen["CTC draft alone"] = CtcGreedy(model, model_name)
    chosen["backbone, autoregressive"] = Autoregressive(model, model_name)
    if Path(whisper).exists():
        chosen["Whisper, autoregressive"] = Whisper(whisper)
    for name, folder in BASELINES.items():
        if Path(folder).exists():
            chosen[name] = TrainedBaseline.load(folder)
    return chosen


def measure(args: argparse.Namespace) -> None:
    """Evaluates the systems, in turn as often as asked."""
    utterances = read_source(args.source, max_duration_s=MAX_CLIP_S)[: args.count]
    chosen = systems(args.model, args.whisper, [int(n) for n in args.steps.split(",")], args.starts.split(","))
    found: dict[str, list[dict[str, Any]]] = {}
    for repeat in range(args.repeats):
        for name, system in chosen.items():
            folder = RUNS / args.list / f"{re.sub('[^a-z0-9]+', '-', name.lower())}-{repeat}"
            found.setdefault(name, []).append(evaluate(system, utterances, folder, args.batch_size))
            print(name, found[name][-1]["languages"]["en"]["error_rate"], flush=True)
    kept = json.loads(FOUND.read_text(encoding="utf-8")) if FOUND.exists() else {}
    kept[args.list] = {name: row(runs) for name, runs in found.items()}
    write_whole(FOUND, json.dumps(kept, indent=1, ensure_ascii=False) + "\n")


def row(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What the table says of a system: its first run's errors, and its median speed."""
    first = runs[0]
    seconds = statistics.median(run["speed"]["seconds"] for run in runs)
    return {
        "errors": first["languages"]["en"], "passes": first["passes"], "seconds": seconds, "sound_s": first["sound_s"],
        "rtfx": round(first["sound_s"] / seconds, 1), "repeats": len(runs), "settings": first["settings"],
        "machine": first["machine"],
    }  # fmt: skip


def table(rows: dict[str, dict[str, Any]]) -> str:
    """One list's systems as Markdown, with the circumstances under it."""
    lines = [
        "| system | WER | 95 % interval | wrong / missing / extra | passes | RTFx |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in rows.items():
        e = found["errors"]
        counts = " / ".join(f"{e[key] / e['reference']:.1%}" for key in ("substitutions", "deletions", "insertions"))
        interval = f"{e['low']:.1%} – {e['high']:.1%}"
        passes = f"{found['passes']:.1f}".removesuffix(".0")
        lines.append(f"| {name} | {e['error_rate']:.1%} | {interval} | {counts} | {passes} | {found['rtfx']} |")
    some = next(iter(rows.values()))
    m = some["machine"]
    lines.append(
        f"\n{some['errors']['utterances']} utterances, {some['sound_s']:.0f} s of sound, batch size "
        f"{some['settings']['batch_size']}, {some['settings']['dtype']}, {m['threads']} of {m['processor']}, torch "
        f"{m['torch']}, transformers {m['transformers']}, {m['date']}; time from samples to text, median of "
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


def filled(page: str, name: str, content: str) -> str:
    """A page with something between the markers of that name."""
    begin, end = f"<!-- table {name} -->", f"<!-- end {name} -->"
    if begin not in page or end not in page:
        raise SystemExit(f"docs/results/mini.md has no markers {begin} ... {end}; put them where the table belongs")
    head, rest = page.split(begin)
    return f"{head}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def report() -> None:
    """Writes the tables and the plot from the stored figures."""
    found = json.loads(FOUND.read_text(encoding="utf-8"))
    page = (OUT / "mini.md").read_text(encoding="utf-8")
    for name, rows in found.items():
        page = filled(page, name, table(rows))
    page = filled(page, "published", published_table(json.loads(PUBLISHED.read_text(encoding="utf-8"))))
    write_whole(OUT / "mini.md", page)
    figure, axes = plt.subplots(1, len(found), figsize=(6 * len(found), 4.5), constrained_layout=True, squeeze=False)
    for axis, (title, rows) in zip(axes.flat, found.items(), strict=True):
        curves: dict[str, list[tuple[float, float]]] = {}
        for name, cell in rows.items():
            curves.setdefault(name.split(",")[0], []).append((cell["rtfx"], 100 * cell["errors"]["error_rate"]))
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
    measuring.add_argument("--whisper", default="runs/mini/whisper", help="left out where it does not exist")
    measuring.add_argument("--steps", default=STEPS)
    measuring.add_argument("--starts", default="draft,noise")
    measuring.add_argument("--repeats", type=int, default=1)
    measuring.add_argument("--batch_size", type=int, default=8)
    measuring.add_argument("--count", type=int, help="the first so many utterances (default: all)")
    commands.add_parser("report")
    args = parser.parse_args()
    if args.command == "measure":
        measure(args)
    else:
        report()


if __name__ == "__main__":
    main()
