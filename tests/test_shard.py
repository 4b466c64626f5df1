"""train/shard.py: two workers with half of the experts each learn what one worker with all of them learns."""

from __future__ import annotations

import gc
import json
import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file
from sounds import tone, write
from tiny_model import speech_batch, tiny_model
from torch import Tensor, multiprocessing, nn
from torch.distributed.tensor import DTensor

from diffusion_gemma_asr.data.manifest import Utterance, write_manifest
from diffusion_gemma_asr.errors import RecipeError
from diffusion_gemma_asr.model.model import DiffusionGemmaASR
from diffusion_gemma_asr.train.mini.reading import ReadingRecipe
from diffusion_gemma_asr.train.objective import losses
from diffusion_gemma_asr.train.recipe import LossRecipe, load_recipe
from diffusion_gemma_asr.train.run import train_from_recipe
from diffusion_gemma_asr.train.shard import shard_experts
from diffusion_gemma_asr.train.workers import join_workers

ALWAYS = LossRecipe(self_conditioning=1.0)
SOMETIMES = LossRecipe(self_conditioning=0.5)
EXPERTS = tiny.EXPERTS  # of a layer
TEXTS = ["the quick fox", "seven eight nine"]


def write_recipe(folder: Path, whisper: Path, backbone: Path) -> Path:
    """Two utterances to train on, one to judge by; experts are shared where there are workers to share them."""
    rows = []
    for i, text in enumerate([*TEXTS, "by the sea"]):
        duration = 1.5 + 0.2 * i
        sound = write(folder / f"{i}.wav", tone(300 + 100 * i, duration))
        rows.append(Utterance(str(sound), text, "en", duration))
    write_manifest(folder / "train.jsonl", rows[:2])
    write_manifest(folder / "dev.jsonl", rows[2:])
    content: dict[str, Any] = {
        "model": {
            "name": "tiny",
            "encoder": {"name": str(whisper)},
            "backbone": {"name": str(backbone)},
            "projector": {"hidden_size": 16},
            "lora": {"rank": 2, "alpha": 4},
        },
        "train": {
            "steps": 2,
            "batch_size": 2,
            "accumulation": 2,
            "lr": 0.001,
            "min_lr_ratio": 1.0,  # the schedule does not depend on the steps
            "dtype": "float32",
            "eval_every": 2,
            "save_every": 1,
            "shard": "experts",
        },
        "data": {"train": [{"manifest": "train.jsonl"}], "dev": ["dev.jsonl"]},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def changed(recipe: Path, **train: Any) -> Path:
    """The recipe with other values in its section `train`, beside it."""
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    content["train"] |= train
    path = recipe.with_name("changed.yaml")
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def gradients(model: DiffusionGemmaASR, options: LossRecipe, seed: int = 1) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    trained = model.trained()
    for parameter in trained.values():
        parameter.requires_grad_(True).grad = None
    losses(model, speech_batch(model, TEXTS, [90, 120]), options).total(options).backward()
    return {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}


def held(model: DiffusionGemmaASR) -> int:
    """Bytes of expert weights in this process, those that both stacks hold counted once."""
    total, seen = 0, set()
    for name, p in model.backbone.named_parameters(remove_duplicate=False):
        if ".experts." in name:
            storage = (p.to_local() if isinstance(p, DTensor) else p).untyped_storage()
            total += storage.nbytes() if storage.data_ptr() not in seen else 0
            seen.add(storage.data_ptr())
    return total


def gathered() -> int:
    """Bytes of whole experts, three-dimensional and not in shares, that this process holds."""
    matrices = [t for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter) and t.dim() == 3 and t.shape[0] == EXPERTS]
    return sum(t.untyped_storage().nbytes() for t in matrices)


def work(number: int, port: int, whisper: Path, backbone: Path, recipe: Path, run: Path) -> None:
    """One of two processes, as torchrun starts them."""
    os.environ |= {"RANK": str(number), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    join_workers(torch.device("cpu"))
    model = tiny_model(whisper, backbone)
    before, whole = {o: gradients(model, o) for o in (ALWAYS, SOMETIMES)}, held(model)
    other = gradients(model, SOMETIMES, seed=2 + number)  # the workers draw differently
    assert gathered() >= whole > 0
    shard_experts(model.backbone, torch.device("cpu"))
    for options, expected in before.items():
        after = gradients(model, options)
        assert after.keys() == expected.keys() and len(after) > 40
        for name, gradient in expected.items():
            assert (after[name] - gradient).abs().max() <= 1e-6, name
        assert held(model) == whole // 2 and gathered() == 0
    with torch.no_grad():
        losses(model, speech_batch(model, TEXTS, [90, 120]), ALWAYS)
    assert gathered() == 0  # a layer at a time, also where no backward pass follows
    shared = gradients(model, SOMETIMES, seed=2 + number)
    for name, gradient in other.items():  # rounding grows with what is summed
        assert (shared[name] - gradient).abs().max() <= 1e-6 * max(1.0, float(gradient.abs().max())), name
    train_from_recipe(recipe, run, "cpu")


def test_two_workers_with_half_of_the_experts_each(tmp_path: Path, whisper_folder: Path, backbone_folder: Path) -> None:
    recipe = write_recipe(tmp_path, whisper_folder, backbone_folder)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(work, (port, whisper_folder, backbone_folder, recipe, tmp_path / "two"), nprocs=2)
    train_from_recipe(changed(recipe, steps=4), tmp_path / "two", "cpu")  # goes on alone, with all experts
    train_from_recipe(changed(recipe, steps=4), tmp_path / "one", "cpu")
    one, two = (load_file(tmp_path / name / "checkpoint/adapter.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=1e-5, rtol=1e-4)
    log = [json.loads(line) for line in (tmp_path / "two/log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(record["step"], "evaluation" in record) for record in log] == [(1, False), (2, True), (3, False), (4, True)]


def test_what_cannot_be_shared_is_refused(tmp_path: Path, whisper_folder: Path, backbone_folder: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, whisper_folder, backbone_folder))
    with pytest.raises(RecipeError, match="both set, but packed experts cannot be shared"):
        replace(recipe.train, quantization="bnb-4bit")
    with pytest.raises(RecipeError, match="the stage 'reading' trains them"):
        ReadingRecipe(recipe.model, recipe.train, recipe.data)
    with pytest.raises(RecipeError, match=r"'train\.quantization' must be one of bnb-4bit, "):
        replace(recipe.train, quantization="int3", shard=None)
