"""Recipes: what is read, what is refused, and whether the message says what to do."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml

from diffusion_gemma_asr.errors import RecipeError
from diffusion_gemma_asr.recipe import Recipe, load_recipe
from diffusion_gemma_asr.recipe_files import RECIPE_FOLDERS, recipe_names, resolve_source

MINIMAL = """
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
    assert (recipe.lora.rank, recipe.lora.alpha) == (16, 32)
    assert (recipe.losses.diffusion, recipe.losses.autoregressive, recipe.losses.ctc) == (1, 1, 1)
    assert recipe.projector.hidden_size == 1280 and recipe.projector.scaled
    assert recipe.data.train[0].weight == 1.0 and recipe.data.languages == ("en",)


@pytest.mark.parametrize("name", ["small", "large-v3"])
def test_shipped_recipes_load_by_name_and_by_path(name: str) -> None:
    by_name = load_recipe(name)
    assert by_name.name == name
    assert by_name == load_recipe(Path(__file__).parents[1] / "recipes" / f"{name}.yaml")
    assert name in recipe_names()


def test_package_holds_every_recipe_of_the_repository() -> None:
    """A wheel takes its recipes from the package's folder; it must be the repository's, not a stale copy."""
    inside, outside = RECIPE_FOLDERS
    names = {path.name for path in outside.glob("*.yaml")}
    assert names == {path.name for path in inside.glob("*.yaml")} != set()
    assert all(path.samefile(outside / path.name) for path in inside.glob("*.yaml"))


def test_small_recipe_shows_every_key() -> None:
    """The messages send the reader to small.yaml, so nothing may be missing from it."""
    content = yaml.safe_load((Path(__file__).parents[1] / "recipes" / "small.yaml").read_text())

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
        ("name: test", "name: test\nenkoder: 1", ["unknown key 'enkoder' at the top level", "'encoder'"]),
        ("steps: 10, ", "", ["'train.steps' is missing", "small.yaml"]),
        ("encoder: {name: openai/whisper-small}", "", ["'encoder' is missing"]),
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
        ("[{manifest: train.jsonl}]", "[]", ["'data.train' must be a list of at least one"]),
        ("[{manifest: train.jsonl}]", "[train.jsonl]", ["'data.train[0]' must be a section"]),
        ("[dev.jsonl]", "dev.jsonl", ["'data.dev' must be a list, found the text 'dev.jsonl'"]),
        ("name: test", "name: test\nlora: {dropout: 1}", ["'lora.dropout' must be at least 0 and below 1"]),
        ("name: test", "name: test\nlosses: {diffusion: 0, autoregressive: 0, ctc: 0}", ["'losses' must be"]),
        ("name: test", "name: test\nname: again", ["'name' is given twice"]),
        ("name: test", "name: [", ["not YAML", "line"]),
    ],
)
def test_mistakes_are_named_with_key_file_and_remedy(
    tmp_path: Path, old: str, new: str, expected: list[str]
) -> None:
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
        "dev: [dev.jsonl]", "dev: [dev.jsonl]\n  languages: [no, en]"
    )
    recipe = load_recipe(write(tmp_path, text))
    assert recipe.train.lr == 1e-4
    assert recipe.train.weight_decay == 1.0
    assert recipe.data.languages == ("no", "en")  # Norwegian, which YAML 1.1 takes for false


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
    assert recipe.encoder.name == str(tmp_path / "mine")
    assert recipe.backbone.name == "google/diffusiongemma-26B-A4B-it"


def test_recipes_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_recipe("small").name = "other"  # type: ignore[misc]


MOVES = ["1-english-ctc", "2-english", "3-languages-ctc", "4-languages", "5-real-ctc", "../mini-whisper-base"]


def test_each_move_goes_on_from_the_one_before_and_is_judged_by_what_none_trains_on() -> None:
    """Of the model with Whisper base: projector and backbone, from stage to stage."""
    folder = Path(__file__).parents[1] / "recipes" / "mini-whisper-base"
    recipes = [load_recipe(folder / f"{name}.yaml") for name in MOVES]
    for before, after in pairwise(recipes):
        frozen = before.name.endswith("real-ctc")  # trained as an adapter, which leaves a checkpoint
        assert after.train.start_from == f"runs/{before.name}/{'checkpoint' if frozen else 'projector'}"
        left = before.backbone.name if frozen else f"runs/{before.name}/backbone"
        assert after.backbone.name.endswith(left)
        assert after.projector == before.projector
        assert set(before.data.languages) <= set(after.data.languages)
        assert {item.manifest for item in before.data.train} <= {item.manifest for item in after.data.train}
    trained_on = {item.manifest for recipe in recipes for item in recipe.data.train}
    assert not trained_on & {name for recipe in recipes for name in recipe.data.dev}
    assert [recipe.model.finds_language for recipe in recipes] == [False, False, False, True, False, True]
