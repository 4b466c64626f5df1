"""The student of the stage `encoder`: a small Whisper encoder, the heads on its frames, and their files."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase, WhisperConfig, WhisperForConditionalGeneration

from ...checkpoint.parts import load_encoder
from ...model.backbone import Backbone
from ...model.config import EncoderConfig
from ...model.ctc import ctc_loss
from ...model.drafter import Encoded, GreedyCtc
from ...model.encoder import AcousticEncoder
from ...model.head import Head
from ...model.lengths import length_mask
from ...model.projector import AudioProjector
from ..loop import load_weights

HEADS = "heads.safetensors"  # linear maps to the teacher's frames and to phonemes


@dataclass(frozen=True)
class EncoderShape:
    """The sizes of a small Whisper encoder, as WhisperConfig names them."""

    d_model: int
    encoder_layers: int
    encoder_attention_heads: int
    encoder_ffn_dim: int


class Student(nn.Module):
    """An encoder with a linear map to its teacher's frames and a phoneme head.

    Args:
        acoustic: the encoder.
        phonemes: number of classes of the phoneme head.
        deviations: (teacher width,) standard deviations of the components of the teacher's frames, the unit of the teacher
            loss; None without a teacher.
    """

    deviations: Tensor | None

    def __init__(self, acoustic: AcousticEncoder, phonemes: int, deviations: Tensor | None = None):
        super().__init__()
        self.acoustic = acoustic
        self.phoneme_head = nn.Linear(acoustic.hidden_size, phonemes)
        self.teacher_head = nn.Linear(acoustic.hidden_size, len(deviations), bias=False) if deviations is not None else None
        self.register_buffer("deviations", deviations)

    def imitated(self, frames: Tensor) -> Tensor:
        """The projector's input from the student's frames (B, F, width).

        Returns:
            (B, F, teacher width), the estimate of the teacher's frames; without a teacher the frames unchanged.
        """
        return frames if self.teacher_head is None else self.teacher_head(frames)

    def teacher_loss(self, imitated: Tensor, wanted: Tensor, lengths: Tensor) -> Tensor:
        """Mean squared error of standardised components; the loss of a constant guess is 1.

        Args:
            imitated: (B, F, teacher width), see `imitated`.
            wanted: (B, F, teacher width), the teacher's frames.
            lengths: (B,) frames without padding.
        """
        assert self.deviations is not None
        inside = length_mask(lengths, wanted.shape[1])  # (B, F)
        return ((imitated.float() - wanted) / self.deviations)[inside].pow(2).mean()


def phoneme_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the labelled frames; 0 if there are none.

    Args:
        scores: (B, F, classes) logits.
        labels: (B, F) long, -100 for unlabelled frames.
    """
    known = labels >= 0
    return F.cross_entropy(scores.float()[known], labels[known]) if known.any() else scores.new_zeros(())


class CtcReader(nn.Module):
    """A CTC decoder of frames: a trainable projector and the backbone's frozen output head.

    Args:
        projector: of the teacher's or the student's frames.
        backbone: its head is copied.
        tokenizer: the backbone's.
    """

    weight: Tensor

    def __init__(self, projector: AudioProjector, backbone: Backbone, tokenizer: PreTrainedTokenizerBase):
        super().__init__()
        self.projector, self.tokenizer, self.softcap = projector, tokenizer, backbone.softcap
        self.register_buffer("weight", backbone.lm_head_weight.detach().clone())

    @property
    def head(self) -> Head:
        """The backbone's output head."""
        return Head(self.weight, self.softcap)

    def ctc_loss(self, frames: Tensor, lengths: Tensor, tokens: Sequence[Sequence[int]]) -> Tensor:
        """CTC loss per token.

        Args:
            frames: (B, F, width).
            lengths: (B,) frames without padding.
            tokens: ids of each transcript.
        """
        slots, slot_lengths = self.projector(frames, lengths)
        targets = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in tokens], batch_first=True).to(slots.device)
        counts = torch.tensor([len(row) for row in tokens], device=slots.device)
        with torch.autocast(slots.device.type, enabled=False):
            return ctc_loss(self.head, slots.float(), targets, slot_lengths, counts, self.tokenizer.pad_token_id)

    def drafts(self, frames: Tensor, lengths: Tensor) -> list[str]:
        """Greedy CTC transcripts of frames (B, F, width) with lengths (B,)."""
        encoded = Encoded(frames, lengths, *self.projector(frames, lengths))
        drafts = GreedyCtc(self.head, self.tokenizer.pad_token_id).drafts(encoded)
        return [self.tokenizer.decode([token.id for token in draft], skip_special_tokens=True) for draft in drafts]


