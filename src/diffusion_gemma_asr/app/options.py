"""Options of the command line, made from dataclasses: an option is declared once, as a field with `strict.option`.

Names are those of openai/whisper and whisperX, with underscores; cli.py lets dashes stand for them.
"""

from __future__ import annotations

import functools
import re
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from inspect import Parameter, Signature, signature
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand

from ..errors import AsrError
from ..strict import from_options

ADDRESS = re.compile(r"auto|local|ray://\S+|[\w.-]+:\d+")  # of a cluster; a file has no port


def with_options(function: Callable[..., None]) -> Callable[..., None]:
    """A command's function, as typer wants it, from one that takes dataclasses of options.

    A parameter whose type is a dataclass becomes an option for each of its fields, and of those of dataclasses inside it;
    not for hidden ones. What the dataclasses refuse is a usage error.

    Args:
        function: its other parameters are as typer has them.
    """
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
    members = {name: dict(_options(kind)) for name, kind in groups.items()}
    parameters: list[Parameter] = []
    for name, parameter in signature(function).parameters.items():
        if name in groups:
            parameters += [_parameter(item, kind) for item, kind in members[name].values()]
        else:
            parameters.append(parameter.replace(annotation=hints[name], kind=Parameter.KEYWORD_ONLY))

    @functools.wraps(function)
    def command(**values: Any) -> None:
        for name, group in groups.items():
            given = {key: _value(key, values.pop(key), kind) for key, (_, kind) in members[name].items()}
            try:
                values[name] = from_options(group, given)
            except AsrError as error:
                raise typer.BadParameter(str(error)) from None
        function(**values)

    command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _options(group: Any) -> Iterator[tuple[str, tuple[Field[Any], Any]]]:
    """The fields that are options, by name, each with its type; of two of a name the outer one."""
    hints = get_type_hints(group)
    own = {item.name for item in fields(group)}
    for item in fields(group):
        if is_dataclass(hints[item.name]):
            yield from ((name, found) for name, found in _options(hints[item.name]) if name not in own)
        elif not item.metadata.get("hidden"):
            yield item.name, (item, hints[item.name])


def _parameter(item: Field[Any], kind: Any) -> Parameter:
    """A field as a parameter of a typer command."""
    shown = dict(item.metadata)
    names, default = [f"--{item.name}", *shown.pop("names", ())], item.default
    annotation = _without_none(kind)
    if annotation is bool and default:
        names[0] += f"/--no_{item.name}"
    if get_origin(annotation) is tuple:
        annotation = str
        default = default if default in (None, MISSING) else ",".join(map(str, default))
    shown.setdefault("show_default", default not in (None, "", MISSING))
    given = Parameter.empty if default is MISSING else default
    return Parameter(
        item.name, Parameter.KEYWORD_ONLY, default=given, annotation=Annotated[annotation, typer.Option(*names, **shown)]
    )


def _without_none(kind: Any) -> Any:
    """X of `X | None`."""
    if get_origin(kind) not in (Union, types.UnionType):
        return kind
    (inner,) = (argument for argument in get_args(kind) if argument is not type(None))
    return inner


def _value(name: str, value: Any, kind: Any) -> Any:
    """What typer gives for an option as its field has it: a list in one text is a tuple."""
    kind = _without_none(kind)
    if get_origin(kind) is not tuple or value is None:
        return value
    try:
        return tuple(get_args(kind)[0](part) for part in value.split(",") if part.strip())
    except ValueError:
        raise typer.BadParameter(f"--{name} is {value!r}; give numbers such as 1,2,4") from None


class WhisperCommand(TyperCommand):
    """A command whose flags may be followed by True or False, as openai/whisper writes them: `--word_timestamps True`.

    The value of an option whose metavar is [ADDRESS] may be left out, which means "auto".
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See click."""
        flags: dict[str, str | None] = {}
        for option in self.params:
            if getattr(option, "is_flag", False):
                flags |= {name.lstrip("-"): next(iter(option.secondary_opts), None) for name in option.opts}
        optional = [
            name for option in self.params if getattr(option, "metavar", None) == "[ADDRESS]" for name in option.opts
        ]
        return super().parse_args(ctx, with_addresses(without_booleans(args, flags), optional))


def without_booleans(arguments: Sequence[str], flags: dict[str, str | None]) -> list[str]:
    """Arguments in which a flag stands alone: without the True behind it, and with False not at all, or as what denies it.

    Args:
        arguments: of a command.
        flags: their names, with underscores and without dashes, and for each the option that denies it.
    """
    kept: list[str] = []
    for place, argument in enumerate(arguments):
        if argument == "--":
            return kept + list(arguments[place:])
        name, _, joined = argument.partition("=")
        if joined in ("True", "False") and _flag(name) in flags:
            kept.append(name)
            argument = joined
        if argument in ("True", "False") and kept and (flag := _flag(kept[-1])) in flags:
            if argument == "False":
                kept.pop()
                kept += [denied] if (denied := flags[flag]) else []
            continue
        kept.append(argument)
    return kept


def with_addresses(arguments: Sequence[str], names: Sequence[str]) -> list[str]:
    """Arguments in which "auto" stands behind options of these names that no address follows."""
    kept: list[str] = []
    for place, argument in enumerate(arguments):
        if argument == "--":
            return kept + list(arguments[place:])
        kept.append(argument)
        if argument in names and not ADDRESS.fullmatch((*arguments[place + 1 :], "")[0]):
            kept.append("auto")
    return kept


def _flag(argument: str) -> str:
    """The name of a long option; empty where it is none."""
    return argument[2:].replace("-", "_") if argument.startswith("--") else ""
