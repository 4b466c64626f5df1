"""The loop of steps.py against `DiffusionGemmaForBlockDiffusion.generate()`: the same canvas, step by step.

Both run the same small random weights from the same random state. Only the loop differs, and the way the
prompt comes in: ids for `generate()`, embeddings for ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, cast
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion
from transformers.models.diffusion_gemma.generation_diffusion_gemma import EntropyBoundSamplerConfig

from diffusion_gemma_asr.denoise.canvas import uniform_canvas
from diffusion_gemma_asr.denoise.steps import DenoiseOptions, denoise
from diffusion_gemma_asr.model.backbone import Backbone
from diffusion_gemma_asr.model.prefill import Prefill

VOCAB = 96
CANVAS = 12
SLOT = 90  # id of the audio placeholder

# A fresh random model is never as sure as the default bound and threshold expect of a trained one.
OPTIONS = [DenoiseOptions(steps=steps, entropy_bound=1.0) for steps in (1, 2, 6, 16)]
OPTIONS += [DenoiseOptions(steps=6, entropy_bound=0.1, t_max=1.5, t_min=0.2)]
STOPS_EARLY = DenoiseOptions(steps=48, entropy_bound=4.0, confidence_threshold=0.4)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    """Random weights, loud enough that a step accepts some tokens of the canvas but not all."""
    config = DiffusionGemmaConfig(
        text_config={
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "sliding_window": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "global_head_dim": 16,
            "num_global_key_value_heads": 1,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 16,
            "use_bidirectional_attention": "vision",
        },
        vision_config={
            "model_type": "gemma4_vision",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "position_embedding_size": 16,
        },
        image_token_id=VOCAB - 1,
        canvas_length=CANVAS,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = DiffusionGemmaForBlockDiffusion(config).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
        model.lm_head.weight.mul_(6)  # and the embeddings, which are the same
    return Backbone(model)


@dataclass
class Trace:
    """What a loop did.

    At every step: the canvas (B, C) and self-conditioning (B, C, V) it fed in, and the draft (B, C) it got.
    In the end: the passes of each row.
    """

    fed: list[Tensor] = field(default_factory=list)
    conditioning: list[Tensor | None] = field(default_factory=list)
    drafts: list[Tensor] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)

    def assert_equal(self, other: Trace) -> None:
        assert self.steps == other.steps
        for step, (mine, theirs) in enumerate(zip(self.fed, other.fed, strict=True), start=1):
            assert torch.equal(mine, theirs), f"another canvas goes into step {step}"
        for step, (mine, theirs) in enumerate(zip(self.drafts, other.drafts, strict=True), start=1):
            assert torch.equal(mine, theirs), f"another draft comes out of step {step}"
        assert self.conditioning[0] is None and other.conditioning[0] is None
        torch.testing.assert_close(self.conditioning[1:], other.conditioning[1:])


def trace_generate(model: DiffusionGemmaForBlockDiffusion, ids: Tensor, options: DenoiseOptions, seed: int) -> Trace:
    """Run `generate()` for one canvas and look at each of its denoising steps."""
    trace, passes = Trace(), torch.zeros(len(ids), dtype=torch.long)
    denoising_step, generate = model._denoising_step, cast(Callable[..., Any], model.generate)

    def watched_step(**inputs: Any) -> tuple[Tensor, ...]:
        trace.fed.append(inputs["current_canvas"].clone())
        trace.conditioning.append(inputs["self_conditioning_logits"])
        passes.add_(~inputs["finished_denoising"])
        outputs: tuple[Tensor, ...] = denoising_step(**inputs)
        trace.drafts.append(outputs[1].clone())
        return outputs

    with torch.random.fork_rng(devices=[]), patch.object(model, "_denoising_step", watched_step):
        torch.manual_seed(seed)
        output = generate(
            ids,
            max_new_tokens=CANVAS,
            max_denoising_steps=options.steps,
            sampler_config=EntropyBoundSamplerConfig(options.entropy_bound),
            t_min=options.t_min,
            t_max=options.t_max,
            stability_threshold=options.stability_threshold,
            confidence_threshold=options.confidence_threshold,
        )
    assert torch.equal(output.sequences[:, -CANVAS:], trace.drafts[-1])
    trace.steps = passes.tolist()
    return trace


class WatchedBackbone:
    """A backbone that notes what it is given."""

    def __init__(self, backbone: Backbone, trace: Trace) -> None:
        self.backbone, self.trace, self.vocab_size = backbone, trace, backbone.vocab_size

    def denoise_logits(self, canvas: Tensor, prefill: Prefill, conditioning: Tensor | None = None) -> Tensor:
        self.trace.fed.append(canvas.clone())
        self.trace.conditioning.append(conditioning)
        return self.backbone.denoise_logits(canvas, prefill, conditioning)


@torch.no_grad()
def trace_ours(backbone: Backbone, embeds: Tensor, options: DenoiseOptions, seed: int | None) -> Trace:
    """Run our loop on prompts of embeddings (B, P, H); seed None draws from torch's default generator."""
    trace, generator = Trace(), None if seed is None else torch.Generator().manual_seed(seed)
    prefill, _ = backbone.prefill(embeds, torch.ones(embeds.shape[:2], dtype=torch.bool))
    canvas = uniform_canvas(len(embeds), CANVAS, VOCAB, generator)
    watched = WatchedBackbone(backbone, trace)
    result = denoise(watched, prefill, canvas, options, generator, lambda _, d, __: trace.drafts.append(d.clone()))
    assert torch.equal(result.canvas, trace.drafts[-1])
    trace.steps = result.steps.tolist()
    return trace


