"""The projector: how many slots there are, that padding never reaches them, and how loud they are."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from diffusion_gemma_asr.model.config import ProjectorConfig
from diffusion_gemma_asr.model.lengths import strided_length
from diffusion_gemma_asr.model.projector import AudioProjector

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
