"""What a model is: one description, which is config.json of a checkpoint, the `model:` part of a recipe, and what the class
is built from."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from ..errors import RecipeError
from ..strict import require

Start = Literal["noise", "draft", "ctc"]
Canvas = Literal["packed", "aligned"]
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class EncoderConfig:
    """The frozen acoustic encoder."""

    name: str  # hub repository, or folder in the same layout
    revision: str | None = None  # branch, tag or commit on the hub; None is its main branch
    width: int | None = None  # of a frame, as the projector was trained for; a recipe leaves it out
    mel_bins: int | None = None  # of its spectrogram; a recipe leaves it out
    silence_s: float = 0.0  # silence that it hears behind each clip, up to 30 s in all; the projector gets its frames too

    def __post_init__(self) -> None:
        require(0 <= self.silence_s <= 30, "encoder.silence_s", self.silence_s, "from 0 to 30")


@dataclass(frozen=True)
class BackboneConfig:
    """The frozen diffusion language model."""

    name: str  # hub repository, or folder in the same layout
    revision: str | None = None
    width: int | None = None  # of a token row, as projector and LoRA were trained for; a recipe leaves out these three
    vocab_size: int | None = None
    layers: int | None = None


@dataclass(frozen=True)
class ProjectorConfig:
    """The trained bridge from encoder frames (20 ms) to audio tokens (160 ms with the strides given here)."""

    hidden_size: int = 1280  # channels of the convolutions
    strides: tuple[int, ...] = (4, 2)  # of each in time; an audio token stands for 20 ms times all of them
    scaled: bool = True  # bring the output to the scale of the backbone's token embeddings
    kernels: tuple[int, ...] = (7, 5)  # frames that each convolution sees, with half of them as padding on either side
    skip_blanks: float | None = None  # audio tokens that are CTC's blank with this probability stay out of the prompt
    decoder_layers: int = 0  # of a Whisper decoder, beside the linear layer (decoder_layers.py)
    dropout: float = 0.0  # while training: of what enters those layers, and of what each of their parts adds
    acoustic: bool = False  # prompts hold tokens straight from the frames; CTC alone reads those of the layers above

    @property
    def described(self) -> str:
        """The shape in words."""
        parts = [f"{self.hidden_size} channels", f"{math.prod(self.strides)}x in time"]
        if self.decoder_layers:
            parts.append(f"{self.decoder_layers} layers of a Whisper decoder")
        if self.acoustic:
            parts.append("acoustic tokens in prompts")
        return ", ".join(parts)

    def __post_init__(self) -> None:
        require(self.hidden_size >= 1, "projector.hidden_size", self.hidden_size, "at least 1")
        require(len(self.strides) >= 1, "projector.strides", "an empty list", "a list of at least one")
        require(min(self.strides) >= 1, "projector.strides", self.strides, "at least 1 each")
        require(min(self.kernels, default=1) >= 1, "projector.kernels", self.kernels, "at least 1 each")
        count = len(self.strides)
        require(len(self.kernels) == count, "projector.kernels", self.kernels, f"{count} numbers, one for each stride")
        require(self.decoder_layers >= 0, "projector.decoder_layers", self.decoder_layers, "at least 0")
        require(0 <= self.dropout < 1, "projector.dropout", self.dropout, "at least 0 and below 1")
        limit = self.skip_blanks
        require(limit is None or 0 < limit <= 1, "projector.skip_blanks", limit, "above 0 and at most 1")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank updates of q, k, v and o in both stacks of the backbone (Hu et al., 2021)."""

    rank: int = 16
    alpha: int = 32  # the update is scaled by alpha / rank
    dropout: float = 0.0  # on the input of the update, while training
    shared: bool = False  # one update for both stacks, whose weights stay tied when it is merged

    def __post_init__(self) -> None:
        require(self.rank >= 1, "lora.rank", self.rank, "at least 1")
        require(self.alpha >= 1, "lora.alpha", self.alpha, "at least 1")
        require(0 <= self.dropout < 1, "lora.dropout", self.dropout, "at least 0 and below 1")


@dataclass(frozen=True)
class ModelConfig:
    """A whole model: its parts, and what it was trained to do."""

    name: str
    encoder: EncoderConfig
    backbone: BackboneConfig
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    languages: tuple[str, ...] = ("en",)  # codes, as Whisper has them
    finds_language: bool = False  # trained with prompts that do not name the language, so that "auto" works
    reads_context: bool = False  # trained with context in the prompt: text that came before, words that may occur
    ctc: bool = True  # CTC trained the projector, so that its slots spell a draft
    canvas: Canvas = "packed"  # the transcript, or a position for each audio token; see denoise/canvas.py
    draft_conditioning: bool = False  # CTC's logits at each place are added to those of a canvas that begins with a draft
    silent_drafts: bool = False  # prompts of such canvases hold no sound: what CTC hears is all that they know of it
    canvas_share: float = 1.0  # of the canvas's own logits where CTC's are added to them
    causal_share: float = 0.0  # of what the encoder, reading the canvas's text, expects at each place, added as well
    start: Start = "noise"  # what a canvas holds at first, where the caller does not say; see `DecodeOptions`
    candidates: int = 1  # drafts of which the backbone chooses one to denoise, where the caller does not say
    dtype: Dtype = "float32"  # of the frozen parts in training, and where loading names none

    def __post_init__(self) -> None:
        require(len(self.languages) >= 1, "languages", "an empty list", "a list of at least one")
        require(self.candidates >= 1, "candidates", self.candidates, "at least 1")
        require(0 < self.canvas_share <= 1, "canvas_share", self.canvas_share, "above 0 and at most 1")
        if self.draft_conditioning and self.canvas != "aligned":
            raise RecipeError("'draft_conditioning' wants 'canvas: aligned', a place for each audio token")
        require(0 <= self.causal_share <= 1, "causal_share", self.causal_share, "from 0 to 1")
        if self.causal_share and not self.draft_conditioning:
            raise RecipeError("'causal_share' wants 'draft_conditioning': it is added to what CTC hears")
        if self.silent_drafts and not self.draft_conditioning:
            raise RecipeError("'silent_drafts' wants 'draft_conditioning', without which nothing would tell of the sound")
        if self.start != "noise" and not self.ctc:
            raise RecipeError(f"'start' is {self.start}, but 'ctc' is false: without CTC there is no draft")
