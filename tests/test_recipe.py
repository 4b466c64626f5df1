"""Recipes: what is read, what is refused, and whether the message says what to do."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml

from diffusion_gemma_asr.errors import RecipeError
from diffusion_gemma_asr.strict import resolve_source
from diffusion_gemma_asr.train.recipe import Recipe, load_recipe
from diffusion_gemma_asr.train.recipe_files import RECIPE_FOLDERS, find_recipe, load_recipe_as, read_mapping, recipe_names
from diffusion_gemma_asr.train.run import STAGES, train_from_recipe

RECIPES = Path(__file__).parents[1] / "recipes"
MINIMAL = """
model:
  name: test
  encoder: {name: openai/whisper-small}
  backbone: {name: google/diffusiongemma-26B-A4B-it}
train: {steps: 10, batch_size: 2}
data:
  train: [{manifest: train.jsonl}]
  dev: [dev.jsonl]
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_minimal_recipe_takes_the_published_defaults(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL))
    assert (recipe.train.lr, recipe.train.betas, recipe.train.clip) == (1.5e-4, (0.95, 0.99), 1.0)
    assert (recipe.model.lora.rank, recipe.model.lora.alpha) == (16, 32)
    assert (recipe.losses.diffusion, recipe.losses.autoregressive, recipe.losses.ctc) == (1, 1, 1)
    assert recipe.model.projector.hidden_size == 1280 and recipe.model.projector.scaled
    assert recipe.data.train[0].weight == 1.0 and recipe.model.languages == ("en",)
    assert recipe.stage == "adapter" and recipe.name == "test"


@pytest.mark.parametrize("name", ["small", "large-v3", "mini"])
def test_shipped_recipes_load_by_name_and_by_path(name: str) -> None:
    by_name = load_recipe(name)
    assert by_name.name == name
    assert by_name == load_recipe(RECIPES / f"{name}.yaml")
    assert name in recipe_names()


def test_package_holds_every_recipe_of_the_repository() -> None:
    """A wheel takes its recipes from the package's folder; it must be the repository's, not a stale copy."""
    inside, outside = RECIPE_FOLDERS
    names = {path.name for path in outside.glob("*.yaml")}
    assert names == {path.name for path in inside.glob("*.yaml")} != set()
    assert all(path.samefile(outside / path.name) for path in inside.glob("*.yaml"))


