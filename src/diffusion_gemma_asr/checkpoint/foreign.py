"""Adapters of other programs as checkpoints of this one: what tensors are for is told by their shapes.

The system is the same (a Whisper encoder, convolutions and a linear layer, LoRA on DiffusionGemma's attention), the names of
tensors are not. What shapes do not tell is asked for, or assumed with a line that says so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import DiffusionGemmaConfig, WhisperConfig

from ..errors import CheckpointError, RecipeError
from ..languages import LANGUAGES
from ..model.backbone import Backbone
from ..model.config import BackboneConfig, EncoderConfig, LoraConfig, ModelConfig, ProjectorConfig
from ..model.lengths import strided_length
from ..strict import is_path, option, resolve_source
from .foreign_files import Foreign
from .parts import source_config

SLOTS = 188  # audio tokens of 30 s in the published system
STRIDES = {1: (8,), 2: (4, 2), 3: (2, 2, 2)}  # by the number of convolutions: eight frames an audio token
# the published parts, by what tells them: width of a frame, width of a token row
ENCODERS, BACKBONES = {768: "openai/whisper-small"}, {2816: "google/diffusiongemma-26B-A4B-it"}
STACKS = {"encoder": "model.encoder.language_model.", "decoder": "model.decoder."}
LORA = re.compile(r"(.*?)(layers\.\d+\.self_attn\.[qkvo]_proj)\.lora_([AB])(?:\.\w+)*$")
PLAIN = {"use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "lora_bias": False}  # of PEFT; else not known here


@dataclass(frozen=True)
class ImportOptions:
    """What an adapter's tensors do not tell."""

    encoder: str | None = option(None, "Hub name or folder of the Whisper that it was trained with.")
    backbone: str | None = option(None, "Hub name or folder of the DiffusionGemma that it was trained with.")
    lora_alpha: int | None = option(
        None, "The LoRA is multiplied by this over its rank, where no adapter_config.json says it."
    )
    strides: tuple[int, ...] | None = option(None, "Of the projector's convolutions, such as 4,2.", metavar="LIST")
    scale: Literal["factor", "rms"] | None = option(
        None, "What a lone number beside the projector is: a factor of its output, or the size that this is brought to."
    )
    languages: tuple[str, ...] = option(("en",), "Codes of the languages that it was trained for.", metavar="LIST")


@dataclass(frozen=True)
class Imported:
    """An adapter in this program's terms.

    Attributes:
        config: of the model; `ctc` is false, since only listening can tell.
        tensors: of adapter.safetensors.
        assumed: a line for each thing that nothing in the files says.
    """

    config: ModelConfig
    tensors: dict[str, Tensor]
    assumed: tuple[str, ...]


