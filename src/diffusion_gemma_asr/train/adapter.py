"""Stage 4 of the mini model, and all training of the real composition: projector and LoRA on frozen parts, by a recipe."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..backbone import Backbone
from ..checkpoint import load_adapter, load_tokenizer, save_checkpoint
from ..data.augment import mask_bands
from ..data.batches import UNLIMITED, Mixture, tempered
from ..data.context import drawn_context
from ..data.features import FeatureCache
from ..data.manifest import Utterance
from ..data.phonemes import pronunciations
from ..data.sources import read_source
from ..data.synth import read_sound
from ..data.text import plain_text
from ..decoding import Decoded, Start
from ..draft_prior import DRAFT_WEIGHT
from ..ear import Ear, load_encoder
from ..language_files import load_lexicon, load_lm
from ..model import DiffusionGemmaASR
from ..objective import SpeechBatch, text_batch
from ..projector import new_projector
from ..prompt import AUTO
from ..recipe import DataRecipe, LossRecipe, Recipe, TrainRecipe, load_recipe
from ..speller import alphabet_size
from .loop import LoopOptions, Metrics, run, step_seed
from .monitor import error_rate, report, report_drafts
from .workers import rank, wait_for_all, workers

MARGIN = 12  # canvases are up to this many tokens longer than the longest transcript


def build_model(
    recipe: Recipe, device: str = "cpu", dtype: torch.dtype = torch.float32, lora: bool = True
) -> DiffusionGemmaASR:
    """The model of a recipe with a new projector and LoRA: frozen parts in `dtype`, trained ones in float32."""
    encoder = load_encoder(recipe.encoder.name, revision=recipe.encoder.revision, dtype=dtype, device=device)
    backbone = Backbone.from_pretrained(recipe.backbone.name, revision=recipe.backbone.revision, dtype=dtype, device=device)
    tokenizer = load_tokenizer(recipe.backbone)
    torch.manual_seed(recipe.train.seed)
    if lora:
        backbone.add_lora(recipe.lora.rank, recipe.lora.alpha, recipe.lora.dropout)
    scale = backbone.embedding_scale() if recipe.projector.scaled else None
    characters = alphabet_size(recipe.projector, tokenizer)
    lexicon = load_lexicon(recipe.lm, Path())
    written = characters, 0 if lexicon is None else len(lexicon)
    projector = new_projector(recipe.projector, encoder.hidden_size, backbone.hidden_size, scale, *written)
    parts = encoder, projector.to(device), backbone, tokenizer
    start: Start = "draft" if recipe.losses.draft_share > 0 else "noise"
    drafts, told = recipe.losses.ctc > 0 or spells(recipe.losses), recipe.model
    trained = told.languages, told.finds_language, told.reads_context
    weight, lm = DRAFT_WEIGHT if start == "draft" else 0.0, load_lm(recipe.lm, Path(), tokenizer)
    model = DiffusionGemmaASR(*parts, drafts, start, *trained, weight, lm, lexicon)
    for parameter in model.trained().values():
        parameter.data = parameter.data.float()
    return model


@dataclass(frozen=True)
class Examples:
    """Utterances with their frozen frames and target tokens."""

    utterances: Sequence[Utterance]
    cache: FeatureCache
    targets: list[list[int]]
    phonemes: list[list[int]]  # or none

    def batch(
        self, model: DiffusionGemmaASR, chosen: Sequence[int], margin: int, unnamed: Sequence[bool] | None = None,
        contexts: Sequence[str] | None = None,
    ) -> SpeechBatch:  # fmt: skip
        """The chosen rows, padded; see `text_batch`."""
        utterances = [self.utterances[i] for i in chosen]
        frames, lengths = self.cache.batch(utterances)
        text = text_batch(
            model.prompts,
            model.projector.output_length(lengths).tolist(),
            [self.targets[i] for i in chosen],
            [u.language for u in utterances],
            margin,
            unnamed,
            contexts,
        )
        return SpeechBatch(frames, lengths, text, [self.phonemes[i] for i in chosen] if self.phonemes else ())


def frame_cache(folder: Path, encoder: Ear, utterances: Sequence[Utterance]) -> FeatureCache:
    """Frames (n, hidden) of the frozen encoder for all utterances, computed once and kept in `folder`."""
    device = next((p.device for p in encoder.parameters()), torch.device("cpu"))

    def compute(batch: list[Utterance]) -> list[np.ndarray]:
        mel, lengths = encoder.features([read_sound(u.audio_filepath) for u in batch])
        with torch.no_grad():
            frames, frame_lengths = encoder(mel.to(device), lengths.to(device))
        return [row[:n].float().cpu().numpy() for row, n in zip(frames, frame_lengths.tolist(), strict=True)]

    FeatureCache.build(folder, utterances, encoder.hidden_size, compute, worker=rank(), workers=workers())
    wait_for_all()
    return FeatureCache(folder)


class SpeechData:
    """What a recipe trains on and is judged by, with the frozen encoder's frames.

    Attributes:
        utterances, texts: to train on, and what they say as the recipe wants it written.
        dev: lists to judge by, by name.
        cache: frames of all of them.
        mixture: which utterances make up a batch.
    """

    def __init__(self, data: DataRecipe, train: TrainRecipe, encoder: Ear, folder: Path):
        def read(source: str, split: str) -> list[Utterance]:
            # A folder of sounds does not say its language: it is the recipe's first.
            return read_source(source, data.languages, data.max_duration_s, None, data.languages[0], split)

        lists = [first_of(read(item.manifest, "train"), item.first) for item in data.train]
        self.dev = {
            "/".join(Path(source).with_suffix("").parts[-2:]): read(source, "validation")[: train.monitor_samples]
            for source in data.dev
        }
        everything = [u for rows in [*lists, *self.dev.values()] for u in rows]
        self.cache = frame_cache(Path(data.cache_dir or folder / "frames"), encoder, everything)
        self.utterances = [u for rows in lists for u in rows]
        plain = data.transcript == "plain"
        self.texts = [plain_text(u.text, u.language) if plain else u.text.strip() for u in self.utterances]
        sizes = [len(rows) for rows in lists]
        factors = [1.0] * len(sizes) if data.temperature is None else tempered(sizes, data.temperature)
        weights = [factor * item.weight for factor, item in zip(factors, data.train, strict=True)]
        self.mixture = Mixture(
            sizes, weights,
            [self.cache.length(u) for u in self.utterances], train.batch_frames or UNLIMITED, train.batch_size, train.seed,
        )  # fmt: skip

    def dev_by_language(self) -> list[tuple[str, str, list[Utterance]]]:
        """The lists to judge by, those in several languages in parts: name, code, utterances."""
        found = []
        for name, rows in self.dev.items():
            codes = sorted({u.language for u in rows})
            for code in codes:
                part = name if len(codes) == 1 else f"{name}/{code}"
                found.append((part, code, [u for u in rows if u.language == code]))
        return found


def first_of(utterances: list[Utterance], count: int | None) -> list[Utterance]:
    """So many utterances out of a shuffle that is always the same, so that a larger count holds a smaller one's; None: all,
    as they come."""
    if count is None:
        return utterances
    return random.Random(0).sample(utterances, len(utterances))[:count]


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """Of the computation; "auto" is bfloat16 on a GPU that has it, else float32: few processors multiply bfloat16 fast."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


