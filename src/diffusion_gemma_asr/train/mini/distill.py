"""The stage `encoder`: distils a small Whisper encoder (the student) from a larger one (the teacher).

The student learns from up to three losses:
- teacher: its frames, through a linear map, match the teacher's cached frames of the same sound (Hinton et al. 2015; last
  layer only);
- phonemes: each frame of synthetic speech predicts its phoneme, known from espeak-ng;
- tokens: CTC over the tokenizer's tokens, through a projector trained on the teacher's frames and the backbone's head.

The student's spectrograms are masked and warped; the teacher's frames come from the original sound.

The map to the teacher's width is linear and without a bias, so after training it is folded into the projector's first
convolution: the result is an ordinary encoder with a matching projector. Training can continue without the teacher (a recipe
without `teacher_frames`), on sound without teacher frames and with changes of tempo.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ...checkpoint.load import read_projector
from ...checkpoint.parts import load_backbone, load_tokenizer
from ...checkpoint.save import save_projector
from ...data.augment import Masking, change_tempo, log_uniform, mask_bands, warp_frequencies
from ...data.batches import Mixture, tempered
from ...data.features import FeatureCache
from ...data.manifest import Utterance, read_manifest
from ...data.text import plain_text
from ...evaluate.metrics import error_rate
from ...model.config import BackboneConfig, ProjectorConfig
from ...model.encoder import AcousticEncoder
from ...model.lengths import length_mask
from ...model.projector import AudioProjector
from ...strict import require
from .. import fingerprint
from ..adapter import computing_in
from ..loop import LoopOptions, Metrics, compute_dtype, load_weights, run
from ..recipe import TrainList
from ..speech import first_of, mel_of
from ..workers import rank
from .phonemes import PhonemeTimes
from .student import (
    CtcReader,
    EncoderShape,
    Student,
    folded,
    go_on,
    phoneme_loss,
    save_encoder,
    save_heads,
    stretched,
    whisper_config,
)

MAX_BATCH_SIZE = 256  # utterances


@dataclass(frozen=True)
class EncoderLosses:
    """Weights of the losses; 0 switches one off."""

    teacher: float = 1.0  # mean squared error, each component divided by the teacher's variance
    phonemes: float = 0.0  # mean cross-entropy of a frame
    tokens: float = 0.0  # CTC through a projector trained on the teacher's frames, and the backbone's head


@dataclass(frozen=True)
class PhonemeList(TrainList):
    """A list of utterances to train on, with the times of its phonemes."""

    phonemes: Path | None = None  # phonemes.jsonl of synthetic speech


@dataclass(frozen=True)
class EncoderData:
    """Training and dev lists."""

    train: tuple[PhonemeList, ...]
    dev: dict[str, Path]  # manifests for evaluation, by their name in the log
    dev_count: int  # utterances of each to evaluate on
    max_duration_s: float = 30.0  # longer utterances are left out
    temperature: float = 1.0  # T: a list's sampling weight is its weight times its utterances ** (1 / T)


@dataclass(frozen=True, kw_only=True)
class EncoderTrain(LoopOptions):
    """The loop's options, batches and augmentation."""

    batch_frames: int  # mel frames of 10 ms in a batch at most, padding included
    masking: Masking = field(default_factory=Masking)  # of frames of 10 ms and mel bins
    warp: tuple[float, float] = (1.0, 1.0)  # range of the factor on an utterance's frequencies
    tempo: tuple[float, float] | None = None  # range of the factor on its tempo; not with a teacher


@dataclass(frozen=True)
class EncoderRecipe:
    """The stage `encoder`."""

    stage: Literal["encoder"]
    name: str  # of the run's folder
    shape: EncoderShape
    backbone: Path  # folder with the tokenizer and, for the loss `tokens`, the head
    train: EncoderTrain
    data: EncoderData
    losses: EncoderLosses = field(default_factory=EncoderLosses)
    teacher_frames: Path | None = None  # cache of the teacher's frames (`data.cache_dir` of an adapter), if any
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    projector_from: Path | None = None  # folder of a projector trained on the teacher's frames, for the loss `tokens`
    start_from: Path | None = None  # folder of an earlier run of this stage, with the initial encoder

    def __post_init__(self) -> None:
        has_teacher, has_projector = self.teacher_frames is not None, self.projector_from is not None
        weights = self.losses
        require(has_teacher == (weights.teacher > 0), "losses.teacher", weights.teacher, "set with teacher_frames alone")
        require(has_projector == (weights.tokens > 0), "losses.tokens", weights.tokens, "set with projector_from alone")
        require(weights.teacher + weights.tokens > 0, "losses", "weights of 0", "positive for teacher or tokens")
        tempo_fits = self.train.tempo is None or not has_teacher
        require(tempo_fits, "train.tempo", self.train.tempo, "left out with teacher_frames, which have a tempo of their own")


