"""The average of adapters that were trained from one another, which hears more than either.

    python -m diffusion_gemma_asr.train.average runs/a/checkpoint runs/b/checkpoint --shares 0.3 0.7 --out runs/c/checkpoint

What an adapter learnt of training speech by heart differs from run to run and is averaged away (Wortsman et al. 2022, arXiv
2203.05482); figures in docs/results/log.md. With `--encoders` their encoders are averaged too, into OUT/encoder, with
`--backbones` their backbones, into OUT/backbone.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoint.config_file import read_config_file, write_config
from ..checkpoint.load import ADAPTER, read_adapter
from ..checkpoint.parts import load_backbone, load_encoder, load_tokenizer
from ..checkpoint.save import save_encoder
from ..errors import CheckpointError
from ..files import whole_file
from ..model.backbone import Backbone
from ..model.config import BackboneConfig, EncoderConfig
from ..model.encoder import AcousticEncoder


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
    return _mean(folders, [read_adapter(folder) for folder in folders], shares)


def average_encoder(names: Sequence[str], shares: Sequence[float]) -> AcousticEncoder:
    """The weighted mean of several encoders, in float32 on the CPU.

    Args:
        names: folders or hub repositories of encoders with the same architecture.
        shares: of each; they are divided by their sum.

    Raises:
        CheckpointError: an encoder is missing or damaged, or has other tensors than the first; or the shares do not fit.
    """
    encoders = [load_encoder(EncoderConfig(str(name))) for name in names]
    mean = _mean(names, [encoder.state_dict() for encoder in encoders], shares)
    encoders[-1].load_state_dict(mean)
    return encoders[-1]


def average_backbone(names: Sequence[str], shares: Sequence[float]) -> Backbone:
    """The weighted mean of several backbones, in float32 on the CPU; arguments and errors as for `average_encoder`."""
    backbones = [load_backbone(BackboneConfig(str(name))) for name in names]
    mean = _mean(names, [backbone.state_dict() for backbone in backbones], shares)
    backbones[-1].load_state_dict(mean)
    return backbones[-1]


def _mean(
    names: Sequence[str | Path], weights: Sequence[Mapping[str, Tensor]], shares: Sequence[float]
) -> dict[str, Tensor]:
    """See `average`."""
    if len(names) != len(shares) or min(shares, default=0.0) < 0 or sum(shares) <= 0:
        raise CheckpointError(f"{len(names)} to average and the shares {list(shares)}; give each a share, none below 0")
    shapes = [{key: value.shape for key, value in tensors.items()} for tensors in weights]
    for name, own in zip(names, shapes, strict=True):
        if own != shapes[0]:
            raise CheckpointError(f"{name} has other tensors than {names[0]}; they cannot be averaged")

    def mean(key: str) -> Tensor:
        parts = [tensors[key].double() * (share / sum(shares)) for tensors, share in zip(weights, shares, strict=True)]
        return torch.stack(parts).sum(0)

    return {key: mean(key).to(last.dtype) if last.is_floating_point() else last for key, last in weights[-1].items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; `arguments` None are those of the process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path, help="folders of checkpoints")
    parser.add_argument("--shares", nargs="+", type=float, help="of each (default: equal)")
    parser.add_argument("--encoders", nargs="+", help="of each, folders or hub repositories: these are averaged as well")
    parser.add_argument("--backbones", nargs="+", help="likewise")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; config.json is the last one's")
    args = parser.parse_args(arguments)
    shares = args.shares or [1.0] * len(args.checkpoints)
    with torch.no_grad():  # everything before the first file is written
        tensors = average(args.checkpoints, shares)
        encoder = average_encoder(args.encoders, shares) if args.encoders else None
        backbone = average_backbone(args.backbones, shares) if args.backbones else None
    config = read_config_file(args.checkpoints[-1])
    left = shutil.ignore_patterns(ADAPTER, "README.md")  # a card's results are of the one that it came with
    shutil.copytree(args.checkpoints[-1], args.out, dirs_exist_ok=True, ignore=left)
    if encoder is not None:
        save_encoder(encoder, args.out / "encoder")
        config = replace(config, encoder=replace(config.encoder, name="encoder", revision=None))
    if backbone is not None:
        backbone.model.half().save_pretrained(args.out / "backbone")
        load_tokenizer(BackboneConfig(str(args.backbones[-1]))).save_pretrained(args.out / "backbone")
        config = replace(config, backbone=replace(config.backbone, name="backbone", revision=None))
    with whole_file(args.out / ADAPTER) as part:
        save_file({key: value.contiguous() for key, value in tensors.items()}, part)
    write_config(config, args.out)
    print(args.out)


if __name__ == "__main__":
    main()