@contextmanager
def computing_in(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Autocast to `dtype`; in float32 nothing is cast.

    On a processor PyTorch's fused attention takes twice as long in bfloat16 as plain products do, which then take its place.
    """
    plain = device.type == "cpu" and dtype == torch.bfloat16
    with (
        torch.autocast(device.type, dtype, enabled=dtype != torch.float32),
        sdpa_kernel(SDPBackend.MATH) if plain else nullcontext(),
    ):
        yield


def train_from_recipe(path: str | Path, folder: str | Path | None = None, device: str | None = None) -> Path:
    """Trains an adapter as a recipe file (or the recipe of that name) says; see `train_adapter`."""
    recipe = load_recipe(path)
    return train_adapter(recipe, folder or Path("runs") / recipe.name, device)


def train_adapter(recipe: Recipe, folder: str | Path, device: str | None = None, drafts: bool | None = None) -> Path:
    """Trains an adapter, resuming what a killed run left, and writes a checkpoint.

    Args:
        folder: of the run; gets log.jsonl, state.pt, frames/ and checkpoint/.
        device: "cpu" or "cuda"; by default the GPU where there is one.
        drafts: whether canvases are as long as the CTC draft suggests; by default if CTC has a weight.

    Returns:
        the checkpoint's folder, as `load()` takes it.
    """
    folder = Path(folder)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = compute_dtype(recipe.train.dtype, place)
    model = build_model(recipe, str(place), dtype)
    if place.type == "cpu" and reads(recipe.losses):
        model.backbone.float()  # there is room, and logits in bfloat16 are coarse; they do for CTC alone, a third faster
    if drafts is not None:
        model.drafts = drafts
    if recipe.train.start_from is not None:
        load_adapter(model, recipe.train.start_from)
    trainer = AdapterTrainer(recipe, model, folder, dtype)
    run(learning(model, recipe.losses), trainer.loss_of, folder, loop_options(recipe.train), trainer.evaluate)
    if rank() == 0:
        save_checkpoint(model.eval(), folder / "checkpoint", recipe.model)
    return folder / "checkpoint"


def reads(losses: LossRecipe) -> bool:
    """Whether the backbone's layers take part; CTC alone needs its lm_head and no more."""
    return losses.diffusion > 0 or losses.autoregressive > 0


def spells(losses: LossRecipe) -> bool:
    """Whether the speller learns."""
    return losses.spelling > 0 or losses.phonemes > 0


def learning(model: DiffusionGemmaASR, losses: LossRecipe) -> dict[str, nn.Parameter]:
    """The parameters that the losses train, by name: the speller has a loss of its own, and all else the others."""
    speller, others = spells(losses), reads(losses) or losses.ctc > 0
    return {n: p for n, p in model.trained().items() if (speller if n.startswith("projector.speller.") else others)}


def loop_options(t: TrainRecipe) -> LoopOptions:
    """A recipe's schedule as the training loop takes it."""
    return LoopOptions(
        steps=t.steps, lr=t.lr, optimizer=t.optimizer, betas=t.betas, weight_decay=t.weight_decay,
        warmup_steps=t.warmup_steps, min_lr_ratio=t.min_lr_ratio, clip=t.clip, accumulation=t.accumulation, seed=t.seed,
        save_every=t.save_every, evaluate_every=t.eval_every,
    )  # fmt: skip


class AdapterTrainer:
    """The data of a recipe and what the loop asks of it: the loss of a step, and a judgement now and then."""

    def __init__(self, recipe: Recipe, model: DiffusionGemmaASR, folder: Path, dtype: torch.dtype):
        self.recipe, self.model, self.dtype = recipe, model, dtype
        self.console = Console(stderr=True)
        self.data = SpeechData(recipe.data, recipe.train, model.encoder, folder)
        targets = [model.prompts.target(text) for text in self.data.texts]
        self.examples = Examples(self.data.utterances, self.data.cache, targets, self._phonemes())

    def _phonemes(self) -> list[list[int]]:
        """Of each utterance to train on, in classes; none where no loss asks for them."""
        lexicon = self.model.lexicon
        if lexicon is None or self.recipe.losses.phonemes == 0:
            return []
        rows = self.data.utterances
        return [lexicon.classes_of(said, u.language) for u, said in zip(rows, pronunciations(rows), strict=True)]

    def loss_of(self, step: int, micro: int) -> tuple[Tensor, Metrics]:
        """The weighted loss of one micro-batch, and its parts."""
        t = self.recipe.train
        self.model.train()
        rng = random.Random(step_seed(t.seed, step, micro))
        chosen = self.data.mixture.at(step * t.accumulation + micro)
        margin = rng.randint(0, MARGIN)
        unnamed = [rng.random() < t.unnamed for _ in chosen]
        contexts = [drawn_context(i, self.data.texts, rng) if rng.random() < t.context else "" for i in chosen]
        batch = self.examples.batch(self.model, chosen, margin, unnamed, contexts)
        masked = mask_bands(batch.frames, batch.frame_lengths, t.spec_augment)
        batch = replace(batch, frames=masked).to(self.model.device)
        return weighted_loss(self.model, batch, self.recipe, self.model.device, self.dtype)

    def evaluate(self, step: int) -> Metrics:
        """Transcribes the dev lists, prints some transcripts beside their references, and judges them."""
        self.model.eval()
        figures: Metrics = {}
        for name, code, rows in self.data.dev_by_language():
            references = [u.text for u in rows]
            if not reads(self.recipe.losses):
                drafts = draft_cached(self.model, rows, self.data.cache)
                figures[f"wer_draft_{name}"] = report_drafts(self.console, step, name, references, drafts, code)
                continue
            decoded = transcribe_cached(self.model, rows, self.data.cache)
            judged = report(self.console, step, name, references, decoded, code)
            if self.model.finds_language:
                found = transcribe_cached(self.model, rows, self.data.cache, AUTO)
                judged["language"] = sum(d.language == code for d in found) / len(rows)
                judged["wer_auto"] = error_rate(references, [d.text for d in found], code)
            figures |= {f"{key}_{name}": round(value, 4) for key, value in judged.items()}
        return figures


def weighted_loss(
    model: DiffusionGemmaASR, batch: SpeechBatch, recipe: Recipe, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Metrics]:
    """The losses of a batch with the recipe's weights, computed in `dtype`, and each loss on its own for the log."""
    weights, found = recipe.losses, {}
    with computing_in(dtype, device):
        if reads(weights):
            losses, found["ctc"] = model.losses(
                batch, weights.self_conditioning, weights.full_noise, weights.autoregressive > 0, weights.draft_share,
                weights.unroll,
            )  # fmt: skip
            found |= losses.__dict__
        elif weights.ctc > 0:
            found["ctc"] = model.ctc_loss(batch)
        if spells(weights):
            found |= model.spelling_losses(batch)
        weighted = [weight * loss for name, loss in found.items() if (weight := getattr(weights, name, 0.0)) > 0]
        total = torch.stack(weighted).sum()
    return total, {name: float(value.detach()) for name, value in found.items()}


@torch.no_grad()
def draft_cached(model: DiffusionGemmaASR, utterances: Sequence[Utterance], cache: FeatureCache) -> list[str]:
    """Greedy CTC drafts of utterances whose frozen frames are cached, in their order: the speller's, if there is one."""
    frames, lengths = (part.to(model.device) for part in cache.batch(utterances))
    if model.projector.speller is not None:
        return model.alphabet.read(model.projector.speller.hear(frames, lengths).characters, lengths)
    slots, lengths = model.projector(frames, lengths)
    return [model.text([token.id for token in draft]) for draft in model.draft(slots, lengths)]


@torch.no_grad()
def transcribe_cached(
    model: DiffusionGemmaASR, utterances: Sequence[Utterance], cache: FeatureCache, language: str | None = None,
    batch_size: int = 25,
) -> list[Decoded]:  # fmt: skip
    """Transcripts of utterances whose frozen frames are cached, in their order; `language` None: each one's own."""
    decoded: list[Decoded] = []
    for i in range(0, len(utterances), batch_size):
        batch = utterances[i : i + batch_size]
        frames, lengths = cache.batch(batch)
        slots, slot_lengths, drafts = model.listen(frames.to(model.device), lengths.to(model.device))
        languages = [language or u.language for u in batch]
        decoded += model.transcribe_slots(slots, slot_lengths, languages, drafts=drafts)
    return decoded
