"""engine.py: a queue that is refilled writes what the plain loop writes, in fewer passes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_model import clips, tiny_model
from torch import Tensor

from diffusion_gemma_asr.backbone import Prefill
from diffusion_gemma_asr.decoding import Decoded
from diffusion_gemma_asr.denoise import DenoiseOptions
from diffusion_gemma_asr.model import DiffusionGemmaASR

SAMPLES = [40_000, 4000, 36_200, 320, 9000, 22_000, 30_000]
SURE_EARLY = DenoiseOptions(steps=6, entropy_bound=2.0, stability_threshold=0, confidence_threshold=4.75)
TO_THE_END = DenoiseOptions(steps=3, entropy_bound=2.0)


@pytest.fixture(scope="module")
def model(whisper_folder: Path, backbone_folder: Path) -> DiffusionGemmaASR:
    return tiny_model(whisper_folder, backbone_folder)


@pytest.fixture(scope="module")
def audio() -> list[np.ndarray]:
    return clips(SAMPLES)


@pytest.fixture
def passes(model: DiffusionGemmaASR, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The canvas lengths of the rows in every pass of the fast engine."""
    seen: list[list[int]] = []
    one_pass = model.backbone.denoise_hidden_from_soft

    def noted(canvas: Tensor, lengths: Tensor, prefill: Prefill, soft: Tensor) -> Tensor:
        assert canvas.shape[1] == lengths.max() and prefill.visible.shape[1] == prefill.lengths.max()
        seen.append(lengths.tolist())
        return one_pass(canvas, lengths, prefill, soft)

    monkeypatch.setattr(model.backbone, "denoise_hidden_from_soft", noted)
    return seen


def assert_same(found: Sequence[Decoded], expected: Sequence[Decoded]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.tokens, one.text, one.draft, one.steps) == (other.tokens, other.text, other.draft, other.steps)
        assert one.logprobs == pytest.approx(other.logprobs, abs=5e-3)


@pytest.mark.parametrize("options", [SURE_EARLY, TO_THE_END])
@pytest.mark.parametrize(("start", "draft_weight"), [("noise", 0.0), ("draft", 0.0), ("draft", 1.0)])
@pytest.mark.parametrize("rows", [1, 3, 32])
def test_both_engines_write_the_same(
    model: DiffusionGemmaASR, audio: list[np.ndarray], options: DenoiseOptions, start: str, draft_weight: float, rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(model, "draft_weight", draft_weight)
    languages = ["en", "de", "fr", "es", "hi", "zh", "en"]
    fast, plain = (
        model.transcribe_batch(audio, languages, options, 4, None, None, start, engine, rows)  # type: ignore[arg-type]
        for engine in ("fast", "reference")
    )
    assert_same(fast, plain)


def test_rows_that_have_stopped_make_room(
    model: DiffusionGemmaASR, audio: list[np.ndarray], passes: list[list[int]]
) -> None:
    found = model.transcribe_batch(audio, "en", SURE_EARLY, start="draft", rows=3)
    steps = [row.steps for row in found]
    assert len(set(steps)) > 1, "every row stopped at the same step: nothing to show"
    assert sum(len(rows) for rows in passes) == sum(steps)  # no row is denoised after it has stopped
    assert max(len(rows) for rows in passes) == 3
    assert len(passes) < sum(sorted(steps, reverse=True)[::3]), "waiting rows did not fill the gaps"
    assert passes[0][0] == max(max(rows) for rows in passes)  # the longest first


def test_the_order_of_the_clips_does_not_matter(model: DiffusionGemmaASR, audio: list[np.ndarray]) -> None:
    forward = model.transcribe_batch(audio, "en", TO_THE_END, rows=2)
    backward = model.transcribe_batch(audio[::-1], "en", TO_THE_END, rows=4)
    assert_same(forward, backward[::-1])


def test_padding_of_canvas_and_prompt_changes_nothing(model: DiffusionGemmaASR, audio: list[np.ndarray]) -> None:
    slots, lengths = model.encode_audio(audio[:2])
    backbone = model.backbone
    canvas = torch.randint(backbone.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    alone = []
    for row, size in enumerate((9, 5)):
        n = int(lengths[row])
        prefill, _ = model.read_prompts(slots[row : row + 1, :n], lengths[row : row + 1], ["en"])
        signal = backbone.denoise_logits(canvas[row : row + 1, :size], prefill)
        hidden = backbone.denoise_hidden(canvas[row : row + 1, :size], prefill, signal)
        alone.append((prefill, signal.softmax(-1) @ backbone.lm_head_weight, hidden))
    joined = alone[0][0].join(alone[1][0])
    assert joined.visible.sum(1).tolist() == joined.lengths.tolist()
    soft = torch.nn.utils.rnn.pad_sequence([part[1][0] for part in alone], True, 7.0)
    found = backbone.denoise_hidden_from_soft(canvas, torch.tensor([9, 5]), joined, soft)
    torch.testing.assert_close(found[0], alone[0][2][0], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(found[1, :5], alone[1][2][0], atol=1e-4, rtol=1e-3)
    second = joined.keep(torch.tensor([1]), int(joined.lengths[1]))
    again = backbone.denoise_hidden_from_soft(canvas[1:, :5], torch.tensor([5]), second, soft[1:, :5])
    torch.testing.assert_close(again, alone[1][2], atol=1e-4, rtol=1e-3)
