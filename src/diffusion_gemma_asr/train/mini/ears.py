"""The stage `ears`: trains an encoder of Whisper's kind further, together with the projector, by CTC through the head.

A frozen Whisper gives frames that were made for its own decoder; its layers, trained on with CTC, give frames that say what
was spoken without one. The result is an encoder of the model's own, which later stages freeze.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from ...checkpoint.load import load_adapter
from ...checkpoint.save import save_checkpoint, save_encoder
from ...errors import RecipeError
from ...model.encoder import AcousticEncoder
from ...model.lengths import Length, length_mask
from ...model.projector import AudioProjector
from .. import fingerprint
from ..adapter import AdapterTrainer, build_model
from ..loop import compute_dtype, run
from ..recipe import Recipe
from ..workers import rank

FUSED = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)  # whichever there is


@dataclass(frozen=True)
class EarsRecipe(Recipe):
    """The stage `ears`; `model.encoder` names the encoder to begin with, `data.cache_dir` holds log-mel spectrograms."""

    stage: Literal["ears"] = "ears"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.losses.uses_backbone:
            raise RecipeError("the stage 'ears' trains by CTC alone: set losses.diffusion and losses.autoregressive to 0")
        if self.model.encoder.silence_s:
            raise RecipeError("the stage 'ears' hears clips as they are: leave out 'model.encoder.silence_s'")


class Spectrograms(AcousticEncoder):
    """Log-mel spectrograms as frames (B, T, bins), 10 ms each, in an encoder's place while the encoder itself is trained.

    Args:
        extractor: makes them.
    """

    frame_s = 0.01
    place: Tensor

    def __init__(self, extractor: WhisperFeatureExtractor):
        nn.Module.__init__(self)
        self.extractor, self.silence_s = extractor, 0.0
        self.register_buffer("place", torch.zeros(0), persistent=False)  # tells the device

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.place.device

    @property
    def hidden_size(self) -> int:
        """Width of a frame: the mel bins."""
        return self.extractor.feature_size

    @property
    def max_samples(self) -> int:
        """Samples of 30 s."""
        return self.extractor.n_samples

    def _encode(self, mel: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """See `AcousticEncoder.forward`."""
        return mel.transpose(1, 2) * length_mask(lengths, mel.shape[2])[..., None].to(mel.dtype), lengths


class Ears(nn.Module):
    """An encoder and a projector as one module over log-mel spectrograms, in a projector's place while both are trained.

    Args:
        encoder: Whisper's architecture.
        projector: over its frames.
    """

    def __init__(self, encoder: AcousticEncoder, projector: AudioProjector):
        super().__init__()
        self.encoder, self.projector = encoder, projector

    def forward(self, mel: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Spectrograms (B, T, bins), 10 ms a frame, with lengths (B,) → audio tokens (B, S, H) and their number (B,)."""
        with sdpa_kernel(list(FUSED)):  # over 20 ms frames it is twice as fast as plain products, which suit audio tokens
            frames, lengths = self.encoder(mel.transpose(1, 2), lengths)
        return self.projector(frames, lengths)

    def output_length(self, frames: Length) -> Length:
        """Audio tokens that so many frames of 10 ms become."""
        return self.projector.output_length((frames + 1) // 2)

    @property
    def frames_per_slot(self) -> int:
        """Frames of 10 ms that make one audio token."""
        return 2 * self.projector.frames_per_slot

    @property
    def linear(self) -> nn.Linear:
        """The projector's linear layer, whose dtype is that of the audio tokens."""
        return self.projector.linear


def train_ears(recipe: EarsRecipe, folder: Path, device: torch.device) -> Path:
    """Trains encoder and projector, resuming an interrupted run.

    Args:
        recipe: of the stage.
        folder: of the run; gets log.jsonl, state.pt, encoder/ in Whisper's layout, and checkpoint/, whose config.json names
            that encoder.
        device: to compute on.

    Returns:
        the checkpoint's folder, an argument for `load()` and for `train.start_from`.

    Raises:
        RecipeError: the encoder is not a Whisper.
        AsrError: a model part, a data list or a saved state cannot be used.
    """
    model = build_model(recipe, device, compute_dtype(recipe.train.dtype, device))
    if recipe.train.start_from is not None:
        load_adapter(model, recipe.train.start_from)
    encoder, projector = model.encoder, model.projector
    if not isinstance(encoder.encoder, WhisperEncoder):
        raise RecipeError(f"{recipe.model.encoder.name} is not a Whisper; the stage 'ears' trains no other encoder")
    origin = fingerprint.of_tensors(encoder.state_dict())
    encoder.float().requires_grad_(True)
    encoder.encoder.embed_positions.requires_grad_(False)
    model.encoder, model.projector = Spectrograms(encoder.extractor).to(device), Ears(encoder, projector)  # type: ignore[assignment]
    trainer = AdapterTrainer(recipe, model, folder)
    trained = {n: p for n, p in model.trained().items() if n.startswith("projector.") and p.requires_grad}
    run(trained, trainer.loss_of, folder, recipe.train, trainer.evaluate, trainer.settings | {"encoder": origin})
    model.encoder, model.projector = encoder, projector
    if rank() == 0:
        save_encoder(encoder, folder / "encoder")
        named = replace(recipe.model.encoder, name=str((folder / "encoder").resolve()), revision=None)
        model.config = replace(model.config, encoder=named)
        save_checkpoint(model.eval(), folder / "checkpoint")
    return folder / "checkpoint"
