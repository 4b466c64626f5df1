"""The stage `reading`: trains a small backbone to read the projector's audio tokens.

LoRA is enough to teach DiffusionGemma audio tokens, but not a backbone of a few million parameters that has only met text
(docs/training.md). Here all weights of the backbone, including its head, are trained by
the adapter's three losses on the frozen encoder's frames, and on sentences that nobody has spoken (slot_bank.py); later
stages freeze it.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from ...checkpoint.load import load_adapter, load_projector
from ...checkpoint.save import save_projector
from ...errors import RecipeError
from ...model.model import DiffusionGemmaASR
from ...model.projector import noise
from ...strict import require
from .. import fingerprint
from ..adapter import MARGIN, AdapterTrainer, build_model, computing_in
from ..compiled import compile_layers
from ..loop import Metrics, compute_dtype, run, step_seed
from ..objective import TextBatch, losses_of_slots, text_batch
from ..recipe import Recipe
from ..workers import rank, workers
from .sentences import SentenceData, random_rows, read_targets
from .slot_bank import SlotBank
from .text import save_backbone

OVERHEARD_DRAFTS = 0.85  # share of drafts where language is to correct them; the other canvases are text at a noise level


@dataclass(frozen=True)
class Curriculum:
    """From rows of a few random tokens, where nothing but reading helps, to sentences and speech."""

    clean: int  # first steps, with random tokens alone
    until: int  # step from which there are none
    length: int = 16  # random tokens in a row at most, to begin with: what to read is found soonest where there is little

    def __post_init__(self) -> None:
        require(0 <= self.clean < self.until, "curriculum.clean", self.clean, "at least 0 and below curriculum.until")
        require(self.length >= 1, "curriculum.length", self.length, "at least 1")

    def level(self, step: int) -> float:
        """Share of what is not random, and of the way to the longest rows: 0 up to `clean`, then linear to 1 at `until`."""
        return min(1.0, max(0.0, (step - self.clean) / (self.until - self.clean)))


@dataclass(frozen=True, kw_only=True)
class UnspokenData(SentenceData):
    """Sentences without sound, whose audio tokens are put together from those of training utterances."""

    share: float  # of the forward passes that read such sentences
    batch_tokens: int  # transcript tokens in a forward pass at most, padding included
    bank: int = 400  # batches of utterances that audio tokens are cut out of
    curriculum: Curriculum | None = None  # random tokens first, in rows that grow; real speech and sentences come in later
    silent: float = 0.0  # share of these passes whose prompts hold one audio token of noise: language without sound
    drowned: float = 0.0  # share of the other passes' audio tokens that noise takes the place of, in stretches

    def __post_init__(self) -> None:
        require(0 < self.share < 1, "unspoken.share", self.share, "above 0 and below 1")
        require(self.batch_tokens >= self.max_tokens, "unspoken.batch_tokens", self.batch_tokens, "at least max_tokens")
        require(self.bank >= 1, "unspoken.bank", self.bank, "at least 1")
        require(0 <= self.silent <= 1, "unspoken.silent", self.silent, "from 0 to 1")
        require(0 <= self.drowned < 1, "unspoken.drowned", self.drowned, "at least 0 and below 1")


@dataclass(frozen=True)
class ReadingRecipe(Recipe):
    """The stage `reading`; its LoRA settings are ignored."""

    stage: Literal["reading"] = "reading"
    frozen_projector: bool = False  # the projector stays as train.start_from has it
    frozen_rows: bool = False  # the tokens' rows, which are the head as well, stay as the backbone has them
    overheard: float = 0.0  # share of the passes on speech and sentences that correct drafts behind silent prompts
    drafts_from: tuple[Path, ...] = ()  # whose projectors write these drafts, and take turns at other prompts
    unspoken: UnspokenData | None = None  # None: speech alone

    def __post_init__(self) -> None:
        super().__post_init__()
        train = self.train
        if train.shard or train.quantization:
            raise RecipeError("'train.shard' and 'train.quantization' want frozen experts; the stage 'reading' trains them")
        if self.frozen_projector and train.start_from is None:
            raise RecipeError("'frozen_projector' is set, but 'train.start_from' names no projector")
        if self.unspoken is not None and not self.frozen_projector:
            raise RecipeError("'unspoken' wants 'frozen_projector': what is cut out of utterances must stay what it was")
        if self.unspoken is not None and self.unspoken.silent and not self.losses.autoregressive:
            raise RecipeError("'unspoken.silent' wants 'losses.autoregressive': without sound there is no canvas to denoise")
        if self.unspoken is not None and self.model.projector.acoustic != (self.unspoken.silent == 1):
            wanted = "1, since nothing is cut out of acoustic tokens" if self.model.projector.acoustic else "below 1"
            raise RecipeError(f"'unspoken.silent' must be {wanted}")
        require(0 <= self.overheard <= 1, "overheard", self.overheard, "from 0 to 1")
        if self.overheard and not (self.losses.diffusion and self.frozen_projector):
            raise RecipeError("'overheard' wants 'losses.diffusion' and 'frozen_projector': it teaches canvases alone")
        if self.drafts_from and not self.overheard:
            raise RecipeError("'drafts_from' names projectors for the drafts of 'overheard' passes, but there are none")


def readers(model: DiffusionGemmaASR, frozen_projector: bool = False, frozen_rows: bool = False) -> dict[str, nn.Parameter]:
    """Unfreezes projector and backbone, without its vision tower; returns their parameters by name."""
    trained = ("backbone.",) if frozen_projector else ("projector.", "backbone.")
    rows = model.backbone.lm_head_weight if frozen_rows else None
    parameters = {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.startswith(trained) and "vision" not in name and parameter is not rows
    }
    model.projector.requires_grad_(not frozen_projector)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return parameters


def train_reading(recipe: ReadingRecipe, folder: Path, device: torch.device) -> Path:
    """Trains the backbone, and the projector unless it is frozen, resuming an interrupted run.

    Args:
        recipe: of the stage.
        folder: of the run; gets log.jsonl, state.pt, frames/, backbone/ in DiffusionGemma's layout, and projector/, an
            adapter without LoRA.
        device: to compute on.

    Returns:
        the backbone's folder.

    Raises:
        AsrError: a model part, a data list or a saved state cannot be used.
    """
    model = build_model(recipe, device, compute_dtype(recipe.train.dtype, device), lora=False)
    model.backbone.float()  # trained weights are float32
    if recipe.train.start_from is not None:
        load_adapter(model, recipe.train.start_from, projector_alone=True)
    if recipe.train.compile:
        compile_layers(model.backbone)
    trainer = ReadingTrainer(recipe, model, folder)
    trained = readers(model, recipe.frozen_projector, recipe.frozen_rows)
    run(trained, trainer.loss_of, folder, recipe.train, trainer.evaluate, trainer.settings)
    if rank() == 0:
        save_backbone(model.backbone, model.prompts, folder / "backbone")
        save_projector(model.projector, folder / "projector")
    return folder / "backbone"


class ReadingTrainer(AdapterTrainer):
    """As `AdapterTrainer`, with forward passes on sentences without sound among those on speech.

    Args:
        recipe: data and options.
        model: see `build_model`; its projector has its final weights if the recipe freezes it.
        folder: of the run.
    """

    def __init__(self, recipe: ReadingRecipe, model: DiffusionGemmaASR, folder: Path):
        super().__init__(recipe, model, folder)
        self.unspoken, self.overheard = recipe.unspoken, recipe.overheard
        self.writers = [copy.deepcopy(model.projector).requires_grad_(False) for _ in recipe.drafts_from]
        for number, (writer, checkpoint) in enumerate(zip(self.writers, recipe.drafts_from, strict=True)):
            self.settings[f"drafts_from {number}"] = fingerprint.of_tensors(load_projector(writer, checkpoint))
        if recipe.frozen_projector and recipe.frozen_rows:  # CTC would move nothing
            self.weights = replace(self.weights, ctc=0.0)
        if self.unspoken is not None:
            seed = recipe.train.seed
            self.sentences = read_targets(self.unspoken, model.prompts, seed)
            sizes = self.unspoken.batch_tokens, recipe.train.batch_size, seed
            self.texts = self.sentences.mixture(self.unspoken, *sizes)
            self.settings |= {"unspoken": fingerprint.of_lines(map(str, self.sentences.targets))}
            self.bank = SlotBank(token_rows(model), seed)
            if self.unspoken.silent < 1:
                self.console.print("cutting audio tokens out of utterances")
                for utterance in self._spoken():
                    self.bank.add(*utterance)

    @torch.no_grad()
    def _spoken(self) -> Iterator[tuple[str, list[int], Tensor, list[int]]]:
        """This worker's share of the bank: see `SlotBank.add`."""
        assert self.unspoken is not None
        model, train = self.model.eval(), self.recipe.train
        for number in range(rank(), self.unspoken.bank, workers()):
            torch.manual_seed(step_seed(train.seed, number))
            chosen = self.data.mixture.at(number)
            frames, lengths = self.data.cache.batch([self.data.utterances[i] for i in chosen])
            frames = self.augmented(frames, lengths, chosen).to(model.device)
            with computing_in(self.dtype, model.device):
                slots, slot_lengths = model.projector(frames, lengths.to(model.device))
            slots = slots.float()
            kept = model.read_mask(slots, slot_lengths)
            for row, i in enumerate(chosen):
                count, tokens = int(slot_lengths[row]), self.targets[i][:-1]
                places = model.places(slots[row, :count], tokens)
                if places:
                    before = kept[row, :count].cumsum(0).tolist()
                    ends = [before[end - 1] for _, end in places]
                    heard = slots[row, :count][kept[row, :count]].cpu()
                    yield self.data.utterances[i].language, tokens, heard, ends

    def loss_of(self, step: int, micro: int) -> tuple[Tensor, Metrics]:
        """The weighted loss of one micro-batch, and its parts."""
        unspoken, seed = self.unspoken, self.recipe.train.seed
        rng = random.Random(-1 - step_seed(seed, step, micro))
        drawn = random.Random(-1 - step_seed(seed, step, micro // workers()))  # workers do the like, and wait for nobody
        if unspoken is None:
            return self._spoken_loss(step, micro, drawn)
        curriculum = unspoken.curriculum
        level = 1.0 if curriculum is None else curriculum.level(step)
        if curriculum is not None and drawn.random() >= level:
            length = curriculum.length + round(level * (unspoken.max_tokens - curriculum.length))
            end = self.model.prompts.special["end_of_turn"]
            targets = random_rows(unspoken.batch_tokens // length, length, self.bank.known, end, rng)
            languages = rng.choices(self.recipe.model.languages, k=len(targets))
            return self._unspoken_loss(targets, languages, rng, "random")
        if drawn.random() >= unspoken.share:
            return self._spoken_loss(step, micro, drawn)
        chosen = self.texts.at(step * self.recipe.train.accumulation + micro)
        targets = [self.sentences.targets[i] for i in chosen]
        kind = "silent" if drawn.random() < unspoken.silent else "unspoken"
        if kind == "unspoken" and drawn.random() < self.overheard:
            kind = "unspoken_overheard"
        return self._unspoken_loss(targets, [self.sentences.languages[i] for i in chosen], rng, kind)

    def _spoken_loss(self, step: int, micro: int, drawn: random.Random) -> tuple[Tensor, Metrics]:
        """The loss of utterances; `drawn` says whether their prompts hold them, and which projector heard them."""
        overheard, own = drawn.random() < self.overheard, self.model.projector
        projector = drawn.choice(self.writers if overheard and self.writers else [own, *self.writers])
        batch = self.spoken(step, micro, augment=projector is own, named=overheard)
        with computing_in(self.dtype, self.model.device):
            slots, lengths = projector(batch.frames, batch.frame_lengths)
            prompted = own.prompted(batch.frames, batch.frame_lengths, slots)
            if overheard:
                return self._overheard_loss(slots.float(), lengths, batch.text, "overheard", prompted)
            parts = losses_of_slots(self.model, slots, lengths, batch.text, self.weights, prompted)
            return parts.total(self.weights), parts.figures()

    def _overheard_loss(
        self, slots: Tensor, lengths: Tensor, text: TextBatch, kind: str, prompted: Tensor | None = None
    ) -> tuple[Tensor, Metrics]:
        """The loss of correcting drafts, where canvases alone are learnt: prompts hold acoustic tokens, or no sound."""
        alone = replace(
            self.weights, autoregressive=0.0, ctc=0.0, draft_share=OVERHEARD_DRAFTS, full_noise=0.0, known_start=0.0
        )
        silent = not self.model.config.projector.acoustic
        parts = losses_of_slots(self.model, slots, lengths, text, alone, prompted, silent=silent)
        return parts.total(alone), {f"{name}_{kind}": value for name, value in parts.figures().items()}

    def _unspoken_loss(
        self, targets: Sequence[list[int]], languages: Sequence[str], rng: random.Random, kind: str
    ) -> tuple[Tensor, Metrics]:
        """The loss of sentences, its parts named by `kind`.

        CTC keeps rows that learn in step with the projector here as well, but where noise stands for audio tokens.
        """
        assert self.unspoken is not None
        model, device, weights = self.model.train(), self.model.device, self.weights
        scale = float(self.model.projector.scale)
        if kind == "silent":
            rows = [*model.projector.without_sound(len(targets)).cpu().split(1)]
            weights = replace(weights, diffusion=0.0, ctc=0.0)
        else:
            rows = [self.bank.draw(code, target[:-1], rng) for code, target in zip(languages, targets, strict=True)]
        if kind == "unspoken" and self.unspoken.drowned:
            rows = [drowned(row, self.unspoken.drowned, scale, rng) for row in rows]
            weights = replace(weights, ctc=0.0)
        lengths = torch.tensor([len(row) for row in rows])
        unnamed = [rng.random() < self.recipe.train.unnamed for _ in rows]
        text = text_batch(model.prompts, lengths.tolist(), targets, languages, rng.randint(0, MARGIN), unnamed)
        with computing_in(self.dtype, device):
            slots = pad_sequence(rows, batch_first=True).to(device)
            if kind == "unspoken_overheard":
                return self._overheard_loss(slots, lengths.to(device), text.to(device), kind)
            parts = losses_of_slots(model, slots, lengths.to(device), text.to(device), weights)
            return parts.total(weights), {f"{name}_{kind}": value for name, value in parts.figures().items()}


def drowned(slots: Tensor, share: float, scale: float, rng: random.Random) -> Tensor:
    """Audio tokens with noise in place of some of them: what was said there, the rest of the sentence has to tell.

    Args:
        slots: (n, H).
        share: of them that noise takes the place of, on average, in stretches of 2 to 6.
        scale: root mean square of a component of the noise.
        rng: of places and lengths; the noise is drawn from torch's default generator.

    Returns:
        (n, H).
    """
    slots, left = slots.clone(), round(share * len(slots) * 2 * rng.random())
    while left > 0:
        length = min(left, rng.randint(2, 6))
        start = rng.randrange(len(slots))
        place = slots[start : start + length]
        place.copy_(noise(len(place), place.shape[1], scale))
        left -= length
    return slots


def token_rows(model: DiffusionGemmaASR) -> Tensor:
    """(V, H) embeddings of all tokens at the scale of audio tokens."""
    with torch.no_grad():
        rows = model.backbone.embed(torch.arange(model.backbone.vocab_size, device=model.device)[None])[0].float()
        return (F.rms_norm(rows, rows.shape[-1:]) * model.backbone.embedding_scale()).cpu()
