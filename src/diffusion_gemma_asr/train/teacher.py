"""A teacher: a trained projector whose audio tokens another one imitates, as if it heard as well from less.

Knowledge distillation (Hinton et al. 2015, arXiv 1503.02531) of vectors in place of probabilities: what imitates them well
spells as the teacher spells, and is read by the backbone that has learnt to read the teacher's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.config_file import read_config_file
from ..checkpoint.load import fill_projector, read_projector
from ..data.features import FeatureCache
from ..data.manifest import Utterance
from ..errors import CheckpointError
from ..model.model import DiffusionGemmaASR
from ..model.projector import AudioProjector


class Teacher:
    """A trained projector over the cached frames of its own encoder.

    Args:
        checkpoint: folder with the projector; its audio tokens stand for as much sound as the model's.
        frames: folder with the frames of its encoder.
        model: that imitates; both must have been trained through the same head.
        utterances: to be heard.

    Raises:
        CheckpointError: there is no such projector, or it fits neither the backbone nor the length of the audio tokens.
        DataError: frames of an utterance are missing.
    """

    def __init__(self, checkpoint: Path, frames: Path, model: DiffusionGemmaASR, utterances: Sequence[Utterance]):
        self.cache = FeatureCache.open(frames, utterances)
        config = read_config_file(checkpoint)
        width = model.backbone.hidden_size
        if config.backbone.width not in (None, width):
            trained = f"was trained for a backbone {config.backbone.width} wide, not {width}"
            raise CheckpointError(f"the teacher {checkpoint} {trained}")
        self.projector = AudioProjector(config.projector, self.cache.width, width, model.backbone.embedding_scale())
        fill_projector(self.projector, read_projector(checkpoint), checkpoint)
        self.projector.to(model.device).eval().requires_grad_(False)
        longest = max(utterances, key=lambda u: u.duration)
        own = self.projector.output_length(self.cache.length(longest)) / max(longest.duration, 1e-3)
        if abs(own * model.slot_s - 1) > 0.1:
            raise CheckpointError(
                f"the teacher {checkpoint} makes {own:.1f} audio tokens a second, this model {1 / model.slot_s:.1f}; "
                "give projector.strides that agree"
            )

    @torch.no_grad()
    def lend(self, projector: AudioProjector) -> None:
        """Lets a new projector begin with the teacher's upper part: what writes audio tokens, and the last layers over them,
        where shapes agree. Its convolutions and first layers stay its own."""
        theirs, own = self.projector.state_dict(), projector.state_dict()
        if self.projector.deep is not None and projector.deep is not None:
            above = len(projector.deep.layers) - len(self.projector.deep.layers)
            theirs = {_moved(name, above): value for name, value in theirs.items()}
        for name, value in own.items():
            lent = theirs.get(name)
            if lent is not None and not name.startswith("conv") and name != "scale" and lent.shape == value.shape:
                value.copy_(lent)

    @torch.no_grad()
    def slots(self, utterances: Sequence[Utterance]) -> Tensor:
        """(B, S, H) audio tokens of the unmasked sound, zeros behind each end, on the model's device."""
        frames, lengths = (part.to(self.projector.linear.weight.device) for part in self.cache.batch(utterances))
        return self.projector(frames, lengths)[0]


def _moved(name: str, layers: int) -> str:
    """The name of a projector's tensor so many layers higher up."""
    first, found, rest = name.partition("deep.layers.")
    if not found:
        return name
    number, _, tensor = rest.partition(".")
    return f"{first}{found}{int(number) + layers}.{tensor}"
