"""Which weights choose best among CTC's transcripts: those of denoise/candidates.py, fitted.

    python benchmarks/candidates.py measure mini        adds the model to benchmarks/results/candidates.json
    python benchmarks/candidates.py report              fills the tables of docs/results/candidates.md

On utterances of the lists of languages.py that its tables leave out: of each list those behind the first 60. Every
transcript is scored once by CTC and once by the backbone, behind a prompt without sound; what each choice of weights would
take is counted afterwards, without denoising.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from languages import in_batches, lists
from pages import RESULTS, ROOT, add_results, fill, markdown, measure_or_report, read_results, stated

from diffusion_gemma_asr.checkpoint.load import load_checkpoint
from diffusion_gemma_asr.data.manifest import Utterance
from diffusion_gemma_asr.data.sound import read_utterance
from diffusion_gemma_asr.denoise.candidates import LANGUAGE, LENGTH, language_scores, proposed
from diffusion_gemma_asr.denoise.decode import draft_clips
from diffusion_gemma_asr.evaluate.metrics import edits, percent
from diffusion_gemma_asr.model.ctc import transcript_scores
from diffusion_gemma_asr.model.model import DiffusionGemmaASR

DATA, PAGE = RESULTS / "candidates.json", ROOT / "docs/results/candidates.md"
REPORTED, COUNTS = 60, (8, 32)  # utterances of each list in other tables; candidates
WEIGHTS = {"LANGUAGE": (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1), "LENGTH": (0, 0.5, 1, 1.5, 2, 3, 4)}
NOW, CTC = (LANGUAGE, LENGTH), (0.0, 0.0)
SHOWN = 5  # choices of weights that the table names


class Scored(NamedTuple):
    """The candidates of a clip, the greedy draft first: two log-probabilities of each, tokens, errors; words said."""

    ctc: np.ndarray
    language: np.ndarray
    length: np.ndarray
    errors: np.ndarray
    words: int


@torch.no_grad()
def scored(model: DiffusionGemmaASR, rows: Sequence[Utterance]) -> list[Scored]:
    """Candidates and scores of every utterance, all of one language."""
    found = []
    for batch in in_batches(rows):
        clips = draft_clips(model, model.encode([read_utterance(u) for u in batch]))
        for utterance, clip in zip(batch, clips, strict=True):
            candidates = proposed(model, clip.slots, clip.draft, COUNTS[-1])
            wrong = [edits(utterance.text, model.text(row), utterance.language) for row in candidates]
            columns = (
                transcript_scores(model.head, clip.slots, candidates, model.blank),
                language_scores(model, candidates, utterance.language),
                [len(row) for row in candidates],
                [one.errors for one in wrong],
            )
            found.append(Scored(*map(np.array, columns), words=wrong[0].reference))
    return found


def rate(clips: Sequence[Scored], weights: Sequence[float], count: int) -> float:
    """Error rate of the candidates that these weights take, of the first so many of each clip."""
    language, length = weights
    taken = [np.argmax((c.ctc + language * c.language + length * c.length)[:count]) for c in clips]
    return float(sum(c.errors[at] for c, at in zip(clips, taken, strict=True)) / sum(c.words for c in clips))


def measure(args: argparse.Namespace) -> None:
    """Scores the candidates of all lists, and tries all weights."""
    model = load_checkpoint(args.model, device="cpu", dtype="auto")
    grid = list(product(*WEIGHTS.values()))
    tables: dict[str, Any] = {}
    relative: dict[int, list[list[float]]] = {count: [] for count in COUNTS}
    for title, rows in lists(model.config.languages).items():
        chosen = rows[REPORTED : REPORTED + args.count]
        if not chosen:
            continue
        clips = scored(model, chosen)
        words = sum(c.words for c in clips)
        draft = rate(clips, CTC, 1)
        tables[title] = {"utterances": len(clips), "draft": round(draft, 5)}
        for count in COUNTS:
            rates = [rate(clips, weights, count) for weights in grid]
            if draft:
                relative[count].append([one / draft for one in rates])
            tables[title][str(count)] = {
                "best_possible": round(float(sum(c.errors[:count].min() for c in clips) / words), 5),
                "now": round(rate(clips, NOW, count), 5),
            }
        print(title, tables[title], flush=True)
    means = {count: np.mean(rows, 0) for count, rows in relative.items()}
    best = {
        str(count): [[*grid[at], round(float(mean[at]), 4)] for at in np.argsort(mean)[:SHOWN]]
        for count, mean in means.items()
    }
    add_results(DATA, args.model, {"lists": tables, "best": best})


def report() -> None:
    """Two tables a model: the lists, and the weights."""
    parts = {}
    for name, content in read_results(DATA).items():
        heading = ["list", "utterances", "draft"]
        heading += [f"of {n}: {what}" for n in COUNTS for what in ("the best there is", "chosen")]
        lines = [
            [title, str(row["utterances"]), percent(row["draft"])]
            + [percent(row[str(n)][key]) for n in COUNTS for key in ("best_possible", "now")]
            for title, row in content["lists"].items()
        ]
        weights = [[str(n), *map(str, row)] for n in COUNTS for row in content["best"][str(n)]]
        named = ["candidates", *WEIGHTS, "errors, drafts are 1"]
        parts[name] = f"{markdown(heading, lines)}\n\n{markdown(named, weights)}\n\n{stated(content['circumstances'])}."
    fill(PAGE, parts)


def main() -> None:
    """Parses arguments and runs a part."""
    parser, measuring = measure_or_report("Weights of the scores that choose among candidates.", measure, report)
    measuring.add_argument("model")
    measuring.add_argument("--count", type=int, default=40, help="utterances of each list")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
