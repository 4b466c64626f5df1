"""The projector: how many slots there are, that padding never reaches them, and how loud they are."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from diffusion_gemma_asr.model.config import ProjectorConfig
from diffusion_gemma_asr.model.lengths import strided_length
from diffusion_gemma_asr.model.projector import AudioProjector
from diffusion_gemma_asr.model.slot_layers import rotations, turned

INPUT, HIDDEN, OUTPUT = 6, 8, 16


def make(scale: float | None) -> AudioProjector:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = ProjectorConfig(hidden_size=HIDDEN, scaled=scale is not None)
        return AudioProjector(config, INPUT, OUTPUT, scale or 1.0).eval()


def padded(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Frames (B, F, INPUT) with zeros behind each row's end, and the lengths."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(n, INPUT, generator=generator) for n in lengths]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor(lengths)


def by_hand(projector: AudioProjector, frames: Tensor) -> Tensor:
    """One unpadded row through the bare layers."""
    x = F.gelu(projector.conv2(F.gelu(projector.conv1(frames.T[None]))))
    return projector.linear(x[0].T)


@torch.no_grad()
def test_output_length_is_what_the_convolutions_give() -> None:
    projector = make(None)
    frames = torch.zeros(1, 1500, INPUT)
    for n in range(1, 1501):
        slots, slot_lengths = projector(frames[:, :n], torch.tensor([n]))
        assert strided_length(n) == slots.shape[1] == slot_lengths[0] == math.ceil(math.ceil(n / 4) / 2), n


def test_thirty_seconds_are_188_slots() -> None:
    assert strided_length(1500) == 188


def test_output_length_of_a_tensor() -> None:
    n = torch.arange(1, 1501)
    assert strided_length(n).tolist() == [strided_length(i) for i in range(1, 1501)]


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    scale=st.sampled_from([None, 7.5]),
    seed=st.integers(0, 999),
)
@torch.no_grad()
def test_batch_is_what_single_calls_give(lengths: list[int], scale: float | None, seed: int) -> None:
    projector = make(scale)
    frames, frame_lengths = padded(lengths, seed)
    slots, slot_lengths = projector(frames, frame_lengths)
    assert slots.shape == (len(lengths), strided_length(max(lengths)), OUTPUT)
    for row, n in enumerate(lengths):
        alone, own = projector(frames[row : row + 1, :n], frame_lengths[row : row + 1])
        s = strided_length(n)
        assert own.tolist() == [s] == [int(slot_lengths[row])]
        torch.testing.assert_close(slots[row, :s], alone[0], atol=1e-5, rtol=1e-5)
        assert not slots[row, s:].any(), "not zero behind the end"


@pytest.mark.parametrize("scale", [0.25, 1.0, 55.0])
@torch.no_grad()
def test_scaled_slots_have_the_asked_size(scale: float) -> None:
    frames, lengths = padded([90, 41])
    frames = frames * torch.linspace(0.1, 20, 90)[:, None]  # however quiet or loud the frames are
    slots, slot_lengths = make(scale)(frames, lengths)
    for row, n in zip(slots, slot_lengths.tolist(), strict=True):
        rms = row[:n].pow(2).mean(-1).sqrt()  # (S,)
        torch.testing.assert_close(rms, torch.full((n,), scale), rtol=1e-4, atol=0)


@torch.no_grad()
def test_unscaled_slots_are_the_linear_layers_own() -> None:
    projector = make(None)
    frames, lengths = padded([37])
    slots, _ = projector(frames, lengths)
    torch.testing.assert_close(slots[0], by_hand(projector, frames[0]))
    projector.linear.weight.mul_(3)
    projector.linear.bias.mul_(3)
    torch.testing.assert_close(projector(frames, lengths)[0], 3 * slots)


@torch.no_grad()
def test_scaling_keeps_the_direction() -> None:
    projector = make(4.0)
    frames, lengths = padded([37])
    slots, _ = projector(frames, lengths)
    similarity = F.cosine_similarity(slots[0], by_hand(projector, frames[0]), dim=-1)
    torch.testing.assert_close(similarity, torch.ones_like(similarity))
    projector.linear.weight.mul_(3)
    projector.linear.bias.mul_(3)
    torch.testing.assert_close(projector(frames, lengths)[0], slots)


def test_the_scale_is_not_trained() -> None:
    layers = {name.split(".")[0] for name, _ in make(4.0).named_parameters()}
    assert layers == {"conv1", "conv2", "linear"}


def test_other_strides_make_shorter_slots() -> None:
    """Strides of 2 and 2: a slot of four frames, padding without effect, and as many slots as the lengths say."""
    projector = AudioProjector(ProjectorConfig(hidden_size=HIDDEN, strides=(2, 2)), INPUT, OUTPUT).eval()
    assert projector.frames_per_slot == 4 and make(None).frames_per_slot == 8
    frames = torch.randn(2, 50, INPUT)
    lengths = torch.tensor([50, 33])
    frames[1, 33:] = 0
    with torch.no_grad():
        slots, slot_lengths = projector(frames, lengths)
        alone, _ = projector(frames[1:, :33], lengths[1:])
    assert slot_lengths.tolist() == [strided_length(50, (2, 2)), strided_length(33, (2, 2))] == [13, 9]
    assert slots.shape == (2, 13, OUTPUT) and not slots[1, 9:].any()
    torch.testing.assert_close(slots[1, :9], alone[0])


def with_layers(
    strides: tuple[int, int] = (2, 2), layer_stride: int = 1, rotary: bool = False, dropout: float = 0.0
) -> AudioProjector:
    """Layers that already do something."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = ProjectorConfig(
            HIDDEN, strides, layers=2, layer_width=64, layer_stride=layer_stride, rotary=rotary, dropout=dropout
        )
        projector = AudioProjector(config, INPUT, OUTPUT, 7.5).eval()
        assert projector.deep is not None
        torch.nn.init.normal_(projector.deep.out_proj.weight)
    return projector


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize(("strides", "layer_stride"), [((2, 2), 1), ((2, 1), 2), ((1, 1), 3)])
@torch.no_grad()
def test_layers_give_a_row_of_a_batch_what_they_give_it_alone(
    strides: tuple[int, int], layer_stride: int, rotary: bool
) -> None:
    projector = with_layers(strides, layer_stride, rotary)
    lengths = [61, 7, 1, 30]
    frames, frame_lengths = padded(lengths)
    slots, slot_lengths = projector(frames, frame_lengths)
    for row, n in enumerate(lengths):
        alone, own = projector(frames[row : row + 1, :n], frame_lengths[row : row + 1])
        s = strided_length(n, strides)
        assert own.tolist() == [s] == [int(slot_lengths[row])]
        torch.testing.assert_close(slots[row, :s], alone[0], atol=1e-4, rtol=1e-4)
        assert not slots[row, s:].any(), "not zero behind the end"