def interpret(foreign: Foreign, options: ImportOptions) -> Imported:
    """Finds the projector and the LoRA matrices among the tensors, and what model they belong to.

    Raises:
        CheckpointError: something is missing, has no place here, does not fit the frozen parts, or has to be said by an
            option; one line names it.
    """
    assumed = ["GELU behind each convolution", "the encoder hears clips padded to 30 s"]
    lora = {name: tensor for name, tensor in foreign.tensors.items() if "lora_" in name}
    projector, shape = read_projector(foreign, {n: t for n, t in foreign.tensors.items() if n not in lora}, options, assumed)
    width, output = projector["conv1.weight"].shape[1], projector["linear.weight"].shape[0]
    encoder = _source("encoder", options.encoder, None, ENCODERS.get(width), f"frames {width} wide", assumed)
    base = foreign.settings.get("base_model_name_or_path")
    backbone = _source("backbone", options.backbone, base, BACKBONES.get(output), f"token rows {output} wide", assumed)
    heard, read = source_config(EncoderConfig(encoder)), source_config(BackboneConfig(backbone))
    if not isinstance(heard, WhisperConfig) or heard.d_model != width:
        raise CheckpointError(f"{encoder} is no Whisper {width} wide, which the projector asks for; give another --encoder")
    if not isinstance(read, DiffusionGemmaConfig) or read.text_config.hidden_size != output:
        raise CheckpointError(
            f"{backbone} is no DiffusionGemma {output} wide, which the projector asks for; give another --backbone"
        )
    updates, lora_config = read_lora(foreign, lora, read, options.lora_alpha, assumed)
    if unknown := [code for code in options.languages if code not in LANGUAGES]:
        raise CheckpointError(f"language {unknown[0]!r} is not one of {', '.join(LANGUAGES)}; correct --languages")
    if options.languages == ImportOptions.languages:
        assumed.append("it was trained for English; --languages says otherwise")
    text = read.text_config
    dtype = str(getattr(read, "dtype", None) or "bfloat16").removeprefix("torch.")
    try:
        config = ModelConfig(
            name=Path(foreign.place).stem if Path(foreign.place).is_file() else Path(foreign.place).name,
            encoder=EncoderConfig(encoder, None, width, heard.num_mel_bins, silence_s=30.0),
            backbone=BackboneConfig(backbone, None, output, text.vocab_size, text.num_hidden_layers),
            projector=shape,
            lora=lora_config,
            languages=options.languages,
            ctc=False,
            dtype=dtype,  # type: ignore[arg-type]
        )
    except RecipeError as error:
        raise CheckpointError(f"{foreign.place}: {error}") from None
    tensors = {f"projector.{name}": tensor for name, tensor in projector.items()}
    tensors |= {f"lora.{name}": tensor for name, tensor in updates.items()}
    return Imported(config, tensors, tuple(assumed))


def _source(part: str, given: str | None, said: Any, known: str | None, kind: str, assumed: list[str]) -> str:
    """The name of a frozen part: as given, as the files say, or the published one of that width."""
    if given is not None:
        return resolve_source(given, Path.cwd())
    if isinstance(said, str) and (Path(said).is_dir() or (said.count("/") == 1 and not is_path(said))):
        return resolve_source(said, Path.cwd())
    if known is None:
        raise CheckpointError(f"which {part} has {kind}? Nothing in the files says it; give --{part}")
    assumed.append(f"the {part} is {known}, which has {kind}; --{part} says otherwise")
    return known