def prompts(batch: int = 2, length: int = 20) -> Tensor:
    """Random prompts (B, P) whose middle is audio placeholders."""
    ids = torch.randint(3, SLOT, (batch, length), generator=torch.Generator().manual_seed(11))
    ids[:, 6:14] = SLOT
    return ids


@contextmanager
def audio_in_placeholders(model: DiffusionGemmaForBlockDiffusion, audio: Tensor) -> Iterator[None]:
    """Overwrite the encoder's embeddings of the placeholder with audio (number of placeholders, H)."""

    def overwrite(module: torch.nn.Module, inputs: tuple[Tensor], embeds: Tensor) -> Tensor:
        return embeds.masked_scatter((inputs[0] == SLOT)[..., None], audio)

    handle = model.model.encoder.get_input_embeddings().register_forward_hook(overwrite)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: f"{options.steps}-steps-{options.entropy_bound}")
@pytest.mark.parametrize("seed", range(3))
def test_text_prompt(backbone: Backbone, options: DenoiseOptions, seed: int) -> None:
    ids = prompts()
    expected = trace_generate(backbone.model, ids, options, seed)
    trace_ours(backbone, backbone.embed(ids), options, seed).assert_equal(expected)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: f"{options.steps}-steps-{options.entropy_bound}")
@pytest.mark.parametrize("seed", range(3))
def test_audio_in_the_placeholder_slots(backbone: Backbone, options: DenoiseOptions, seed: int) -> None:
    ids = prompts()
    slots = ids == SLOT  # (B, P)
    audio = 6 * torch.randn(int(slots.sum()), backbone.hidden_size, generator=torch.Generator().manual_seed(seed))
    with audio_in_placeholders(backbone.model, audio):
        expected = trace_generate(backbone.model, ids, options, seed)
    embeds = backbone.embed(ids).detach().masked_scatter(slots[..., None], audio)
    trace_ours(backbone, embeds, options, seed).assert_equal(expected)

    without = trace_ours(backbone, backbone.embed(ids), options, seed)
    assert not torch.equal(without.drafts[-1], expected.drafts[-1])  # the audio was heard


@pytest.mark.parametrize("stability", [0, 1, 2])
def test_early_stop(backbone: Backbone, stability: int) -> None:
    ids, options = prompts(batch=3), replace(STOPS_EARLY, stability_threshold=stability)
    traces = [trace_generate(backbone.model, ids, options, seed) for seed in range(3)]
    for seed, expected in enumerate(traces):
        trace_ours(backbone, backbone.embed(ids), options, seed).assert_equal(expected)
    assert any(min(trace.steps) < max(trace.steps) for trace in traces)  # a row was frozen, others went on
    assert any(max(trace.steps) < options.steps for trace in traces)  # all rows stopped early


def test_default_generator(backbone: Backbone) -> None:
    ids = prompts()
    expected = trace_generate(backbone.model, ids, OPTIONS[2], seed=5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        trace_ours(backbone, backbone.embed(ids), OPTIONS[2], seed=None).assert_equal(expected)


def test_the_comparison_is_not_trivial(backbone: Backbone) -> None:
    """The tiny model keeps some tokens of a step and not all, and changes its mind."""
    trace = trace_ours(backbone, backbone.embed(prompts()), OPTIONS[2], seed=0)
    kept = torch.stack([fed == draft for fed, draft in zip(trace.fed[1:], trace.drafts, strict=False)])
    changed = torch.stack([one != other for one, other in pairwise(trace.drafts)])
    assert 0.2 < kept.float().mean() < 0.9
    assert 0.1 < changed.float().mean() < 0.9
