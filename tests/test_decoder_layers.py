"""A Whisper decoder's layers in the projector: what they compute, and what they begin as."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tiny import write_tokenizer, write_whisper
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch import Tensor
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerFast,
    WhisperForConditionalGeneration,
)

from diffusion_gemma_asr.errors import CheckpointError, RecipeError
from diffusion_gemma_asr.model.config import ProjectorConfig
from diffusion_gemma_asr.model.decoder_layers import DecoderLayers
from diffusion_gemma_asr.model.projector import AudioProjector
from diffusion_gemma_asr.train.adapter import build_model
from diffusion_gemma_asr.train.decoder_start import shared_tokens, start_from_whisper, token_map
from diffusion_gemma_asr.train.recipe import load_recipe

WIDTH, HIDDEN, OUTPUT = 64, 8, 16  # Whisper's heads are 64 wide


def with_decoder(dropout: float = 0.0) -> AudioProjector:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = ProjectorConfig(HIDDEN, (2, 2), decoder_layers=2, dropout=dropout)
        return AudioProjector(config, WIDTH, OUTPUT, 7.5).eval()


def padded(lengths: list[int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(n, WIDTH, generator=generator) for n in lengths]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor(lengths)


@torch.no_grad()
def test_a_row_of_a_batch_becomes_what_it_becomes_alone() -> None:
    projector, lengths = with_decoder(), [61, 7, 1, 30]
    frames, frame_lengths = padded(lengths)
    slots, slot_lengths = projector(frames, frame_lengths)
    for row, n in enumerate(lengths):
        alone, own = projector(frames[row : row + 1, :n], frame_lengths[row : row + 1])
        s = int(slot_lengths[row])
        assert own.tolist() == [s] == [math.ceil(math.ceil(n / 2) / 2)]
        torch.testing.assert_close(slots[row, :s], alone[0], atol=1e-4, rtol=1e-4)
        assert not slots[row, s:].any(), "not zero behind the end"


def test_every_weight_learns() -> None:
    projector = with_decoder()
    frames, lengths = padded([40, 21])
    projector(frames, lengths)[0].square().mul(torch.randn(OUTPUT)).sum().backward()
    assert not [name for name, p in projector.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


@torch.no_grad()
def test_dropout_is_for_training_alone() -> None:
    frames, lengths = padded([40, 21])
    plain, dropping = with_decoder(), with_decoder(dropout=0.3)
    assert torch.equal(dropping(frames, lengths)[0], plain(frames, lengths)[0])
    dropping.train()
    assert not torch.allclose(dropping(frames, lengths)[0], dropping(frames, lengths)[0])


@torch.no_grad()
def test_attention_falls_with_distance() -> None:
    """Where all frames are alike but for one, a slot hears it the louder the nearer it is."""
    layers = with_decoder().decoder
    assert layers is not None
    cross, slots, frames = layers.layers[0].cross_attention, 10, 40
    for part in (cross.q, cross.out):
        part.weight.zero_(), part.bias.zero_()
    cross.out.weight.copy_(torch.eye(WIDTH))
    sound = torch.zeros(1, frames, WIDTH)
    sound[0, 14] = 1.0  # in the slot of number 3
    cross.v.bias.zero_()
    here = (torch.arange(frames) - (torch.arange(slots)[:, None] + 0.5) * layers.stride + 0.5).abs()
    heard = cross(torch.zeros(1, slots, WIDTH), sound, here, torch.zeros(1, 1, 1, frames))[0].norm(dim=1)
    assert heard.argmax() == 3
    assert (heard[:3].diff() > 0).all() and (heard[4:].diff() < 0).all()


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Whisper whose decoder has three layers 64 wide, and a byte-level tokenizer of a few words."""
    folder = tmp_path_factory.mktemp("whisper")
    write_whisper(folder, width=WIDTH, seed=1, decoder_layers=3, decoder_attention_heads=1, decoder_ffn_dim=4 * WIDTH)
    letters = ["\u0120", *"abcdefghijklmnopqrstuvwxyz"]
    merges = [("t", "h"), ("th", "e"), ("\u0120", "the"), ("o", "u")]
    vocabulary = {token: number for number, token in enumerate([*letters, *("".join(pair) for pair in merges)])}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE(vocabulary, merges))).save_pretrained(folder)
    return folder


