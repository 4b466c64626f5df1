"""A Whisper's decoder that reads audio tokens and writes the tokens of a backbone: what a small backbone begins as.

That decoder was trained on 680,000 hours of speech: it knows how transcripts go on, and where in the encoder's frames to
look for the next token. Three things are changed in it, so that carry_over.py can put it into DiffusionGemma's layers. Each
costs little once it has trained for some minutes:

- it reads an acoustic token for each slot, a linear map of the slot's frames (`AudioProjector.prompted`), not every frame;
- a layer's self-attention and cross-attention read the same state, side by side, as heads of one attention do;
- in place of learned positions there is a function of the distance, made of waves that rotated queries and keys can give.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase
from transformers.models.whisper.modeling_whisper import WhisperModel

from ...checkpoint.parts import load_pretrained, load_tokenizer
from ...errors import CheckpointError
from ...model.config import BackboneConfig
from ...model.lengths import length_mask
from ...model.projector import of_slots
from ..decoder_start import readable

IGNORED = -100  # places behind the end of a row, in targets
POSITIONS = 100  # of Whisper's, whose mean stands in for all


class Attention(nn.Module):
    """Attention of Whisper's, its parameters under Whisper's names; `speeds` (F,) of the waves."""

    speeds: Tensor

    def __init__(self, width: int, heads: int, speeds: Tensor):
        super().__init__()
        self.heads = heads
        self.q_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(3))
        self.k_proj = nn.Linear(width, width, bias=False)
        self.waves = nn.Parameter(torch.zeros(heads, len(speeds), 2))  # factors of cosine and sine
        self.register_buffer("speeds", speeds, persistent=False)

    def by_distance(self, size: int) -> Tensor:
        """(heads, size, size), what is added to a place's logits for each one before it; -inf for those behind it."""
        places = torch.arange(size, device=self.waves.device)
        distance = places[:, None] - places
        angles = self.speeds[:, None, None] * distance  # (F, size, size)
        waves = torch.stack([angles.cos(), angles.sin()])
        return torch.einsum("hfs,sfij->hij", self.waves, waves).masked_fill(distance < 0, -torch.inf)

    def forward(self, states: Tensor, read: Tensor, mask: Tensor) -> Tensor:
        """states (B, T, D) look at what is read (B, S, D); mask, broadcast to (B, heads, T, S): bool, or added to logits."""
        q, k, v = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear, x in ((self.q_proj, states), (self.k_proj, read), (self.v_proj, read))
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class ListenerLayer(nn.Module):
    """A layer of the decoder, its parameters under Whisper's names."""

    def __init__(self, width: int, heads: int, inner: int, speeds: Tensor):
        super().__init__()
        self.self_attn, self.encoder_attn = Attention(width, heads, speeds), Attention(width, heads, speeds)
        self.encoder_attn.waves.requires_grad_(False)
        self.self_attn_layer_norm, self.encoder_attn_layer_norm, self.final_layer_norm = (
            nn.LayerNorm(width) for _ in range(3)
        )
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def attend(self, states: Tensor, tokens: Tensor, heard: Tensor) -> Tensor:
        """states (B, T, D) → behind both attentions; acoustic tokens (B, S, D), heard (B, 1, 1, S) bool."""
        written = self.self_attn_layer_norm(states)
        before = self.self_attn.by_distance(states.shape[1])
        sound = self.encoder_attn(self.encoder_attn_layer_norm(states), tokens, heard)
        return states + self.self_attn(written, written, before) + sound

    def forward(self, states: Tensor, tokens: Tensor, heard: Tensor) -> Tensor:
        """As `attend`, behind the feed-forward block."""
        return self.feed(self.attend(states, tokens, heard))

    def feed(self, states: Tensor) -> Tensor:
        """(B, T, D) → behind the feed-forward block."""
        return states + self.fc2(F.gelu(self.fc1(self.final_layer_norm(states))))