def read_projector(
    foreign: Foreign, tensors: Mapping[str, Tensor], options: ImportOptions, assumed: list[str]
) -> tuple[dict[str, Tensor], ProjectorConfig]:
    """The projector among tensors that are no LoRA: three-dimensional ones are convolutions, a matrix the linear layer.

    Args:
        foreign: for messages.
        tensors: to choose from; all of them must find a place.
        options: `strides` and `scale` count here.
        assumed: gets lines.

    Returns:
        tensors by the names that `AudioProjector` has for them, and its config.

    Raises:
        CheckpointError: as `interpret`.
    """
    place, left = foreign.place, dict(tensors)
    chain = _chain([(name, t) for name, t in tensors.items() if t.dim() == 3], place)
    matrices = [name for name, t in tensors.items() if t.dim() == 2]
    if len(matrices) != 1:
        raise CheckpointError(
            f"{place}: {len(matrices)} matrices beside the LoRA, where a projector has one, behind its convolutions; "
            "--inspect lists what is there"
        )
    found: dict[str, Tensor] = {}
    layers = [(f"conv{number}", name) for number, (name, _) in enumerate(chain, 1)]
    for own, name in [*layers, ("linear", matrices[0])]:
        weight = found[f"{own}.weight"] = left.pop(name)
        bias = left.pop(name.removesuffix("weight") + "bias", torch.zeros(weight.shape[0], dtype=weight.dtype))
        if bias.shape != weight.shape[:1]:
            raise CheckpointError(f"{place}: the bias of {name} is {tuple(bias.shape)}, not {tuple(weight.shape[:1])}")
        found[f"{own}.bias"] = bias
    hidden, kernels = chain[-1][1].shape[0], tuple(t.shape[2] for _, t in chain)
    if found["linear.weight"].shape[1] != hidden:
        raise CheckpointError(
            f"{place}: the linear layer {matrices[0]} {tuple(found['linear.weight'].shape)} does not take the "
            f"{hidden} channels of {chain[-1][0]}"
        )
    strides = options.strides or STRIDES.get(len(chain))
    if strides is None or len(strides) != len(chain):
        raise CheckpointError(f"{place}: {len(chain)} convolutions; give as many --strides, which no shape tells")
    if options.strides is None:
        assumed.append(f"strides {','.join(map(str, strides))}; --strides says otherwise")
        if (slots := strided_length(1500, strides, kernels)) != SLOTS:
            raise CheckpointError(
                f"{place}: kernels {kernels} with strides {strides} make {slots} audio tokens of 30 s, not {SLOTS}; "
                "give --strides"
            )
    numbers = [name for name, t in left.items() if t.numel() == 1]
    scaled = bool(numbers) and options.scale == "rms"
    if len(numbers) == 1 and options.scale is not None:
        number = left.pop(numbers[0]).float().reshape(())
        if not scaled:
            found["linear.weight"], found["linear.bias"] = (number * found[f"linear.{key}"] for key in ("weight", "bias"))
        found["scale"] = number if scaled else torch.tensor(1.0)
    elif len(numbers) == 1:
        raise CheckpointError(f"{place}: what is the number {numbers[0]} for? Give --scale factor or --scale rms")
    elif options.scale is not None and not numbers:
        raise CheckpointError(f"{place}: no number in it that --scale {options.scale} could speak of; leave it out")
    else:
        found["scale"] = torch.tensor(1.0)
    if left:
        name, tensor = next(iter(left.items()))
        raise CheckpointError(
            f"{place}: {name} {tuple(tensor.shape)} has no place in a projector of convolutions and a linear layer, "
            "the only kind that is known here"
        )
    if not scaled:
        assumed.append("the linear layer's output is used as it is")
    return found, ProjectorConfig(hidden, strides, scaled, kernels=kernels)


def _chain(convolutions: list[tuple[str, Tensor]], place: str) -> list[tuple[str, Tensor]]:
    """Convolutions in the order in which each takes what the one before gives; the file's where several are possible."""
    if not convolutions:
        raise CheckpointError(
            f"{place}: no convolutions in it, so no projector that is known here; --inspect lists its tensors"
        )
    if len(convolutions) <= 4:
        for order in permutations(convolutions):
            fits = all(a.shape[0] == b.shape[1] for (_, a), (_, b) in pairwise(order))
            if fits and len({t.shape[0] for _, t in order}) == 1:
                return list(order)
    shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in convolutions)
    raise CheckpointError(f"{place}: these convolutions do not follow each other with one number of channels: {shapes}")


