"""Trains what a checkpoint holds, projector and LoRA, on a frozen encoder and a frozen backbone, as a recipe says."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..checkpoint.load import load_adapter, read_adapter
from ..checkpoint.parts import load_backbone, load_encoder, load_tokenizer
from ..checkpoint.save import save_checkpoint
from ..data.augment import mask_bands
from ..data.context import drawn_context
from ..data.features import FeatureCache
from ..data.manifest import Utterance
from ..denoise.decode import Decoded, DecodeOptions, decode, draft_clips
from ..errors import DataError
from ..evaluate.metrics import error_rate
from ..model.lengths import strided_length
from ..model.model import DiffusionGemmaASR
from ..model.projector import AudioProjector
from ..model.prompt import AUTO
from . import fingerprint
from .loop import Metrics, compute_dtype, run, step_seed
from .monitor import report, report_drafts
from .objective import SpeechBatch, losses, text_batch
from .recipe import LossRecipe, Recipe
from .speech import SpeechData
from .workers import rank

MARGIN = 12  # canvases are up to this many tokens longer than the longest transcript


def build_model(
    recipe: Recipe, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, lora: bool = True
) -> DiffusionGemmaASR:
    """The model of a recipe with a new projector and LoRA.

    Args:
        recipe: names the frozen parts.
        device: of all weights.
        dtype: of the frozen parts; trained weights are float32.
        lora: put LoRA on the backbone.

    Raises:
        CheckpointError: a frozen part cannot be loaded.
    """
    config = recipe.model
    encoder = load_encoder(config.encoder, dtype=dtype, device=device)
    backbone = load_backbone(config.backbone, dtype=dtype, device=device)
    tokenizer = load_tokenizer(config.backbone)
    torch.manual_seed(recipe.train.seed)
    if lora:
        backbone.add_lora(config.lora.rank, config.lora.alpha, config.lora.dropout)
    scale = backbone.embedding_scale()
    projector = AudioProjector(config.projector, encoder.hidden_size, backbone.hidden_size, scale).to(device)
    model = DiffusionGemmaASR(config, encoder, projector, backbone, tokenizer)
    for parameter in model.trained().values():
        parameter.data = parameter.data.float()
    return model


def train_adapter(recipe: Recipe, folder: str | Path, device: str | torch.device = "cpu") -> Path:
    """Trains an adapter, resuming what a killed run left, and writes a checkpoint.

    Args:
        recipe: model, data and options.
        folder: of the run; gets log.jsonl, state.pt, frames/ and checkpoint/.
        device: where to compute.

    Returns:
        the checkpoint's folder, as `load()` takes it.

    Raises:
        AsrError: a part, a list or a saved state cannot be used; one line says what, and what to do.
    """
    folder, place = Path(folder), torch.device(device)
    model = build_model(recipe, place, compute_dtype(recipe.train.dtype, place))
    if place.type == "cpu" and recipe.losses.uses_backbone:
        model.backbone.float()  # there is room, and logits in bfloat16 are coarse; they do for CTC alone, a third faster
    if recipe.train.start_from is not None:
        load_adapter(model, recipe.train.start_from)
    trainer = AdapterTrainer(recipe, model, folder)
    trained = learning(model, recipe.losses)
    run(trained, trainer.loss_of, folder, recipe.train, trainer.evaluate, trainer.settings)
    if rank() == 0:
        save_checkpoint(model.eval(), folder / "checkpoint")
    return folder / "checkpoint"


def learning(model: DiffusionGemmaASR, weights: LossRecipe) -> dict[str, nn.Parameter]:
    """The parameters that the losses reach, by name: CTC alone reaches the projector's."""
    return {n: p for n, p in model.trained().items() if weights.uses_backbone or n.startswith("projector.")}


