"""What one LoRA for both stacks costs (`lora.shared`): trained beside LoRA of its own for each, on a bundled backbone.

    python benchmarks/shared_lora.py    trains what benchmarks/results/shared_lora.json lacks; a table for docs/runtimes.md

All start from the frozen parts and the projector of `base` with new LoRA, and see the same batches and draws. The losses are
those on the dev list, on the same canvases for all. The lists are those of recipes/mini.yaml in English, or others.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from pages import RESULTS, ROOT, circumstances, fill, markdown, read_results, stated, write_results

from diffusion_gemma_asr.checkpoint.config_file import read_config_file
from diffusion_gemma_asr.checkpoint.load import find_checkpoint, load_adapter
from diffusion_gemma_asr.data.text import plain_text
from diffusion_gemma_asr.model.config import BackboneConfig, EncoderConfig, LoraConfig, ModelConfig
from diffusion_gemma_asr.train.adapter import AdapterTrainer, build_model, learning
from diffusion_gemma_asr.train.loop import run
from diffusion_gemma_asr.train.objective import SpeechBatch, losses, text_batch
from diffusion_gemma_asr.train.recipe import DataRecipe, LossRecipe, Recipe, TrainList, TrainRecipe

PAGE, DATA = ROOT / "docs/runtimes.md", RESULTS / "shared_lora.json"
SHARED = ROOT.parent / "shared"
ENCODER = SHARED / "models/whisper-base-encoder"
VARIANTS = {
    "for each stack, rank 16": LoraConfig(16, 32),
    "shared, rank 16": LoraConfig(16, 32, shared=True),
    "shared, rank 32": LoraConfig(32, 64, shared=True),
}
BATCH = 8


def recipe(args: argparse.Namespace, lora: LoraConfig, seed: int, frames: Path) -> Recipe:
    """The model with this LoRA, and a short run of it."""
    folder = find_checkpoint(args.model)
    bundled = read_config_file(folder)
    model = ModelConfig(
        args.model, EncoderConfig(str(args.encoder)), BackboneConfig(str(folder / bundled.backbone.name)),
        bundled.projector, lora, ctc=False, canvas=bundled.canvas,
    )  # fmt: skip
    options = TrainRecipe(
        steps=args.steps, lr=args.lr, warmup_steps=args.steps // 10, batch_size=BATCH, seed=seed, dtype="float32",
        monitor_samples=args.dev_count, eval_every=args.steps, save_every=args.steps,
    )  # fmt: skip
    train = (TrainList(args.train, first=args.train_count),)
    data = DataRecipe(train, (args.dev,), args.max_duration_s, cache_dir=frames, transcript="plain")
    return Recipe(model, options, data, LossRecipe(ctc=0.0))


@torch.no_grad()
def dev_figures(trainer: AdapterTrainer) -> dict[str, float]:
    """Mean losses and accuracies over the dev list."""
    model, (rows,) = trainer.model.eval(), trainer.data.dev.values()
    order = sorted(rows, key=lambda u: u.duration)
    sums: dict[str, float] = {}
    torch.manual_seed(0)
    for at in range(0, len(order), BATCH):
        some = order[at : at + BATCH]
        frames, lengths = trainer.data.cache.batch(some)
        targets = [model.prompts.target(plain_text(u.text, u.language)) for u in some]
        text = text_batch(model.prompts, model.projector.output_length(lengths).tolist(), targets, ["en"] * len(some), 0)
        found = losses(model, SpeechBatch(frames, lengths, text), trainer.recipe.losses).figures()
        for key, value in found.items():
            sums[key] = sums.get(key, 0.0) + value * len(some) / len(order)
    return {key: round(value, 4) for key, value in sums.items()}


def train(args: argparse.Namespace, lora: LoraConfig, seed: int, frames: Path) -> dict[str, Any]:
    """Trains, and says what became of the dev list."""
    with tempfile.TemporaryDirectory() as folder:
        plan = recipe(args, lora, seed, frames)
        model = build_model(plan)
        load_adapter(model, find_checkpoint(args.model), projector_alone=True)
        trainer = AdapterTrainer(plan, model, Path(folder))
        trained, before, began = learning(model, plan.losses), dev_figures(trainer), time.process_time()
        run(trained, trainer.loss_of, folder, plan.train)
        seconds = time.process_time() - began
        count = sum(value.numel() for name, value in trained.items() if "lora_" in name)
        return {"parameters": count, "cpu_s": round(seconds, 1), "before": before, "after": dev_figures(trainer)}


def table(results: dict[str, Any]) -> str:
    """Means over the seeds, and the lowest and highest."""
    heading = ["LoRA", "parameters", "diffusion loss", "right on the canvas", "autoregressive loss", "right next tokens"]
    runs = list(results["runs"].values())
    start = next(iter(runs[0].values()))["before"]
    keys = {"diffusion": "{:.3f}", "canvas_accuracy": "{:.1%}", "autoregressive": "{:.3f}", "next_token_accuracy": "{:.1%}"}
    body = [["none yet", "0", *(form.format(start[key]) for key, form in keys.items())]]
    for name, by_seed in results["runs"].items():
        cells = []
        for key, form in keys.items():
            values = [part["after"][key] for part in by_seed.values()]
            spread = f" ({form.format(min(values))} to {form.format(max(values))})" if len(values) > 1 else ""
            cells.append(form.format(sum(values) / len(values)) + spread)
        body.append([name, f"{next(iter(by_seed.values()))['parameters']:,}", *cells])
    plan, seeds = results["plan"], min(map(len, runs))
    over = f"means of {seeds} seeds, lowest and highest" if seeds > 1 else "one seed"
    facts = (
        f"\n\n`python benchmarks/shared_lora.py`, {plan['model']}: {plan['steps']} steps of {BATCH} utterances of "
        f"{plan['train_count']}, in English, at most {plan['max_duration_s']:g} s long; "
        f"losses on {plan['dev_count']} others, {over}.\n"
        f"{stated(results['circumstances'])}."
    )
    return markdown(heading, body) + facts


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="base", help="bundled model or checkpoint folder")
    parser.add_argument("--encoder", type=Path, default=ENCODER, help="its encoder")
    parser.add_argument("--train", type=Path, default=SHARED / "speech/en-train.jsonl")
    parser.add_argument("--dev", type=Path, default=SHARED / "speech/en-dev.jsonl")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--train_count", type=int, default=1500)
    parser.add_argument("--dev_count", type=int, default=100)
    parser.add_argument("--max_duration_s", type=float, default=6.0)
    parser.add_argument(
        "--frames", type=Path, default=ROOT / "runs/shared_lora/frames", help="folder of the encoder's frames"
    )
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    plan = {key: getattr(args, key) for key in ("model", "steps", "lr", "train_count", "dev_count", "max_duration_s")}
    results = read_results(args.data)
    if results.get("plan") != plan:
        results = {"plan": plan, "runs": {}}
    for seed in range(args.seeds):
        for name, lora in VARIANTS.items():
            if str(seed) in results["runs"].setdefault(name, {}):
                continue
            results["runs"][name][str(seed)] = train(args, lora, seed, args.frames)
            write_results(args.data, results | {"circumstances": circumstances()})
    fill(args.page, {"shared": table(read_results(args.data))})


if __name__ == "__main__":
    main()
