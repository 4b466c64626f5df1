"""Checkpoints onto a hub: every file that loading opens, and a card whose header hubs read."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

import yaml
from huggingface_hub import CommitOperationAdd, HfApi

from ..errors import CheckpointError, first_line
from ..strict import resolve_source
from .card import Score, published_card
from .config_file import CONFIG, read_config_file
from .load import ADAPTER, read_adapter
from .save import CARD, EXTRACTOR


def push_to_hub(
    folder: str | Path,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    scores: Sequence[Score] = (),
) -> str:
    """Uploads all files that a checkpoint needs, in one commit; frozen parts inside the folder go along.

    The card's header names library, task, languages and frozen parts, and the scores if there are any; the folder's own
    README.md stays as it is.

    Args:
        folder: of `save_checkpoint`.
        repository: "owner/name"; made if missing. The token is the one that huggingface_hub finds.
        private: for a repository that is made.
        revision: branch, made if missing; None is the main one.
        scores: error rates for the card.

    Returns:
        the address of the commit.

    Raises:
        CheckpointError: the folder is no checkpoint, or the hub refuses.
    """
    folder = Path(folder)
    patterns, config = checkpoint_files(folder), read_config_file(folder)
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    names = [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]
    try:
        card = published_card((folder / CARD).read_text(encoding="utf-8"), config, scores).encode()
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{folder / CARD} cannot be read: {first_line(error)}; save the checkpoint again") from error
    operations = [CommitOperationAdd(name, card if name == CARD else str(folder / name)) for name in names]
    try:
        hub = HfApi()
        hub.create_repo(repository, private=private, exist_ok=True)
        if revision is not None:
            hub.create_branch(repository, branch=revision, exist_ok=True)
        message = f"Upload {config.name} with diffusion-gemma-asr"
        return hub.create_commit(repository, operations, commit_message=message, revision=revision).commit_url
    except Exception as error:  # those of its HTTP library as well, which changes between versions
        raise CheckpointError(f"cannot upload to {repository}: {first_line(error)}") from error


def checkpoint_files(folder: Path) -> list[str]:
    """All files of a checkpoint, relative to its folder; those of frozen parts inside it as one pattern each.

    Raises:
        CheckpointError: the folder is no checkpoint, or needs what nobody else has.
    """
    config = read_config_file(folder)
    read_adapter(folder)
    files = [ADAPTER, CONFIG, CARD, EXTRACTOR]
    inside = folder.resolve()
    for part in (config.encoder, config.backbone):
        place = Path(resolve_source(part.name, folder))
        if not place.is_absolute():
            continue  # a hub name
        if not place.is_relative_to(inside):
            raise CheckpointError(
                f"{folder} names the local folder {part.name}, which nobody else has; "
                f"copy it into the checkpoint, or write its hub name into {CONFIG}"
            )
        files.append(f"{place.relative_to(inside).as_posix()}/*")
    return files
