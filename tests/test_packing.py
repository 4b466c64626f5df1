"""packing.py: large matrices in 8 bits, and back."""

from __future__ import annotations

import torch

from diffusion_gemma_asr.model.packing import LEAST, SCALES, pack, unpack


def test_unpacked_weights_are_what_was_packed_but_for_rounding() -> None:
    torch.manual_seed(0)
    rows = LEAST // 64
    loud = torch.randn(rows, 64) * torch.logspace(-6, 3, rows)[:, None]
    loud[3] = 0.0
    tensors = {"loud": loud, "conv": torch.randn(64, 32, 8).half(), "small": torch.randn(5, 5), "bias": torch.randn(LEAST)}
    packed = pack(tensors)
    assert {name for name, tensor in packed.items() if tensor.dtype == torch.int8} == {"loud", "conv"}
    assert packed["loud" + SCALES].shape == (rows,) and packed["conv"].shape == (64, 32, 8)
    found = unpack(packed)
    assert found.keys() == tensors.keys()
    assert torch.equal(found["small"], tensors["small"]) and torch.equal(found["bias"], tensors["bias"])
    for name in ("loud", "conv"):
        whole = tensors[name].float().flatten(1)
        off = (found[name].flatten(1) - whole).abs().amax(1)
        assert (off <= whole.abs().amax(1) / 254 * 1.001 + 1e-12).all()


def test_packing_again_changes_nothing() -> None:
    torch.manual_seed(0)
    once = unpack(pack({"w": torch.randn(256, 128)}))
    torch.testing.assert_close(unpack(pack(once)), once, rtol=1e-6, atol=0)
