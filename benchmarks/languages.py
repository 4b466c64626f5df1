"""The six-language models beside baselines on the same frozen encoder, by language and domain.

    python benchmarks/languages.py measure mini6         or mini-whisper-base; adds to the data what is not measured yet
    python benchmarks/languages.py measure mini6 --again measures denoising anew; the baselines' figures stay
    python benchmarks/languages.py report                fills docs/results/mini6.md, README.md, cards

The lists are the 300 held-out synthetic sentences of each language, in voices that training never meets, and the real dev
splits, their first 300 utterances of at most 10 s. English, German, French and Spanish are counted in words, Hindi and
Mandarin in characters, after data/text.py. Intervals are from a bootstrap over utterances.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pages import circumstances, fill, measured

from diffusion_gemma_asr.baselines.autoregressive import greedy
from diffusion_gemma_asr.baselines.trained import TrainedBaseline
from diffusion_gemma_asr.checkpoint import load_checkpoint
from diffusion_gemma_asr.data.features import FeatureCache
from diffusion_gemma_asr.data.manifest import Utterance, read_manifest
from diffusion_gemma_asr.data.text import error_name
from diffusion_gemma_asr.evaluate.run import machine, write_whole
from diffusion_gemma_asr.model import DiffusionGemmaASR
from diffusion_gemma_asr.prompt import AUTO, LANGUAGES
from diffusion_gemma_asr.train.adapter import frame_cache, transcribe_cached
from diffusion_gemma_asr.train.monitor import error_rate

MAX_DURATION_S = 10.0
COUNT = 300  # of each real list, at most
LONG_ENOUGH_S = 2.0  # for finding the language
PAGE, DATA = Path("docs/results/mini6.md"), Path("docs/results/mini6-languages.json")
FRONT_ENDS = {  # checkpoint, baseline's checkpoint, frames
    "mini6": ("mini6", "runs/mini6/whisper-decoder/checkpoint", "runs/mini6/frames"),
    "mini-whisper-base": (
        "runs/mini-whisper-base/checkpoint", "runs/mini-whisper-base/whisper-decoder/checkpoint",
        "runs/mini-whisper-base/frames",
    ),
}  # fmt: skip
DOMAINS = {"synthetic": "held-out synthetic", "real": "real dev"}
SYSTEMS = {
    "denoised": "8 steps",
    "draft": "draft",
    "plain": "8 steps, no language model",
    "greedy": "draft, no language model",
    "slots": "audio tokens by CTC",
    "autoregressive": "same weights, token after token",
    "whisper": "Whisper's decoder",
}


def lists() -> dict[str, list[Utterance]]:
    """Held-out synthetic speech and real dev splits, by name."""
    found = {}
    for code in LANGUAGES:
        found[f"synthetic {code}"] = read_manifest(f"runs/mini/heldout-{code}/manifest.jsonl", [code], MAX_DURATION_S)
    for code in LANGUAGES:
        found[f"real {code}"] = read_manifest(f"../shared/speech/{code}-dev.jsonl", [code], MAX_DURATION_S)[:COUNT]
    return found


def judged(said: Sequence[str], written: Sequence[str], code: str) -> dict[str, Any]:
    """The error rate and its 95 % interval."""
    rng = random.Random(0)
    draws = []
    for _ in range(200):
        chosen = rng.choices(range(len(said)), k=len(said))
        draws.append(error_rate([said[i] for i in chosen], [written[i] for i in chosen], code))
    draws.sort()
    return {"errors": round(error_rate(said, written, code), 4), "interval": [round(draws[5], 4), round(draws[194], 4)]}


@torch.no_grad()
def measure_list(
    model: DiffusionGemmaASR, baseline: TrainedBaseline | None, rows: list[Utterance], cache: FeatureCache,
    autoregressive: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Error rates of the systems, and how often the language is found."""
    code, said = rows[0].language, [u.text for u in rows]
    found = transcribe_cached(model, rows, cache)
    lm, model.lm = model.lm, None
    without = transcribe_cached(model, rows, cache)
    model.lm = lm
    written = {"denoised": [d.text for d in found], "draft": [d.draft for d in found]}
    written |= {"plain": [d.text for d in without], "greedy": [d.draft for d in without]}
    for i in range(0, len(rows), 25):
        batch = cache.batch(rows[i : i + 25])
        slots, lengths = model.projector(*batch)
        if model.projector.speller is not None:
            tokens = [model.text([token.id for token in draft]) for draft in model.draft(slots, lengths)]
            written.setdefault("slots", []).extend(tokens)
        if autoregressive:
            texts = [model.text(row) for row in greedy(model, slots, lengths, [code] * len(lengths))]
            written.setdefault("autoregressive", []).extend(texts)
        if baseline is not None:
            written.setdefault("whisper", []).extend(row.text for row in baseline.decode(*batch))
    asked = transcribe_cached(model, rows, cache, AUTO)
    long = [d.language == code for d, u in zip(asked, rows, strict=True) if u.duration > LONG_ENOUGH_S]
    return {
        "count": len(rows),
        "systems": {name: judged(said, texts, code) for name, texts in written.items()},
        "auto": {"errors": round(error_rate(said, [d.text for d in asked], code), 4)},
        "language_found": round(sum(long) / len(long), 4),
        "language_count": len(long),
    }


