"""Whether a projector hears: the error rate of greedy CTC on an example, straight through the backbone's output head.

A wrong stride, scale or order of layers shows at once. It needs the encoder and the head alone, not the backbone's layers.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from ..audio.read import load_audio
from ..checkpoint.foreign import Imported
from ..checkpoint.load import fill_projector
from ..checkpoint.parts import load_encoder, load_head, load_tokenizer
from ..errors import AsrError
from ..model.drafts import Encoded, GreedyCtc
from ..model.projector import AudioProjector
from ..model.prompt import SPECIAL_TOKENS

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
HEARS = 0.5  # errors a word, at most, with which drafts are of use


class Heard(NamedTuple):
    """What came of it.

    Attributes:
        rate: error rate with the pad token as the blank, None where nothing could be checked.
        line: for people.
    """

    rate: float | None
    line: str


@torch.no_grad()
def hear(imported: Imported) -> Heard:
    """Transcribes a bundled example by greedy CTC, where encoder and head are on this machine."""
    config = imported.config
    language = next((code for code in config.languages if (EXAMPLES / f"{code}.flac").is_file()), None)
    if language is None:
        return Heard(None, f"not checked by ear: no example in {', '.join(config.languages)}")
    try:
        from ..evaluate.metrics import error_rate  # needs an extra

        encoder = load_encoder(config.encoder, local_files_only=True)
        head = load_head(config.backbone)
        tokenizer = load_tokenizer(config.backbone, local_files_only=True)
    except AsrError as error:
        return Heard(None, f"not checked by ear, so its drafts are not used: {error}")
    width, backbone_width = encoder.hidden_size, head.weight.shape[1]
    projector = AudioProjector(config.projector, width, backbone_width).eval()
    weights = {name.removeprefix("projector."): t for name, t in imported.tensors.items() if name.startswith("projector.")}
    fill_projector(projector, weights, Path(config.name))
    frames, lengths = encoder(*encoder.features([load_audio(EXAMPLES / f"{language}.flac")]))
    encoded = Encoded(frames, lengths, *projector(frames, lengths))
    said = (EXAMPLES / f"{language}.txt").read_text(encoding="utf-8").strip()

    def rate(blank: int) -> tuple[float, str]:
        (draft,) = GreedyCtc(head, blank).drafts(encoded)
        text = tokenizer.decode([token.id for token in draft], skip_special_tokens=True).strip()
        return error_rate([said], [text], language), text

    pad = tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS["pad"])
    errors, text = rate(pad)
    line = f'greedy CTC hears "{text}" for "{said}": {errors:.0%} errors'
    if errors <= HEARS:
        return Heard(errors, line)
    winner = int(head.best(encoded.slots)[0].flatten().mode().values)
    if winner != pad and (other := rate(winner))[0] <= HEARS:
        token = tokenizer.convert_ids_to_tokens(winner)
        line = f'greedy CTC hears "{other[1]}" for "{said}" ({other[0]:.0%} errors), but its blank is {token}'
        return Heard(errors, f"{line}, where ours is <pad>: its drafts are not used")
    return Heard(errors, f"{line}; the mapping is wrong, or it was trained without CTC: its drafts are not used")