def read_lora(
    foreign: Foreign,
    tensors: Mapping[str, Tensor],
    backbone: DiffusionGemmaConfig,
    alpha: int | None,
    assumed: list[str],
) -> tuple[dict[str, Tensor], LoraConfig]:
    """LoRA matrices by the names that `Backbone` has for them, and their config.

    Modules of ours that the adapter leaves alone get new LoRA, which does nothing.

    Args:
        foreign: its settings may say alpha.
        tensors: the LoRA's.
        backbone: whose layers they belong to.
        alpha: as the user says it.
        assumed: gets lines.

    Raises:
        CheckpointError: as `interpret`.
    """
    place, settings = foreign.place, foreign.settings
    if not tensors:
        raise CheckpointError(f"{place}: no LoRA matrices in it (lora_A, lora_B); give the folder that holds them as well")
    if odd := next((key for key, plain in PLAIN.items() if settings.get(key, plain) not in (plain, None)), None):
        raise CheckpointError(f"{place}: its adapter_config.json has {odd}, a kind of LoRA that is not known here")
    named: dict[str, Tensor] = {}
    stacks = set()
    for name, tensor in tensors.items():
        match = LORA.match(name)
        if match is None:
            raise CheckpointError(f"{place}: {name} has no place here, where LoRA sits on q, k, v, o of the attention alone")
        stack = next((stack for stack in ("encoder", "decoder") if stack in match[1]), "shared")
        stacks.add(stack)
        named[f"{STACKS.get(stack, STACKS['encoder'])}{match[2]}.lora_{match[3]}.weight"] = tensor
    if len(named) < len(tensors) or ("shared" in stacks and len(stacks) > 1):
        raise CheckpointError(f"{place}: the LoRA of encoder and decoder cannot be told apart by their names")
    ranks = {tensor.shape[0 if ".lora_A" in name else -1] for name, tensor in named.items()}
    if len(ranks) != 1:
        raise CheckpointError(f"{place}: LoRA of several ranks ({', '.join(map(str, sorted(ranks)))}); one is known here")
    (rank,) = ranks
    config = LoraConfig(rank, _alpha(foreign, alpha, rank, assumed), shared="shared" in stacks)
    with torch.device("meta"):
        shell = Backbone.from_config(backbone)
        shell.add_lora(**asdict(config))
    wanted = shell.lora_state_dict()
    for name, tensor in named.items():
        if name not in wanted:
            raise CheckpointError(
                f"{place}: {name} is no module of this backbone; give the --backbone that it was trained on"
            )
        if tensor.shape != wanted[name].shape:
            raise CheckpointError(
                f"{place}: {name} is {tuple(tensor.shape)}, but this backbone needs {tuple(wanted[name].shape)}; "
                "give the --backbone that it was trained on"
            )
    if alone := [name for name in wanted if (name in named) != (_twin(name) in named)]:
        raise CheckpointError(f"{place}: only one of the two matrices {alone[0]} and {_twin(alone[0])} is there")
    if missing := wanted.keys() - named.keys():
        assumed.append(f"{len(missing) // 2} of {len(wanted) // 2} attention matrices have no LoRA and stay as they are")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name in sorted(missing):
            new = torch.zeros(wanted[name].shape)
            named[name] = nn.init.kaiming_uniform_(new, a=5**0.5) if ".lora_A" in name else new
    return named, config


def _twin(name: str) -> str:
    """The other matrix of an update."""
    return name.replace(".lora_A.", ".lora_B.") if ".lora_A." in name else name.replace(".lora_B.", ".lora_A.")


def _alpha(foreign: Foreign, given: int | None, rank: int, assumed: list[str]) -> int:
    said = foreign.settings.get("lora_alpha")
    if given is None and said is None:
        assumed.append(f"LoRA's alpha is twice its rank, {2 * rank}; --lora_alpha says otherwise")
        return 2 * rank
    alpha = given if given is not None else said
    if foreign.settings.get("use_rslora") and given is None:
        alpha *= rank**0.5  # it divides by the root of the rank
    if not isinstance(alpha, int | float) or alpha != int(alpha):
        raise CheckpointError(f"{foreign.place}: LoRA's alpha comes to {alpha}, which is no whole number; give --lora_alpha")
    return int(alpha)


def listing(foreign: Foreign) -> str:
    """Names, shapes and dtypes of all tensors, and plain values beside them; a line each."""
    rows = [f"{n}  {tuple(t.shape)}  {str(t.dtype).removeprefix('torch.')}" for n, t in foreign.tensors.items()]
    return "\n".join([*rows, *(f"{name} = {value}" for name, value in foreign.settings.items())])


def with_ctc(imported: Imported, heard: bool) -> Imported:
    """The same, its audio tokens known to spell drafts or not."""
    return replace(imported, config=replace(imported.config, ctc=heard))
