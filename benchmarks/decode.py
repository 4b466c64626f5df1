"""Speed on a CPU by what makes decoding fast, and where the time goes, with a bundled model.

    python benchmarks/decode.py measure LIST.jsonl      writes benchmarks/results/decode.json
    python benchmarks/decode.py report                  fills the tables of docs/performance.md

Every stage adds one thing to the stage before. They run in turn, as often as --repeats says, each over the whole list from
samples to text; times are medians. `measure` also counts the operations of the last stage and how fast this machine
multiplies matrices, which gives the floor.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from pages import RESULTS, ROOT, circumstances, fill, markdown, measure_or_report, read_results, stated, write_results
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import diffusion_gemma_asr as asr
from diffusion_gemma_asr.checkpoint.load import fast_bfloat16, load_checkpoint
from diffusion_gemma_asr.data.sound import read_utterance
from diffusion_gemma_asr.data.sources import read_source
from diffusion_gemma_asr.denoise.clip import Decoded
from diffusion_gemma_asr.denoise.decode import decode_clips
from diffusion_gemma_asr.denoise.options import DecodeOptions
from diffusion_gemma_asr.evaluate.metrics import error_rate, percent
from diffusion_gemma_asr.evaluate.normalise import NORMALISER
from diffusion_gemma_asr.model.int8 import int8_available
from diffusion_gemma_asr.model.model import DiffusionGemmaASR

DATA, PAGE = RESULTS / "decode.json", ROOT / "docs/performance.md"
SHOWN = 12  # operations of the profile


OTHER_PRODUCTS: dict[Any, Callable[..., int]] = {  # operations of products that torch's counter does not know, by shapes
    torch.ops.aten._grouped_mm: lambda a, b, *_, **__: 2 * a[0] * a[1] * b[-1],  # (N, H), (E, H, F)
}
if int8_available():
    # (..., H); the weights are packed, and what comes out has the width of the scales of their rows
    OTHER_PRODUCTS[torch.ops.onednn.qlinear_pointwise] = lambda a, *_, out_shape, **__: 2 * math.prod(out_shape) * a[-1]


@dataclass(frozen=True)
class Stage:
    """One line of the table.

    Attributes:
        name: in words.
        options: of decoding.
        batch_size: clips at once.
        loading: options of `load_checkpoint`.
    """

    name: str
    options: DecodeOptions
    batch_size: int = 8
    loading: dict[str, Any] = field(default_factory=dict)

    def run(self, model: DiffusionGemmaASR, clips: Sequence[np.ndarray]) -> list[Decoded]:
        """Decodes clips so."""
        return decode_clips(model, clips, self.options, batch_size=self.batch_size)


NOISE = DecodeOptions(language="en", start="noise")
DRAFT = DecodeOptions(language="en", start="draft", candidates=1)
STAGES = [
    Stage("canvas of 256 tokens of noise, one clip at a time", replace(NOISE, canvas_length=256), 1, {"merge_lora": False}),
    Stage("LoRA merged", replace(NOISE, canvas_length=256), 1),
    Stage("canvas as long as the clip needs", NOISE, 1),
    Stage("draft on the canvas", DRAFT, 1),
    Stage("8 clips at once: rows that have stopped make room", DRAFT),
    Stage("32 clips at once", DRAFT, 32),
    Stage("encoder and projector in bfloat16 or 8 bits, as the processor is faster", DRAFT, 32, {"dtype": "auto"}),
    Stage("the backbone chooses among drafts, the default", DecodeOptions(language="en"), 32, {"dtype": "auto"}),
]
LEFT_OUT = [Stage("all weights in bfloat16", DRAFT, 32, {"dtype": "bfloat16"})] if fast_bfloat16() else []


def measure(args: argparse.Namespace) -> None:
    """Runs the stages in turn."""
    utterances = read_source(args.source)[: args.count]
    clips, said = [read_utterance(u) for u in utterances], [u.text for u in utterances]
    sound_s = sum(len(clip) for clip in clips) / 16_000
    stages = [replace(s, options=replace(s.options, steps=args.steps)) for s in STAGES + LEFT_OUT]
    models = [load_checkpoint(args.model, device="cpu", **stage.loading) for stage in stages]
    seconds: list[list[float]] = [[] for _ in stages]
    rows: list[dict[str, Any]] = [{} for _ in stages]
    for repeat in range(args.repeats + 1):  # the first, on a few clips, warms up
        for i, (stage, model) in enumerate(zip(stages, models, strict=True)):
            began = time.perf_counter()
            decoded = stage.run(model, clips if repeat else clips[:8])
            wall = time.perf_counter() - began
            if repeat == 0:
                continue
            seconds[i].append(wall)
            wrong = error_rate(said, [row.text for row in decoded], "en")
            passes = sum(row.steps for row in decoded) / len(decoded)
            rows[i] = {"name": stage.name, "wer": round(wrong, 5), "passes": round(passes, 3)}
            print(f"{stage.name}: {wall:.1f} s, WER {wrong:.2%}, {passes:.2f} passes", flush=True)
    for row, times in zip(rows, seconds, strict=True):
        middle = statistics.median(times)
        row |= {"seconds": round(middle, 2), "rtfx": round(sound_s / middle, 1)}
    last = len(STAGES) - 1
    content = {
        "model": args.model,
        "stages": rows[: last + 1],
        "left_out": rows[last + 1 :],
        "steps": args.steps,
        "repeats": args.repeats,
        "utterances": len(clips),
        "sound_s": round(sound_s, 1),
        "floor": floor(stages[last], models[last], clips),
        "profile": operations(stages[last], models[last], clips),
        "start": start(args.model),
        "circumstances": circumstances(),
    }
    write_results(DATA, content)


def floor(stage: Stage, model: DiffusionGemmaASR, clips: Sequence[np.ndarray]) -> dict[str, float]:
    """Operations of a whole run and of its encoder, and how many of them a second this machine does on large products."""
    with FlopCounterMode(display=False, custom_mapping=OTHER_PRODUCTS) as counter:
        stage.run(model, clips)
    with FlopCounterMode(display=False, custom_mapping=OTHER_PRODUCTS) as encoding, torch.no_grad():
        for clip in clips:
            model.encoder(*model.encoder.features([clip]))
    return {
        "gflop": round(counter.get_total_flops() / 1e9, 1),
        "encoder_gflop": round(encoding.get_total_flops() / 1e9, 1),
        "gflop_s": products_a_second(torch.float32),
        "encoder_gflop_s": products_a_second(next(model.encoder.parameters()).dtype),
    }


def products_a_second(dtype: torch.dtype) -> float:
    """Billions of operations a second of this machine on a large product."""
    a, b = torch.randn(2048, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
    times = []
    for _ in range(10):
        began = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - began)
    return round(2 * 2048 * 1024 * 1024 / statistics.median(times) / 1e9, 1)


def operations(stage: Stage, model: DiffusionGemmaASR, clips: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    """Shares of the processor time by operation, the largest first."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        stage.run(model, clips)
    events = sorted(recorded.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return [{"operation": e.key, "share": round(e.self_cpu_time_total / total, 4), "calls": e.count} for e in events[:SHOWN]]


def start(model: str, runs: int = 7) -> dict[str, float]:
    """Seconds of the command from its start to its end, and of a clip of 3 s where everything is loaded."""

    def seconds(work: Callable[[], object]) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    def command(*arguments: str) -> Callable[[], object]:
        line = [sys.executable, "-m", "diffusion_gemma_asr", *arguments]
        return lambda: subprocess.run(line, capture_output=True, check=True)

    example = str(ROOT / "examples/en.flac")
    warm = asr.load(model, device="cpu")
    tasks = {
        "help_s": command("--help"),
        "transcribe_s": command("transcribe", example, "--model", model, "--language", "en"),
        "warm_s": lambda: warm.transcribe(example, language="en"),
    }
    taken: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(runs):
        for name, task in tasks.items():
            taken[name].append(seconds(task))
    return {name: round(statistics.median(times), 3) for name, times in taken.items()} | {"runs": runs}


def report() -> None:
    """Fills docs/performance.md."""
    data = read_results(DATA)
    first = data["stages"][0]["seconds"]
    rows = []
    for row, mark in [(r, "") for r in data["stages"]] + [(r, "*not kept:* ") for r in data["left_out"]]:
        cells = [percent(row["wer"]), f"{row['passes']:.2f}", f"{row['seconds']:.1f}", str(row["rtfx"])]
        rows.append([mark + row["name"], *cells, f"{first / row['seconds']:.1f} ×"])
    heading = ["", f"WER, {NORMALISER}", "passes", "seconds", "times real time", "against the first"]
    what = (
        f"`{data['model']}`, {data['utterances']} utterances, {data['sound_s']:.0f} s of sound, at most "
        f"{data['steps']} steps, median of {data['repeats']} runs, taken in turn"
    )
    stages = f"{markdown(heading, rows)}\n\n{what}; {stated(data['circumstances'])}."
    made, took = data["floor"], data["stages"][-1]["seconds"]
    rest = made["gflop"] - made["encoder_gflop"]
    least = rest / made["gflop_s"] + made["encoder_gflop"] / made["encoder_gflop_s"]
    limit = (
        f"The last stage needs {made['encoder_gflop']:.0f} billion operations in matrix products for the encoder, of which "
        f"this machine does {made['encoder_gflop_s']:.0f} billion a second on large ones, and {rest:.0f} billion for the "
        f"rest, at {made['gflop_s']:.0f} billion a second: at least {least:.1f} s. It takes {took:.1f} s, "
        f"{took / least:.1f} times as long."
    )
    began = data["start"]
    start = (
        f"`diffusion-gemma-asr --help` takes {began['help_s']:.2f} s, `diffusion-gemma-asr transcribe examples/en.flac` "
        f"{began['transcribe_s']:.2f} s, of which the 3 s of sound, in a process that has transcribed before, "
        f"{began['warm_s']:.2f} s (medians of {began['runs']})."
    )
    shares = [[f"`{row['operation']}`", percent(row["share"]), f"{row['calls']:,}"] for row in data["profile"]]
    profiled = markdown(["operation", "share of the time", "calls"], shares)
    fill(PAGE, {"stages": stages, "floor": limit, "profile": profiled, "start": start})


def main() -> None:
    """Measures or reports."""
    parser, measuring = measure_or_report("Speed by what makes decoding fast.", measure, report)
    measuring.add_argument("source", help="manifest or folder of English speech")
    measuring.add_argument("--model", default="mini", help="bundled model or checkpoint folder")
    measuring.add_argument("--count", type=int, default=60, help="the first so many utterances")
    measuring.add_argument("--steps", type=int, default=8)
    measuring.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