class AdapterTrainer:
    """The data of a recipe and what the loop asks of it: the loss of a step, and a judgement now and then.

    Args:
        recipe: data and options.
        model: built for the recipe; on the device where to compute.
        folder: of the run.

    Attributes:
        settings: what the run depends on.

    Raises:
        DataError: a list cannot be used, or none of its transcripts fits into its sound.
    """

    def __init__(self, recipe: Recipe, model: DiffusionGemmaASR, folder: Path):
        self.recipe, self.model = recipe, model
        self.dtype = compute_dtype(recipe.train.dtype, model.device)
        self.console = Console(stderr=True, quiet=rank() > 0)
        self.data = SpeechData(recipe.data, recipe.train, recipe.model.languages, model.encoder, folder)
        self.targets = [model.prompts.target(text) for text in self.data.texts]
        if recipe.losses.ctc > 0:
            self._report_crowded()
        start = recipe.train.start_from
        self.settings = fingerprint.of_recipe(recipe) | {
            "encoder": fingerprint.of_tensors(model.encoder.state_dict()),
            "backbone": fingerprint.of_tensors({n: p for n, p in model.backbone.state_dict().items() if "lora_" not in n}),
            "data": fingerprint.of_utterances(self.data.utterances),
            "start_from": "nothing" if start is None else fingerprint.of_tensors(read_adapter(start)),
        }

    def _report_crowded(self) -> None:
        """Says how many transcripts have more tokens than CTC has audio tokens for; these teach it nothing."""
        strides = self.model.projector.strides
        lengths = [strided_length(self.data.cache.length(u), strides) for u in self.data.utterances]
        needed = [len(row) - 1 + sum(a == b for a, b in pairwise(row)) for row in self.targets]
        rows = zip(self.data.utterances, needed, lengths, strict=True)
        if not (crowded := [(u, wanted, there) for u, wanted, there in rows if wanted > there]):
            return
        utterance, wanted, there = crowded[0]
        message = (
            f"{len(crowded)} of {len(lengths)} transcripts do not fit into their sound, first {utterance.audio_filepath}: "
            f"{wanted} audio tokens are needed, {there} are there; correct the text, or give shorter projector.strides"
        )
        if len(crowded) == len(lengths):
            raise DataError(message)
        self.console.print(f"warning: {message}", style="bold yellow", markup=False)

    def batch(
        self,
        chosen: Sequence[int],
        margin: int = 0,
        unnamed: Sequence[bool] | None = None,
        contexts: Sequence[str] | None = None,
    ) -> SpeechBatch:
        """The chosen utterances, padded; see `text_batch`."""
        utterances = [self.data.utterances[i] for i in chosen]
        frames, lengths = self.data.cache.batch(utterances)
        slots = self.model.projector.output_length(lengths).tolist()
        targets, languages = [self.targets[i] for i in chosen], [u.language for u in utterances]
        text = text_batch(self.model.prompts, slots, targets, languages, margin, unnamed, contexts)
        return SpeechBatch(frames, lengths, text)

    def loss_of(self, step: int, micro: int) -> tuple[Tensor, Metrics]:
        """The weighted loss of one micro-batch, and its parts."""
        t = self.recipe.train
        self.model.train()
        rng = random.Random(step_seed(t.seed, step, micro))
        chosen = self.data.mixture.at(step * t.accumulation + micro)
        margin = rng.randint(0, MARGIN)
        unnamed = [rng.random() < t.unnamed for _ in chosen]
        contexts = [drawn_context(i, self.data.texts, rng) if rng.random() < t.context else "" for i in chosen]
        batch = self.batch(chosen, margin, unnamed, contexts)
        masked = mask_bands(batch.frames, batch.frame_lengths, t.spec_augment)
        batch = replace(batch, frames=masked).to(self.model.device)
        with computing_in(self.dtype, self.model.device):
            parts = losses(self.model, batch, self.recipe.losses)
            return parts.total(self.recipe.losses), parts.figures()

    def evaluate(self, step: int) -> Metrics:
        """Transcribes the dev lists, prints some transcripts beside their references, and judges them."""
        self.model.eval()
        figures: Metrics = {}
        for name, code, rows in self.data.dev_by_language():
            title, references = f"step {step} · {name}", [u.text for u in rows]
            if not self.recipe.losses.uses_backbone:
                drafts = draft_cached(self.model, rows, self.data.cache)
                figures[f"error_rate_draft_{name}"] = report_drafts(self.console, title, references, drafts, code)
                continue
            decoded = transcribe_cached(self.model, rows, self.data.cache)
            judged = report(self.console, title, references, decoded, code)
            if self.model.config.finds_language:
                auto = transcribe_cached(self.model, rows, self.data.cache, AUTO)
                judged["language"] = sum(d.language == code for d in auto) / len(rows)
                judged["error_rate_auto"] = error_rate(references, [d.text for d in auto], code)
            figures |= {f"{key}_{name}": round(value, 4) for key, value in judged.items()}
        return figures


@contextmanager
def computing_in(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Autocast to `dtype`; in float32 nothing is cast.

    On a processor PyTorch's fused attention over a projector's slots takes twice as long in bfloat16 as plain products do,
    which then take its place.
    """
    plain = device.type == "cpu" and dtype == torch.bfloat16
    with (
        torch.autocast(device.type, dtype, enabled=dtype != torch.float32),
        sdpa_kernel(SDPBackend.MATH) if plain else nullcontext(),
    ):
        yield


@torch.no_grad()
def draft_cached(model: DiffusionGemmaASR, utterances: Sequence[Utterance], cache: FeatureCache) -> list[str]:
    """Greedy CTC drafts of utterances whose frozen frames are cached, in their order."""
    frames, lengths = (part.to(model.device) for part in cache.batch(utterances))
    drafts = model.greedy.drafts(model.project(frames, lengths))
    return [model.text([token.id for token in draft]) for draft in drafts]


@torch.no_grad()
def transcribe_cached(
    model: DiffusionGemmaASR,
    utterances: Sequence[Utterance],
    cache: FeatureCache,
    language: str | None = None,
    batch_size: int = 25,
) -> list[Decoded]:
    """Transcripts of utterances whose frozen frames are cached, in their order.

    Args:
        model: in eval mode.
        utterances, cache: the cache holds all of them.
        language: a code, or AUTO; None is each one's own.
        batch_size: clips that are taken at once.
    """
    options = DecodeOptions(language=language or AUTO)
    decoded: list[Decoded] = []
    for i in range(0, len(utterances), batch_size):
        batch = utterances[i : i + batch_size]
        frames, lengths = (part.to(model.device) for part in cache.batch(batch))
        clips = draft_clips(model, model.project(frames, lengths), options)
        languages = [u.language for u in batch] if language is None else None
        decoded += decode(model, clips, options, batch_size=batch_size, languages=languages)
    return decoded