@torch.no_grad()
def test_new_layers_add_nothing() -> None:
    config = ProjectorConfig(hidden_size=HIDDEN, strides=(2, 2), scaled=False)
    shallow = AudioProjector(config, INPUT, OUTPUT).eval()
    deep = AudioProjector(replace(config, layers=2, layer_width=64), INPUT, OUTPUT).eval()
    shallow.load_state_dict({name: value for name, value in deep.state_dict().items() if not name.startswith("deep.")})
    frames, lengths = padded([40, 21])
    assert torch.equal(deep(frames, lengths)[0], shallow(frames, lengths)[0])


def test_with_layers_a_slot_hears_the_whole_utterance() -> None:
    """Without them it hears the frames under its two convolutions."""
    for projector, reach in ((make(7.5), 36), (with_layers(), 400)):
        frames = torch.randn(1, 400, INPUT, requires_grad=True)
        slots, _ = projector(frames, torch.tensor([400]))
        slots[0, 0].sum().backward()
        assert frames.grad is not None
        heard = frames.grad[0].abs().sum(-1).nonzero()
        assert heard.min() == 0 and (heard.max() == 399 if reach == 400 else heard.max() < reach)


def test_every_weight_of_the_layers_learns() -> None:
    projector = with_layers()
    frames, lengths = padded([40, 21])
    projector(frames, lengths)[0].square().mul(torch.randn(OUTPUT)).sum().backward()
    still = [name for name, p in projector.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not still


@torch.no_grad()
def test_dropout_is_for_training_alone() -> None:
    frames, lengths = padded([40, 21])
    plain, dropping = with_layers(), with_layers(dropout=0.3)
    assert torch.equal(dropping(frames, lengths)[0], plain(frames, lengths)[0])
    plain.train(), dropping.train()
    assert torch.equal(plain(frames, lengths)[0], plain(frames, lengths)[0])
    assert not torch.allclose(dropping(frames, lengths)[0], dropping(frames, lengths)[0])


@pytest.mark.parametrize("rotary", [False, True])
@torch.no_grad()
def test_rotary_attention_tells_distances(rotary: bool) -> None:
    """Attention alone, without the convolutions, hears the order of what it attends to only if it is rotary."""
    deep = with_layers(rotary=rotary).deep
    assert deep is not None
    layer, x, mask = deep.layers[0], torch.randn(1, 9, 64), torch.ones(1, 9, dtype=torch.bool)
    turns = rotations(9, x.device) if deep.rotary else None
    there = layer._attention(x, mask, turns)[0, 0]
    back = layer._attention(torch.cat([x[:, :1], x[:, 1:].flip(1)], 1), mask, turns)[0, 0]
    assert torch.allclose(there, back, atol=1e-5) is not rotary


@torch.no_grad()
def test_rotary_attention_depends_on_distances_alone() -> None:
    q, k = torch.randn(2, 64)
    turns = rotations(40, q.device)
    scores = turned(q.expand(40, 64), turns) @ turned(k.expand(40, 64), turns).T
    for distance in (0, 1, 7):
        same = scores.diagonal(distance)
        torch.testing.assert_close(same, same[:1].expand_as(same), atol=1e-4, rtol=1e-4)
    assert (scores[0, 0] - scores[0, 7]).abs() > 1e-3


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 8)), min_size=1, max_size=3),
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=3),
)
@torch.no_grad()
def test_any_kernels_give_a_row_of_a_batch_what_they_give_it_alone(shape: list[tuple[int, int]], lengths: list[int]) -> None:
    kernels, strides = zip(*shape, strict=True)
    projector = AudioProjector(ProjectorConfig(HIDDEN, strides, False, kernels=kernels), INPUT, OUTPUT).eval()
    frames, frame_lengths = padded(lengths)
    slots, slot_lengths = projector(frames, frame_lengths)
    for row, n in enumerate(lengths):
        plain = frames[row, :n].T[None]
        for convolution in projector.convolutions():
            plain = F.gelu(convolution(plain))
        expected = projector.linear(plain[0].T)
        assert len(expected) == slot_lengths[row] == projector.output_length(n)
        torch.testing.assert_close(slots[row, : len(expected)], expected, atol=1e-5, rtol=1e-5)
        assert not slots[row, len(expected) :].any(), "not zero behind the end"


@pytest.mark.parametrize(("kernels", "strides"), [((16,), (8,)), ((7, 5), (4, 2)), ((3, 3, 3), (2, 2, 2))])
def test_foreign_shapes_make_188_slots_of_30_s(kernels: tuple[int, ...], strides: tuple[int, ...]) -> None:
    assert strided_length(1500, strides, kernels) == 188
