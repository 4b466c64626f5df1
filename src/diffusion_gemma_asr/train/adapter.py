"""The stage `adapter`: trains projector and LoRA on a frozen encoder and a frozen backbone."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..checkpoint.load import load_adapter, read_adapter
from ..checkpoint.parts import load_backbone, load_encoder, load_tokenizer
from ..checkpoint.save import save_checkpoint
from ..data.augment import log_uniform, mask_bands, warp_frequencies, with_others
from ..data.context import drawn_context
from ..data.features import FeatureCache
from ..data.manifest import Utterance
from ..denoise.clip import Decoded
from ..denoise.decode import decode, draft_clips
from ..denoise.options import DecodeOptions
from ..errors import DataError
from ..evaluate.metrics import error_rate
from ..model.lengths import length_mask
from ..model.model import DiffusionGemmaASR
from ..model.projector import AudioProjector
from ..model.prompt import AUTO
from . import fingerprint
from .compiled import compile_layers
from .decoder_start import read_acoustic, start_from_whisper
from .loop import Metrics, compute_dtype, run, step_seed
from .monitor import report, report_drafts
from .objective import SpeechBatch, losses, text_batch
from .recipe import LossRecipe, Recipe
from .shard import follow, leading, shard_experts
from .speech import SpeechData
from .workers import rank

MARGIN = 12  # canvases are up to this many tokens longer than the longest transcript


def build_model(
    recipe: Recipe, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, lora: bool = True
) -> DiffusionGemmaASR:
    """Builds the model of a recipe, with a newly initialised projector and LoRA.

    Args:
        recipe: names the frozen parts.
        device: of all weights.
        dtype: of the frozen parts; trained weights are float32.
        lora: whether to add LoRA to the backbone.

    Returns:
        the model, its frozen parts loaded.

    Raises:
        CheckpointError: a frozen part cannot be loaded.
    """
    config, train, device = recipe.model, recipe.train, torch.device(device)
    encoder = load_encoder(config.encoder, dtype=dtype, device=device)
    first_place = "cpu" if train.shard else device  # a share of the experts has room on the device, perhaps not all of them
    backbone = load_backbone(config.backbone, dtype=dtype, device=first_place, quantization=train.quantization)
    if train.shard:
        shard_experts(backbone, device)
        backbone.to(device)
    if train.quantization:
        backbone.recompute_experts()
    tokenizer = load_tokenizer(config.backbone)
    torch.manual_seed(recipe.train.seed)
    if lora:
        backbone.add_lora(**asdict(config.lora))
    scale = backbone.embedding_scale()
    projector = AudioProjector(config.projector, encoder.hidden_size, backbone.hidden_size, scale).to(device)
    if train.decoder is not None and projector.decoder is not None:
        start_from_whisper(projector.decoder, train.decoder, backbone.head.weight, tokenizer)
    if train.acoustic is not None:
        projector.load_state_dict(projector.state_dict() | read_acoustic(train.acoustic))
    model = DiffusionGemmaASR(config, encoder, projector, backbone, tokenizer)
    for parameter in model.trained().values():
        parameter.data = parameter.data.float()
    return model


def train_adapter(recipe: Recipe, folder: str | Path, device: str | torch.device = "cpu") -> Path:
    """Trains an adapter, resuming an interrupted run, and writes a checkpoint.

    Args:
        recipe: model, data and options.
        folder: of the run; gets log.jsonl, state.pt, frames/ and checkpoint/.
        device: to compute on.

    Returns:
        the checkpoint's folder, an argument for `load()`.

    Raises:
        AsrError: a model part, a data list or a saved state cannot be used.
    """
    folder, device = Path(folder), torch.device(device)
    model = build_model(recipe, device, compute_dtype(recipe.train.dtype, device))
    if device.type == "cpu" and recipe.losses.uses_backbone:
        model.backbone.float()  # bfloat16 logits are coarse; they suffice for CTC alone, a third faster
    if recipe.train.start_from is not None:
        load_adapter(model, recipe.train.start_from)
    if recipe.train.compile:
        compile_layers(model.backbone)
    trainer = AdapterTrainer(recipe, model, folder)
    trained = learning(model, recipe.losses)

    def evaluate(step: int) -> Metrics:
        if step in recipe.train.keep:
            save_checkpoint(model.eval(), folder / f"checkpoint-{step}")
        return trainer.evaluate(step)

    run(trained, trainer.loss_of, folder, recipe.train, evaluate, trainer.settings, trainer.assist)
    if rank() == 0:
        save_checkpoint(model.eval(), folder / "checkpoint")
    return folder / "checkpoint"


def learning(model: DiffusionGemmaASR, weights: LossRecipe) -> dict[str, nn.Parameter]:
    """The parameters that get a gradient from the losses, by name; with CTC alone these are the projector's."""
    return {n: p for n, p in model.trained().items() if weights.uses_backbone or n.startswith("projector.")}


