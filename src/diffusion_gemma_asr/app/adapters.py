"""The commands `diffusion-gemma-asr import` and `export`: adapters of other programs in, folders for other programs out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from transformers import WhisperFeatureExtractor

from ..checkpoint.card import ModelCard
from ..checkpoint.config_file import is_checkpoint, read_config_file
from ..checkpoint.export import check_exportable, export_checkpoint
from ..checkpoint.foreign import ImportOptions, interpret, listing, with_ctc
from ..checkpoint.foreign_files import read_foreign
from ..checkpoint.load import find_checkpoint, load_checkpoint
from ..checkpoint.save import write_checkpoint
from ..errors import CheckpointError
from .hearing import HEARS, hear
from .options import with_options
from .terminal import print_out


@with_options
def import_(
    adapter: Annotated[
        str, typer.Argument(help="A file (.safetensors, .pt), a folder, or a hub repository.", show_default=False)
    ],
    *,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the checkpoint.", show_default=False)] = None,
    inspect: Annotated[bool, typer.Option("--inspect", help="Print names and shapes; write nothing.")] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch, tag or commit of the repository.", show_default=False)
    ] = None,
    options: ImportOptions,
) -> None:
    """Reads an adapter of another program by the shapes of its tensors, and writes a checkpoint."""
    foreign = read_foreign(adapter, revision)
    if inspect:
        print_out(listing(foreign) + "\n")
        return
    own = Path(adapter).expanduser()
    if is_checkpoint(own if own.is_dir() else own.parent):
        raise CheckpointError(f"{adapter} is of a checkpoint of this program; it is loaded as it is, with --model")
    if out is None:
        raise typer.BadParameter("where to? Give --out FOLDER, or --inspect")
    imported = interpret(foreign, options)
    for line in imported.assumed:
        print(f"assumed: {line}", file=sys.stderr)
    heard = hear(imported)
    print(heard.line, file=sys.stderr)
    imported = with_ctc(imported, heard.rate is not None and heard.rate <= HEARS)
    extractor = WhisperFeatureExtractor(feature_size=imported.config.encoder.mel_bins)
    card = ModelCard(training_data=f"Not stated; imported from `{adapter}`.")
    print_out(f"{write_checkpoint(out, imported.config, imported.tensors, extractor, card)}\n")


def export(
    checkpoint: Annotated[
        str, typer.Argument(help="A checkpoint folder, a hub repository, or a bundled model.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to make.", show_default=False)],
    untied: Annotated[
        bool, typer.Option("--untied", help="Also where encoder and decoder differ, which transformers alone reads.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch, tag or commit of the repository.", show_default=False)
    ] = None,
) -> None:
    """Writes a checkpoint's backbone with LoRA merged, in the stock layout, and the parts that hear beside it."""
    folder = find_checkpoint(checkpoint, revision)
    check_exportable(read_config_file(folder), untied)  # before minutes of reading
    print_out(f"{export_checkpoint(load_checkpoint(checkpoint, device='cpu', revision=revision), out, untied)}\n")
