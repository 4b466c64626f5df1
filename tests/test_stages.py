"""train/mini/: each stage of the small models' ladder, a few steps of it, and what it leaves behind."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from sounds import tone, write

import diffusion_gemma_asr
from diffusion_gemma_asr.checkpoint.load import read_adapter
from diffusion_gemma_asr.checkpoint.parts import load_backbone, load_tokenizer
from diffusion_gemma_asr.data.manifest import Utterance, write_manifest
from diffusion_gemma_asr.errors import CheckpointError, RecipeError
from diffusion_gemma_asr.model.backbone import Backbone
from diffusion_gemma_asr.model.config import BackboneConfig
from diffusion_gemma_asr.train.loop import run
from diffusion_gemma_asr.train.mini.backbone_config import BackboneShape, small_config
from diffusion_gemma_asr.train.mini.reading import Curriculum
from diffusion_gemma_asr.train.mini.sentences import joined, random_rows
from diffusion_gemma_asr.train.mini.text import BackboneRecipe, TextTrainer, new_backbone, warm_start
from diffusion_gemma_asr.train.mini.tokenizer import FIRST_WORD_TOKEN, saved, train_tokenizer
from diffusion_gemma_asr.train.recipe_files import load_recipe_as
from diffusion_gemma_asr.train.run import train_from_recipe

TEXTS = ["the quick fox", "lazy dog", "by the sea", "she sells shells", "it is fine"]
RECIPES = Path(__file__).parents[1] / "recipes"
SHAPE = {
    "hidden": 32, "layers": 2, "heads": 4, "kv_heads": None, "head_dim": 8, "intermediate": 32, "experts": 2, "top_k": 1,
    "expert_intermediate": 16,
}  # fmt: skip
PROJECTOR = {"hidden_size": 12, "strides": [2, 2]}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer and tones."""
    folder = tmp_path_factory.mktemp("mini")
    saved(train_tokenizer({"en": TEXTS * 3}, 320), folder / "tokenizer")
    rows = []
    for i, text in enumerate(TEXTS):
        sound = write(folder / f"{i}.wav", tone(220 + 110 * i, 1.2))
        rows.append(Utterance(str(sound), text, "en", 1.2))
    write_manifest(folder / "manifest.jsonl", rows)
    (folder / "en.txt").write_text("\n".join(TEXTS * 2))
    (folder / "zh.txt").write_text("你好\n他是日本人。\n我們\n", encoding="utf-8")
    write_manifest(folder / "dev.jsonl", [Utterance(str(folder / "0.wav"), "the sea", "en", 1.2)])
    return folder


def write_recipe(folder: Path, name: str, **changes: Any) -> Path:
    """A recipe of the repository with some sections changed, three steps long, in `folder`."""
    content = yaml.safe_load((RECIPES / name).read_text(encoding="utf-8"))
    content["train"] |= {"minutes": None, "steps": 3, "warmup_steps": 1, "save_every": 2, "eval_every": 3, "accumulation": 1}
    for section, values in changes.items():
        content[section] = content[section] | values if isinstance(values, dict) and section in content else values
    path = folder / Path(name).name
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}), encoding="utf-8")
    return path