def measure(front_end: str, again: bool = False) -> None:
    """Adds the lists that are not measured yet to the data; `again` replaces what is there, but for the baselines."""
    checkpoint, other, frames = FRONT_ENDS[front_end]
    model = load_checkpoint(checkpoint, device="cpu").eval()
    baseline = TrainedBaseline.load(other) if Path(other).is_dir() and not again else None
    rows = lists()
    cache = frame_cache(Path(frames), model.encoder, [u for part in rows.values() for u in part])
    for name, part in rows.items():
        old = measured(DATA).get(front_end, {"lists": {}})["lists"].get(name)
        if old and not again:
            continue
        start = time.time()
        found = measure_list(model, baseline, part, cache, autoregressive=not again)
        if old:
            found["systems"] = old["systems"] | found["systems"]
        data = measured(DATA)  # anew: the other front end may be measured at the same time
        held = data.setdefault(front_end, {"lists": {}})
        held["lists"][name] = found
        held["machine"] = machine()
        write_whole(DATA, json.dumps(data, indent=1, ensure_ascii=False) + "\n")
        print(name, f"{time.time() - start:.0f} s", json.dumps(found["systems"]), flush=True)


def table(held: dict[str, Any]) -> str:
    """One line a list: each system's error rate, ours without a language model to the autoregressive one (Whisper's decoder,
    if it was trained), and how often the language is found."""
    names = [name for name in SYSTEMS if any(name in row["systems"] for row in held["lists"].values())]
    head = f"| list | {' | '.join(SYSTEMS[name] for name in names)} | ratio | language found |"
    lines = [head, "|---" * (len(names) + 3) + "|"]
    for name, row in held["lists"].items():
        systems = row["systems"]
        cells = [_cell(systems[system]) if system in systems else "–" for system in names]
        other = systems["whisper" if "whisper" in systems else "autoregressive"]
        ratio = f"{systems['plain']['errors'] / other['errors']:.2f}"
        found = f"{row['language_found']:.1%} of {row['language_count']}"
        lines.append(f"| {name} ({row['count']}) | {' | '.join(cells)} | {ratio} | {found} |")
    return "\n".join([*lines, "", f"{circumstances(held['machine'])}."])


def short_table(data: dict[str, Any]) -> str:
    """The README's: errors of each model's 8 steps, with and without its language model, a column a language."""
    lines = [f"| errors in % (words; hi, zh: characters) | {' | '.join(LANGUAGES)} |", "|---" * (len(LANGUAGES) + 1) + "|"]
    for name, held in data.items():
        for domain, told in DOMAINS.items():
            labels = {"denoised": f"`{name}`, {told}, 8 steps", "plain": "the same without its language model"}
            for system, label in labels.items():
                found = [held["lists"][f"{domain} {code}"]["systems"][system]["errors"] for code in LANGUAGES]
                lines.append(f"| {label} | {' | '.join(f'{100 * errors:.0f}' for errors in found)} |")
    return "\n".join(lines)


def card_results(held: dict[str, Any]) -> str:
    """The results of a model card, as lines of YAML."""
    lines = []
    for domain, told in DOMAINS.items():
        for code in LANGUAGES:
            row = held["lists"][f"{domain} {code}"]
            rates = (row["systems"][name]["errors"] for name in ("denoised", "greedy"))
            steps, draft = (f"{rate:.1%}".replace("%", " %") for rate in rates)
            found = f"{error_name(code)} {steps} ({draft})"
            lines.append(f'  {told} {code}, {row["count"]} utterances, 8 steps (greedy draft): "{found}"')
    return "\n".join(lines)


def report() -> None:
    """Writes all that is made from the data."""
    data = {name: held for name in FRONT_ENDS if (held := measured(DATA).get(name))}
    fill(PAGE, {f"languages {name}": table(held) for name, held in data.items()})
    fill(Path("README.md"), {"languages": short_table(data)})
    for name, held in data.items():
        card = Path(f"recipes/{name}/card.yaml")
        head, rest = card.read_text(encoding="utf-8").split("results:\n")
        write_whole(card, f"{head}results:\n{card_results(held)}\nlimits:{rest.split('limits:')[1]}")


def _cell(found: dict[str, Any]) -> str:
    low, high = found["interval"]
    return f"{found['errors']:.1%} ({100 * low:.0f}–{100 * high:.0f})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("front_end", choices=list(FRONT_ENDS))
    measuring.add_argument("--again", action="store_true", help="measure denoising anew, and not the baselines")
    commands.add_parser("report")
    args = parser.parse_args()
    if args.command == "measure":
        measure(args.front_end, args.again)
    else:
        report()