def test_small_recipe_shows_every_key() -> None:
    """The messages send the reader to small.yaml, so nothing may be missing from it."""
    content = yaml.safe_load((RECIPES / "small.yaml").read_text())

    def keys(kind: Any) -> set[str]:
        if not dataclasses.is_dataclass(kind):
            return set().union(*(keys(inner) for inner in get_args(kind)), set())
        hints = get_type_hints(kind)
        names = {item.name for item in dataclasses.fields(kind)}
        return names.union(*(keys(hints[name]) for name in names))

    def written(node: Any) -> set[str]:
        if isinstance(node, dict):
            return set(node).union(*(written(value) for value in node.values()))
        return set().union(*(written(value) for value in node)) if isinstance(node, list) else set()

    assert written(content) == keys(Recipe)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("steps: 10", "step: 10", ["unknown key 'step' in section 'train'", "did you mean 'steps'"]),
        ("name: test", "name: test\n  enkoder: 1", ["unknown key 'enkoder' in section 'model'", "'encoder'"]),
        ("model:", "modell: 1\nmodel:", ["unknown key 'modell' at the top level", "'model'"]),
        ("steps: 10, ", "", ["'train.steps' is missing"]),
        ("encoder: {name: openai/whisper-small}", "", ["'model.encoder' is missing"]),
        ("steps: 10", "steps: 10.5", ["'train.steps' must be a whole number, found 10.5"]),
        ("steps: 10", "steps: true", ["'train.steps' must be a whole number, found true"]),
        ("steps: 10", "steps: many", ["'train.steps' must be a whole number, found the text 'many'"]),
        ("steps: 10", "steps:", ["'train.steps' must be a whole number, found nothing"]),
        ("steps: 10", "steps: 0", ["'train.steps' must be at least 1, found 0"]),
        ("steps: 10", "steps: 10, lr: -1", ["'train.lr' must be above 0, found -1.0"]),
        ("steps: 10", "steps: 10, lr: .inf", ["'train.lr' must be a number"]),
        ("steps: 10", "steps: 10, betas: [0.9]", ["'train.betas' must be a list of 2, found the list [0.9]"]),
        ("steps: 10", "steps: 10, betas: 0.9", ["'train.betas' must be a list, found 0.9"]),
        ("steps: 10", "steps: 10, betas: [0.9, x]", ["'train.betas[1]' must be a number"]),
        ("steps: 10", "steps: 10, dtype: float16", ["'train.dtype' must be one of auto, float32, bfloat16"]),
        ("steps: 10", "steps: 10, warmup_steps: 11", ["'train.warmup_steps' must be at most train.steps"]),
        ("steps: 10", "steps: 10, spec_augment: {time_bands: -1}", ["'train.spec_augment.time_bands' must"]),
        ("steps: 10", "steps: 10, spec_augment: 3", ["'train.spec_augment' must be a section"]),
        ("steps: 10", "steps: 10, others: [0.5, 0.2]", ["'train.others' must be two shares"]),
        ("steps: 10", "steps: 10, warp: [0.9, 1.1]", ["in the stage 'ears' alone"]),
        ("[{manifest: train.jsonl}]", "[]", ["'data.train' must be a list of at least one"]),
        ("[{manifest: train.jsonl}]", "[train.jsonl]", ["'data.train[0]' must be a section"]),
        ("[dev.jsonl]", "dev.jsonl", ["'data.dev' must be a list, found the text 'dev.jsonl'"]),
        ("name: test", "name: test\n  lora: {dropout: 1}", ["'lora.dropout' must be at least 0 and below 1"]),
        ("model:", "losses: {diffusion: 0, autoregressive: 0, ctc: 0}\nmodel:", ["'losses' must be"]),
        ("steps: 10", "steps: 10, optimizer: adam", ["'train.optimizer' must be one of adamw, muon"]),
        ("name: test", "name: test\n  name: again", ["'name' is given twice"]),
        ("name: test", "name: [", ["not YAML", "line"]),
    ],
)
def test_mistakes_are_named_with_key_file_and_remedy(tmp_path: Path, old: str, new: str, expected: list[str]) -> None:
    assert old in MINIMAL
    path = write(tmp_path, MINIMAL.replace(old, new))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    for part in [str(path), *expected]:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="expected sections"):
        load_recipe(write(tmp_path, "- a\n- b\n"))
    with pytest.raises(RecipeError, match="cannot be read"):
        (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
        load_recipe(tmp_path / "binary.yaml")


def test_numbers_and_languages_are_read_as_yaml_1_2_has_them(tmp_path: Path) -> None:
    text = MINIMAL.replace("steps: 10", "steps: 10, lr: 1e-4, weight_decay: 1").replace(
        "name: test", "name: test\n  languages: [no, en]"
    )
    recipe = load_recipe(write(tmp_path, text))
    assert recipe.train.lr == 1e-4
    assert recipe.train.weight_decay == 1.0
    assert recipe.model.languages == ("no", "en")  # Norwegian, which YAML 1.1 takes for false


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    with pytest.raises(RecipeError, match=r"no recipe is called 'smal'; did you mean 'small'\?.*large-v3, "):
        load_recipe("smal")
    with pytest.raises(RecipeError, match=r"elsewhere/small\.yaml: no such recipe file"):
        load_recipe("elsewhere/small.yaml")


def test_sources_are_hub_names_or_folders(tmp_path: Path) -> None:
    (tmp_path / "encoder").mkdir()
    assert resolve_source("openai/whisper-small", tmp_path) == "openai/whisper-small"
    assert resolve_source("encoder", tmp_path) == str(tmp_path / "encoder")
    assert resolve_source("./later", tmp_path) == str(tmp_path / "later")
    assert resolve_source("../sibling", tmp_path) == str(tmp_path.parent / "sibling")
    assert resolve_source(str(tmp_path), Path("/")) == str(tmp_path)
    assert resolve_source("~/models", tmp_path) == str(Path("~/models").expanduser())


def test_relative_sources_start_from_the_recipe(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL.replace("openai/whisper-small", "./mine"))
    recipe = load_recipe(path)
    assert recipe.model.encoder.name == str(tmp_path / "mine")
    assert recipe.model.backbone.name == "google/diffusiongemma-26B-A4B-it"


def test_recipes_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_recipe("small").stage = "reading"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("model", "train", "losses", "expected"),
    [
        ("", "unnamed: 0.3", "", "'train.unnamed' is 0.3, but 'model.finds_language' is not set"),
        ("finds_language: true", "", "", "'model.finds_language' is set, but 'train.unnamed' is 0"),
        ("", "context: 0.1", "", "'train.context' is 0.1, but 'model.reads_context' is not set"),
        ("reads_context: true", "", "", "'model.reads_context' is set, but 'train.context' is 0"),
        ("", "", "draft_share: 0.5", "'losses.draft_share' is 0.5, but 'model.start: draft' is not set"),
        ("start: draft", "", "", "'model.start: draft' is set, but 'losses.draft_share' is 0"),
        ("", "", "ctc: 0", "'model.ctc' is set, but 'losses.ctc' is 0"),
        ("ctc: false", "", "", "'losses.ctc' is 1.0, but 'model.ctc' is not set"),
        ("dtype: bfloat16", "", "", "'model.dtype' must be left out of a recipe, which has train.dtype"),
    ],
)
def test_sections_that_contradict_each_other_are_named(
    tmp_path: Path, model: str, train: str, losses: str, expected: str
) -> None:
    content = yaml.safe_load(MINIMAL)
    content["model"] |= yaml.safe_load(model or "{}")
    content["train"] |= yaml.safe_load(train or "{}")
    content["losses"] = yaml.safe_load(losses or "{}")
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, yaml.safe_dump(content)))
    assert expected in str(caught.value) and str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_all_paths_start_from_the_recipe_and_names_of_corpora_stay_names(tmp_path: Path) -> None:
    (tmp_path / "fleurs").mkdir()  # what exists is no corpus
    content = yaml.safe_load(MINIMAL)
    content["train"]["start_from"] = "../before/checkpoint"
    lists = ["train.jsonl", "/elsewhere/train.jsonl", "librispeech:clean/train.100", "fleurs", "fleurs:de"]
    content["data"] |= {"train": [{"manifest": name} for name in lists], "cache_dir": "frames"}
    content["data"]["dev"] = ["voxpopuli:fr", "dev.jsonl"]
    recipe = load_recipe(write(tmp_path, yaml.safe_dump(content)))
    assert recipe.train.start_from == tmp_path.parent / "before" / "checkpoint"
    assert recipe.data.cache_dir == tmp_path / "frames"
    expected = [
        tmp_path / "train.jsonl",
        Path("/elsewhere/train.jsonl"),
        Path(lists[2]),
        tmp_path / "fleurs",
        Path("fleurs:de"),
    ]
    assert [item.manifest for item in recipe.data.train] == expected
    assert recipe.data.dev == (Path("voxpopuli:fr"), tmp_path / "dev.jsonl")


