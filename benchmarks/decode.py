"""What each part of the decoding engine brings on a CPU, with the bundled model.

    python benchmarks/decode.py measure runs/mini/heldout-en/manifest.jsonl     writes benchmarks/results/decode.json
    python benchmarks/decode.py report                                          fills the tables of docs/performance.md

Every stage adds one thing to the stage before. They run in turn, as often as --repeats says, each over the whole list from
samples to text; times are medians. `measure` also counts the operations of the last stage and how fast this machine
multiplies matrices, which gives the floor, and where the time goes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import torch
from pages import circumstances, fill
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from diffusion_gemma_asr import load
from diffusion_gemma_asr.audio import load_audio
from diffusion_gemma_asr.data.sources import read_source
from diffusion_gemma_asr.errors import CheckpointError
from diffusion_gemma_asr.evaluate.normalise import normaliser
from diffusion_gemma_asr.evaluate.run import machine, write_whole
from diffusion_gemma_asr.model import DiffusionGemmaASR
from diffusion_gemma_asr.noise import uniform_canvas
from diffusion_gemma_asr.quantization import QUANTIZATIONS

FOUND = Path("benchmarks/results/decode.json")
PAGE = Path("docs/performance.md")
SHOWN = 12  # operations of the profile


@dataclass(frozen=True)
class Stage:
    """One line of the table: how to load, and how to transcribe."""

    name: str
    loading: dict[str, Any] = field(default_factory=dict)
    calling: dict[str, Any] = field(default_factory=dict)


PLAIN: dict[str, Any] = {"engine": "reference", "rows": 8, "start": "noise"}
STAGES = [
    Stage("plain loop, canvas of 256 tokens of noise", {"merge_lora": False}, PLAIN | {"canvas_length": 256}),
    Stage("LoRA merged", {}, PLAIN | {"canvas_length": 256}),
    Stage("canvas as long as the draft suggests", {}, PLAIN),
    Stage("draft on the canvas", {}, PLAIN | {"start": "draft"}),
    Stage("fast engine: rows that have stopped make room, lm_head in slices", {}, {"rows": 8, "start": "draft"}),
    Stage("32 rows at once", {}, {"rows": 32, "start": "draft"}),
]
LEFT_OUT = [Stage("bfloat16 weights", {"dtype": "bfloat16"}, {"rows": 32, "start": "draft"})]


def measure(args: argparse.Namespace) -> None:
    """Runs the stages in turn."""
    utterances = read_source(args.source)[: args.count]
    clips = [load_audio(u.audio_filepath) for u in utterances]
    said = [normaliser(u.language)(u.text) for u in utterances]
    sound_s = sum(len(clip) for clip in clips) / 16_000
    stages = STAGES + LEFT_OUT
    models = [load("mini", device="cpu", **stage.loading) for stage in stages]
    seconds: list[list[float]] = [[] for _ in stages]
    rows: list[dict[str, Any]] = [{} for _ in stages]
    for repeat in range(args.repeats + 1):  # the first, on a few clips, warms up
        for i, (stage, model) in enumerate(zip(stages, models, strict=True)):
            taken = clips if repeat else clips[:8]
            began = time.perf_counter()
            found = model.transcribe_batch(taken, "en", args.steps, **stage.calling)
            wall = time.perf_counter() - began
            if repeat == 0:
                continue
            seconds[i].append(wall)
            wer = jiwer.wer(said, [normaliser("en")(row.text) for row in found])
            passes = sum(row.steps for row in found) / len(found)
            rows[i] = {"name": stage.name, "wer": round(wer, 5), "passes": round(passes, 3)}
            print(f"{stage.name}: {wall:.1f} s, WER {wer:.2%}, {passes:.2f} passes", flush=True)
    for row, times in zip(rows, seconds, strict=True):
        middle = statistics.median(times)
        row |= {"seconds": round(middle, 2), "rtfx": round(sound_s / middle, 1)}
    last, calling = models[len(STAGES) - 1], STAGES[-1].calling
    result = {
        "stages": rows[: len(STAGES)], "left_out": rows[len(STAGES) :],
        "trained_on_drafts": trained_on_drafts(clips, said, args.steps), "steps": args.steps, "repeats": args.repeats,
        "utterances": len(clips), "sound_s": round(sound_s, 1), "machine": machine(),
        "floor": floor(last, clips, args.steps, calling), "lower_precision": lower_precision(clips, said, args.steps),
        "profile": operations(last, clips, args.steps, calling), "corrections": corrections(last, clips, said, args.steps),
    }  # fmt: skip
    FOUND.parent.mkdir(exist_ok=True)
    write_whole(FOUND, json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def trained_on_drafts(clips: list[np.ndarray], said: list[str], steps: int) -> dict[str, dict[str, float]]:
    """Error rates of the adapters of recipes/mini/drafts.yaml and no-drafts.yaml, where they have been trained."""
    found = {}
    for name in ("drafts", "no-drafts"):
        folder = Path(f"runs/mini-{name}/checkpoint")
        if folder.exists():
            model = load(str(folder), device="cpu")
            starts = {start: model.transcribe_batch(clips, "en", steps, start=start) for start in ("draft", "noise")}
            texts = {start: [row.text for row in rows] for start, rows in starts.items()}
            texts["its CTC draft"] = [row.draft for row in starts["draft"]]
            wers = {key: jiwer.wer(said, [normaliser("en")(t) for t in rows]) for key, rows in texts.items()}
            found[name] = {key: round(value, 5) for key, value in wers.items()}
    return found


@torch.no_grad()
def lower_precision(clips: list[np.ndarray], said: list[str], steps: int) -> list[dict[str, Any]]:
    """What packing the experts in fewer bits does to the first pass over noise, and to the error rate in the end."""
    found: list[dict[str, Any]] = []
    exact = load("mini", device="cpu")
    slots, lengths = exact.encode_audio(clips[:32])
    canvas = uniform_canvas(len(slots), 32, exact.backbone.vocab_size, torch.Generator().manual_seed(0))
    truth = first_pass(exact, slots, lengths, canvas)
    for name in QUANTIZATIONS:
        try:
            model = load("mini", device="cpu", quantization=name)
        except CheckpointError as error:
            print(f"{name}: left out, {error}")
            continue
        logits = first_pass(model, slots, lengths, canvas)
        divergence = (truth.softmax(-1) * (truth.log_softmax(-1) - logits.log_softmax(-1))).sum(-1).mean()
        same = (truth.argmax(-1) == logits.argmax(-1)).float().mean()
        written = [normaliser("en")(row.text) for row in model.transcribe_batch(clips, "en", steps)]
        figures = {"divergence": float(divergence), "same_best": float(same), "wer": float(jiwer.wer(said, written))}
        found.append({"name": name} | {key: round(value, 5) for key, value in figures.items()})
        print(found[-1], flush=True)
    return found


def first_pass(model: DiffusionGemmaASR, slots: torch.Tensor, lengths: torch.Tensor, canvas: torch.Tensor) -> torch.Tensor:
    """(B, C, V) logits."""
    prefill, _ = model.read_prompts(slots, lengths, ["en"] * len(slots))
    return model.backbone.denoise_logits(canvas, prefill)


def floor(model: DiffusionGemmaASR, clips: list[np.ndarray], steps: int, calling: dict[str, Any]) -> dict[str, float]:
    """Operations of a whole run, and how many a second this machine does on one large float32 product."""
    experts = {torch.ops.aten._grouped_mm: lambda a, b, *_, **__: 2 * a[0] * a[1] * b[-1]}  # shapes (N, H), (E, H, F)
    with FlopCounterMode(display=False, custom_mapping=experts) as counter:
        model.transcribe_batch(clips, "en", steps, **calling)
    a, b = torch.randn(2048, 1024), torch.randn(1024, 1024)
    times = []
    for _ in range(10):
        began = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - began)
    rate = 2 * 2048 * 1024 * 1024 / statistics.median(times)
    return {"gflop": round(counter.get_total_flops() / 1e9, 1), "gflop_s": round(rate / 1e9, 1)}


def operations(
    model: DiffusionGemmaASR, clips: list[np.ndarray], steps: int, calling: dict[str, Any]
) -> list[dict[str, Any]]:
    """Shares of the processor time by operation, the largest first."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        model.transcribe_batch(clips, "en", steps, **calling)
    events = sorted(recorded.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return [{"operation": e.key, "share": round(e.self_cpu_time_total / total, 4), "calls": e.count} for e in events[:SHOWN]]


def corrections(model: DiffusionGemmaASR, clips: list[np.ndarray], said: list[str], steps: int) -> dict[str, Any]:
    """How often denoising changes a draft for the better and for the worse, in words, with some of the better ones."""
    better, worse, same, shown = 0, 0, 0, []
    for text, row in zip(said, model.transcribe_batch(clips, "en", steps, start="draft"), strict=True):
        before, after = (jiwer.process_words(text, normaliser("en")(t) or "-") for t in (row.draft, row.text))
        errors = [m.substitutions + m.deletions + m.insertions for m in (before, after)]
        better += errors[1] < errors[0]
        worse += errors[1] > errors[0]
        same += errors[1] == errors[0]
        if errors[1] < errors[0]:
            shown.append({"said": text, "draft": row.draft, "written": row.text})
    return {"better": better, "worse": worse, "same": same, "examples": shown[:6]}


def table(rows: list[dict[str, Any]], first: float) -> list[str]:
    """Rows as Markdown; `first` is the time in s that they are compared with."""
    lines = ["| | WER | passes | seconds | times real time | against the first |", "|---|---|---|---|---|---|"]
    for row in rows:
        faster = f"{first / row['seconds']:.1f} ×"
        cells = f"{row['wer']:.1%} | {row['passes']:.2f} | {row['seconds']:.1f} | {row['rtfx']} | {faster}"
        lines.append(f"| {row['name']} | {cells} |")
    return lines


def report() -> None:
    """Fills docs/performance.md."""
    found = json.loads(FOUND.read_text(encoding="utf-8"))
    kept = found["stages"]
    stages = table(kept, kept[0]["seconds"]) + [
        line.replace("| ", "| *not kept:* ", 1) for line in table(found["left_out"], kept[0]["seconds"])[2:]
    ]
    stages.append(
        f"\n{found['utterances']} utterances, {found['sound_s']:.0f} s of sound, at most {found['steps']} steps, float32, "
        f"{circumstances(found['machine'])}; median of "
        f"{found['repeats']} runs, taken in turn."
    )
    f, last = found["floor"], kept[-1]
    least = f["gflop"] / f["gflop_s"]
    limit = (
        f"The last stage needs {f['gflop']:.0f} billion operations in matrix products; this machine does {f['gflop_s']:.0f} "
        f"billion a second on large ones, so at least {least:.1f} s; it takes {last['seconds']:.1f} s, "
        f"{last['seconds'] / least:.1f} times that. The weights (25 MB) are read again in every pass, which costs far less."
    )
    shares = ["| operation | share of the time | calls |", "|---|---|---|"]
    shares += [f"| `{row['operation']}` | {row['share']:.1%} | {row['calls']:,} |" for row in found["profile"]]
    c = found["corrections"]
    examples = [
        f"Of {found['utterances']} drafts denoising makes {c['better']} better and {c['worse']} worse, in wrong words; "
        f"{c['same']} stay as good as they were.\n",
        "| said | draft | written |", "|---|---|---|",
        *(f"| {row['said']} | {row['draft']} | {row['written']} |" for row in c["examples"]),
    ]  # fmt: skip
    learnt = ["| trained | canvas from the draft | canvas from noise | its CTC draft |", "|---|---|---|---|"]
    for name, key in (("with drafts on canvases (share 0.8)", "drafts"), ("on noise alone", "no-drafts")):
        if row := found["trained_on_drafts"].get(key):
            learnt.append(f"| {name} | {row['draft']:.1%} | {row['noise']:.1%} | {row['its CTC draft']:.1%} |")
    precision = ["| experts in | divergence of the first pass, nats | same best token | WER |", "|---|---|---|---|"]
    for row in found["lower_precision"]:
        precision.append(f"| {row['name']} | {row['divergence']:.5f} | {row['same_best']:.1%} | {row['wer']:.1%} |")
    texts = {
        "learnt": learnt,
        "precision": precision,
        "stages": stages,
        "floor": [limit],
        "profile": shares,
        "corrections": examples,
    }
    fill(PAGE, {name: "\n".join(lines) for name, lines in texts.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description="What each part of the decoding engine brings.")
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("source", help="manifest, folder or corpus")
    measuring.add_argument("--count", type=int, default=150, help="the first so many utterances")
    measuring.add_argument("--steps", type=int, default=8)
    measuring.add_argument("--repeats", type=int, default=3)
    commands.add_parser("report")
    args = parser.parse_args()
    if args.command == "measure":
        measure(args)
    else:
        report()


if __name__ == "__main__":
    main()