def read_log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def same(folder: Path, other: Path) -> bool:
    """Whether two runs ended in the same weights."""
    a, b = (torch.load(path / "state.pt", weights_only=True)["weights"] for path in (folder, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# -- backbone --------------------------------------------------------------------------------------------------


def backbone_recipe(corpus: Path, rows: str | None = None, **changes: Any) -> Path:
    texts = {"text": ["en.txt", "zh.txt", "manifest.jsonl"], "exclude": ["dev.jsonl"], "dev": {"en": "dev.jsonl"}}
    sections: dict[str, Any] = {
        "tokenizer": "tokenizer",
        "rows": rows,
        "shape": SHAPE,
        "data": texts,
        "decoder": None,
    }
    train = {"batch_size": 4, "unnamed": 0.5}
    return write_recipe(corpus, "mini/1-backbone.yaml", train=train | changes, **sections)


@pytest.fixture(scope="module")
def text_run(corpus: Path) -> Path:
    folder = corpus / "text"
    assert train_from_recipe(backbone_recipe(corpus), folder, "cpu") == folder / "backbone"
    return folder


@pytest.fixture(scope="module")
def backbone(text_run: Path) -> Backbone:
    return load_backbone(BackboneConfig(str(text_run / "backbone")))


def test_a_backbone_is_left_in_the_real_layout(text_run: Path, backbone: Backbone) -> None:
    records = read_log(text_run)
    assert [record["step"] for record in records] == [1, 2, 3]
    assert all(record["autoregressive"] > 0 for record in records)
    assert 0 < records[-1]["evaluation"]["nats_a_character_en"] < 20
    assert (backbone.hidden_size, backbone.vocab_size) == (32, 320)
    state = torch.load(text_run / "state.pt", weights_only=True)["weights"]
    loaded = dict(backbone.named_parameters())
    name = next(name for name in state if name.endswith("layers.0.self_attn.q_proj.weight"))
    torch.testing.assert_close(loaded[name], state[name], atol=1e-3, rtol=1e-3)


def test_a_stage_that_was_interrupted_ends_as_one_that_was_not(corpus: Path, text_run: Path) -> None:
    path = backbone_recipe(corpus)
    recipe = load_recipe_as(BackboneRecipe, path)
    trainer = TextTrainer(recipe, torch.device("cpu"))
    trained = {n: p for n, p in trainer.backbone.named_parameters() if "vision" not in n}

    def interrupt(step: int) -> dict[str, float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # step 3 is lost
        run(trained, trainer.loss_of, corpus / "broken", recipe.train, interrupt, trainer.settings)
    assert torch.load(corpus / "broken" / "state.pt", weights_only=True)["step"] == 2
    train_from_recipe(path, corpus / "broken", "cpu")
    assert same(corpus / "broken", text_run)


def test_rows_that_are_given_do_not_learn(corpus: Path, text_run: Path) -> None:
    rows = torch.randn(320, 32).half()
    save_file({"rows": rows}, corpus / "rows.safetensors")
    folder = train_from_recipe(backbone_recipe(corpus, rows="rows.safetensors"), corpus / "kept", "cpu")
    kept = load_backbone(BackboneConfig(str(folder)))
    assert torch.equal(kept.lm_head_weight, rows.float())
    learnt, others = (torch.load(path / "state.pt", weights_only=True)["weights"] for path in (corpus / "kept", text_run))
    assert len(learnt) == len(others) - 1  # the head is not among them
    save_file({"rows": -rows}, corpus / "rows.safetensors")
    with pytest.raises(CheckpointError, match=r"state\.pt was made with other settings \(rows was"):
        train_from_recipe(backbone_recipe(corpus, rows="rows.safetensors"), corpus / "kept", "cpu")


def test_a_run_is_not_continued_by_another_recipe(corpus: Path, text_run: Path) -> None:
    with pytest.raises(CheckpointError, match=r"state\.pt was made with other settings \(.*train\.seed was 5, is 2\)"):
        train_from_recipe(backbone_recipe(corpus, seed=2), text_run, "cpu")


def test_a_backbone_goes_on_from_one_with_another_tokenizer(corpus: Path, text_run: Path, backbone: Backbone) -> None:
    """Tokens of the same spelling keep their rows, and everything but the rows is the old backbone's."""
    other = saved(
        train_tokenizer({"en": ["the quick fox she sells"] * 3, "de": ["schöne füchse"] * 3}, 330), corpus / "other"
    )
    new = new_backbone(small_config(other, BackboneShape(**SHAPE)))
    vocabulary = load_tokenizer(BackboneConfig(str(text_run / "backbone"))).get_vocab()
    shared = {token: i for token, i in other.get_vocab().items() if token in vocabulary}
    assert warm_start(new, other, text_run / "backbone") == len(shared) < len(other)
    for token, i in shared.items():
        assert torch.equal(new.lm_head_weight[i], backbone.lm_head_weight[vocabulary[token]])
    old = dict(backbone.named_parameters())
    kept = [name for name, p in new.named_parameters() if p.shape == old[name].shape and torch.equal(p, old[name])]
    assert len(kept) == len(old) - 1


def test_random_targets_are_ordinary_tokens_before_their_end() -> None:
    rows = random_rows(200, 5, range(FIRST_WORD_TOKEN, 300), 4, random.Random(0))
    assert {len(row) - 1 for row in rows} == {1, 2, 3, 4, 5} and all(row[-1] == 4 for row in rows)
    assert {token for row in rows for token in row[:-1]} == set(range(FIRST_WORD_TOKEN, 300))


def test_the_curriculum_grows_linearly() -> None:
    curriculum = Curriculum(clean=10, until=30)
    assert [curriculum.level(step) for step in (0, 10, 20, 30, 99)] == [0, 0, 0.5, 1, 1]
    with pytest.raises(RecipeError, match=r"curriculum\.clean"):
        Curriculum(clean=3, until=3)


def test_a_share_of_the_sentences_goes_on_with_those_that_follow() -> None:
    targets = [[10 + i] * (1 + i % 4) + [1] for i in range(300)]  # 1 ends each
    assert joined(targets, 0.0, 20, random.Random(0)) == targets
    rows = joined(targets, 0.5, 20, random.Random(0))
    longer = [i for i, row in enumerate(rows) if row != targets[i]]
    assert 0.3 < len(longer) / len(rows) < 0.6 and max(map(len, rows)) <= 20
    for i, row in enumerate(rows):
        assert row.count(1) == 1 and row[-1] == 1
        following = [token for target in targets[i : i + 20] for token in target[:-1]]
        assert row[:-1] == following[: len(row) - 1]


# -- reading, adapter, bundle ------------------------------------------------------------------------------------


def speech_recipe(corpus: Path, text_run: Path, name: str, model: dict[str, Any], **train: Any) -> Path:
    backbone = {"backbone": {"name": str(text_run / "backbone")}}
    content = yaml.safe_load((RECIPES / name).read_text(encoding="utf-8"))
    content["model"] |= backbone | {"projector": PROJECTOR, "lora": {"rank": 2}, "languages": ["en"]} | model
    given = {
        "minutes": None,
        "start_from": None,
        "steps": 3,
        "batch_size": 3,
        "warmup_steps": 1,
        "eval_every": 3,
        "save_every": 2,
        "accumulation": 1,
    }
    content["train"] |= given | {"dtype": "float32"} | train
    content["data"] |= {"train": [{"manifest": "manifest.jsonl"}], "dev": ["manifest.jsonl"], "cache_dir": None}
    path = corpus / f"speech-{Path(name).name}"
    content = {
        key: value
        for key, value in content.items()
        if key not in ("frozen_projector", "overheard", "drafts_from", "unspoken")
    }
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def ears_run(corpus: Path, text_run: Path, whisper_folder: Path) -> Path:
    recipe = speech_recipe(corpus, text_run, "mini/4-ears.yaml", {"encoder": {"name": str(whisper_folder)}})
    assert train_from_recipe(recipe, corpus / "ears", "cpu") == corpus / "ears" / "checkpoint"
    return corpus / "ears"


@pytest.fixture(scope="module")
def reading_run(corpus: Path, text_run: Path, ears_run: Path) -> Path:
    encoder = {"encoder": {"name": str(ears_run / "encoder")}}
    recipe = speech_recipe(corpus, text_run, "mini/3-reading.yaml", encoder, start_from=str(ears_run / "checkpoint"))
    assert train_from_recipe(recipe, corpus / "reading", "cpu") == corpus / "reading" / "backbone"
    return corpus / "reading"


def test_the_backbone_learns_to_read_with_the_projector(ears_run: Path, reading_run: Path, backbone: Backbone) -> None:
    records = read_log(reading_run)
    assert [record["step"] for record in records] == [1, 2, 3]
    assert all(record[name] > 0 for record in records for name in ("diffusion", "autoregressive", "ctc"))
    taught = dict(load_backbone(BackboneConfig(str(reading_run / "backbone"))).named_parameters())
    changed = {name for name, p in backbone.named_parameters() if not torch.equal(p, taught[name])}
    assert any("experts" in name for name in changed) and not any("vision" in name for name in changed)
    old, new = (read_adapter(folder) for folder in (ears_run / "checkpoint", reading_run / "projector"))
    assert new.keys() == {name for name in old if name.startswith("projector.")}
    assert not torch.equal(old["projector.conv1.weight"], new["projector.conv1.weight"])


def test_the_ladder_ends_in_a_bundle_that_needs_nothing_else(
    corpus: Path, text_run: Path, ears_run: Path, reading_run: Path
) -> None:
    parts = {"backbone": {"name": str(reading_run / "backbone")}, "encoder": {"name": str(ears_run / "encoder")}}
    recipe = speech_recipe(corpus, text_run, "mini.yaml", parts, start_from=str(reading_run / "projector"))
    checkpoint = train_from_recipe(recipe, corpus / "adapter", "cpu")
    content = yaml.safe_load((RECIPES / "mini/5-bundle.yaml").read_text(encoding="utf-8"))
    (corpus / "bundle.yaml").write_text(yaml.safe_dump(content | {"checkpoint": "adapter/checkpoint"}), encoding="utf-8")
    moved = train_from_recipe(corpus / "bundle.yaml", corpus / "bundle", "cpu").rename(corpus / "moved")
    config = json.loads((moved / "config.json").read_text(encoding="utf-8"))
    assert (config["encoder"]["name"], config["backbone"]["name"], config["start"]) == ("encoder", "backbone", "draft")
    assert "Real speech" in (moved / "README.md").read_text(encoding="utf-8")
    before, after = (diffusion_gemma_asr.load(folder, device="cpu").model for folder in (checkpoint, moved))
    sizes = [p.shape for model in (before, after) for p in model.parameters()]
    assert sizes[: len(sizes) // 2] == sizes[len(sizes) // 2 :]
    encoded = [model.encode([tone(440, 1.0)]).slots for model in (before, after)]
    torch.testing.assert_close(*encoded, atol=0.05, rtol=0.05)  # 8 bits a weight


def test_a_bundle_copies_the_encoder_or_leaves_it_to_a_hub(corpus: Path, text_run: Path, whisper_folder: Path) -> None:
    model = {"encoder": {"name": str(whisper_folder)}}
    recipe = speech_recipe(corpus, text_run, "mini.yaml", model, steps=1, monitor_samples=0, start_from=None)
    checkpoint = train_from_recipe(recipe, corpus / "short", "cpu")
    content = {"stage": "bundle", "name": "b", "checkpoint": str(checkpoint)}
    content["card"] = {"training_data": "Tones.", "limits": "None."}
    for name, encoder in (("own", None), ("hub", "someone/whisper")):
        (corpus / "b.yaml").write_text(yaml.safe_dump(content | {"encoder": encoder}), encoding="utf-8")
        folder = train_from_recipe(corpus / "b.yaml", corpus / name, "cpu")
        assert (folder / "encoder").is_dir() == (encoder is None) and (folder / "backbone").is_dir()
        assert json.loads((folder / "config.json").read_text())["encoder"]["name"] == (encoder or "encoder")
        given = whisper_folder if encoder else None
        loaded = diffusion_gemma_asr.load(folder, encoder=given, device="cpu", dtype="float32").model
        assert loaded.projector.conv1.weight.dtype == torch.float32 and loaded.config.name == "mini"
