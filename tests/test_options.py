"""app/options.py: options dataclasses as a command line, and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
from typer.testing import CliRunner

from diffusion_gemma_asr.app.options import WhisperCommand, with_addresses, with_options
from diffusion_gemma_asr.denoise.options import DecodeOptions
from diffusion_gemma_asr.errors import AsrError
from diffusion_gemma_asr.strict import option
from diffusion_gemma_asr.transcribe.recordings import TranscribeOptions


@dataclass(frozen=True)
class Inner:
    depth: int = option(3, "How deep.", min=0)
    shared: str = option("inner", "Stands behind the outer one.")


@dataclass(frozen=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    shared: str = option("outer", "Stands in front of the inner one.")
    times: tuple[float, ...] = option((1.0, 2.5), "Some times.", metavar="SECONDS,...")
    colour: Literal["red", "blue"] = option("red", "One of two.")
    folder: Path | None = option(None, "A folder.", names=["-o", "--directory"], show_default="nowhere")
    loud: bool = option(False, "A flag.")
    checked: bool = option(True, "A flag that is set.")
    secret: int = option(7, "Not for the command line.", hidden=True)

    def __post_init__(self) -> None:
        if self.inner.depth > 10:
            raise AsrError(f"depth is {self.inner.depth}: too deep")


@dataclass
class Program:
    """A command of these options, and what it was called with."""

    kind: Any
    calls: list[tuple[list[str] | None, Any]] = field(default_factory=list)

    def __call__(self, *arguments: str) -> Any:
        """The options that these arguments make; or the exit status and the message."""
        calls = self.calls

        def command(files: Annotated[list[str] | None, typer.Argument()] = None, *, options: Any) -> None:
            calls.append((files, options))

        command.__annotations__["options"] = self.kind
        app = typer.Typer()
        app.command(cls=WhisperCommand)(with_options(command))
        result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"}, catch_exceptions=False)
        return calls[-1][1] if result.exit_code == 0 and calls else (result.exit_code, result.output)


@pytest.fixture
def outer() -> Program:
    return Program(Outer)


def test_defaults_are_those_of_the_dataclass(outer: Program) -> None:
    assert outer() == Outer()
    assert Program(TranscribeOptions)() == TranscribeOptions()


@pytest.mark.parametrize(
    ("arguments", "changed"),
    [
        ("--depth 5", lambda o: replace(o, inner=Inner(depth=5))),
        ("--shared x", lambda o: replace(o, shared="x")),
        ("--times 3,4.5,", lambda o: replace(o, times=(3.0, 4.5))),
        ("--colour blue", lambda o: replace(o, colour="blue")),
        ("--folder a", lambda o: replace(o, folder=Path("a"))),
        ("-o a", lambda o: replace(o, folder=Path("a"))),
        ("--directory a", lambda o: replace(o, folder=Path("a"))),
        ("--loud", lambda o: replace(o, loud=True)),
        ("--loud True", lambda o: replace(o, loud=True)),
        ("--loud=True", lambda o: replace(o, loud=True)),
        ("--loud False", lambda o: o),
        ("--no_checked", lambda o: replace(o, checked=False)),
        ("--checked False", lambda o: replace(o, checked=False)),
        ("--checked True", lambda o: o),
    ],
)
def test_each_option_reaches_its_field(outer: Program, arguments: str, changed: Callable[[Outer], Outer]) -> None:
    assert outer(*arguments.split(), "a.wav") == changed(Outer())
    assert outer.calls[-1][0] == ["a.wav"]  # a True behind a flag is no file


@pytest.mark.parametrize(
    "arguments", ["--depth -1", "--depth 11", "--times a,b", "--colour green", "--secret 8", "--depth x"]
)
def test_what_the_dataclass_refuses_is_misuse(outer: Program, arguments: str) -> None:
    status, message = outer(*arguments.split())
    assert status == 2 and not outer.calls
    assert arguments.split()[0].strip("-") in message


def test_true_is_a_file_where_no_flag_stands_before_it(outer: Program) -> None:
    assert outer("--colour", "blue", "True") == Outer(colour="blue")
    assert outer("--", "--loud", "True") == Outer()
    assert [files for files, _ in outer.calls] == [["True"], ["--loud", "True"]]


@pytest.mark.parametrize(
    ("given", "understood"),
    [
        ("--ray a.wav", "--ray auto a.wav"),
        ("a.wav --ray", "a.wav --ray auto"),
        ("--ray --watch", "--ray auto --watch"),
        ("--ray head.example.org:6379 a.wav", "--ray head.example.org:6379 a.wav"),
        ("--ray ray://10.0.0.1:10001", "--ray ray://10.0.0.1:10001"),
        ("--ray local a.wav", "--ray local a.wav"),
        ("--ray=10.0.0.1:6379 a.wav", "--ray=10.0.0.1:6379 a.wav"),
        ("-- --ray a.wav", "-- --ray a.wav"),
    ],
)
def test_an_address_may_be_left_out(given: str, understood: str) -> None:
    assert with_addresses(given.split(), ["--ray"]) == understood.split()


def test_help_says_all_that_the_fields_say(outer: Program) -> None:
    _, text = outer("--help")
    for word in ("How deep.", "Stands in front", "SECONDS,...", "1.0,2.5", "red|blue", "nowhere", "--no_checked"):
        assert word in text
    assert "secret" not in text and "Stands behind" not in text


def test_options_of_transcription(outer: Program) -> None:
    program = Program(TranscribeOptions)
    chosen = program("--steps", "3", "--start", "noise", "--seed", "7", "--clip_timestamps", "0,2", "--chunk_size", "20")
    decode = DecodeOptions(steps=3, start="noise", seed=7)
    assert chosen == TranscribeOptions(decode, clip_timestamps=(0.0, 2.0), chunk_length=20.0)
    assert program("--steps", "0")[0] == program("--vad_onset", "3")[0] == program("--language", "xx")[0] == 2