class AdapterTrainer:
    """The callbacks of the training loop for an adapter: the loss of a step, and evaluation.

    Args:
        recipe: data and options.
        model: see `build_model`; its device is the one to compute on.
        folder: of the run.

    Attributes:
        settings: fingerprints of everything that the run depends on, by name.
        weights: of the losses.

    Raises:
        DataError: a data list cannot be used, or every transcript is too long for CTC.
    """

    def __init__(self, recipe: Recipe, model: DiffusionGemmaASR, folder: Path):
        self.recipe, self.model, self.weights = recipe, model, recipe.losses
        self.dtype = compute_dtype(recipe.train.dtype, model.device)
        self.console = Console(stderr=True, quiet=rank() > 0)
        self.data = SpeechData(recipe.data, recipe.train, recipe.model.languages, model.encoder, folder)
        self.targets = [model.prompts.target(text) for text in self.data.texts]
        if recipe.losses.ctc > 0:
            self._report_too_long()
        start = recipe.train.start_from
        silence = model.encoder.silence_s
        self.settings = fingerprint.of_recipe(recipe) | {
            "encoder": fingerprint.of_tensors(model.encoder.state_dict()) + (f" with {silence:g} s" if silence else ""),
            "backbone": fingerprint.of_tensors({n: p for n, p in model.backbone.state_dict().items() if "lora_" not in n}),
            "data": fingerprint.of_utterances(self.data.utterances),
            "start_from": "nothing" if start is None else fingerprint.of_tensors(read_adapter(start)),
        }

    def _report_too_long(self) -> None:
        """Warns of transcripts that need more audio tokens than there are: their CTC loss has no gradient.

        CTC needs an audio token for each token, and one for a blank between two equal ones.
        """
        slots = [self.model.projector.output_length(self.data.cache.length(u)) for u in self.data.utterances]
        needed = [len(row) - 1 + sum(a == b for a, b in pairwise(row)) for row in self.targets]
        too_long = [i for i, (most, need) in enumerate(zip(slots, needed, strict=True)) if need > most]
        if not too_long:
            return
        first = too_long[0]
        message = (
            f"{len(too_long)} of {len(slots)} transcripts do not fit into their sound, first "
            f"{self.data.utterances[first].audio_filepath}: {needed[first]} audio tokens are needed, {slots[first]} are "
            "there; correct the text, or give shorter projector.strides"
        )
        if len(too_long) == len(slots):
            raise DataError(message)
        self.console.print(f"warning: {message}", style="bold yellow", markup=False)

    def batch(
        self,
        chosen: Sequence[int],
        margin: int = 0,
        unnamed: Sequence[bool] | None = None,
        contexts: Sequence[str] | None = None,
    ) -> SpeechBatch:
        """A batch of training utterances.

        Args:
            chosen: indices of the utterances.
            margin: see `text_batch`.
            unnamed: see `text_batch`.
            contexts: see `text_batch`.
        """
        utterances = [self.data.utterances[i] for i in chosen]
        frames, lengths = self.data.cache.batch(utterances)
        slots = self.model.projector.output_length(lengths).tolist()
        targets, languages = [self.targets[i] for i in chosen], [u.language for u in utterances]
        text = text_batch(self.model.prompts, slots, targets, languages, margin, unnamed, contexts)
        return SpeechBatch(frames, lengths, text)

    def loss_of(self, step: int, micro: int) -> tuple[Tensor, Metrics]:
        """The weighted loss of one micro-batch, and its parts."""
        batch = self.spoken(step, micro)
        with computing_in(self.dtype, self.model.device):
            parts = losses(self.model, batch, self.weights)
            return parts.total(self.weights), parts.figures()

    def spoken(self, step: int, micro: int, augment: bool = True, named: bool = False) -> SpeechBatch:
        """The utterances of one micro-batch on the model's device, augmented unless that is turned off.

        With `named`, all prompts name the language.
        """
        train = self.recipe.train
        self.model.train()
        rng = random.Random(step_seed(train.seed, step, micro))
        chosen = self.data.mixture.at(step * train.accumulation + micro)
        margin = rng.randint(0, MARGIN)
        unnamed = [rng.random() < train.unnamed and not named for _ in chosen]
        contexts = [drawn_context(i, self.data.texts, rng) if rng.random() < train.context else "" for i in chosen]
        batch = self.batch(chosen, margin, unnamed, contexts)
        if augment:
            batch = replace(batch, frames=self.augmented(batch.frames, batch.frame_lengths, chosen))
        return batch.to(self.model.device)

    def augmented(self, frames: Tensor, lengths: Tensor, chosen: Sequence[int]) -> Tensor:
        """Frames (B, F, D) with lengths (B,) of the chosen utterances, changed at random as the recipe says."""
        train, unheard = self.recipe.train, self.data.unheard[list(chosen)]
        changed = frames
        if train.warp != (1, 1):
            changed = warp_frequencies(changed, log_uniform(train.warp, len(frames)))
        if train.others != (0, 0):
            low, high = train.others
            mixed = with_others(changed, low + (high - low) * torch.rand(len(frames)))
            changed = mixed * length_mask(lengths, frames.shape[1])[..., None].to(mixed)
        changed = mask_bands(changed, lengths, train.spec_augment)
        return torch.where(unheard[:, None, None], frames.to(changed), changed)

    def evaluate(self, step: int) -> Metrics:
        """Transcribes the dev lists, prints some transcripts beside their references, and computes error rates."""
        self.model.eval()
        with leading(self.model.backbone):
            return self._judge(step)

    def assist(self) -> None:
        """What the other workers do while the first one evaluates."""
        follow(self.model.backbone)

    def _judge(self, step: int) -> Metrics:
        figures: Metrics = {}
        for name, code, rows in self.data.dev_by_language():
            title, references = f"step {step} · {name}", [u.text for u in rows]
            if not self.recipe.losses.uses_backbone:
                drafts = draft_cached(self.model, rows, self.data.cache)
                figures[f"error_rate_draft_{name}"] = report_drafts(self.console, title, references, drafts, code)
                continue
            decoded = transcribe_cached(self.model, rows, self.data.cache)
            scores = report(self.console, title, references, decoded, code)
            if self.model.config.finds_language:
                auto = transcribe_cached(self.model, rows, self.data.cache, AUTO)
                scores["language"] = sum(d.language == code for d in auto) / len(rows)
                scores["error_rate_auto"] = error_rate(references, [d.text for d in auto], code)
            figures |= {f"{key}_{name}": round(value, 4) for key, value in scores.items()}
        return figures


