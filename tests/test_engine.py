"""The engines: rows that come and go write what the plain loop writes for each alone, in fewer passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_jobs import LENGTHS, SAMPLES, SURE_EARLY, TO_THE_END, Queue, assert_same
from tiny_model import clips, tiny_model
from torch import Tensor

from diffusion_gemma_asr.denoise.clip import Decoded
from diffusion_gemma_asr.denoise.decode import decode_clips
from diffusion_gemma_asr.denoise.engine import Engine, predict
from diffusion_gemma_asr.denoise.options import DecodeOptions
from diffusion_gemma_asr.denoise.queue import AnyEngine, run_queue
from diffusion_gemma_asr.denoise.static_engine import StaticEngine
from diffusion_gemma_asr.denoise.steps import DenoiseOptions, denoise, pick, sample_by_inversion, token_entropy
from diffusion_gemma_asr.model.head import Head
from diffusion_gemma_asr.model.model import DiffusionGemmaASR

Make = Callable[..., AnyEngine]


@pytest.fixture(scope="module")
def model(whisper_folder: Path, backbone_folder: Path) -> DiffusionGemmaASR:
    return tiny_model(whisper_folder, backbone_folder)


@pytest.fixture(scope="module")
def audio() -> list[np.ndarray]:
    return clips(SAMPLES)


@pytest.fixture(scope="module")
def queue(model: DiffusionGemmaASR, audio: list[np.ndarray]) -> Queue:
    return Queue(model, audio)


@pytest.fixture(params=[Engine, StaticEngine])
def make(request: pytest.FixtureRequest) -> Make:
    """An engine's class."""
    return request.param


@pytest.mark.parametrize("options", [SURE_EARLY, TO_THE_END], ids=["early", "to the end"])
@pytest.mark.parametrize("rows", [1, 3, 32])
def test_the_queue_writes_what_the_plain_loop_writes(
    model: DiffusionGemmaASR, queue: Queue, make: Make, options: DenoiseOptions, rows: int
) -> None:
    finished = dict(run_queue(model.backbone, queue.jobs(), queue.read, options, rows, engine=make(model.backbone)))
    assert_same([finished[number] for number in range(len(LENGTHS))], queue.plain(options))


def test_rows_come_and_go_each_with_its_own_options(model: DiffusionGemmaASR, queue: Queue, make: Make) -> None:
    options = [replace(TO_THE_END, steps=1 + number % 4, entropy_bound=0.5 * number) for number in range(len(LENGTHS))]
    jobs, engine, finished = queue.jobs(), make(model.backbone), {}
    for number in range(len(LENGTHS)):
        engine.add([number], [jobs[number]], [options[number]], queue.read([number]))
        finished |= dict(engine.step())
    assert finished and len(engine) == len(LENGTHS) - len(finished)
    while len(engine):
        finished |= dict(engine.step())
    assert_same([finished[number] for number in range(len(LENGTHS))], queue.plain(options))
    assert engine.step() == []


def test_rows_that_are_dropped_change_nothing_for_the_others(model: DiffusionGemmaASR, queue: Queue, make: Make) -> None:
    jobs, engine = queue.jobs(), make(model.backbone)
    numbers = list(range(len(jobs)))
    engine.add(numbers, jobs, [TO_THE_END] * len(jobs), queue.read(numbers))
    engine.step()
    engine.drop([0, 2])
    assert len(engine) == len(jobs) - 2
    finished = {}
    while len(engine):
        finished |= dict(engine.step())
    kept = [1, 3, 4, 5, 6]
    assert sorted(finished) == kept
    plain = queue.plain(TO_THE_END)
    assert_same([finished[number] for number in kept], [plain[number] for number in kept])
    engine.add([0], jobs[:1], [TO_THE_END], queue.read([0]))
    engine.drop([0])
    assert len(engine) == 0 and engine.step() == []


def test_jobs_may_be_added_while_others_finish(model: DiffusionGemmaASR, queue: Queue, make: Make) -> None:
    jobs = queue.jobs()
    growing, finished = jobs[:2], {}
    for number, one in run_queue(model.backbone, growing, queue.read, TO_THE_END, 2, engine=make(model.backbone)):
        finished[number] = one
        growing.extend(jobs[len(growing) : len(growing) + 2])
    assert_same([finished[number] for number in range(len(LENGTHS))], queue.plain(TO_THE_END))


def test_rows_that_have_stopped_make_room(model: DiffusionGemmaASR, queue: Queue, make: Make) -> None:
    passes: dict[int, int] = {}
    order: list[int] = []  # of the jobs' first steps
    under_way, most = set(), 0

    def watch(number: int, step: int, canvas: Tensor, entropy: Tensor) -> None:
        nonlocal most
        assert canvas.shape == entropy.shape == (LENGTHS[number],)
        if step == 0:
            order.append(number)
            assert entropy.isinf().all()
        under_way.add(number)
        most = max(most, len(under_way))
        passes[number] = step

    steps = {}
    for number, finished in run_queue(
        model.backbone, queue.jobs(), queue.read, SURE_EARLY, 3, engine=make(model.backbone, watch)
    ):
        steps[number] = finished.steps
        under_way.discard(number)
    assert len(set(steps.values())) > 1, "every row stopped at the same step: nothing to show"
    assert passes == steps  # no row is denoised after it has stopped
    assert most == 3
    assert [LENGTHS[number] for number in order] == sorted(LENGTHS, reverse=True)  # the longest first