class Listener(nn.Module):
    """The decoder.

    Args:
        decoder: a Whisper's, whose weights it begins with.
        table: (V, D) embeddings of the backbone's tokens in Whisper's space; they do not learn.
        starts: (languages, n, D) of what Whisper begins with.
        stride: encoder frames of one slot.
        speeds: (F,) angles by which the waves turn from one position to the next.
    """

    table: Tensor
    starts: Tensor
    layers: Any  # ListenerLayer

    def __init__(self, decoder: Any, table: Tensor, starts: Tensor, stride: int, speeds: Tensor):
        super().__init__()
        width, config = table.shape[1], decoder.config
        self.stride, self.heads = stride, config.decoder_attention_heads
        self.acoustic = nn.Conv1d(width, width, stride, stride)
        self.layers = nn.ModuleList(
            ListenerLayer(width, self.heads, config.decoder_ffn_dim, speeds) for _ in range(config.decoder_layers)
        )
        self.layer_norm = nn.LayerNorm(width)
        self.position = nn.Parameter(decoder.embed_positions.weight.detach()[:POSITIONS].float().mean(0))
        self.register_buffer("table", table)
        self.register_buffer("starts", starts)
        own = self.state_dict()
        theirs = {name: tensor for name, tensor in decoder.state_dict().items() if name in own}
        self.load_state_dict(theirs, strict=False)
        with torch.no_grad():  # the mean of the frames
            self.acoustic.weight.copy_(torch.eye(width)[..., None].expand(-1, -1, stride) / stride)
            self.acoustic.bias.zero_()  # type: ignore[union-attr]

    def hear(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Frames (B, F, D), zeros behind each end, with lengths (B,) → acoustic tokens (B, S, D), and how many (B,)."""
        counts = (lengths + self.stride - 1) // self.stride
        return of_slots(self.acoustic, frames, int(counts.max())), counts

    def embed(self, ids: Tensor, languages: Tensor) -> Tensor:
        """Tokens (B, T) behind the start in a language (B,) → (B, n + T, D)."""
        return torch.cat([self.starts[languages], self.table[ids]], 1) + self.position

    def forward(self, tokens: Tensor, counts: Tensor, ids: Tensor, languages: Tensor) -> Tensor:
        """Hidden states (B, 1 + T, D) from which each token and what follows the last one are written.

        Args:
            tokens: (B, S, D) acoustic ones; counts: (B,).
            ids: (B, T); languages: (B,) numbers.
        """
        heard = length_mask(counts, tokens.shape[1])[:, None, None]
        states = self.embed(ids, languages)
        for layer in self.layers:
            states = layer(states, tokens, heard)
        return self.layer_norm(states)[:, self.starts.shape[1] - 1 :]

    def logits(self, frames: Tensor, lengths: Tensor, targets: Sequence[Sequence[int]], languages: Tensor) -> Tensor:
        """(N, V) for all N tokens of the targets, one after another, from frames (B, F, D) with lengths (B,)."""
        ids, wanted = rows_of(targets)
        hidden = self(*self.hear(frames, lengths), ids.to(frames.device), languages)
        return hidden[wanted.to(frames.device) != IGNORED] @ self.table.T


def rows_of(targets: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Targets → what is read for them, (B, T - 1), and the same as rows (B, T) that end in `IGNORED`."""
    wanted = torch.full((len(targets), max(map(len, targets))), IGNORED)
    for row, target in zip(wanted, targets, strict=True):
        row[: len(target)] = torch.tensor(target)
    return wanted[:, :-1].clamp_min(0), wanted


def load_listener(
    name: str, tokenizer: PreTrainedTokenizerBase, rows: Tensor, languages: Sequence[str], stride: int, speeds: Tensor
) -> tuple[Listener, float]:
    """A new listener.

    Args:
        name: hub repository or folder of a whole Whisper.
        tokenizer: the backbone's; rows: (V, D) its tokens' (`whisper_tokens.rows_for`).
        languages: codes, by number.
        stride, speeds: see `Listener`.

    Returns:
        it, and the factor that `rows_for` multiplied Whisper's rows with.

    Raises:
        CheckpointError: there is no such Whisper, or none of its tokens is one of the backbone's.
    """
    whisper: Any = load_pretrained(WhisperModel, name, "decoder", dtype=torch.float32)
    decoder = whisper.decoder
    theirs = load_tokenizer(BackboneConfig(name))
    vocabulary, embeddings = theirs.get_vocab(), decoder.embed_tokens.weight.detach()
    whole = {text: vocabulary[token] for token, text in readable(vocabulary).items()}
    known = {number: whole[text] for text, number in tokenizer.get_vocab().items() if text in whole}
    if not known:
        raise CheckpointError(f"{name} can write none of the backbone's tokens: are they its own?")
    mean = embeddings[[*whole.values()]].mean(0)
    own, other = rows[[*known]].float(), embeddings[[*known.values()]] - mean
    factor = float((own * other).sum() / other.square().sum())
    starts = torch.stack([embeddings[start_of(vocabulary, code, decoder.config)] for code in languages])
    return Listener(decoder, rows.float() / factor + mean, starts, stride, speeds), factor


def start_of(vocabulary: Mapping[str, int], language: str, config: Any) -> list[int]:
    """The tokens that a Whisper begins a transcript with."""
    names = ["<|startoftranscript|>", f"<|{language}|>", "<|transcribe|>", "<|notimestamps|>"]
    return [vocabulary.get(name, config.decoder_start_token_id) for name in names]