@contextmanager
def computing_in(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Autocast to `dtype`, off for float32.

    In bfloat16 on a CPU it also replaces PyTorch's fused attention by plain matrix products, which are twice as fast over a
    projector's slots.
    """
    unfused = device.type == "cpu" and dtype == torch.bfloat16
    with (
        torch.autocast(device.type, dtype, enabled=dtype != torch.float32),
        sdpa_kernel(SDPBackend.MATH) if unfused else nullcontext(),
    ):
        yield


@torch.no_grad()
def draft_cached(model: DiffusionGemmaASR, utterances: Sequence[Utterance], cache: FeatureCache) -> list[str]:
    """Greedy CTC drafts, from cached encoder frames.

    Args:
        model: in eval mode.
        utterances: to transcribe.
        cache: frames of all utterances.

    Returns:
        a text for each utterance.
    """
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
    """Transcribes from cached encoder frames.

    Args:
        model: in eval mode.
        utterances: to transcribe.
        cache: frames of all utterances.
        language: a code, or AUTO; None uses the language of each utterance.
        batch_size: clips in a batch.

    Returns:
        a result for each utterance.
    """
    options = DecodeOptions(language=language or AUTO)
    decoded: list[Decoded] = []
    for i in range(0, len(utterances), batch_size):
        batch = utterances[i : i + batch_size]
        frames, lengths = (part.to(model.device) for part in cache.batch(batch))
        clips = draft_clips(model, model.project(frames, lengths))
        languages = [u.language for u in batch] if language is None else None
        decoded += decode(model, clips, options, batch_size=batch_size, languages=languages)
    return decoded
