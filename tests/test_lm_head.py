"""lm_head.py: in slices it finds what whole logits give."""

from __future__ import annotations

import pytest
import torch

from diffusion_gemma_asr import lm_head
from diffusion_gemma_asr.denoise import pick, token_entropy
from diffusion_gemma_asr.lm_head import logprobs_of, predict

CAP = 30.0


@pytest.mark.parametrize("slices", [1, 7, 50])
def test_predictions_are_those_of_the_whole_logits(slices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lm_head.SLICE, "cpu", slices * 90)
    torch.manual_seed(0)
    hidden, weight = 4 * torch.randn(50, 16), torch.randn(90, 16)
    temperature, uniform = 0.1 + torch.rand(50), torch.rand(50)
    logits = CAP * torch.tanh(hidden @ weight.T / CAP)
    probs = (logits / temperature[:, None]).softmax(-1)
    found = predict(hidden, weight, CAP, temperature, uniform)
    assert torch.equal(found.best, logits.argmax(-1))
    assert torch.equal(found.drawn, pick(probs, uniform))
    torch.testing.assert_close(found.entropy, token_entropy(probs), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.soft, probs @ weight, atol=1e-5, rtol=1e-4)
    tokens = torch.randint(90, (50,))
    expected = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs_of(hidden, weight, CAP, tokens), expected, atol=1e-5, rtol=1e-5)


def test_the_coldest_prediction_is_finite() -> None:
    hidden, weight = 100 * torch.ones(2, 4), torch.eye(4)[torch.tensor([0, 1, 2, 3, 0])] - 0.5
    found = predict(hidden, weight, CAP, torch.tensor([1e-3, 1.0]), torch.rand(2))
    assert all(torch.isfinite(part.float()).all() for part in found)
