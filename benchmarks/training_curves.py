"""Collects the logs of the mini model's stages into one data file and one plot.

python benchmarks/training_curves.py        reads runs/mini/, writes docs/results/mini-training.{json,png}
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

DEV = ("wer_dev-en/manifest", "wer_draft_dev-en/manifest")
STAGES = {  # log, the losses to draw, the evaluations to draw
    "1 backbone": (
        "runs/mini/backbone-run",
        ("diffusion", "autoregressive"),
        ("wer_of_slots", "wer_8_steps", "wer_8_steps_from_slots"),
    ),
    "2 encoder": (
        "runs/mini/whisper-run",
        ("phonemes", "characters", "tokens"),
        ("token_wer_synthetic", "token_wer_real"),
    ),
    "3 reading": ("runs/mini/reading", ("diffusion", "autoregressive", "ctc"), DEV),
    "4 adapter": ("runs/mini", ("diffusion", "autoregressive", "ctc"), DEV),
}
WINDOW = 25  # steps that a point of the data is the mean of
OUT = Path("docs/results")


def curves(folder: str) -> dict[str, list]:
    """Means over WINDOW steps of every figure of a log, and its evaluations with their steps."""
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    windows = [lines[i : i + WINDOW] for i in range(0, len(lines), WINDOW)]
    shared = set.intersection(*(set(row) for row in lines))  # a run that resumed with other code may log other figures
    names = [name for name, value in lines[0].items() if isinstance(value, (int, float)) and name in shared - {"step"}]
    means = {name: [round(sum(row[name] or 0 for row in rows) / len(rows), 4) for rows in windows] for name in names}
    judged = [{"step": row["step"]} | row["evaluation"] for row in lines if "evaluation" in row]
    return {"step": [rows[-1]["step"] for rows in windows], **means, "evaluations": judged}


def main() -> None:
    found = {stage: curves(folder) for stage, (folder, _, _) in STAGES.items() if (Path(folder) / "log.jsonl").exists()}
    (OUT / "mini-training.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
    figure, axes = plt.subplots(2, len(found), figsize=(4 * len(found), 6), constrained_layout=True, squeeze=False)
    for column, (stage, data) in enumerate(found.items()):
        _, losses, rates = STAGES[stage]
        for name in losses:
            axes[0, column].plot(data["step"], data[name], label=name)
        for name in rates:
            points = [(row["step"], row[name]) for row in data["evaluations"] if name in row]
            axes[1, column].plot(*zip(*points, strict=True), "o-", label=name.split("/")[0])
        axes[0, column].set(title=stage, ylabel="loss")
        axes[1, column].set(xlabel="step", ylabel="WER", ylim=(0, 1.05))
        for axis in axes[:, column]:
            axis.grid(alpha=0.3)
            axis.legend(fontsize="small")
    figure.savefig(OUT / "mini-training.png", dpi=100)


if __name__ == "__main__":
    main()
