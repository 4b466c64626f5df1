"""Error rates of models by language and corpus, on held-out synthetic and on real speech.

    python benchmarks/languages.py measure mini          adds to benchmarks/results/languages.json the lists that it lacks
    python benchmarks/languages.py whisper FOLDER        the same lists by a Whisper with its own decoder, as a yardstick
    python benchmarks/languages.py report                fills docs/results/languages.md and the table of README.md

The lists are those of runs/mini.sh, 300 synthetic sentences a language in voices that training never meets, and the real dev
splits of ../shared/speech, by corpus, their first 300 utterances. The language is named.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pages import RESULTS, ROOT, circumstances, fill, markdown, read_results, stated, write_results

from diffusion_gemma_asr.checkpoint.load import load_checkpoint
from diffusion_gemma_asr.data.manifest import Utterance, read_manifest
from diffusion_gemma_asr.data.sound import read_utterance
from diffusion_gemma_asr.denoise.decode import decode, draft_clips, find_languages
from diffusion_gemma_asr.denoise.options import DEFAULT_STEPS, DecodeOptions
from diffusion_gemma_asr.evaluate.baselines.autoregressive import greedy
from diffusion_gemma_asr.evaluate.baselines.whisper import Whisper
from diffusion_gemma_asr.evaluate.metrics import Edits, edits, percent
from diffusion_gemma_asr.evaluate.normalise import NORMALISER
from diffusion_gemma_asr.evaluate.summary import LONG_S, rates
from diffusion_gemma_asr.languages import LANGUAGES
from diffusion_gemma_asr.model.model import DiffusionGemmaASR

DATA, PAGE, README = RESULTS / "languages.json", ROOT / "docs/results/languages.md", ROOT / "README.md"
DOMAINS = {"synthetic": "runs/mini/heldout-{}/manifest.jsonl", "real": "../shared/speech/{}-dev.jsonl"}
COUNT, BATCH, EXAMPLES = 300, 16, 3
SYSTEMS = {
    "draft": "CTC draft",
    "denoised": f"denoised from it, {DEFAULT_STEPS} steps",
    "chosen": "draft that the backbone chooses",
    "candidates": f"denoised from that, {DEFAULT_STEPS} steps",
    "noise": f"from noise, {DEFAULT_STEPS} steps",
    "autoregressive": "same weights, token after token",
    "whisper": "own decoder",
}


class Written(NamedTuple):
    """What one system wrote for a list: a text each, and the seconds that it took beside reading and encoding."""

    texts: list[str]
    seconds: float


def lists(codes: Sequence[str]) -> dict[str, list[Utterance]]:
    """The utterances of every list that is there, by title: domain, language, and of real speech the corpus."""
    found: dict[str, list[Utterance]] = {}
    for domain, place in DOMAINS.items():
        for code in codes:
            path = ROOT / place.format(code)
            if not path.is_file():
                print(f"{domain} {code}: left out, there is no {path}")
                continue
            for utterance in read_manifest(path, [code], skipped=[]):
                corpus = f", {Path(utterance.audio_filepath).parents[1].name}" if domain == "real" else ""
                found.setdefault(f"{domain} {code}{corpus}", []).append(utterance)
    return found


@torch.no_grad()
def texts(model: DiffusionGemmaASR, batch: Sequence[Utterance]) -> dict[str, Written]:
    """What each system writes for a batch of one language."""
    languages, count = [u.language for u in batch], model.config.candidates
    encoded = model.encode([read_utterance(u) for u in batch])
    written: dict[str, Written] = {}
    ways = {
        "draft": DecodeOptions(start="ctc"),
        "denoised": DecodeOptions(start="draft", candidates=1),
        "chosen": DecodeOptions(start="ctc", candidates=count),
        "candidates": DecodeOptions(start="draft", candidates=count),
        "noise": DecodeOptions(start="noise"),
    }
    for name, how in ways.items():
        began = time.perf_counter()
        lines = [row.text for row in decode(model, draft_clips(model, encoded), how, batch_size=BATCH, languages=languages)]
        written[name] = Written(lines, time.perf_counter() - began)
    began = time.perf_counter()
    lines = [model.text(row) for row in greedy(model, encoded, languages)]
    return written | {"autoregressive": Written(lines, time.perf_counter() - began)}


@torch.no_grad()
def languages_found(model: DiffusionGemmaASR, batch: Sequence[Utterance]) -> list[str]:
    """The language of each utterance, as the model finds it among all that it knows."""
    options = DecodeOptions(start="noise")
    clips = draft_clips(model, model.encode([read_utterance(u) for u in batch]))
    return find_languages(model, clips, model.config.languages, options, BATCH)


def in_batches(rows: Sequence[Utterance]) -> list[list[Utterance]]:
    """Utterances of like length together."""
    order = sorted(rows, key=lambda u: u.duration)
    return [order[at : at + BATCH] for at in range(0, len(order), BATCH)]


def measure_list(model: DiffusionGemmaASR, rows: Sequence[Utterance]) -> dict[str, Any]:
    """Rates of all systems over one list, what denoising changes, how often the language is found in what is long enough."""
    batches = in_batches(rows)
    parts = [texts(model, batch) for batch in batches]
    codes = [code for batch in batches for code in languages_found(model, batch)] if model.config.finds_language else []
    order = [u for batch in batches for u in batch]
    right = [code == u.language for code, u in zip(codes, order, strict=False) if u.duration > LONG_S]
    return judged(order, parts) | {
        "language_found": round(sum(right) / len(right), 4) if right else None,
        "language_count": len(right),
    }


def judged(rows: Sequence[Utterance], parts: Sequence[dict[str, Written]]) -> dict[str, Any]:
    """Rates and seconds of each system that wrote the batches of a list."""
    lines = {name: [text for part in parts for text in part[name].texts] for name in parts[0]}
    counted = {
        name: [edits(u.text, line, u.language) for u, line in zip(rows, texts, strict=True)] for name, texts in lines.items()
    }
    result: dict[str, Any] = {
        "count": len(rows),
        "sound_s": round(sum(u.duration for u in rows), 1),
        "systems": {
            name: rates(some) | {"seconds": round(sum(part[name].seconds for part in parts), 2)}
            for name, some in counted.items()
        },
    }
    if "denoised" in lines:
        result["changed"] = changes(rows, lines, counted)
    return result


def changes(rows: Sequence[Utterance], lines: dict[str, list[str]], counted: dict[str, list[Edits]]) -> dict[str, Any]:
    """What denoising makes of CTC's drafts: words (characters) fewer and more wrong, as shares of all, and examples."""
    words = sum(one.reference for one in counted["draft"])
    gained = [a.errors - b.errors for a, b in zip(counted["draft"], counted["denoised"], strict=True)]
    order = sorted(range(len(rows)), key=gained.__getitem__)
    examples = [
        {"said": rows[i].text, "draft": lines["draft"][i], "denoised": lines["denoised"][i]}
        for i in [*order[::-1][:EXAMPLES], *order[:EXAMPLES]]
        if gained[i]
    ]
    return {
        "better": round(sum(gain for gain in gained if gain > 0) / max(1, words), 5),
        "worse": round(-sum(gain for gain in gained if gain < 0) / max(1, words), 5),
        "examples": examples,
    }