@torch.no_grad()
def test_layers_begin_as_the_decoders_last_ones(whisper: Path, tmp_path: Path) -> None:
    """Over one slot, and without the bias for distance, they compute what Whisper's compute."""
    write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    layers = DecoderLayers(HIDDEN, WIDTH, OUTPUT, layers=2, stride=4).eval()
    start_from_whisper(layers, str(whisper), torch.randn(len(tokenizer), OUTPUT), tokenizer)
    for layer in layers.layers:
        for attention in (layer.self_attention, layer.cross_attention):
            attention.log_slopes.fill_(-math.inf)
    decoder = WhisperForConditionalGeneration.from_pretrained(whisper).model.decoder.eval()
    slot, frames = torch.randn(1, 1, HIDDEN), torch.randn(1, 4, WIDTH)
    x = layers.in_proj(slot)
    for layer in decoder.layers[1:]:
        x = layer(x, encoder_hidden_states=frames)
        x = x[0] if isinstance(x, tuple) else x
    found = layers(slot, torch.tensor([1]), frames, torch.tensor([4]))
    torch.testing.assert_close(found, layers.out_proj(decoder.layer_norm(x)), atol=1e-5, rtol=1e-5)


def test_a_decoder_that_does_not_fit_is_refused(whisper: Path, tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    head = torch.randn(len(tokenizer), OUTPUT)
    with pytest.raises(CheckpointError, match=r"3 layers 64 wide.* wants 4 as wide .* 64"):
        start_from_whisper(DecoderLayers(HIDDEN, WIDTH, OUTPUT, layers=4, stride=4), str(whisper), head, tokenizer)
    with pytest.raises(CheckpointError, match=r"1 layers 16 wide.* wants 1 as wide .* 64"):
        small = write_whisper(tmp_path / "small")
        start_from_whisper(DecoderLayers(HIDDEN, WIDTH, OUTPUT, layers=1, stride=4), str(small), head, tokenizer)
    with pytest.raises(CheckpointError, match="no such folder"):
        start_from_whisper(DecoderLayers(HIDDEN, WIDTH, OUTPUT, layers=1, stride=4), str(tmp_path / "no"), head, tokenizer)


def test_a_vocabulary_without_a_token_of_whispers_is_refused(whisper: Path, tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.get_vocab = lambda: {"\u4f60\u597d": 7}
    with pytest.raises(CheckpointError, match=r"'train\.decoder': no token of .* is spelled like one of the backbone's"):
        start_from_whisper(
            DecoderLayers(HIDDEN, WIDTH, OUTPUT, layers=2, stride=4), str(whisper), torch.randn(8, OUTPUT), tokenizer
        )


def test_tokens_that_both_spell_alike(whisper: Path, tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    theirs, ours = AutoTokenizer.from_pretrained(whisper), AutoTokenizer.from_pretrained(tmp_path)
    pairs = shared_tokens(theirs, ours)
    assert pairs
    for a, b in pairs:
        spelled = theirs.convert_ids_to_tokens(a).replace("\u0120", " ")
        assert len(spelled) > 1 and ours.convert_ids_to_tokens(b) == spelled.replace(" ", "\u2581")


def test_the_map_turns_what_points_to_one_row_to_the_other() -> None:
    """Rows of which one are a linear map of the others: every mapped row is nearest to its own."""
    torch.manual_seed(0)
    ours = torch.randn(50, OUTPUT)
    theirs = ours @ torch.randn(OUTPUT, WIDTH) + 3.0
    found = token_map(theirs, ours)
    assert found.shape == (OUTPUT, WIDTH)
    scores = (theirs - theirs.mean(0)) @ found.T @ (ours - ours.mean(0)).T
    cosines = scores / (ours - ours.mean(0)).norm(dim=1)
    assert (cosines.argmax(1) == torch.arange(50)).float().mean() > 0.9


RECIPE = """
model:
  name: tiny
  encoder: {{name: whisper}}
  backbone: {{name: {backbone}}}
  projector: {{hidden_size: 8, strides: [2, 2], decoder_layers: {layers}}}
train: {{steps: 1, batch_size: 1, {decoder}}}
data: {{train: [{{manifest: a.jsonl}}], dev: [a.jsonl]}}
"""


def test_a_recipe_names_the_whisper(whisper: Path, backbone_folder: Path, tmp_path: Path) -> None:
    """By a path that starts from its own folder."""
    (tmp_path / "whisper").symlink_to(whisper)
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(backbone=backbone_folder, layers=1, decoder="decoder: ./whisper"))
    projector = build_model(load_recipe(path)).projector
    assert projector.decoder is not None
    theirs = WhisperForConditionalGeneration.from_pretrained(whisper).model.decoder.layers[2].fc1.weight
    assert torch.equal(projector.decoder.layers[0].fc1.weight, theirs)
    path.write_text(RECIPE.format(backbone=backbone_folder, layers=0, decoder="decoder: ./whisper"))
    with pytest.raises(RecipeError, match=r"'train\.decoder' is set, but 'model\.projector\.decoder_layers' is 0"):
        load_recipe(path)
    path.write_text(RECIPE.format(backbone=backbone_folder, layers=1, decoder="decoder: ./whisper, start_from: a"))
    with pytest.raises(RecipeError, match=r"'train\.decoder' and 'train\.start_from' are both set"):
        load_recipe(path)