def deviations_of(cache: FeatureCache, utterances: Sequence[Utterance], count: int = 200) -> Tensor:
    """(width,) standard deviations of the components of cached frames, over a sample of `count` utterances."""
    chosen = first_of(list(utterances), min(count, len(utterances)))
    frames, lengths = cache.batch(chosen)
    return frames[length_mask(lengths, frames.shape[1])].std(0)


def train_encoder(recipe: EncoderRecipe, folder: Path, device: torch.device) -> Path:
    """Trains an encoder, resuming an interrupted run.

    Args:
        recipe: of the stage.
        folder: of the run; gets log.jsonl, state.pt, encoder/, heads.safetensors and, with the loss `tokens`, projector/,
            the projector for the student's frames as an adapter without LoRA.
        device: to compute on.

    Returns:
        the encoder's folder.

    Raises:
        DataError: a manifest is missing, or the cache lacks the teacher's frames of an utterance.
        CheckpointError: tokenizer, backbone, projector, `start_from` or a saved state cannot be read or does not fit.
    """
    trainer = EncoderTrainer(recipe, device)
    run(trainer.trained, trainer.loss_of, folder, recipe.train, trainer.evaluate, trainer.settings)
    if rank() == 0:
        student, reader = trainer.student, trainer.reader
        save_encoder(student.acoustic, folder / "encoder")
        save_heads(student, folder)
        if reader is not None:
            head = student.teacher_head
            save_projector(reader.projector if head is None else folded(reader.projector, head), folder / "projector")
    return folder / "encoder"