def stretched(labels: Tensor, count: int) -> Tensor:
    """Resamples frame labels (n,) to `count` frames, by nearest neighbour."""
    return labels[(torch.arange(count) * len(labels) // max(1, count)).clamp(max=len(labels) - 1)]


@torch.no_grad()
def folded(projector: AudioProjector, head: nn.Linear) -> AudioProjector:
    """Folds a linear map without bias into a projector's first convolution: the result(x) = projector(head(x))."""
    wide = copy.deepcopy(projector)
    wide.conv1.in_channels = head.in_features
    weight = torch.einsum("oik,ij->ojk", projector.conv1.weight, head.weight)
    wide.conv1.weight = nn.Parameter(weight.contiguous())
    return wide


@torch.no_grad()
def go_on(student: Student, folder: Path) -> None:
    """Initialises a student from an earlier run: the encoder, and heads whose shapes match.

    The student may have more layers than the saved encoder; these start as identities, their residual branches zero.

    Args:
        student: is overwritten.
        folder: of the earlier run.

    Raises:
        CheckpointError: the encoder cannot be read, is of another width, or has more layers than the student.
    """
    old = dict(load_encoder(EncoderConfig(str(folder / "encoder"))).encoder.named_parameters())
    new = dict(student.acoustic.encoder.named_parameters())
    old_layers = {name.split(".")[1] for name in old if name.startswith("layers.")}
    added = {name for name in new if name.startswith("layers.") and name.split(".")[1] not in old_layers}
    for name in added:
        if name.split(".")[-2] in ("out_proj", "fc2"):
            new[name].zero_()
    load_weights({name: p for name, p in new.items() if name not in added}, old, folder)
    if (folder / HEADS).is_file():
        heads = {name: p for name, p in student.named_parameters() if "head" in name}
        saved = {name: value for name, value in load_file(folder / HEADS).items() if name in heads}
        fitting = {name: value for name, value in saved.items() if value.shape == heads[name].shape}
        load_weights({name: heads[name] for name in fitting}, fitting, folder / HEADS)


def whisper_config(tokenizer: PreTrainedTokenizerBase, shape: EncoderShape) -> WhisperConfig:
    """A Whisper configuration with a small encoder; the decoder that it requires is neither trained nor saved."""
    sizes = asdict(shape)
    return WhisperConfig(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.bos_token_id,
        max_target_positions=256,
        suppress_tokens=[],
        begin_suppress_tokens=[],
        **sizes,
        **{name.replace("encoder", "decoder"): size for name, size in sizes.items() if "encoder" in name},
    )


def save_encoder(acoustic: AcousticEncoder, folder: Path) -> None:
    """Writes an encoder, without a decoder, in float16 and Whisper's layout (`model.encoder.*` keys)."""
    state = {f"model.encoder.{name}": value.half().cpu() for name, value in acoustic.encoder.state_dict().items()}
    shell = WhisperForConditionalGeneration(acoustic.encoder.config)
    shell.save_pretrained(folder, state_dict=state)
    acoustic.extractor.save_pretrained(folder)


def save_heads(student: Student, folder: Path) -> None:
    """Writes the heads to `folder`, for `go_on`."""
    heads = {name: value for name, value in student.state_dict().items() if "head" in name}
    save_file({name: value.cpu().contiguous() for name, value in heads.items()}, folder / HEADS)
