"""Word error rate and speed of a model for different numbers of denoising steps, on a manifest.

    python benchmarks/step_sweep.py --manifest runs/mini/heldout-en/manifest.jsonl --name heldout-en

writes docs/results/steps-NAME.json and steps-NAME.md. Every row is decoded with the same seed, from noise and from the CTC
draft; the time covers features, encoder, projector, prefill, denoising and text, after one warm-up batch, and is the
median of alternating runs.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from datetime import date
from pathlib import Path

import jiwer
import torch
import transformers

from diffusion_gemma_asr import load
from diffusion_gemma_asr.audio import load_audio
from diffusion_gemma_asr.data.manifest import read_manifest
from diffusion_gemma_asr.data.text import plain_english
from diffusion_gemma_asr.evaluate.run import processor
from diffusion_gemma_asr.model import Decoded, DiffusionGemmaASR, Start

STEPS = (1, 2, 4, 8, 16, 32, 48)
Case = tuple[Start, int]  # what canvases hold at first, denoising steps at most


def decode_all(model: DiffusionGemmaASR, clips: list, case: Case, batch_size: int) -> tuple[list[Decoded], float]:
    """Decodes clips sorted by length → what was written, in the order given, and seconds."""
    first, steps = case
    order = sorted(range(len(clips)), key=lambda i: len(clips[i]))
    decoded: dict[int, Decoded] = {}
    start = time.perf_counter()
    for i in range(0, len(order), batch_size):
        rows = order[i : i + batch_size]
        found = model.transcribe_batch([clips[j] for j in rows], options=steps, start=first)
        decoded.update(zip(rows, found, strict=True))
    return [decoded[i] for i in range(len(clips))], time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="mini")
    parser.add_argument("--manifest", required=True)
    parser.add_argument("--name", required=True, help="of the result files")
    parser.add_argument("--count", type=int, help="the first so many utterances (default: all)")
    parser.add_argument("--steps", default=",".join(map(str, STEPS)))
    parser.add_argument("--starts", default="noise,draft", help="what canvases hold at first")
    parser.add_argument("--repeats", type=int, default=3, help="runs for the time; each run decodes everything")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--predictions", action="store_true", help="also write predictions-NAME.jsonl, with the references")
    parser.add_argument("--out", default="docs/results")
    args = parser.parse_args()
    model = load(args.model)
    utterances = read_manifest(args.manifest)[: args.count]
    clips = [load_audio(u.audio_filepath) for u in utterances]
    references = [plain_english(u.text) for u in utterances]
    seconds_of_sound = sum(len(clip) for clip in clips) / 16_000
    cases: list[Case] = [(first, int(n)) for first in args.starts.split(",") for n in args.steps.split(",")]
    times: dict[Case, list[float]] = {case: [] for case in cases}
    rows: dict[Case, list[Decoded]] = {}
    decode_all(model, clips[: args.batch_size], cases[0], args.batch_size)
    for _ in range(args.repeats):
        for case in cases:
            rows[case], taken = decode_all(model, clips, case, args.batch_size)
            times[case].append(taken)
    table = [
        {
            "start": case[0],
            "steps": case[1],
            "wer": round(jiwer.wer(references, [plain_english(d.text) for d in rows[case]]), 4),
            "cer": round(jiwer.cer(references, [plain_english(d.text) for d in rows[case]]), 4),
            "passes": round(statistics.mean(d.steps for d in rows[case]), 2),
            "seconds": round(statistics.median(times[case]), 2),
            "rtfx": round(seconds_of_sound / statistics.median(times[case]), 1),
        }
        for case in cases
    ]
    draft = jiwer.wer(references, [plain_english(d.draft) for d in rows[cases[0]]])
    result = {
        "model": args.model, "list": args.name, "utterances": len(clips), "seconds_of_sound": round(seconds_of_sound, 1),
        "ctc_draft_wer": round(draft, 4), "batch_size": args.batch_size, "repeats": args.repeats,
        "dtype": "float32", "threads": torch.get_num_threads(), "machine": platform.machine(), "processor": processor(),
        "torch": torch.__version__, "transformers": transformers.__version__, "date": date.today().isoformat(),
        "table": table,
    }  # fmt: skip
    out = Path(args.out)
    (out / f"steps-{args.name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (out / f"steps-{args.name}.md").write_text(markdown(result), encoding="utf-8")
    if args.predictions:
        shown = (model.start, 8) if (model.start, 8) in rows else cases[-1]
        write_predictions(out / f"predictions-{args.name}.jsonl", references, rows[shown])
    print(markdown(result))


def write_predictions(path: Path, references: list[str], decoded: list[Decoded]) -> None:
    """One JSON object an utterance: reference, hypothesis and draft in plain words, and the passes used."""
    with path.open("w", encoding="utf-8") as file:
        for reference, row in zip(references, decoded, strict=True):
            line = {"reference": reference, "hypothesis": plain_english(row.text), "draft": plain_english(row.draft)}
            file.write(json.dumps(line | {"steps": row.steps}) + "\n")


def markdown(result: dict) -> str:
    """The result as a page."""
    head = (
        f"# {result['list']}: error and speed by denoising steps\n\n"
        f"Model `{result['model']}`, {result['utterances']} utterances, {result['seconds_of_sound']:.0f} s of sound, "
        f"batch size {result['batch_size']}, {result['dtype']}, {result['threads']} threads, {result['processor']}, torch "
        f"{result['torch']}, {result['date']}. Time: median of {result['repeats']} alternating runs, from samples to text. "
        f"WER of the CTC draft alone: {result['ctc_draft_wer']:.1%}.\n\n"
        "| canvas starts as | steps at most | passes used | WER | CER | seconds | RTFx |\n|---|---|---|---|---|---|---|\n"
    )
    return head + "".join(
        f"| {r['start']} | {r['steps']} | {r['passes']} | {r['wer']:.1%} | {r['cer']:.1%} | {r['seconds']} | {r['rtfx']} |\n"
        for r in result["table"]
    )


if __name__ == "__main__":
    main()
