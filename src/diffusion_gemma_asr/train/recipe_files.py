"""Finds recipe files, parses their YAML into dataclasses, and resolves the paths in them."""

from __future__ import annotations

import re
from dataclasses import Field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ..data.hub import CORPORA
from ..errors import RecipeError
from ..model.config import BackboneConfig, EncoderConfig
from ..strict import from_mapping, resolve_source, suggest

_T = TypeVar("_T")

SOURCE = {"source": True}
PART = {"part": True}  # of a field that names a part of a model: a hub repository, or a folder
"""Metadata of a recipe's field whose value is a file, a folder, or the name of a corpus (data/sources.py)."""

PACKAGE_FOLDER = Path(__file__).resolve().parents[1]
# In a wheel the package contains a copy of the recipes, in a checkout a symbolic link to the repository's `recipes/`; the
# second folder is for checkouts without symbolic links.
RECIPE_FOLDERS = (PACKAGE_FOLDER / "recipes", PACKAGE_FOLDER.parents[1] / "recipes")


def find_recipe(path_or_name: str | Path) -> Path:
    """Finds the file of a recipe.

    Args:
        path_or_name: path of a YAML file, or the name of a recipe that ships with the package.

    Returns:
        its absolute path.

    Raises:
        RecipeError: there is no such file or name; the message lists the known names.
    """
    text = str(path_or_name)
    path = Path(text).expanduser()
    if path.suffix in (".yaml", ".yml") or len(path.parts) != 1:
        if not path.is_file():
            raise RecipeError(f"{path}: no such recipe file. {_known()}")
        return path.resolve()
    for folder in RECIPE_FOLDERS:
        if (shipped := folder / f"{text}.yaml").is_file():
            return shipped.resolve()
    raise RecipeError(f"no recipe is called '{text}'{suggest(text, recipe_names()) or '.'} {_known()}")


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package, sorted."""
    return sorted({path.stem for folder in RECIPE_FOLDERS for path in folder.glob("*.yaml")})


def load_recipe_as(cls: type[_T], path_or_name: str | Path) -> _T:
    """Reads a recipe of any stage.

    Args:
        cls: frozen dataclass of the stage.
        path_or_name: see `find_recipe`.

    Returns:
        the recipe with absolute paths; relative ones start from the recipe's folder.

    Raises:
        RecipeError: there is no such file, it is not YAML, or a key is unknown, missing, or has an impossible value.
    """
    path = find_recipe(path_or_name)
    content = read_mapping(path)
    try:
        if {"encoder", "backbone"} <= content.keys() and "model" not in content:
            raise RecipeError(
                "name, encoder, backbone, projector and lora stand in a section 'model' since version 0.2.0, with the "
                "languages, and all paths start from the recipe's folder; recipes/small.yaml shows every key"
            )
        return placed(from_mapping(cls, content), path.parent)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None


def placed(value: Any, base: Path, item: Field[Any] | None = None) -> Any:
    """Makes all paths of a recipe absolute.

    Args:
        value: a recipe, or a part of one.
        base: folder from which relative paths start.
        item: the dataclass field of the value; with the metadata SOURCE, names of corpora are not changed, with PART those
            of hub repositories.

    Returns:
        the value, or a copy with absolute paths.
    """
    if isinstance(value, Path):
        path = (base / value.expanduser()).resolve()
        is_corpus = re.split("[:/]", str(value))[0] in CORPORA and not path.exists()
        return value if item is not None and item.metadata == SOURCE and is_corpus else path
    if isinstance(value, str) and item is not None and item.metadata == PART:
        return resolve_source(value, base)
    if isinstance(value, (EncoderConfig, BackboneConfig)):
        return replace(value, name=resolve_source(value.name, base))
    if isinstance(value, tuple):
        return tuple(placed(part, base, item) for part in value)
    if isinstance(value, dict):
        return {key: placed(part, base, item) for key, part in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        changed = {part.name: placed(getattr(value, part.name), base, part) for part in fields(value)}
        return replace(value, **changed)
    return value


class _Loader(yaml.SafeLoader):
    """Reads numbers and booleans by YAML 1.2 (`1e-4` is a number, `no` is text), and rejects duplicate keys."""

    yaml_implicit_resolvers = {  # noqa: RUF012  (PyYAML's own attribute)
        letter: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float"))]
        for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                problem = f"'{key.value}' is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|false)$"), list("tf"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)


def read_mapping(path: Path) -> dict[Any, Any]:
    """Reads a YAML file whose top level is a mapping.

    Raises:
        RecipeError: the file cannot be read, is not YAML, has duplicate keys, or its top level is not a mapping.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: expected sections (model:, train:, ...), found {type(content).__name__}")
    return content


def _known() -> str:
    """The end of an error message: the known recipes."""
    return f"Give the path of a .yaml file or one of: {', '.join(recipe_names())}"
