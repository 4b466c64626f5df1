"""What the model of a recipe needs in memory, and what is fetched first, by arithmetic: no weights, no network.

Weights are counted on the meta device. What a pass makes is found by running the backbone's own code on fake tensors, which
have shapes and no content, and adding up what is alive at a time.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DiffusionGemmaConfig, WhisperConfig, WhisperForConditionalGeneration

from ..checkpoint.known_configs import STORED
from ..checkpoint.parts import new_encoder, source_config
from ..checkpoint.quantization import BNB_BLOCK_SIZE, Quantizer, quantize_experts
from ..model.backbone import Backbone
from ..model.config import BackboneConfig, EncoderConfig, ModelConfig
from ..model.head import CHUNK_ELEMENTS, Head
from ..model.prefill import Prefill
from ..train.losses import cross_entropy
from ..train.recipe import Recipe
from .parts import count_parts

Task = Literal["inference", "training"]
Packing = Literal["bfloat16", "bnb-8bit", "bnb-4bit"]
BITS: dict[Packing, int] = {"bfloat16": 16, "bnb-8bit": 8, "bnb-4bit": 4}

CLIP_S = 30  # the longest clip
TOKENS_PER_S = 4  # of speech, Gemma's tokens
INSTRUCTION = 20  # tokens of a prompt that stand for no sound
INFERENCE_BATCH = 16  # clips at once, the default of `transcribe`
WORKERS = 8  # that share the experts, in the line of the table


class Load(NamedTuple):
    """What a pass runs on.

    Attributes:
        batch: rows.
        prompt: tokens of a row that the backbone's encoder reads; while training with the transcript.
        canvas: tokens of a row that its decoder reads.
    """

    batch: int
    prompt: int
    canvas: int


@dataclass(frozen=True)
class Need:
    """Bytes on each card.

    Attributes:
        frozen: weights that are not trained.
        trained: float32 weights, gradients and AdamW's moments of projector and LoRA; nothing for inference.
        passes: what is alive at most beyond these, in a forward pass and, while training, until it was walked back.
    """

    frozen: int
    trained: int
    passes: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.frozen + self.trained + self.passes


class Estimate:
    """Memory of a model on cards of its own.

    Args:
        model: of a recipe.

    Raises:
        CheckpointError: as `count_parts`.
    """

    def __init__(self, model: ModelConfig):
        parts = {part.name: part.parameters for part in count_parts(model)}
        self.model = model
        self.encoder, self.projector = parts["encoder"], parts["projector"]
        self.trained = self.projector + parts["LoRA"]
        self.config = source_config(model.backbone)
        with _fake_backbone(self.config, model) as backbone:
            experts = [p for layer in backbone.experts for p in layer.parameters()]
            self.experts = sum(p.numel() for p in experts)
            self.layer = self.experts // len(backbone.experts)
            self.others = parts["backbone"] - self.experts
            attention = {id(p): p for n, p in backbone.named_parameters() if ".self_attn." in n and "base_layer" in n}
            self.attention = sum(p.numel() for p in attention.values())
        self._passes: dict[tuple[Load, bool, bool], int] = {}

    def need(self, task: Task, packing: Packing, load: Load, workers: int = 1) -> Need:
        """Bytes on each card.

        Args:
            task: inference has LoRA merged, and the stacks' attention with it twice, unless they share their LoRA; training
                has it apart, in float32.
            packing: of the experts; all else is bfloat16.
            load: what a pass runs on.
            workers: that share the experts; above 1 without packing alone.
        """
        training, packed = task == "training", packing != "bfloat16"
        experts = self.experts * BITS[packing] // 8 + (4 * self.experts // BNB_BLOCK_SIZE if packed else 0)
        frozen = experts // workers + 2 * (self.others + self.encoder)
        passes = self.passes(load, training, packed)
        if workers > 1:
            passes += 2 * 2 * self.layer  # a layer as it arrives, and as it is used
        if training:
            return Need(frozen, (16 if workers == 1 else 20) * self.trained, passes)  # workers join gradients in a copy
        again = 0 if self.model.lora.shared else self.attention
        return Need(frozen + 2 * (again + self.projector), 0, passes)

    def passes(self, load: Load, training: bool, packed: bool) -> int:
        """Bytes that are alive at most beyond the weights."""
        key = load, training, packed
        if key not in self._passes:
            with _fake_backbone(self.config, self.model) as backbone:
                if packed:
                    quantize_experts(backbone.model, Quantizer("shapes", _pack_shapes), "cpu")
                    backbone.recompute_experts()
                with _Alive(backbone) as alive:
                    _train(backbone, load) if training else _infer(backbone, load)
            self._passes[key] = alive.most
        return self._passes[key]


@contextmanager
def _fake_backbone(config: DiffusionGemmaConfig, model: ModelConfig) -> Iterator[Backbone]:
    """A backbone with LoRA in bfloat16, LoRA itself in float32, without content; valid inside the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            backbone = Backbone.from_config(config)
            backbone.add_lora(**asdict(model.lora))
    finally:
        torch.set_default_dtype(before)
    backbone.model.tie_weights()
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # with the original, whose id must stay its own
    with FakeTensorMode():
        for module in backbone.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                if id(p) not in made:
                    dtype = torch.float32 if p.requires_grad else p.dtype
                    made[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=dtype), requires_grad=p.requires_grad), p
                setattr(module, name, made[id(p)][0])
            for name, buffer in list(module.named_buffers(recurse=False)):
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
        yield backbone