def test_a_recipe_of_the_first_version_says_what_to_change(tmp_path: Path) -> None:
    old = yaml.safe_load(MINIMAL)
    old |= old.pop("model")
    with pytest.raises(RecipeError, match=r"stand in a section 'model' since version 0\.2\.0"):
        load_recipe(write(tmp_path, yaml.safe_dump(old)))


def test_a_stage_that_does_not_exist_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "stage: adaptor\n" + MINIMAL)
    with pytest.raises(RecipeError, match="no stage is called 'adaptor'; did you mean 'adapter'"):
        train_from_recipe(path, tmp_path / "run", "cpu")
    assert not (tmp_path / "run").exists()


# -- the repository's recipes ----------------------------------------------------------------------------------


def every_recipe() -> dict[str, Any]:
    """By path from recipes/, without ending."""
    recipes = {}
    for path in sorted(RECIPES.rglob("*.yaml")):
        kind, _ = STAGES[read_mapping(path).get("stage", "adapter")]
        recipes[path.relative_to(RECIPES).with_suffix("").as_posix()] = load_recipe_as(kind, path)
    return recipes


def test_every_recipe_of_the_repository_can_be_read() -> None:
    recipes = every_recipe()
    assert {"small", "large-v3", "mini", "mini/1-backbone"} <= recipes.keys()
    assert {type(recipe) for recipe in recipes.values()} == {kind for kind, _ in STAGES.values()}
    assert all(find_recipe(name).is_relative_to(RECIPES) for name in recipe_names())


