"""Error rates of models by language, on held-out synthetic and on real speech, and what else they could write.

    python benchmarks/languages.py measure mini6         adds to benchmarks/results/languages.json the lists that it lacks
    python benchmarks/languages.py report                fills docs/results/languages.md and the table of README.md

The lists are those of runs/mini.sh, 300 synthetic sentences a language in voices that training never meets, and the real dev
splits that docs/training.md describes, their first 300 utterances of at most 10 s. The language is named.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pages import RESULTS, ROOT, circumstances, fill, markdown, read_results, stated, write_results

from diffusion_gemma_asr.checkpoint.load import load_checkpoint
from diffusion_gemma_asr.data.manifest import Utterance, read_manifest
from diffusion_gemma_asr.data.sound import read_utterance
from diffusion_gemma_asr.denoise.decode import decode, draft_clips, find_languages
from diffusion_gemma_asr.denoise.options import DEFAULT_STEPS, DecodeOptions
from diffusion_gemma_asr.evaluate.baselines.autoregressive import greedy
from diffusion_gemma_asr.evaluate.metrics import edits, percent
from diffusion_gemma_asr.evaluate.normalise import NORMALISER
from diffusion_gemma_asr.evaluate.summary import LONG_S, rates
from diffusion_gemma_asr.languages import LANGUAGES
from diffusion_gemma_asr.model.model import DiffusionGemmaASR

DATA, PAGE, README = RESULTS / "languages.json", ROOT / "docs/results/languages.md", ROOT / "README.md"
DOMAINS = {"synthetic": "runs/mini/heldout-{}/manifest.jsonl", "real": "../shared/speech/{}-dev.jsonl"}
MAX_DURATION_S, COUNT, BATCH = 10.0, 300, 16
SYSTEMS = {
    "draft": "draft",
    "denoised": f"denoised from it, {DEFAULT_STEPS} steps",
    "ctc": "greedy CTC",
    "autoregressive": "token after token",
}


@torch.no_grad()
def texts(model: DiffusionGemmaASR, batch: Sequence[Utterance]) -> dict[str, list[str]]:
    """What each system writes for a batch of one language."""
    languages, options = [u.language for u in batch], DecodeOptions(start="draft")
    encoded = model.encode([read_utterance(u) for u in batch])
    decoded = decode(model, draft_clips(model, encoded, options), options, batch_size=BATCH, languages=languages)
    return {
        "draft": [row.draft for row in decoded],
        "denoised": [row.text for row in decoded],
        "ctc": [model.text([token.id for token in row]) for row in model.greedy.drafts(encoded)],
        "autoregressive": [model.text(row) for row in greedy(model, encoded, languages)],
    }


@torch.no_grad()
def languages_found(model: DiffusionGemmaASR, batch: Sequence[Utterance]) -> list[str]:
    """The language of each utterance, as the model finds it among all that it knows."""
    options = DecodeOptions(start="noise")
    clips = draft_clips(model, model.encode([read_utterance(u) for u in batch]), options)
    return find_languages(model, clips, model.config.languages, options, BATCH)


def measure_list(model: DiffusionGemmaASR, rows: Sequence[Utterance]) -> dict[str, Any]:
    """Rates of all systems over one list, and how often the language is found in what is long enough."""
    order = sorted(rows, key=lambda u: u.duration)
    batches = [order[at : at + BATCH] for at in range(0, len(order), BATCH)]
    written: dict[str, list[str]] = {name: [] for name in SYSTEMS}
    codes: list[str] = []
    for batch in batches:
        for name, lines in texts(model, batch).items():
            written[name] += lines
        if model.config.finds_language:
            codes += languages_found(model, batch)
    right = [code == u.language for code, u in zip(codes, order, strict=False) if u.duration > LONG_S]
    return {
        "count": len(order),
        "systems": {
            name: rates([edits(u.text, line, u.language) for u, line in zip(order, lines, strict=True)])
            for name, lines in written.items()
        },
        "language_found": round(sum(right) / len(right), 4) if right else None,
        "language_count": len(right),
    }


def measure(args: argparse.Namespace) -> None:
    """Adds the lists of a model that are not measured yet, or all of them again."""
    model = load_checkpoint(args.model, device=args.device, encoder=args.encoder)
    name = Path(args.model).name
    for domain, place in DOMAINS.items():
        for code in model.config.languages:
            title, path = f"{domain} {code}", ROOT / place.format(code)
            measured = read_results(DATA).get(name, {"lists": {}})["lists"]
            if title in measured and not args.again:
                continue
            if not path.is_file():
                print(f"{title}: left out, there is no {path}")
                continue
            start = time.time()
            result = measure_list(model, read_manifest(path, [code], MAX_DURATION_S, [])[: args.count])
            data = read_results(DATA)  # anew: another model may be measured at the same time
            data.setdefault(name, {"lists": {}})["lists"][title] = result
            data[name]["circumstances"] = circumstances()
            write_results(DATA, data)
            shown = {system: percent(row["error_rate"]) for system, row in result["systems"].items()}
            print(f"{title}: {time.time() - start:.0f} s, {shown}", flush=True)


def table(measured: dict[str, Any]) -> str:
    """One line a list."""
    rows = []
    for title, row in measured["lists"].items():
        cells = [
            f"{percent(r['error_rate'])} ({100 * r['low']:.0f}–{100 * r['high']:.0f})"
            for r in (row["systems"][name] for name in SYSTEMS)
        ]
        share = f"{percent(row['language_found'])} of {row['language_count']}" if row["language_count"] else "–"
        rows.append([f"{title} ({row['count']})", *cells, share])
    heading = f"errors after {NORMALISER} (hi, zh: characters)"
    return markdown([heading, *SYSTEMS.values(), "language found"], rows) + f"\n\n{stated(measured['circumstances'])}."


def short_table(data: dict[str, Any]) -> str:
    """The README's: what wrote the text by row, a column a language."""
    rows = []
    for name, measured in data.items():
        for domain in DOMAINS:
            for system in ("draft", "denoised"):
                lists = [measured["lists"].get(f"{domain} {code}") for code in LANGUAGES]
                cells = [percent(row["systems"][system]["error_rate"], 0) if row else "–" for row in lists]
                rows.append([f"`{name}`, {domain}: {SYSTEMS[system]}", *cells])
    return markdown([f"errors after {NORMALISER} (hi, zh: characters)", *LANGUAGES], rows)


def report() -> None:
    """Fills the tables."""
    data = read_results(DATA)
    sections = [f"### {name}\n\n{table(measured)}" for name, measured in data.items()]
    fill(PAGE, {"languages": "\n\n".join(sections)})
    fill(README, {"languages": short_table(data)})


def main() -> None:
    """Measures or reports."""
    parser = argparse.ArgumentParser(description="Error rates of models by language.")
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("model", help="bundled model or checkpoint folder")
    measuring.add_argument("--encoder", help="folder or hub name in place of the encoder that the model names")
    measuring.add_argument("--device", default="auto")
    measuring.add_argument("--count", type=int, default=COUNT, help="the first so many utterances of each list")
    measuring.add_argument("--again", action="store_true", help="also what is measured already")
    commands.add_parser("report")
    args = parser.parse_args()
    if args.command == "measure":
        measure(args)
    else:
        report()


if __name__ == "__main__":
    main()