class _Alive(TorchDispatchMode):
    """Counts the bytes of all tensors that operations inside the block make, while they live; weights are left out."""

    def __init__(self, weights: nn.Module):
        super().__init__()
        self.now = self.most = 0
        self.known = {p.untyped_storage()._cdata for p in [*weights.parameters(), *weights.buffers()]}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return result

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


class _AllVisible:
    """The mask of a cache whose every position may be read, so that no mask is made: fake tensors cannot be asked."""

    def all(self) -> bool:
        return True


class _UnpackShapes(nn.Module):
    """Stands for a weight that is unpacked."""

    def __init__(self, like: Tensor):
        super().__init__()
        self.shape, self.dtype = like.shape, like.dtype

    def forward(self, packed: Tensor) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=packed.device)


def _pack_shapes(weight: Tensor) -> tuple[Tensor, nn.Module]:
    return torch.empty(weight.numel() // 2, dtype=torch.uint8), _UnpackShapes(weight)


def _read(backbone: Backbone, load: Load, training: bool) -> tuple[Prefill, Tensor]:
    """Reads prompts; the cache is all visible."""
    embeds = torch.empty(load.batch, load.prompt, backbone.hidden_size, dtype=torch.bfloat16, requires_grad=training)
    mask = torch.empty(load.batch, load.prompt, dtype=torch.bool)
    prefill, hidden = backbone.prefill(embeds, mask, torch.empty(load.batch, dtype=torch.long))
    return Prefill(prefill.cache, _AllVisible(), prefill.lengths), hidden  # type: ignore[arg-type]


@torch.no_grad()
def _infer(backbone: Backbone, load: Load) -> None:
    """Reads prompts, and a pass over the canvases with the output head in slices."""
    prefill, _ = _read(backbone, load, training=False)
    canvas = torch.empty(load.batch, load.canvas, dtype=torch.long)
    _head(backbone).best(backbone.denoise_hidden(canvas, prefill))


def _head(backbone: Backbone) -> Head:
    """The output head with the slices of a GPU."""
    return replace(backbone.head, chunk_elements=CHUNK_ELEMENTS["cuda"])


def _train(backbone: Backbone, load: Load) -> None:
    """Diffusion and autoregressive loss with a first pass for self-conditioning, forward and backward."""
    with torch.autocast("cpu", torch.bfloat16):
        prefill, hidden = _read(backbone, load, training=True)
        canvas = torch.empty(load.batch, load.canvas, dtype=torch.long)
        with torch.no_grad():
            signal = backbone.denoise_logits(canvas, prefill)
        denoised = backbone.denoise_hidden(canvas, prefill, signal)
        causal = hidden[:, -load.canvas :]  # behind the prompt
        head = _head(backbone)
        loss = cross_entropy(head, denoised, canvas)[0] + cross_entropy(head, causal, canvas)[0]
    loss.backward()


def loads(recipe: Recipe, canvas_length: int) -> dict[Task, Load]:
    """The largest batches that a recipe's model meets, of the longest clips: that of `transcribe`, and the recipe's own."""
    with torch.device("meta"):
        frame_s = new_encoder(source_config(recipe.model.encoder), recipe.model.encoder.name).frame_s
    clip_s = min(CLIP_S, recipe.data.max_duration_s)
    batch = recipe.train.batch_size
    if recipe.train.batch_frames is not None:
        batch = max(1, min(batch, int(recipe.train.batch_frames * frame_s / clip_s)))
    per_s = 1 / (frame_s * math.prod(recipe.model.projector.strides))  # slots
    written = round(TOKENS_PER_S * clip_s)
    return {
        "inference": Load(INFERENCE_BATCH, INSTRUCTION + round(CLIP_S * per_s), canvas_length),
        "training": Load(batch, INSTRUCTION + round(clip_s * per_s) + written, written),
    }


def render_memory(recipe: Recipe) -> str:
    """Two tables as text: memory for inference and training, and what is fetched before either.

    Raises:
        CheckpointError: as `count_parts`.
    """
    estimate = Estimate(recipe.model)
    largest = loads(recipe, estimate.config.canvas_length)
    rows: list[tuple[str, ...]] = [("memory of a card, GB", "frozen", "trained", "passes", "total")]
    for task, packing, workers in lines():
        need = estimate.need(task, packing, largest[task], workers)
        name = f"{task}, {packing}" + (f", experts shared by {workers}" if workers > 1 else "")
        rows.append((name, *(f"{size / 1e9:.1f}" for size in (need.frozen, need.trained, need.passes, need.total))))
    width = max(len(row[0]) for row in rows)
    table = [f"{row[0]:<{width}}" + "".join(f"{cell:>9}" for cell in row[1:]) for row in rows]
    described = [
        f"{task}: {load.batch} rows of {load.prompt} tokens in the encoder, {load.canvas} in the decoder"
        for task, load in largest.items()
    ]
    return "\n".join([*table, *described, LEFT_OUT, "", *downloads(recipe.model)])


def lines() -> list[tuple[Task, Packing, int]]:
    """The lines of the table: task, packing, workers that share the experts."""
    single: list[tuple[Task, Packing, int]] = [(task, packing, 1) for task in ("inference", "training") for packing in BITS]
    return [*single, ("training", "bfloat16", WORKERS)]


LEFT_OUT = (
    "By arithmetic, not measured. Left out: what CUDA and its libraries hold (about 1 GB), gaps between blocks, attention's "
    "masks, the audio encoder's and the projector's passes, CTC."
)


def downloads(model: ModelConfig) -> list[str]:
    """What each frozen part takes on the disk, and whether it is there; the network is not asked for weights."""
    counts = {part.name: part.parameters for part in count_parts(model)}
    config = source_config(model.encoder)
    if isinstance(config, WhisperConfig):  # its files hold the decoder as well
        with torch.device("meta"):
            counts["encoder"] = sum(p.numel() for p in WhisperForConditionalGeneration(config).parameters())
    parts = ((model.encoder, counts["encoder"]), (model.backbone, counts["backbone"]))
    return [f"{source.name}: {_state(source, parameters)}" for source, parameters in parts if parameters]


def _state(source: EncoderConfig | BackboneConfig, parameters: int) -> str:
    if Path(source.name).is_dir():
        size = sum(path.stat().st_size for path in Path(source.name).glob("*.safetensors"))
        return f"a folder here, {size / 1e9:.2f} GB"
    if any(_cached(source, file) for file in ("model.safetensors", "model.safetensors.index.json")):
        return "in the hub's cache, at least in part"
    dtype = STORED.get(source.name) or source_config(source).dtype or torch.float32
    return f"to be fetched, at least {parameters * dtype.itemsize / 1e9:.1f} GB ({str(dtype).removeprefix('torch.')})"


def _cached(source: EncoderConfig | BackboneConfig, file: str) -> bool:
    return isinstance(try_to_load_from_cache(source.name, file, revision=source.revision), str)