def test_every_step_is_shown_as_the_plain_loop_shows_it(model: DiffusionGemmaASR, queue: Queue, make: Make) -> None:
    shown: list[tuple[int, list[int]]] = []
    (job,), read = queue.jobs()[:1], queue.read
    engine = make(model.backbone, lambda _, step, row, __: shown.append((step, row.tolist())))
    list(run_queue(model.backbone, [job], read, TO_THE_END, 1, engine=engine))
    seen: list[tuple[int, list[int]]] = [(0, queue.jobs()[0].canvas.tolist())]
    job = queue.jobs()[0]
    denoise(
        model.backbone, read([0]), job.canvas[None], TO_THE_END, [job.generator],
        lambda step, row, _: seen.append((step, row[0].tolist())), sample_by_inversion,
    )  # fmt: skip
    assert shown == seen


def test_the_order_of_the_clips_does_not_matter(model: DiffusionGemmaASR, audio: list[np.ndarray]) -> None:
    options = DecodeOptions(language="en", steps=3, entropy_bound=2.0)
    forward = decode_clips(model, audio, options, batch_size=2)
    backward = decode_clips(model, audio[::-1], options, batch_size=4)

    def outline(rows: Sequence[Decoded]) -> Iterator[tuple[list[int], str, int]]:
        return ((row.tokens, row.draft, row.steps) for row in rows)

    assert list(outline(forward)) == list(outline(backward[::-1]))


def test_padding_of_canvas_and_prompt_changes_nothing(model: DiffusionGemmaASR, audio: list[np.ndarray]) -> None:
    encoded = model.encode(audio[:2])
    slots, lengths, backbone = encoded.slots, encoded.slot_lengths, model.backbone
    canvas = torch.randint(backbone.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    alone = []
    with torch.no_grad():
        for row, size in enumerate((9, 5)):
            n = int(lengths[row])
            prefill, _ = model.read_prompts(slots[row : row + 1, :n], lengths[row : row + 1], ["en"])
            signal = backbone.denoise_logits(canvas[row : row + 1, :size], prefill)
            hidden = backbone.denoise_hidden(canvas[row : row + 1, :size], prefill, signal)
            alone.append((prefill, signal.softmax(-1) @ backbone.lm_head_weight, hidden))
        joined = alone[0][0].join(alone[1][0])
        assert joined.visible.sum(1).tolist() == joined.lengths.tolist()
        soft = torch.nn.utils.rnn.pad_sequence([part[1][0] for part in alone], True, 7.0)
        together = backbone.denoise_hidden_from_soft(canvas, torch.tensor([9, 5]), joined, soft)
        torch.testing.assert_close(together[0], alone[0][2][0], atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(together[1, :5], alone[1][2][0], atol=1e-4, rtol=1e-3)
        second = joined.keep(torch.tensor([1]), int(joined.lengths[1]))
        again = backbone.denoise_hidden_from_soft(canvas[1:, :5], torch.tensor([5]), second, soft[1:, :5])
        torch.testing.assert_close(again, alone[1][2], atol=1e-4, rtol=1e-3)


# -- predictions off hidden states, a few positions at a time ---------------------------------------------------

CAP = 30.0


@pytest.mark.parametrize("positions", [1, 7, 50])
@torch.no_grad()
def test_predictions_are_those_of_the_whole_logits(positions: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = 4 * torch.randn(50, 16, generator=generator), torch.randn(90, 16, generator=generator)
    temperature, uniform = 0.1 + torch.rand(50, generator=generator), torch.rand(50, generator=generator)
    logits = CAP * torch.tanh(hidden @ weight.T / CAP)
    probs = (logits / temperature[:, None]).softmax(-1)
    prediction = predict(hidden, Head(weight, CAP, positions * 90), temperature, uniform)
    assert torch.equal(prediction.best, logits.argmax(-1))
    assert torch.equal(prediction.drawn, pick(probs, uniform))
    torch.testing.assert_close(prediction.entropy, token_entropy(probs), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(prediction.soft, probs @ weight, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_coldest_prediction_is_finite() -> None:
    hidden, weight = 100 * torch.ones(2, 4), torch.eye(4)[torch.tensor([0, 1, 2, 3, 0])] - 0.5
    prediction = predict(hidden, Head(weight, CAP), torch.tensor([1e-3, 1.0]), torch.tensor([0.3, 0.9]))
    assert all(torch.isfinite(part.float()).all() for part in prediction)
