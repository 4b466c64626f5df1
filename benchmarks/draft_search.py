"""What each search brings to the drafts of a model whose speller writes phonemes, and how much each ear is to count.

    python benchmarks/draft_search.py measure mini6
    python benchmarks/draft_search.py report                   fills the tables of docs/results/draft_search.md

Error rates of drafts alone (draft_search.py), over the synthetic monitor lists: other sentences than those of the figures that
are reported.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from checkpoints import command, error_lines, monitor_lists
from pages import circumstances, measured
from torch import Tensor

import diffusion_gemma_asr as asr
from diffusion_gemma_asr.draft_search import WEIGHTS, Evidence, Weights, judged_transcripts, likeliest
from diffusion_gemma_asr.evaluate.run import machine, write_whole
from diffusion_gemma_asr.ngram import LM_WEIGHT, TOKEN_BONUS
from diffusion_gemma_asr.speller import Spellings
from diffusion_gemma_asr.token_scores import Tokens
from diffusion_gemma_asr.train.monitor import error_rate

COUNT = 60
TRIED = (
    WEIGHTS, WEIGHTS._replace(slots=0.0), WEIGHTS._replace(characters=0.0), WEIGHTS._replace(phonemes=0.0),
    WEIGHTS._replace(phonemes=0.5), WEIGHTS._replace(phonemes=1.0), WEIGHTS._replace(characters=0.15),
    WEIGHTS._replace(characters=0.6), WEIGHTS._replace(slots=0.2), WEIGHTS._replace(unknown=4.0), WEIGHTS._replace(unknown=16.0),
)  # fmt: skip
PAGE, DATA = Path("docs/results/draft_search.md"), Path("docs/results/draft_search.json")


@torch.no_grad()
def measure(name: str, checkpoint: str, encoder: str | None, frames: Path) -> None:
    """Adds a model's figures to the data, in place of older ones."""
    model = asr.load(checkpoint, device="cpu", encoder=encoder)
    speller, search = model.projector.speller, model.search
    if speller is None or search is None or search.sounded is None:
        raise SystemExit(f"{checkpoint} has no speller with phonemes and a language model")
    sounded = search.sounded
    lists, cache = monitor_lists(model, COUNT, frames)
    lm = replace(search.language.model, weight=LM_WEIGHT, bonus=TOKEN_BONUS)
    errors: dict[str, dict[str, float]] = {}
    seconds: dict[str, float] = {}
    for code, rows in lists.items():
        said, (frames_of, frame_lengths) = [u.text for u in rows], cache.batch(rows)
        slots, lengths = model.projector(frames_of, frame_lengths)
        heard = speller.hear(frames_of, frame_lengths)
        clips = [heard.clip(row, n) for row, n in enumerate(frame_lengths.tolist())]

        def timed(label: str, find: Callable[[], Sequence[Sequence[int]]], said: list[str] = said, code: str = code) -> None:
            start = time.perf_counter()
            texts = [model.text(list(tokens)) for tokens in find()]
            seconds[label] = seconds.get(label, 0.0) + time.perf_counter() - start
            errors.setdefault(label, {})[code] = round(error_rate(said, texts, code), 4)

        by_tokens = model.hear(slots)
        timed("audio tokens", lambda: [[t.id for t in row] for row in by_tokens.draft(lengths, model.blank, lm)])
        timed("characters", lambda: [search.spelled.best(clip.characters)[0].tokens for clip in clips])
        timed("phonemes", lambda: [(*(one.tokens for one in sounded.best(clip.phonemes)), ())[0] for clip in clips])
        judged: list[dict[Tokens, Evidence]] = []

        def judge(
            weights: Weights, judged: list[dict[Tokens, Evidence]] = judged, heard: Spellings = heard,
            sizes: tuple[Tensor, Tensor, Tensor] = (frame_lengths, slots, lengths),
        ) -> list[Tokens]:  # fmt: skip
            judged += [] if judged else judged_transcripts(model, heard, *sizes)
            return [likeliest(found, weights) for found in judged]

        for weights in TRIED:
            timed(label_of(weights), partial(judge, weights))

    sound = sum(u.duration for rows in lists.values() for u in rows)
    took = {label: round(1000 * value / sound, 2) for label, value in seconds.items()}
    print(name, errors, took)
    data = measured(DATA)
    data[name] = {"errors": errors, "ms_per_s": took, "count": COUNT, "machine": machine()}
    write_whole(DATA, json.dumps(data, indent=1) + "\n")


def label_of(weights: Weights) -> str:
    return " / ".join(f"{value:g}" for value in weights)


def table(held: dict[str, Any]) -> str:
    """One line a language, their mean, and the time of each search and of the first setting, which holds all of them."""
    errors, took = held["errors"], held["ms_per_s"]
    lines = error_lines(errors, held["count"])
    times = [f"{took[label]:.1f}" if label in list(errors)[:4] else "" for label in errors]
    lines.append(f"| ms a second of sound | {' | '.join(times)} |")
    return "\n".join([*lines, "", f"{circumstances(held['machine'])}."])


if __name__ == "__main__":
    command(__doc__, PAGE, DATA, measure, table)