def test_each_stage_of_the_small_model_goes_on_from_the_one_before() -> None:
    recipes, runs = every_recipe(), RECIPES.parent / "runs"
    mini, reading = recipes["mini"], recipes["mini/3-reading"]
    projector, ears, bundle = recipes["mini/2-projector"], recipes["mini/4-ears"], recipes["mini/5-bundle"]
    assert reading.model.encoder == projector.model.encoder == ears.model.encoder
    assert reading.data.cache_dir == projector.data.cache_dir
    assert len({reading.data.cache_dir, mini.data.cache_dir, ears.data.cache_dir}) == 3  # an encoder, another, and none
    decoder, backbone = recipes["mini/0-decoder"], recipes["mini/1-backbone"]
    assert backbone.decoder == str(runs / decoder.name / "whisper")
    assert Path(reading.model.backbone.name) == runs / backbone.name / "backbone"
    assert reading.train.start_from == runs / projector.name / "checkpoint"
    assert reading.drafts_from == tuple(runs / projector.name / f"checkpoint-{step}" for step in projector.train.keep)
    assert projector.train.keep
    assert Path(ears.model.backbone.name) == Path(mini.model.backbone.name) == runs / reading.name / "backbone"
    assert ears.train.start_from == runs / reading.name / "projector"
    assert mini.train.start_from == runs / ears.name / "checkpoint"
    assert Path(mini.model.encoder.name) == runs / ears.name / "encoder"
    assert bundle.checkpoint == runs / mini.name / "checkpoint"
    assert reading.model.projector == mini.model.projector
    for name in ("canvas", "draft_conditioning", "canvas_share", "causal_share", "silent_drafts", "start"):
        assert getattr(reading.model, name) == getattr(mini.model, name)
    for recipe in (projector, ears):
        assert dataclasses.replace(mini.model.projector, skip_blanks=None) == recipe.model.projector


def test_no_list_is_both_trained_on_and_judged_by() -> None:
    for name, recipe in every_recipe().items():
        if isinstance(recipe, Recipe):
            assert not {item.manifest for item in recipe.data.train} & set(recipe.data.dev), name
    backbone = every_recipe()["mini/1-backbone"]
    assert set(backbone.data.dev.values()) <= set(backbone.data.exclude)


def test_the_script_that_makes_the_small_models_names_recipes_that_exist() -> None:
    script = (RECIPES.parent / "runs" / "mini.sh").read_text(encoding="utf-8")
    named = {word for word in script.split() if word.startswith("recipes/") and word.endswith(".yaml")}
    assert len(named) == 8 and all((RECIPES.parent / word).is_file() for word in named)


def test_a_stage_reads_numbers_as_yaml_1_2_has_them(tmp_path: Path) -> None:
    text = (RECIPES / "mini" / "1-backbone.yaml").read_text(encoding="utf-8")
    assert "lr: 3.0e-4" in text
    kind, _ = STAGES["backbone"]
    assert load_recipe_as(kind, write(tmp_path, text.replace("lr: 3.0e-4", "lr: 3e-3"))).train.lr == 0.003
