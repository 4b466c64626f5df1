"""Settings in files: mappings, as YAML or JSON gives them, become frozen dataclasses, strictly.

Every key is known, every required key is there, every value has its field's type and a possible value, or one line says what
is wrong. Used for config.json of a model, and for recipes.
"""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Callable
from dataclasses import MISSING, field, fields, is_dataclass
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .errors import AsrError, RecipeError

_T = TypeVar("_T")


def from_mapping(cls: type[_T], content: dict[Any, Any]) -> _T:
    """A dataclass of this module's kind from nested mappings, as YAML or JSON gives them.

    Raises:
        RecipeError: a key is unknown, missing, or has an impossible value. The caller adds the file's name.
    """
    return _build(cls, content, "")


def _build(cls: type[_T], content: Any, where: str) -> _T:
    """A dataclass from a mapping, strictly: every key known, every required key there, every type right."""
    if not isinstance(content, dict):
        raise RecipeError(f"'{where}' must be a section of key: value lines, found {_kind(content)}")
    known = {item.name: item for item in fields(cls)}  # type: ignore[arg-type]
    for key in content:
        if key not in known:
            place = f"in section '{where}'" if where else "at the top level"
            hint = suggest(str(key), list(known)) or f"; known here: {', '.join(known)}"
            raise RecipeError(f"unknown key '{key}' {place}{hint}")
    hints = get_type_hints(cls)
    values = {}
    for key, item in known.items():
        name = f"{where}.{key}" if where else key
        if key in content:
            values[key] = _convert(hints[key], content[key], name)
        elif item.default is MISSING and item.default_factory is MISSING:
            raise RecipeError(f"'{name}' is missing; add it")
    return cls(**values)


def _convert(kind: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type `kind`, or an error that names key, value and what is expected."""
    origin, arguments = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return _build(kind, value, where)  # type: ignore[arg-type]
    if origin in (Union, types.UnionType):  # only `X | None` occurs
        inner = next(argument for argument in arguments if argument is not type(None))
        return None if value is None else _convert(inner, value, where)
    if origin is Literal:
        if value not in arguments:
            raise RecipeError(f"'{where}' must be one of {', '.join(map(str, arguments))}, found {_kind(value)}")
        return value
    if kind is Path:
        return Path(_convert(str, value, where))
    if origin is dict:
        if not isinstance(value, dict):
            raise RecipeError(f"'{where}' must be a section of key: value lines, found {_kind(value)}")
        inner = arguments[1]
        return {str(key): item if inner is Any else _convert(inner, item, f"{where}.{key}") for key, item in value.items()}
    if origin is tuple:
        return _convert_tuple(arguments, value, where)
    expected = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[kind]
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise RecipeError(f"'{where}' must be {expected}, found {_kind(value)}")
    return value


def _convert_tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    """A YAML list as tuple[X, ...] or tuple[X, Y]."""
    if not isinstance(value, list):
        raise RecipeError(f"'{where}' must be a list, found {_kind(value)}")
    if arguments[-1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    if len(value) != len(arguments):
        raise RecipeError(f"'{where}' must be a list of {len(arguments)}, found {_kind(value)}")
    return tuple(
        _convert(kind, item, f"{where}[{index}]") for index, (kind, item) in enumerate(zip(arguments, value, strict=True))
    )


def require(holds: bool, key: str, value: Any, must_be: str) -> None:
    if not holds:
        raise RecipeError(f"'{key}' must be {must_be}, found {value}")


def _kind(value: Any) -> str:
    """A value for an error message, with its kind where that is not obvious."""
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return f"the text '{value}'"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, list):
        return f"the list {value}"
    return str(value)


def suggest(word: str, known: list[str]) -> str:
    """A question that names the known word most like this one; empty where none is like it."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def is_path(name: str, base: Path | None = None) -> bool:
    """Whether a name is a path, and no hub repository ("openai/whisper-small").

    Names that begin with "." or "~" are paths, and absolute ones, and those of folders that exist.

    Args:
        name: as somebody wrote it.
        base: where relative paths start; None is the working directory.
    """
    path = Path(name).expanduser()
    return name.startswith((".", "~")) or path.is_absolute() or ((base or Path()) / path).is_dir()


def resolve_source(name: str, base: Path) -> str:
    """The absolute path of a folder, or a hub name unchanged; see `is_path`.

    Args:
        name: as written in a recipe or a checkpoint's config.json.
        base: folder of the file it is written in; relative paths start there.
    """
    return str((base / Path(name).expanduser()).resolve()) if is_path(name, base) else name


def option(default: Any, help: str, **shown: Any) -> Any:
    """A dataclass field that is an option of the command line as well.

    Args:
        default: its value where none is given.
        help: one sentence for people.
        **shown: how the command line shows it: names, metavar, show_default.
    """
    return field(default=default, metadata={"help": help} | shown)


def from_options(cls: type[_T], given: dict[str, Any]) -> _T:
    """An options dataclass from flat names: those of its fields, and of the fields of options dataclasses inside it.

    Raises:
        AsrError: a name is none of these; or as the dataclasses themselves.
    """
    hints = get_type_hints(cls)
    nested = {item.name: hints[item.name] for item in fields(cls) if is_dataclass(hints[item.name])}  # type: ignore[arg-type]
    own = {item.name for item in fields(cls)}  # type: ignore[arg-type]
    inner = {name: part for part, kind in nested.items() for name in option_names(kind)}
    values = {name: value for name, value in given.items() if name in own}
    parts: dict[str, dict[str, Any]] = {}
    for name, value in given.items():
        if name in own:
            continue
        if name not in inner:
            known = sorted({*own, *inner} - nested.keys())
            hint = suggest(name, known) or f"; known are {', '.join(known)}"
            raise AsrError(f"{name} is no option here{hint}")
        parts.setdefault(inner[name], {})[name] = value
    values |= {part: from_options(nested[part], of_part) for part, of_part in parts.items()}
    return cls(**values)


def check_types(options: Any) -> None:
    """Raises AsrError where a field of an options dataclass holds a value of another type than it says.

    Whole floats are taken for whole numbers where the field wants these; lists for tuples.
    """
    hints = get_type_hints(type(options))
    for item in fields(options):
        kind, value = hints[item.name], getattr(options, item.name)
        if is_dataclass(kind):
            if not isinstance(value, kind):  # type: ignore[arg-type]
                raise AsrError(f"{item.name} is {value!r}; give {kind.__name__}(...)")  # type: ignore[union-attr]
            continue
        if isinstance(value, float) and not math.isfinite(value):
            raise AsrError(f"{item.name} is {value}; give a finite number")
        if kind in (int, int | None) and isinstance(value, float) and value.is_integer():
            value = int(value)
        plain = list(value) if isinstance(value, tuple) else value
        try:
            object.__setattr__(options, item.name, _convert(kind, plain, item.name))
        except RecipeError as error:
            raise AsrError(str(error)) from None


def option_names(cls: Any) -> list[str]:
    """The flat names that `from_options` takes."""
    hints = get_type_hints(cls)
    names: list[str] = []
    for item in fields(cls):
        names += option_names(hints[item.name]) if is_dataclass(hints[item.name]) else [item.name]
    return names


def check_keywords(function: Callable[..., Any], given: dict[str, Any]) -> None:
    """Raises AsrError, with the nearest name, where a function has no keyword of a name that is given."""
    known = [name for name, parameter in signature(function).parameters.items() if parameter.kind == Parameter.KEYWORD_ONLY]
    for name in given:
        if name not in known:
            raise AsrError(f"{name} is no option here{suggest(name, known) or '; known are ' + ', '.join(known)}")
