"""Linear layers in 8 bits: how near they are to float32, and that no row depends on the others."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffusion_gemma_asr.model.int8 import Int8Linear, int8_available, use_int8

pytestmark = pytest.mark.skipif(not int8_available(), reason="8-bit products are for x86 processors")


@pytest.fixture
def inputs() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(3, 40, 64) * torch.rand(3, 40, 1) * 9


@pytest.mark.parametrize("bias", [True, False])
def test_it_computes_what_the_layer_does(inputs: torch.Tensor, bias: bool) -> None:
    linear = nn.Linear(64, 48, bias=bias)
    exact, rounded = linear(inputs), Int8Linear(linear)(inputs)
    assert rounded.shape == exact.shape and rounded.dtype == torch.float32
    away = (rounded - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert 0 < away.max() < 0.03


def test_a_row_does_not_depend_on_the_others(inputs: torch.Tensor) -> None:
    layer = Int8Linear(nn.Linear(64, 48))
    among = layer(inputs)
    inputs[1:] *= 1000
    assert torch.equal(layer(inputs)[0], among[0])
    assert torch.equal(layer(inputs[0, :1]), among[0, :1])


def test_rows_of_zeros_and_no_rows() -> None:
    linear = nn.Linear(64, 48)
    layer = Int8Linear(linear)
    torch.testing.assert_close(layer(torch.zeros(2, 64)), linear.bias.expand(2, -1), atol=1e-6, rtol=0)
    assert layer(torch.zeros(0, 64)).shape == (0, 48)


def test_some_layers_stay_as_they_are() -> None:
    root = nn.Sequential()
    root.inner, root.kept = nn.Sequential(nn.Linear(4, 4), nn.GELU()), nn.Linear(4, 4)
    assert use_int8(root, frozenset({"kept"})) is root
    assert isinstance(root.inner[0], Int8Linear) and type(root.kept) is nn.Linear
    assert not list(root.inner.parameters())  # nothing that an optimiser could be given
