"""What each of the three moves of training brings, by language and domain, on the monitor lists.

    python benchmarks/moves.py measure mini-whisper-base     the moves that are done, on cached frames (frames/ of the run)
    python benchmarks/moves.py report                         fills the tables of docs/results/mini6.md

The lists are the first COUNT utterances of the synthetic monitor lists (voices and sentences that training never meets) and
of the real dev splits. English, German, French and Spanish are counted in words, Hindi and Mandarin in characters.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pages import circumstances, fill, measured

from diffusion_gemma_asr.baselines.autoregressive import greedy
from diffusion_gemma_asr.checkpoint import load_adapter
from diffusion_gemma_asr.data.features import FeatureCache
from diffusion_gemma_asr.data.manifest import Utterance, read_manifest
from diffusion_gemma_asr.evaluate.run import machine, write_whole
from diffusion_gemma_asr.model import DiffusionGemmaASR
from diffusion_gemma_asr.prompt import AUTO, LANGUAGES
from diffusion_gemma_asr.recipe import SourceRecipe, load_recipe
from diffusion_gemma_asr.train.adapter import build_model, frame_cache, transcribe_cached
from diffusion_gemma_asr.train.monitor import error_rate

COUNT = 40
MAX_DURATION_S = 10.0
PAGE, DATA = Path("docs/results/mini6.md"), Path("docs/results/mini6-moves.json")
MOVES = {  # of each front end: name, recipe, folder that the move leaves (a checkpoint, or backbone/ and projector/)
    "mini-whisper-base": (
        ("1 English", "recipes/mini-whisper-base/2-english.yaml", "runs/mini-whisper-base/english"),
        ("2 six languages", "recipes/mini-whisper-base/4-languages.yaml", "runs/mini-whisper-base/languages"),
        ("3 real speech", "recipes/mini-whisper-base.yaml", "runs/mini-whisper-base/checkpoint"),
    ),
    # Versions before had recipes of their own: "3 real speech" ended with mini6/3-encoder-ctc.yaml, "continued" with
    # 4-encoder-continued.yaml, "deeper" was without the speller of 7-speller.yaml, "with a speller" without 8-phonemes.yaml.
    "mini6": (("with phonemes", "recipes/mini6.yaml", "runs/mini6/checkpoint"),),
}
SYSTEMS = {"denoised": "8 steps", "draft": "CTC draft", "autoregressive": "token after token"}


def build(recipe_path: str, folder: Path) -> DiffusionGemmaASR:
    """The model that a move left."""
    recipe = load_recipe(recipe_path)
    alone = (folder / "projector").is_dir()  # of a reading stage
    if alone:
        recipe = replace(recipe, backbone=SourceRecipe(str(folder / "backbone")))
    model = build_model(recipe, lora=not alone)
    load_adapter(model, folder / "projector" if alone else folder)
    model.lm = None  # no move trains it
    return model.eval()


def lists() -> dict[tuple[str, str], list[Utterance]]:
    """By domain and language."""
    found = {}
    for code in LANGUAGES:
        for domain, path in (
            ("synthetic", f"runs/mini/dev-{code}/manifest.jsonl"),
            ("real", f"../shared/speech/{code}-dev.jsonl"),
        ):
            found[domain, code] = read_manifest(path, [code], MAX_DURATION_S)[:COUNT]
    return found


@torch.no_grad()
def errors(model: DiffusionGemmaASR, rows: list[Utterance], cache: FeatureCache) -> dict[str, float]:
    """Error rates of the systems, the one where the language is not named, and how often it is found."""
    code, said = rows[0].language, [u.text for u in rows]
    found = transcribe_cached(model, rows, cache)
    slots, lengths = model.projector(*cache.batch(rows))
    written = [model.text(row) for row in greedy(model, slots, lengths, [code] * len(rows))]
    figures = {
        "denoised": error_rate(said, [d.text for d in found], code),
        "draft": error_rate(said, [d.draft for d in found], code),
        "autoregressive": error_rate(said, written, code),
    }
    if model.finds_language:
        asked = transcribe_cached(model, rows, cache, AUTO)
        figures["auto"] = error_rate(said, [d.text for d in asked], code)
        figures["language_found"] = sum(d.language == code for d in asked) / len(rows)
    return {name: round(value, 4) for name, value in figures.items()}


def measure(front_end: str) -> None:
    """Adds the moves that are done and not yet measured to the data."""
    for name, recipe, folder in MOVES[front_end]:
        if name in measured(DATA).get(front_end, {}) or not any(Path(folder).rglob("adapter.safetensors")):
            continue
        start = time.time()
        model = build(recipe, Path(folder))
        rows = lists()
        cache = frame_cache(Path(f"runs/{front_end}/frames"), model.encoder, [u for part in rows.values() for u in part])
        judged = {
            f"{domain} {code}": {"count": len(part)} | errors(model, part, cache) for (domain, code), part in rows.items()
        }
        data = measured(DATA)  # anew: the other front end may be measured at the same time
        data.setdefault(front_end, {})[name] = {
            "lists": judged,
            "machine": machine(),
            "minutes": round((time.time() - start) / 60, 2),
        }
        write_whole(DATA, json.dumps(data, indent=1, ensure_ascii=False) + "\n")
        print(name, json.dumps(judged))


def table(moves: dict[str, Any]) -> str:
    """The moves side by side: in each cell the error rates of SYSTEMS."""
    head = f"| list | {' | '.join(moves)} | language found |"
    lines = [head, "|---" * (len(moves) + 2) + "|"]
    last = list(moves.values())[-1]["lists"]
    for name, final in last.items():
        cells = [" / ".join(f"{move['lists'][name][system]:.1%}" for system in SYSTEMS) for move in moves.values()]
        share = f"{final['language_found']:.1%}" if "language_found" in final else "–"
        lines.append(f"| {name} ({final['count']}) | {' | '.join(cells)} | {share} |")
    notes = f"{' / '.join(SYSTEMS.values())}. {circumstances(list(moves.values())[-1]['machine'])}."
    return "\n".join([*lines, "", notes])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("measure").add_argument("front_end", choices=list(MOVES))
    commands.add_parser("report")
    args = parser.parse_args()
    if args.command == "measure":
        measure(args.front_end)
    else:
        fill(PAGE, {front_end: table(moves) for front_end, moves in measured(DATA).items()})
