"""What a projector's decoder layers begin as: a Whisper's, and a map from what these write to the backbone's tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..checkpoint.parts import load_decoder, load_tokenizer
from ..errors import CheckpointError, first_line
from ..model.config import BackboneConfig
from ..model.decoder_layers import DecoderLayers

NAMES = {  # Whisper's for the parts of a layer: ours
    "self_attn_layer_norm": "self_norm",
    "encoder_attn_layer_norm": "cross_norm",
    "final_layer_norm": "ffn_norm",
    "self_attn": "self_attention",
    "encoder_attn": "cross_attention",
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "out_proj": "out",
    "layer_norm": "norm",
}
ACOUSTIC = "acoustic.safetensors"  # of the stage `hearing`
SPACE = "\u2581"  # stands for a space, before a word
RIDGE = 0.01  # that keeps the map small, as a share of the mean square of the head's columns
MAP_SIZE = 0.3  # norm of the map's rows, as root mean square


def start_from_whisper(layers: DecoderLayers, name: str, head: Tensor, tokenizer: PreTrainedTokenizerBase) -> None:
    """Fills decoder layers with the last ones of a Whisper's decoder, and their output with a map to the backbone's tokens.

    Whisper's last hidden state points to the row of the token that it writes; mapped, it points to the row of the same
    token in the backbone's head, as far as least squares over all tokens that both spell alike can do it.

    Args:
        layers: to fill.
        name: hub repository or folder of a whole Whisper.
        head: (V, H), the backbone's.
        tokenizer: the backbone's.

    Raises:
        CheckpointError: there is no such Whisper, its decoder does not fit, or no token of two characters is in both
            vocabularies.
    """
    decoder = load_decoder(name)
    depth, width = decoder.config.decoder_layers, decoder.config.d_model
    wanted = len(layers.layers), layers.norm.weight.numel()
    if depth < wanted[0] or width != wanted[1]:
        raise CheckpointError(
            f"the decoder of {name} has {depth} layers {width} wide, 'projector.decoder_layers' wants {wanted[0]} as wide "
            f"as the encoder's frames, {wanted[1]}: name the Whisper that the encoder is of"
        )
    own = dict(layers.named_parameters())
    left = {name for name in own if name.split(".")[0] in ("layers", "norm") and not name.endswith("log_slopes")}
    for key, tensor in decoder.state_dict().items():
        parts = [NAMES.get(part, part) for part in key.split(".")]
        if parts[0] == "layers":
            parts[1] = str(int(parts[1]) - (depth - wanted[0]))
        if (parameter := own.get(".".join(parts))) is not None:
            parameter.data.copy_(tensor)
            left.discard(".".join(parts))
    if left:
        raise CheckpointError(f"the decoder of {name} has nothing for {', '.join(sorted(left)[:3])}")
    shared = shared_tokens(load_tokenizer(BackboneConfig(name)), tokenizer)
    if not shared:
        raise CheckpointError(f"'train.decoder': no token of {name} is spelled like one of the backbone's; name another")
    rows = decoder.embed_tokens.weight.data[[theirs for theirs, _ in shared]]
    own_rows = head[[ours for _, ours in shared]].float()
    layers.out_proj.weight.data.copy_(token_map(rows.to(own_rows.device), own_rows))


def shared_tokens(theirs: PreTrainedTokenizerBase, ours: PreTrainedTokenizerBase) -> list[tuple[int, int]]:
    """Tokens of at least two characters that a byte-level BPE and a SentencePiece spell alike: their number in either."""
    vocabulary = theirs.get_vocab()
    spelled = {text: vocabulary[token] for token, text in readable(vocabulary).items()}
    return [(spelled[text], number) for text, number in ours.get_vocab().items() if len(text) > 1 and text in spelled]


def readable(vocabulary: Mapping[str, int]) -> dict[str, str]:
    """The tokens of a byte-level BPE that hold whole characters, by number: each as text with SPACE for a space."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    table = {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}  # GPT-2's
    found: dict[str, str] = {}
    for token in sorted(vocabulary, key=vocabulary.__getitem__):
        try:
            found[token] = bytes(table[character] for character in token).decode("utf-8").replace(" ", SPACE)
        except (KeyError, UnicodeDecodeError):
            continue  # a special token, or a part of a character
    return found


def token_map(theirs: Tensor, ours: Tensor) -> Tensor:
    """(H, D): the map W for which ours (N, H) @ W comes closest to theirs (N, D), rows of the same N tokens."""
    theirs, ours = theirs - theirs.mean(0), ours - ours.mean(0)
    gram = ours.T @ ours
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device)
    found = torch.linalg.solve(gram + ridge, ours.T @ theirs)
    return MAP_SIZE * found / found.pow(2).sum(1).mean().sqrt()


def read_acoustic(folder: str | Path) -> dict[str, Tensor]:
    """What a projector takes from this stage: the map of frames to audio tokens, and their scale, by the projector's names.

    Raises:
        CheckpointError: there is no such file.
    """
    path = Path(folder) / ACOUSTIC
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: no acoustic tokens there ({first_line(error)}); run the stage 'hearing'") from None
    return {"acoustic.weight": found["weight"], "acoustic.bias": found["bias"], "acoustic_scale": found["scale"]}
