"""What each search brings to the drafts of a model whose speller writes phonemes, and how much each ear is to count.

    python benchmarks/draft_search.py measure mini6
    python benchmarks/draft_search.py report                   fills the tables of docs/results/draft_search.md

Error rates of drafts alone (draft_search.py), over the synthetic monitor lists: other sentences than those of the figures
that are reported.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from checkpoints import command, error_lines, monitor_lists
from pages import circumstances, measured
from torch import Tensor

import diffusion_gemma_asr as asr
from diffusion_gemma_asr.draft_search import FINAL_WEIGHTS, WEIGHTS, Weights, judged_transcripts, likeliest
from diffusion_gemma_asr.evaluate.run import machine, write_whole
from diffusion_gemma_asr.model import DiffusionGemmaASR
from diffusion_gemma_asr.ngram import LM_WEIGHT, TOKEN_BONUS
from diffusion_gemma_asr.train.monitor import error_rate

COUNT = 60
TRIED = (
    FINAL_WEIGHTS, WEIGHTS, FINAL_WEIGHTS._replace(phonemes=0.0), FINAL_WEIGHTS._replace(characters=0.0),
    FINAL_WEIGHTS._replace(slots=0.0), FINAL_WEIGHTS._replace(unknown=0.0), FINAL_WEIGHTS._replace(classes=0.0),
    FINAL_WEIGHTS._replace(language=0.0), FINAL_WEIGHTS._replace(language=1.0), FINAL_WEIGHTS._replace(characters=0.5),
    FINAL_WEIGHTS._replace(sentences=0.4), FINAL_WEIGHTS._replace(sentences=1.2),
)  # fmt: skip
PAGE, DATA = Path("docs/results/draft_search.md"), Path("docs/results/draft_search.json")


@torch.no_grad()
def measure(name: str, checkpoint: str, encoder: str | None, frames: Path) -> None:
    """Adds a model's figures to the data, in place of older ones."""
    model = asr.load(checkpoint, device="cpu", encoder=encoder)
    if model.lexicon is None or model.lm is None or model.lm.recurrent is None:
        raise SystemExit(f"{checkpoint} has no speller with phonemes and a language model of sentences")
    lists, cache = monitor_lists(model, COUNT, frames)
    errors: dict[str, dict[str, float]] = {}
    seconds: dict[str, float] = {}
    for code, rows in lists.items():
        said = [u.text for u in rows]
        for label, took, found in drafts(model, *cache.batch(rows)):
            seconds[label] = seconds.get(label, 0.0) + took
            errors.setdefault(label, {})[code] = round(error_rate(said, [model.text(list(one)) for one in found], code), 4)
    sound = sum(u.duration for rows in lists.values() for u in rows)
    took_ms = {label: round(1000 * value / sound, 2) for label, value in seconds.items()}
    print(name, errors, took_ms)
    data = measured(DATA)
    data[name] = {"errors": errors, "ms_per_s": took_ms, "count": COUNT, "machine": machine()}
    write_whole(DATA, json.dumps(data, indent=1) + "\n")


def drafts(model: DiffusionGemmaASR, frames: Tensor, lengths: Tensor) -> Iterator[tuple[str, float, list[Sequence[int]]]]:
    """Drafts of frames (B, F, D), lengths (B,): what each search alone finds, and all together by the weights of TRIED, with
    the seconds that it took; to weigh again what was found takes none."""
    speller, search = model.projector.speller, model.search
    assert speller is not None and search is not None and search.sounded is not None
    slots, slot_lengths = model.projector(frames, lengths)
    heard = speller.hear(frames, lengths)
    clips = [heard.clip(row, n) for row, n in enumerate(lengths.tolist())]
    start = time.perf_counter()
    lm = replace(search.language.model, weight=LM_WEIGHT, bonus=TOKEN_BONUS)
    by_tokens = [[token.id for token in row] for row in model.hear(slots).draft(slot_lengths, model.blank, lm)]
    yield "audio tokens", time.perf_counter() - start, by_tokens
    start = time.perf_counter()
    by_characters = [search.spelled.best(clip.characters)[0].tokens for clip in clips]
    yield "characters", time.perf_counter() - start, by_characters
    start = time.perf_counter()
    by_phonemes = [[one.tokens for one in search.sounded.best(clip.phonemes)] for clip in clips if clip.phonemes]
    yield "phonemes", time.perf_counter() - start, [found[0] if found else () for found in by_phonemes]
    start = time.perf_counter()
    judged = judged_transcripts(model, heard, lengths, slots, slot_lengths)
    for weights in TRIED:
        chosen = [likeliest(found, weights) for found in judged]
        yield label_of(weights), time.perf_counter() - start, chosen
        start = time.perf_counter()


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
