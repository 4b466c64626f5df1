"""The stage `encoder`: an encoder of our own that learns from a larger Whisper's.

The student is a small Whisper encoder. It learns up to three things at once: its frames, through a linear map, are to be the
teacher's frames of the same sound, which lie in a cache on disk (Hinton et al. 2015; only the last layer is imitated); the
phoneme of every frame of synthetic speech, which espeak-ng knows; and, once a projector has learnt to read the teacher, what
it spells out of the imitated frames, by CTC over the tokenizer's tokens. The student's spectrogram is masked and warped, the
teacher had it as it is.

The map to the teacher's width is linear and without a bias, as is what the projector's first convolution does with a frame:
at the end the one is folded into the other, and the student is an encoder like any other, with a projector of its own. From
there it can go on without the teacher (a recipe without `teacher_frames`), whose frames then need not be made for new sound,
and the sound's tempo may be changed too.
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

MOST_IN_A_BATCH = 256  # utterances


@dataclass(frozen=True)
class EncoderLosses:
    """Weights of the losses; 0 switches one off."""

    teacher: float = 1.0  # squared error of a component of a frame, in the teacher's squared deviations
    phonemes: float = 0.0  # cross-entropy a frame
    tokens: float = 0.0  # CTC through a projector that reads the teacher, and the backbone's head


@dataclass(frozen=True)
class PhonemeList(TrainList):
    """A list to train on, and when its phonemes are spoken."""

    phonemes: Path | None = None  # phonemes.jsonl of synthetic speech


@dataclass(frozen=True)
class EncoderData:
    """Lists to train on and to judge by."""

    train: tuple[PhonemeList, ...]
    dev: dict[str, Path]  # manifests, by the name that the log gives them
    dev_count: int  # utterances of each that judge the run
    max_duration_s: float = 30.0  # longer utterances are left out
    temperature: float = 1.0  # T: a list's share is its weight times its utterances ** (1 / T)


@dataclass(frozen=True, kw_only=True)
class EncoderTrain(LoopOptions):
    """The loop's options, and what batches hold."""

    batch_frames: int  # mel frames of 10 ms in a batch, padding included
    masking: Masking = field(default_factory=Masking)  # frames of 10 ms, mel bins
    warp: tuple[float, float] = (1.0, 1.0)  # an utterance's frequencies are stretched by a factor between these
    tempo: tuple[float, float] | None = None  # and it is so many times as fast; None where there is a teacher


@dataclass(frozen=True)
class EncoderRecipe:
    """The stage `encoder`."""

    stage: Literal["encoder"]
    name: str  # of the run's folder
    shape: EncoderShape
    backbone: Path  # folder, whose tokenizer and, for the loss `tokens`, head are used
    train: EncoderTrain
    data: EncoderData
    losses: EncoderLosses = field(default_factory=EncoderLosses)
    teacher_frames: Path | None = None  # cache of the teacher's frames (`data.cache_dir` of an adapter); None: no teacher
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    projector_from: Path | None = None  # folder of the projector that reads the teacher, for the loss `tokens`
    start_from: Path | None = None  # folder of an earlier run of this stage, whose encoder to go on with

    def __post_init__(self) -> None:
        taught = self.teacher_frames is not None
        require(taught == (self.losses.teacher > 0), "losses.teacher", self.losses.teacher, "set with teacher_frames alone")
        reads = self.projector_from is not None
        require(reads == (self.losses.tokens > 0), "losses.tokens", self.losses.tokens, "set with projector_from alone")
        require(self.losses.teacher + self.losses.tokens > 0, "losses", "weights of 0", "positive for teacher or tokens")
        steady = self.train.tempo is None or not taught
        require(steady, "train.tempo", self.train.tempo, "left out with teacher_frames, which have a tempo of their own")


def deviations_of(cache: FeatureCache, utterances: Sequence[Utterance], count: int = 200) -> Tensor:
    """(width,) standard deviation of each component of cached frames, over some utterances."""
    chosen = first_of(list(utterances), min(count, len(utterances)))
    frames, lengths = cache.batch(chosen)
    return frames[length_mask(lengths, frames.shape[1])].std(0)


def train_encoder(recipe: EncoderRecipe, folder: Path, device: torch.device) -> Path:
    """Trains an encoder, resuming what a killed run left.

    Args:
        recipe: of the stage.
        folder: of the run; gets log.jsonl, state.pt, encoder/, heads.safetensors and, where tokens have a weight, the
            projector of the student's own frames, as an adapter without LoRA, in projector/.
        device: where to compute.

    Returns:
        the encoder's folder.

    Raises:
        DataError: a manifest is not there, or the teacher's frames of an utterance are not in the cache.
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
    """The student, its data, and what the loop asks of them: the loss of a step, and a judgement now and then."""

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
        self.mixture = Mixture(sizes, shares, lengths, train.batch_frames, MOST_IN_A_BATCH, train.seed)

    def _new_student(self, tokenizer: PreTrainedTokenizerBase) -> Student:
        deviations = None if self.cache is None else deviations_of(self.cache, self.rows)
        acoustic = AcousticEncoder.from_config(whisper_config(tokenizer, self.recipe.shape))
        student = Student(acoustic, len(self.phonemes.symbols), deviations)
        acoustic.encoder.embed_positions.requires_grad_(False)
        acoustic.encoder.set_attn_implementation("eager")  # whole steps take a sixth less time than with fused attention
        if self.recipe.start_from is not None:
            go_on(student, self.recipe.start_from)
        return student

    def _new_reader(self, tokenizer: PreTrainedTokenizerBase) -> CtcReader | None:
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
                wanted = self.cache.batch(rows)[0].to(self.device)
                parts["teacher"] = self.student.teacher_loss(imitated, wanted, frame_lengths)
            if weights.phonemes > 0:
                parts["phonemes"] = phoneme_loss(self.student.phoneme_head(frames), labels)
            if self.reader is not None:
                parts["tokens"] = self.reader.ctc_loss(imitated, frame_lengths, [self.tokens[i] for i in chosen])
        loss = torch.stack([getattr(weights, name) * value for name, value in parts.items()]).sum()
        return loss, {name: value.item() for name, value in parts.items()} | {"audio_s": audio_s}

    def _augmented(self, rows: Sequence[Utterance]) -> tuple[Tensor, Tensor, Tensor]:
        """Spectrograms (B, bins, T) as the student hears them, their lengths (B,), and phonemes (B, F) of their frames."""
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
        """How far the frames of the dev lists are from the teacher's, and how well they are read."""
        self.student.eval()
        figures: Metrics = {}
        for name, rows in self.dev.items():
            mel, mel_lengths = mel_of(self.student.acoustic, rows)
            frames, frame_lengths = self.student.acoustic(mel.to(self.device), mel_lengths.to(self.device))
            imitated = self.student.imitated(frames)
            if self.cache is not None:
                error = self.student.teacher_loss(imitated, self.cache.batch(rows)[0].to(self.device), frame_lengths)
                figures[f"teacher_{name}"] = round(float(error), 4)
            if self.reader is not None:
                references, texts = [u.text for u in rows], self.reader.drafts(imitated, frame_lengths)
                figures[f"error_rate_draft_{name}"] = round(error_rate(references, texts, rows[0].language), 4)
                self.console.print(f"step {step} {name}: {references[0]} | {texts[0]}", style="dim", markup=False)
        self.console.print(str(figures), markup=False)
        return figures