def measure(
    args: argparse.Namespace, measure_list: Callable[[Sequence[Utterance]], dict[str, Any]], codes: Sequence[str]
) -> None:
    """Adds the lists of a system that are not measured yet, or all of them again."""
    name = args.name or Path(args.model).name
    for title, rows in lists(codes).items():
        if args.only and not title.startswith(tuple(args.only)):
            continue
        if title in read_results(DATA).get(name, {"lists": {}})["lists"] and not args.again:
            continue
        start = time.time()
        result = measure_list(rows[: args.count])
        data = read_results(DATA)  # anew: another model may be measured at the same time
        data.setdefault(name, {"lists": {}})["lists"][title] = result
        data[name]["circumstances"] = circumstances()
        write_results(DATA, data)
        shown = {system: percent(row["error_rate"]) for system, row in result["systems"].items()}
        print(f"{title} ({result['count']}): {time.time() - start:.0f} s, {shown}", flush=True)


def measure_whisper(whisper: Whisper, rows: Sequence[Utterance]) -> dict[str, Any]:
    """As `measure_list`, for a Whisper."""
    batches, parts = in_batches(rows), []
    for batch in batches:
        sounds = [read_utterance(u) for u in batch]
        began = time.perf_counter()
        written = [one.text for one in whisper.transcribe(sounds, [u.language for u in batch])]
        parts.append({"whisper": Written(written, time.perf_counter() - began)})
    return judged([u for batch in batches for u in batch], parts)


