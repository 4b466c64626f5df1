"""The command `diffusion-gemma-asr`: transcribe, train, evaluate, compare, serve, import, export, push,
info.

Option names are those of openai/whisper and whisperX, with underscores; dashes are understood too. Results go to standard
output, everything else to standard error. Exit status: 0 all went well, 1 something failed (named in one line on standard
error), 2 the command was not understood, 130 it was interrupted.

A command's module is imported when the command is called, or its help is asked for: torch takes seconds.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from keyword import iskeyword
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ..errors import AsrError, __version__, first_line
from .options import WhisperCommand
from .terminal import complain, print_out, replace_unprintable

COMMANDS = {  # name: (module of app/ with a function of that name, behind which a keyword of Python has a "_"; what it does)
    "transcribe": ("transcribe", "Transcribe sound files: the text of one, or path, tab and text of each of several."),
    "train": ("train", "Train a model by a recipe; a run that was interrupted goes on where it stood."),
    "evaluate": ("evaluate", "Measure error rate and speed; writes predictions.jsonl, summary.json and report.html."),
    "compare": ("evaluate", "Put runs side by side, each tested against the first on the same utterances."),
    "serve": ("serve", "Answer OpenAI's transcription routes, a realtime socket, and a web page."),
    "import": ("adapters", "Turn an adapter of another program into a checkpoint, by the shapes of its tensors."),
    "export": ("adapters", "Write a checkpoint with LoRA merged, in the layout that other programs read."),
    "push": ("push", "Upload a checkpoint to a hub, with a card."),
    "info": ("info", "Count the parameters of a recipe's model: what is frozen, what is trained."),
}


class LazyCommand(TyperCommand):
    """A command that is imported when it is called.

    Args:
        name: one of COMMANDS.
    """

    def __init__(self, name: str):
        self._module, help_text = COMMANDS[name]
        super().__init__(name, help=help_text)

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """The context of the command itself, which parses these arguments."""
        gc.disable()  # torch and transformers make half a million objects on import, and keep them
        module = import_module(f".{self._module}", __package__)
        gc.freeze()  # not looked at again, by the end of the process either: saves a third of a short call
        gc.enable()
        single = typer.Typer(add_completion=False)
        function = getattr(module, f"{self.name}_" if iskeyword(str(self.name)) else str(self.name))
        single.command(self.name, cls=WhisperCommand, help=self.help)(function)
        return typer.main.get_command(single).make_context(info_name, args, parent=parent, **extra)


def _print_version(wanted: bool) -> None:
    if wanted:
        print_out(f"diffusion-gemma-asr {__version__}\n")
        raise typer.Exit


def _program(
    version: Annotated[
        bool,
        typer.Option("--version", "-V", callback=_print_version, is_eager=True, help="Print it and exit."),
    ] = False,
) -> None:
    pass


def _group() -> Any:
    """The command with its commands, for typer to run."""
    app = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        context_settings={
            "help_option_names": ["-h", "--help"],
            "token_normalize_func": lambda name: name.replace("-", "_"),  # --batch-size is --batch_size
        },
        help="Speech recognition whose decoder is a diffusion language model.",
    )
    app.callback()(_program)
    group: Any = typer.main.get_command(app)
    for name in COMMANDS:
        group.add_command(LazyCommand(name))
    return group


def main(arguments: Sequence[str] | None = None, load: Callable[..., Any] | None = None) -> None:
    """Runs the command and leaves with its exit status.

    Args:
        arguments: None is those of the process.
        load: what loads a model, with the arguments of `diffusion_gemma_asr.load`; None is that.
    """
    replace_unprintable()
    try:
        _group()(args=arguments, prog_name="diffusion-gemma-asr", obj=load)
    except AsrError as error:
        complain(str(error))
        sys.exit(1)
    except OSError as error:
        complain(first_line(error))
        sys.exit(1)
