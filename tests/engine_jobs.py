"""Jobs for the engines of denoise/, and what the plain loop makes of each alone; for tests only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from diffusion_gemma_asr.denoise.canvas import uniform_canvas
from diffusion_gemma_asr.denoise.engine import Finished, Job
from diffusion_gemma_asr.denoise.steps import DenoiseOptions, denoise, sample_by_inversion
from diffusion_gemma_asr.model.model import DiffusionGemmaASR
from diffusion_gemma_asr.model.prefill import Prefill

SAMPLES = [40_000, 4000, 36_200, 320, 9000, 22_000, 30_000]
LENGTHS = [16, 8, 24, 5, 8, 11, 16]  # positions of the canvases
CODES = ["en", "de", "fr", "es", "hi", "zh", "en"]
SURE_EARLY = DenoiseOptions(steps=6, entropy_bound=2.0, stability_threshold=0, confidence_threshold=4.75)
TO_THE_END = DenoiseOptions(steps=3, entropy_bound=2.0)


class Queue:
    """Prompts and canvases of all clips; the same draws whenever it is asked."""

    def __init__(self, model: DiffusionGemmaASR, audio: list[np.ndarray]):
        self.model = model
        self.rows = [model.encode([clip]) for clip in audio]

    def jobs(self) -> list[Job]:
        jobs = []
        for number, length in enumerate(LENGTHS):
            generator = torch.Generator().manual_seed(220 + number)  # none meets a tie of two experts: rounding decides
            jobs.append(Job(uniform_canvas(1, length, self.model.backbone.vocab_size, generator)[0], generator))
        return jobs

    def read(self, numbers: Sequence[int]) -> Prefill:
        slots = torch.nn.utils.rnn.pad_sequence([self.rows[i].slots[0] for i in numbers], True)
        lengths = torch.cat([self.rows[i].slot_lengths for i in numbers])
        with torch.no_grad():
            return self.model.read_prompts(slots, lengths, [CODES[i] for i in numbers])[0]

    def plain(self, options: DenoiseOptions | Sequence[DenoiseOptions]) -> list[Finished]:
        """What the loop of steps.py makes of each job alone."""
        finished = []
        for number, job in enumerate(self.jobs()):
            own = options if isinstance(options, DenoiseOptions) else options[number]
            backbone, prefill = self.model.backbone, self.read([number])
            result = denoise(backbone, prefill, job.canvas[None], own, [job.generator], sampler=sample_by_inversion)
            finished.append(Finished(result.canvas[0], result.logprobs[0], int(result.steps[0])))
        return finished


def assert_same(ours: Sequence[Finished], expected: Sequence[Finished]) -> None:
    for one, other in zip(ours, expected, strict=True):
        assert one.canvas.tolist() == other.canvas.tolist()
        assert one.steps == other.steps
        assert one.logprobs.tolist() == pytest.approx(other.logprobs.tolist(), abs=5e-3)  # each step magnifies rounding
