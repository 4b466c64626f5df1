"""Collects the logs of a mini model's stages into one data file and one plot.

python benchmarks/training_curves.py [mini | mini-whisper-base | mini6]
    reads the model's runs, writes docs/results/NAME-training.{json,png}
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

CODES = ("en", "de", "fr", "es", "hi", "zh")
ENGLISH = ("wer_dev-en/manifest", "wer_draft_dev-en/manifest")
DRAFTS = tuple(f"wer_draft_dev-{code}/manifest" for code in CODES)
NATS = tuple(f"nats_{code}" for code in CODES)
DENOISED = tuple(f"wer_dev-{code}/manifest" for code in CODES)
THREE = ("diffusion", "autoregressive", "ctc")


class Stage(NamedTuple):
    """A stage's run folder or log, the losses to draw and the evaluations to draw, the steps of the log that a point of the
    data is the mean of, and the highest value that is drawn of an evaluation."""

    folder: str
    losses: tuple[str, ...]
    rates: tuple[str, ...]
    window: int = 25
    highest: float = 1.05

    @property
    def log(self) -> Path:
        """Of the run."""
        path = Path(self.folder)
        return path if path.suffix else path / "log.jsonl"


BACKBONE = tuple(f"errors_8_steps_from_slots_{code}" for code in CODES)
SETS: dict[str, dict[str, Stage]] = {
    "mini": {
        "1 backbone": Stage("runs/mini/backbone-run", THREE[:2], ("wer_of_slots", "wer_8_steps", "wer_8_steps_from_slots")),
        "2 encoder": Stage(
            "runs/mini/whisper-run", ("phonemes", "characters", "tokens"), ("token_wer_synthetic", "token_wer_real")
        ),
        "3 reading": Stage("runs/mini/reading", THREE, ENGLISH),
        "4 adapter": Stage("runs/mini", THREE, ENGLISH),
    },
    "mini-whisper-base": {
        "backbone": Stage("runs/mini6/backbone-run", THREE[:2], BACKBONE),
        "1 English, CTC": Stage("runs/mini-whisper-base/english-ctc", ("ctc",), (ENGLISH[1], "wer_draft_speech/en-dev")),
        "1 English": Stage("runs/mini-whisper-base/english", THREE, (*ENGLISH, "wer_speech/en-dev")),
        "2 languages, CTC": Stage("runs/mini-whisper-base/languages-ctc", ("ctc",), DRAFTS),
        "2 languages": Stage("runs/mini-whisper-base/languages", THREE, DENOISED),
        "3 real speech, CTC": Stage("runs/mini-whisper-base/real-ctc", ("ctc",), (*DRAFTS, "wer_draft_speech/en-dev")),
        "3 real speech": Stage("runs/mini-whisper-base", THREE, DENOISED),
    },
    "mini6": {
        "encoder": Stage("runs/mini6/distilled/student-run", ("teacher", "phonemes"), tuple(f"teacher_{c}" for c in CODES)),
        "encoder, CTC": Stage(
            "runs/mini6/hearing/student-run", ("teacher", "phonemes", "tokens"), tuple(f"token_wer_{c}" for c in CODES)
        ),
        "encoder, CTC alone": Stage(
            "runs/mini6/continued/student-run", ("phonemes", "tokens"), tuple(f"token_wer_{c}" for c in CODES)
        ),
        "layers, 80 ms": Stage("runs/mini6/projector80", ("ctc",), DRAFTS),
        "layers, 40 ms": Stage("runs/mini6/projector", ("ctc",), DRAFTS),
        "reading": Stage("runs/mini6/reading", THREE, DENOISED),
        "speller": Stage("runs/mini6/speller", ("spelling",), DRAFTS),
        "phonemes": Stage("runs/mini6/phonemes", ("spelling", "phonemes"), DRAFTS),
        "sentences": Stage("runs/mini6/recurrent-1.jsonl", ("loss",), NATS, 1, 6.0),
        "sentences, half dropout": Stage("runs/mini6/recurrent.jsonl", ("loss",), NATS, 1, 6.0),
        "adapter": Stage("runs/mini6", THREE, DENOISED),
    },
}
OUT = Path("docs/results")


def curves(stage: Stage) -> dict[str, list]:
    """Means over a stage's window of every figure of its log, and its evaluations with their steps."""
    lines = [json.loads(line) for line in stage.log.read_text(encoding="utf-8").splitlines()]
    windows = [lines[i : i + stage.window] for i in range(0, len(lines), stage.window)]
    shared = set.intersection(*(set(row) for row in lines))  # a run that resumed with other code may log other figures
    names = [name for name, value in lines[0].items() if isinstance(value, (int, float)) and name in shared - {"step"}]
    means = {name: [round(sum(row[name] or 0 for row in rows) / len(rows), 4) for rows in windows] for name in names}
    judged = [{"step": row["step"]} | row["evaluation"] for row in lines if "evaluation" in row]
    return {"step": [rows[-1]["step"] for rows in windows], **means, "evaluations": judged}


def draw(name: str) -> None:
    """The data and the plot of a set's stages that have a log, or had one when the data was written last."""
    path, stages = OUT / f"{name}-training.json", SETS[name]
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    found |= {title: curves(stage) for title, stage in stages.items() if stage.log.exists()}
    found = {title: found[title] for title in stages if title in found}
    path.write_text(json.dumps(found) + "\n", encoding="utf-8")
    figure, axes = plt.subplots(2, len(found), figsize=(4 * len(found), 6), constrained_layout=True, squeeze=False)
    for column, (title, data) in enumerate(found.items()):
        for loss in stages[title].losses:
            axes[0, column].plot(data["step"], data[loss], label=loss)
        for rate in stages[title].rates:
            if points := [(row["step"], row[rate]) for row in data["evaluations"] if rate in row]:
                axes[1, column].plot(*zip(*points, strict=True), "o-", label=rate.split("/manifest")[0])
        axes[0, column].set(title=title, ylabel="loss")
        label = "nats a token" if stages[title].rates == NATS else "error rate"
        axes[1, column].set(xlabel="step", ylabel=label, ylim=(0, stages[title].highest))
        for axis in axes[:, column]:
            axis.grid(alpha=0.3)
            if axis.lines:
                axis.legend(fontsize="small")
    figure.savefig(OUT / f"{name}-training.png", dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("name", choices=list(SETS), nargs="?", default="mini")
    draw(parser.parse_args().name)
