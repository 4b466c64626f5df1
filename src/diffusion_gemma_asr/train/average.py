"""The average of adapters that were trained from one another, which hears more than either.

    python -m diffusion_gemma_asr.train.average runs/a/checkpoint runs/b/checkpoint --shares 0.3 0.7 --out runs/c/checkpoint

What an adapter learnt of training speech by heart differs from run to run and is averaged away (Wortsman et al. 2022, arXiv
2203.05482); figures in docs/results/log.md.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoint.load import ADAPTER, read_adapter
from ..errors import CheckpointError
from ..files import whole_file


def average(folders: Sequence[str | Path], shares: Sequence[float]) -> dict[str, Tensor]:
    """The weighted mean of the tensors of several adapters.

    Args:
        folders: of checkpoints with the same projector, and the same LoRA or none.
        shares: of each; they are divided by their sum.

    Returns:
        the tensors by name, of the last adapter's dtypes; those that are no floating-point numbers are the last one's.

    Raises:
        CheckpointError: an adapter is missing or damaged, or has other tensors than the first; or the shares do not fit.
    """
    if len(folders) != len(shares) or min(shares, default=0.0) < 0 or sum(shares) <= 0:
        raise CheckpointError(f"{len(folders)} adapters and the shares {list(shares)}; give each a share, none below 0")
    adapters = [read_adapter(folder) for folder in folders]
    shapes = [{key: value.shape for key, value in adapter.items()} for adapter in adapters]
    for folder, own in zip(folders, shapes, strict=True):
        if own != shapes[0]:
            raise CheckpointError(f"{folder} has other tensors than {folders[0]}; they cannot be averaged")

    def mean(key: str) -> Tensor:
        parts = [adapter[key].double() * (share / sum(shares)) for adapter, share in zip(adapters, shares, strict=True)]
        return torch.stack(parts).sum(0)

    return {key: mean(key).to(last.dtype) if last.is_floating_point() else last for key, last in adapters[-1].items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; `arguments` None are those of the process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path, help="folders of checkpoints")
    parser.add_argument("--shares", nargs="+", type=float, help="of each (default: equal)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; config.json is the last one's")
    args = parser.parse_args(arguments)
    with torch.inference_mode():
        tensors = average(args.checkpoints, args.shares or [1.0] * len(args.checkpoints))
    shutil.copytree(args.checkpoints[-1], args.out, dirs_exist_ok=True, ignore=shutil.ignore_patterns(ADAPTER))
    with whole_file(args.out / ADAPTER) as part:
        save_file({key: value.contiguous() for key, value in tensors.items()}, part)
    print(args.out)


if __name__ == "__main__":
    main()
