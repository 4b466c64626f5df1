"""The central claim, tested: does training leave its plateau without CTC, and how much does the output scale matter?

    python benchmarks/ctc_grid.py train recipes/mini.yaml    trains the four cells into runs/ctc-grid/ (resumable)
    python benchmarks/ctc_grid.py report                     writes docs/results/ctc-grid.{json,png}

The cells are {CTC weight of the recipe, 0} x {projector output at the embeddings' scale, as the linear layer gives
it}, with the recipe's frozen encoder, a frozen backbone that was trained on text alone (stage 1) and so has never met
a projector's slots, a new projector, the same seed, the same batches and the same number of steps. Canvases start
from noise alone, and their length comes from the duration, since half of the cells have no draft; transcripts are
decoded at 8 steps.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from diffusion_gemma_asr.recipe import SourceRecipe, load_recipe
from diffusion_gemma_asr.train.adapter import train_adapter

CELLS = {
    "ctc-scaled": (True, True),
    "ctc-unscaled": (True, False),
    "noctc-scaled": (False, True),
    "noctc-unscaled": (False, False),
}
RUNS = Path("runs/ctc-grid")
OUT = Path("docs/results")


def train(recipe_path: str, backbone: str, steps: int, batch_size: int, lr: float, only: str | None) -> None:
    """Trains the cells one after the other."""
    base = replace(load_recipe(recipe_path), backbone=SourceRecipe(str(Path(backbone).resolve())))
    data = replace(base.data, dev=base.data.dev[:1])
    schedule = replace(
        base.train,
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        warmup_steps=steps // 10,
        eval_every=steps // 8,
        start_from=None,
        monitor_samples=60,
    )
    for name, (ctc, scaled) in CELLS.items():
        if only in (None, name):
            cell = replace(
                base, name=name, data=data, train=schedule,
                projector=replace(base.projector, scaled=scaled),
                losses=replace(base.losses, ctc=base.losses.ctc if ctc else 0.0, draft_share=0.0),
            )  # fmt: skip
            train_adapter(cell, RUNS / name, drafts=False)


def report() -> None:
    """Collects the cells' logs into one JSON file and one plot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    curves = {}
    for name in CELLS:
        lines = [json.loads(line) for line in (RUNS / name / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        keys = ("step", "diffusion", "autoregressive", "ctc", "canvas_accuracy", "next_token_accuracy")
        curves[name] = {key: [line[key] for line in lines] for key in keys}
        judged = [(line["step"], line["evaluation"]) for line in lines if "evaluation" in line]
        wer = next(key for key in judged[0][1] if key.startswith("wer_") and "draft" not in key)
        curves[name]["evaluated_at"] = [step for step, _ in judged]
        curves[name]["wer"] = [figures[wer] for _, figures in judged]
        curves[name]["wer_draft"] = [figures[wer.replace("wer_", "wer_draft_")] for _, figures in judged]
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "ctc-grid.json").write_text(json.dumps(curves) + "\n", encoding="utf-8")
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), constrained_layout=True)
    panels = ("diffusion", "canvas_accuracy", "ctc", "wer")
    titles = (
        "diffusion loss",
        "token accuracy on the canvas",
        "CTC loss a token",
        "WER of 60 held-out sentences, 8 steps",
    )
    for axis, panel, title in zip(axes.flat, panels, titles, strict=True):
        for name, curve in curves.items():
            steps = curve["evaluated_at"] if panel == "wer" else curve["step"]
            values = curve[panel] if panel == "wer" else _smooth(curve[panel])
            axis.plot(steps, values, label=name, marker="o" if panel == "wer" else None)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes[0, 0].legend()
    figure.savefig(OUT / "ctc-grid.png", dpi=120)
    for name, curve in curves.items():
        print(name, {key: curve[key][-1] for key in ("diffusion", "canvas_accuracy", "ctc", "wer", "wer_draft")})


def _smooth(values: list[float], window: int = 20) -> list[float]:
    """Running mean over the last `window` values."""
    return [sum(values[max(0, i - window + 1) : i + 1]) / min(window, i + 1) for i in range(len(values))]


def main() -> None:
    parser = argparse.ArgumentParser(description="The CTC-by-scale grid.")
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train")
    training.add_argument("recipe")
    training.add_argument("--backbone", default="runs/mini/backbone", help="folder of the frozen backbone")
    training.add_argument("--steps", type=int, default=400)
    training.add_argument("--batch_size", type=int, default=32)
    training.add_argument("--lr", type=float, default=1.5e-3)
    training.add_argument("--only", choices=sorted(CELLS))
    commands.add_parser("report")
    args = parser.parse_args()
    if args.command == "train":
        train(args.recipe, args.backbone, args.steps, args.batch_size, args.lr, args.only)
    else:
        report()


if __name__ == "__main__":
    main()
