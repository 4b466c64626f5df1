"""Recipe files: where they lie, what their YAML holds, and which names in them are folders."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import yaml

from .errors import RecipeError

PACKAGE_FOLDER = Path(__file__).resolve().parent
# The package carries the recipes inside itself: a copy in a wheel, a symbolic link to the repository's
# `recipes/` in a checkout. Where a checkout has no symbolic links, the second folder finds them.
RECIPE_FOLDERS = (PACKAGE_FOLDER / "recipes", PACKAGE_FOLDER.parents[1] / "recipes")


def find_recipe(path_or_name: str | Path) -> Path:
    """The file of a recipe: a path as given, a bare name from the recipes that ship with the package.

    Raises:
        RecipeError: neither exists; the message lists the known names.
    """
    text = str(path_or_name)
    path = Path(text).expanduser()
    if path.suffix in (".yaml", ".yml") or len(path.parts) != 1:
        if not path.is_file():
            raise RecipeError(f"{path}: no such recipe file. {_known()}")
        return path.resolve()
    for folder in RECIPE_FOLDERS:
        if (shipped := folder / f"{text}.yaml").is_file():
            return shipped
    raise RecipeError(f"no recipe is called '{text}'{suggest(text, recipe_names())}. {_known()}")


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package, sorted."""
    return sorted({path.stem for folder in RECIPE_FOLDERS for path in folder.glob("*.yaml")})


def resolve_source(name: str, base: Path) -> str:
    """Tell folders from hub names: the absolute path of a folder, or the hub name unchanged.

    A name that begins with "." or "~", or is absolute, is a path. So is the name of a folder that exists in
    `base`. Everything else ("openai/whisper-small") is a hub repository.

    Args:
        name: as written in a recipe or a checkpoint's config.json.
        base: folder of the file it is written in; relative paths start there.
    """
    path = Path(name).expanduser()
    if name.startswith((".", "~")) or path.is_absolute() or (base / path).is_dir():
        return str((base / path).resolve())
    return name


class _Loader(yaml.SafeLoader):
    """YAML as 1.2 reads it where 1.1 surprises: `1e-4` is a number, `no` is text; and keys are unique."""

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


def read_yaml(path: Path) -> Any:
    """What a YAML file holds, keys unique.

    Raises:
        RecipeError: it cannot be read, or is not YAML.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from None


def suggest(word: str, known: list[str]) -> str:
    """A question that names the known word most like this one; empty where none is like it."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def _known() -> str:
    return f"Give the path of a .yaml file or one of: {', '.join(recipe_names())}"