class EncoderTrainer:
    """The callbacks of the training loop for a student: the loss of a step, and evaluation.

    Args:
        recipe: of the stage.
        device: to compute on.

    Attributes:
        student: encoder and heads.
        reader: projector and head of the loss `tokens`; None without it.
        trained: the parameters to train, by name.
        settings: fingerprints of everything that the run depends on, by name.
    """

    def __init__(self, recipe: EncoderRecipe, device: torch.device):
        self.recipe, self.device = recipe, device
        self.console = Console(stderr=True, quiet=rank() > 0)
        data, train = recipe.data, recipe.train
        self.dtype = compute_dtype(train.dtype, device)
        tokenizer = load_tokenizer(BackboneConfig(str(recipe.backbone)))
        lists = [first_of(read_manifest(item.manifest, (), data.max_duration_s), item.first) for item in data.train]
        self.rows = [u for rows in lists for u in rows]
        self.dev = {name: read_manifest(p, (), data.max_duration_s)[: data.dev_count] for name, p in data.dev.items()}
        self.cache: FeatureCache | None = None
        if recipe.teacher_frames is not None:
            everything = [*self.rows, *(u for rows in self.dev.values() for u in rows)]
            self.cache = FeatureCache.open(recipe.teacher_frames, everything)
        self.phonemes = PhonemeTimes([item.phonemes for item in data.train if item.phonemes is not None])
        texts = [plain_text(u.text, u.language) for u in self.rows]
        self.tokens = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        torch.manual_seed(train.seed)
        self.student = self._new_student(tokenizer).to(device)
        self.reader = self._new_reader(tokenizer)
        self.trained = {name: p for name, p in self.student.named_parameters() if p.requires_grad}
        if self.reader is not None:
            self.trained |= {f"projector.{name}": p for name, p in self.reader.projector.named_parameters()}
        self.settings = fingerprint.of_recipe(recipe) | {"data": fingerprint.of_utterances(self.rows)}
        if self.cache is not None:
            self.settings["teacher"] = self.cache.fingerprint
        starts = {"start_from": recipe.start_from, "projector_from": recipe.projector_from}
        if any(path is not None for path in starts.values()):  # a new student depends on the seed alone
            self.settings["start"] = fingerprint.of_tensors(self.trained)
        sizes = [len(rows) for rows in lists]
        shares = [size * item.weight for size, item in zip(tempered(sizes, data.temperature), data.train, strict=True)]
        lengths = [round(100 * u.duration) for u in self.rows]
        self.mixture = Mixture(sizes, shares, lengths, train.batch_frames, MAX_BATCH_SIZE, train.seed)

    def _new_student(self, tokenizer: PreTrainedTokenizerBase) -> Student:
        """The student, with weights of `start_from` or random ones."""
        deviations = None if self.cache is None else deviations_of(self.cache, self.rows)
        acoustic = AcousticEncoder.from_config(whisper_config(tokenizer, self.recipe.shape))
        student = Student(acoustic, len(self.phonemes.symbols), deviations)
        acoustic.encoder.embed_positions.requires_grad_(False)
        acoustic.encoder.set_attn_implementation("eager")  # a step takes a sixth less time than with fused attention
        if self.recipe.start_from is not None:
            go_on(student, self.recipe.start_from)
        return student

    def _new_reader(self, tokenizer: PreTrainedTokenizerBase) -> CtcReader | None:
        """The projector of `projector_from` with the backbone's head; None without one."""
        recipe = self.recipe
        if recipe.projector_from is None:
            return None
        backbone = load_backbone(BackboneConfig(str(recipe.backbone)))
        width = self.student.acoustic.hidden_size if self.cache is None else self.cache.width
        projector = AudioProjector(recipe.projector, width, backbone.hidden_size, backbone.embedding_scale())
        saved = read_projector(recipe.projector_from) | {"scale": projector.scale}
        load_weights(projector.state_dict(), saved, recipe.projector_from)
        return CtcReader(projector, backbone, tokenizer).to(self.device)

    def loss_of(self, step: int, micro: int) -> tuple[Tensor, Metrics]:
        """The weighted loss of one micro-batch, and its parts."""
        train, weights = self.recipe.train, self.recipe.losses
        self.student.train()
        chosen = self.mixture.at(step * train.accumulation + micro)
        rows = [self.rows[i] for i in chosen]
        mel, mel_lengths, labels = self._augmented(rows)
        audio_s = float(mel_lengths.sum()) / 100
        mel, mel_lengths, labels = (part.to(self.device) for part in (mel, mel_lengths, labels))
        parts: dict[str, Tensor] = {}
        with computing_in(self.dtype, self.device):
            frames, frame_lengths = self.student.acoustic(mel, mel_lengths)
            imitated = self.student.imitated(frames)
            if self.cache is not None:
                teacher_frames = self.cache.batch(rows)[0].to(self.device)
                parts["teacher"] = self.student.teacher_loss(imitated, teacher_frames, frame_lengths)
            if weights.phonemes > 0:
                parts["phonemes"] = phoneme_loss(self.student.phoneme_head(frames), labels)
            if self.reader is not None:
                parts["tokens"] = self.reader.ctc_loss(imitated, frame_lengths, [self.tokens[i] for i in chosen])
        loss = torch.stack([getattr(weights, name) * value for name, value in parts.items()]).sum()
        return loss, {name: value.item() for name, value in parts.items()} | {"audio_s": audio_s}

    def _augmented(self, rows: Sequence[Utterance]) -> tuple[Tensor, Tensor, Tensor]:
        """Augmented spectrograms (B, bins, T), their lengths (B,), and phoneme labels (B, F) of the encoder's frames."""
        train = self.recipe.train
        mel, lengths = mel_of(self.student.acoustic, rows)
        mel = warp_frequencies(mel.transpose(1, 2), log_uniform(train.warp, len(rows)))  # (B, T, bins)
        labels = [self.phonemes.frames(u, n) for u, n in zip(rows, ((lengths + 1) // 2).tolist(), strict=True)]
        if train.tempo is not None:
            mel, lengths = change_tempo(mel, lengths, log_uniform(train.tempo, len(rows)))
            labels = [stretched(row, n) for row, n in zip(labels, ((lengths + 1) // 2).tolist(), strict=True)]
        mel = mask_bands(mel, lengths, train.masking).transpose(1, 2)
        return mel, lengths, nn.utils.rnn.pad_sequence(labels, True, -100)

    @torch.no_grad()
    def evaluate(self, step: int) -> Metrics:
        """The teacher loss and the error rate of the CTC drafts on each dev list."""
        self.student.eval()
        figures: Metrics = {}
        for name, rows in self.dev.items():
            mel, mel_lengths = mel_of(self.student.acoustic, rows)
            frames, frame_lengths = self.student.acoustic(mel.to(self.device), mel_lengths.to(self.device))
            imitated = self.student.imitated(frames)
            if self.cache is not None:
                teacher_frames = self.cache.batch(rows)[0].to(self.device)
                error = self.student.teacher_loss(imitated, teacher_frames, frame_lengths)
                figures[f"teacher_{name}"] = round(float(error), 4)
            if self.reader is not None:
                references, texts = [u.text for u in rows], self.reader.drafts(imitated, frame_lengths)
                figures[f"error_rate_draft_{name}"] = round(error_rate(references, texts, rows[0].language), 4)
                self.console.print(f"step {step} {name}: {references[0]} | {texts[0]}", style="dim", markup=False)
        self.console.print(str(figures), markup=False)
        return figures