def table(measured: dict[str, Any]) -> str:
    """One line a list."""
    names = [name for name in SYSTEMS if all(name in row["systems"] for row in measured["lists"].values())]
    rows = []
    for title, row in measured["lists"].items():
        cells = [
            f"{percent(r['error_rate'])} ({100 * r['low']:.0f}–{100 * r['high']:.0f})"
            for r in (row["systems"][name] for name in names)
        ]
        changed, found = row.get("changed"), row.get("language_count")
        cells.append(f"{percent(changed['better'])} / {percent(changed['worse'])}" if changed else "–")
        cells.append(f"{percent(row['language_found'])} of {found}" if found else "–")
        rows.append([f"{title} ({row['count']})", *cells])
    heading = f"errors after {NORMALISER} (hi, zh: characters)"
    columns = [heading, *(SYSTEMS[name] for name in names), "denoising: better / worse", "language found"]
    timed = [row for row in measured["lists"].values() if "sound_s" in row]  # what was measured before has no times
    sound = sum(row["sound_s"] for row in timed)
    shares = [
        f"{SYSTEMS[name]} {1000 * sum(row['systems'][name]['seconds'] for row in timed) / sound:.1f}"
        for name in names
        if timed
    ]
    without = ", with its encoder" if names == ["whisper"] else ", without reading, encoder and projector"
    spent = f"Milliseconds a second of sound{without}: {', '.join(shares)}. " if timed else ""
    return f"{markdown(columns, rows)}\n\n{spent}{stated(measured['circumstances'])}."


def summed(measured: dict[str, Any], start: str, system: str) -> str:
    """The error rate over all lists whose titles begin so."""
    some = [
        row["systems"][system]
        for title, row in measured["lists"].items()
        if title.startswith(start) and system in row["systems"]
    ]
    words = sum(row["reference"] for row in some)
    wrong = sum(row["substitutions"] + row["deletions"] + row["insertions"] for row in some)
    return percent(wrong / words, 0) if words else "–"


def examples(measured: dict[str, Any]) -> str:
    """What denoising changed for the better and the worse."""
    rows = [
        [title, *(one[key].replace("|", " ") or "–" for key in ("said", "draft", "denoised"))]
        for title, row in measured["lists"].items()
        for one in row.get("changed", {}).get("examples", ())
    ]
    return markdown(["list", "said", "draft", "denoised"], rows)


def short_table(data: dict[str, Any]) -> str:
    """The README's: what wrote the text by row, a column a language."""
    rows = []
    for name, measured in data.items():
        for domain in DOMAINS:
            for system in ("draft", "denoised", "chosen", "candidates", "noise"):
                cells = [summed(measured, f"{domain} {code}", system) for code in LANGUAGES]
                if set(cells) != {"–"}:
                    rows.append([f"`{name}`, {domain}: {SYSTEMS[system]}", *cells])
    return markdown([f"errors after {NORMALISER} (hi, zh: characters)", *LANGUAGES], rows)


def report() -> None:
    """Fills the tables."""
    data = read_results(DATA)
    sections = [f"### {name}\n\n{table(measured)}" for name, measured in data.items()]
    changed = [
        f"### {name}\n\n{examples(measured)}"
        for name, measured in data.items()
        if any("changed" in row for row in measured["lists"].values())
    ]
    fill(PAGE, {"languages": "\n\n".join(sections), "changes": "\n\n".join(changed) or "Not measured yet."})
    fill(README, {"languages": short_table(data)})


def main() -> None:
    """Measures or reports."""
    parser = argparse.ArgumentParser(description="Error rates of models by language.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("measure", "whisper"):
        measuring = commands.add_parser(name)
        measuring.add_argument("model", help="bundled model or checkpoint folder; a Whisper's folder or hub name")
        measuring.add_argument("--name", help="in the tables; by default that of the model's folder")
        measuring.add_argument("--encoder", help="folder or hub name in place of the encoder that the model names")
        measuring.add_argument("--backbone", help="folder or hub name in place of the backbone that the model names")
        measuring.add_argument("--device", default="auto")
        measuring.add_argument("--count", type=int, default=COUNT, help="the first so many utterances of each list")
        measuring.add_argument("--only", nargs="*", help="lists whose titles begin so, such as 'real fr'; all if left out")
        measuring.add_argument("--again", action="store_true", help="also what is measured already")
    commands.add_parser("report")
    args = parser.parse_args()
    if args.command == "report":
        report()
        return
    if args.command == "whisper":
        whisper = Whisper(args.model)
        measure(args, partial(measure_whisper, whisper), whisper.languages)
    else:
        model = load_checkpoint(args.model, device=args.device, dtype="auto", encoder=args.encoder, backbone=args.backbone)
        measure(args, partial(measure_list, model), model.config.languages)


if __name__ == "__main__":
    main()
