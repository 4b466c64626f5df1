"""Speed of the real composition on one GPU, with random weights: the 26B backbone in bfloat16, Whisper small's encoder.

    python benchmarks/full_size.py                      benchmarks/results/full_size.json; a GPU of 80 GB, about 8 minutes
    python benchmarks/full_size.py --size tiny          the same parts on a CPU in seconds, to see that they run
    python benchmarks/full_size.py --report             fills the table of docs/performance.md
    benchmarks/gpu.sh                                   all parts in the order of their worth, fifteen minutes of a GPU

Random weights cannot tell when they are done, so every clip takes all its steps. The parts are stored one by one: a run that
was interrupted goes on with the next. Limits stand beside the times: the bytes of the weights that a pass touches over the
measured copy rate, and its operations over the measured rate of matrix products, whichever takes longer.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import init_empty_weights
from pages import RESULTS, ROOT, circumstances, fill, markdown, read_results, stated, write_results
from torch import nn
from transformers import AutoTokenizer, WhisperConfig
from transformers.models.diffusion_gemma.generation_diffusion_gemma import EntropyBoundSamplerConfig

from diffusion_gemma_asr.checkpoint.known_configs import diffusiongemma_26b, whisper_small
from diffusion_gemma_asr.checkpoint.quantization import find_quantizer, quantize_experts
from diffusion_gemma_asr.denoise.clip import rounded
from diffusion_gemma_asr.denoise.engine import Engine, Job
from diffusion_gemma_asr.denoise.queue import AnyEngine, engine_for, run_queue
from diffusion_gemma_asr.denoise.steps import DenoiseOptions
from diffusion_gemma_asr.errors import CheckpointError
from diffusion_gemma_asr.model.backbone import Backbone
from diffusion_gemma_asr.model.config import BackboneConfig, EncoderConfig, ModelConfig, ProjectorConfig
from diffusion_gemma_asr.model.encoder import AcousticEncoder
from diffusion_gemma_asr.model.model import DiffusionGemmaASR
from diffusion_gemma_asr.model.projector import AudioProjector
from diffusion_gemma_asr.train.mini.backbone_config import BackboneShape, small_config
from diffusion_gemma_asr.train.objective import SpeechBatch, losses, text_batch
from diffusion_gemma_asr.train.recipe import load_recipe

DATA, PAGE = RESULTS / "full_size.json", ROOT / "docs/performance.md"
TOKENIZER = ROOT / "src/diffusion_gemma_asr/presets/mini/backbone"  # its ids stand for the real ones
TOKENS_PER_S = 4.0  # of speech, Gemma's tokens: a fitted canvas of a 10 s clip has 48
ONE_BY_ONE = ", kernels launched one by one"  # without the recorded steps of denoise/static_engine.py
TINY = ModelConfig("tiny", EncoderConfig("none"), BackboneConfig("none"), ProjectorConfig(hidden_size=24))
TINY_SHAPE = BackboneShape(
    hidden=32, layers=6, heads=4, head_dim=8, intermediate=32, experts=4, top_k=2, expert_intermediate=16
)


class Size(NamedTuple):
    """What is measured.

    Attributes:
        clips_s: clip lengths in s.
        batches: clips at once.
        steps: denoising steps.
        generate_steps: steps of transformers' generate().
        quantizations: of the experts.
    """

    clips_s: tuple[int, ...]
    batches: tuple[int, ...]
    steps: tuple[int, ...]
    generate_steps: tuple[int, ...]
    quantizations: tuple[str, ...]


SIZES = {
    "real": Size((10, 30), (1, 8, 32, 64), (8, 3), (8, 16), ("bnb-4bit", "fp8", "torchao-int8")),
    "tiny": Size((2,), (1, 2), (2,), (2,), ("fp8",)),
}


def build(size: str, device: str) -> DiffusionGemmaASR:
    """The composition with random weights: bfloat16 on a GPU."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    real = size == "real"
    config = load_recipe("small").model if real else TINY
    backbone_config = diffusiongemma_26b() if real else small_config(tokenizer, TINY_SHAPE)
    tiny = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
    encoder_config = whisper_small() if real else WhisperConfig(**tiny)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
    try:
        with torch.device(device):
            with init_empty_weights():
                empty = Backbone.from_config(backbone_config)
            backbone = filled(empty, device)
            encoder = AcousticEncoder.from_config(encoder_config)
            projector = AudioProjector(config.projector, encoder.hidden_size, backbone.hidden_size)
    finally:
        torch.set_default_dtype(before)
    return DiffusionGemmaASR(config, encoder, projector, backbone, tokenizer).requires_grad_(False).eval()


def filled(empty: Backbone, device: str) -> Backbone:
    """A backbone of parameters on the meta device with random ones. As its transformers class is built, encoder and decoder
    have weights of their own until they are tied: twice 52 GB."""
    empty.model.tie_weights()
    made: dict[int, nn.Parameter] = {}
    for module in empty.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in made:
                values = torch.empty_like(parameter, device=device)
                made[id(parameter)] = nn.Parameter(values.normal_(0, 0.02) if values.dim() > 1 else values.fill_(1))
            setattr(module, name, made[id(parameter)])
    return empty


# -- limits -----------------------------------------------------------------------------------------------------------


def rates(device: str) -> dict[str, float]:
    """What the machine does at best: copied bytes a second (read and written), operations a second of a large product."""
    dtype, edge, room = (torch.bfloat16, 8192, 1 << 30) if device == "cuda" else (torch.float32, 1024, 1 << 25)
    source = torch.empty(room, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a = torch.randn(edge, edge, dtype=dtype, device=device)
    copied = timed(lambda: target.copy_(source), device, 10)
    multiplied = timed(lambda: a @ a, device, 10)
    return {"bytes_s": 2 * room / copied, "flop_s": 2 * edge**3 / multiplied}


def cost(model: DiffusionGemmaASR, positions: int) -> dict[str, float]:
    """Bytes of the weights that one pass over so many canvas positions reads, and its operations in matrix products."""
    config = model.backbone.config
    decoder = model.backbone.model.model.decoder
    width = model.backbone.lm_head_weight.element_size()
    experts = sum(p.numel() for name, p in decoder.layers.named_parameters() if ".experts." in name)
    others = sum(p.numel() for name, p in decoder.layers.named_parameters() if ".experts." not in name)
    others += sum(p.numel() for p in decoder.self_conditioning.parameters())
    head = model.backbone.lm_head_weight.numel()
    chosen = config.top_k_experts / config.num_experts  # of a token; the same experts serve many
    touched = 1 - (1 - chosen) ** positions  # share that some token chooses, were choices independent
    # lm_head is read for the logits and for the mean rows; each product of m x n costs 2 m n a position.
    return {
        "bytes": width * (others + touched * experts + 2 * head),
        "flop": 2 * positions * (others + chosen * experts + 2 * head),
    }


def timed(call: Callable[[], object], device: str, repeats: int) -> float:
    """Median seconds of a call, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        synchronise(device)
        began = time.perf_counter()
        call()
        synchronise(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def synchronise(device: str) -> None:
    """Waits until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


# -- parts ------------------------------------------------------------------------------------------------------------


def sounds(count: int, seconds: int) -> list[np.ndarray]:
    """Noise."""
    rng = np.random.default_rng(0)
    return [0.1 * rng.standard_normal(16_000 * seconds).astype(np.float32) for _ in range(count)]


@torch.no_grad()
def ours(
    model: DiffusionGemmaASR,
    device: str,
    seconds: int,
    batch: int,
    canvas: int,
    steps: int,
    engine: Callable[[Backbone], AnyEngine] = engine_for,
) -> dict[str, Any]:
    """A batch from samples to text, and its denoising alone."""
    options = DenoiseOptions(steps=steps, confidence_threshold=0.0)
    clips = sounds(batch, seconds)
    times: dict[str, float] = {}

    def transcribe() -> None:
        synchronise(device)
        began = time.perf_counter()
        encoded = model.encode(clips)
        model.greedy.drafts(encoded)
        prefill, _ = model.read_prompts(encoded.slots, encoded.slot_lengths, ["en"] * batch)
        synchronise(device)
        times["before"] = time.perf_counter() - began
        generators = [torch.Generator(device).manual_seed(0) for _ in clips]
        ids = [torch.randint(model.backbone.vocab_size, (canvas,), generator=g, device=device) for g in generators]
        jobs = [Job(row, generator) for row, generator in zip(ids, generators, strict=True)]
        finished = list(run_queue(model.backbone, jobs, lambda _: prefill, options, batch, engine=engine(model.backbone)))
        synchronise(device)
        times["denoising"] = time.perf_counter() - began - times["before"]
        for _, row in finished:
            model.text(row.canvas.tolist())

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    wall = timed(transcribe, device, 3)
    return {
        "clip_s": seconds,
        "batch": batch,
        "canvas": canvas,
        "steps": steps,
        "seconds": wall,
        "ms_a_pass": 1000 * times["denoising"] / steps,
        "ms_before": 1000 * times["before"],
        "rtfx": batch * seconds / wall,
        "peak_gb": memory(device),
        **cost(model, batch * canvas),
    }


@torch.no_grad()
def theirs(model: DiffusionGemmaASR, device: str, seconds: int, steps: int) -> dict[str, Any]:
    """transformers' generate() for one clip: the same prompt as ids, its canvas of 256, fixed steps."""
    slots = model.projector.output_length(torch.tensor([50 * seconds])).tolist()
    ids = model.prompts.build(slots, ["en"]).ids.to(device)
    canvas = model.backbone.model.config.canvas_length

    def generate() -> None:
        model.backbone.model.generate(
            ids,
            max_new_tokens=canvas,
            max_denoising_steps=steps,
            sampler_config=EntropyBoundSamplerConfig(0.1),
            t_min=0.4,
            t_max=0.8,
            stability_threshold=1,
            confidence_threshold=1e-9,
        )

    wall = timed(generate, device, 2)
    shape = {"clip_s": seconds, "batch": 1, "canvas": canvas, "steps": steps}
    return shape | {"seconds": wall, "rtfx": seconds / wall, "ms_a_pass": 1000 * wall / steps} | cost(model, canvas)


def training_step(model: DiffusionGemmaASR, device: str, seconds: int) -> dict[str, Any]:
    """One step of the small recipe, 8 utterances of 10 s, forwards and backwards: the last part, it puts LoRA in."""
    recipe = load_recipe("small")
    model.backbone.add_lora(recipe.model.lora.rank, recipe.model.lora.alpha)
    for parameter in model.trained().values():
        parameter.requires_grad_(True)
    batch = recipe.train.batch_size
    lengths = torch.full((batch,), 50 * seconds)
    target = [5] * round(TOKENS_PER_S * seconds)
    slots = model.projector.output_length(lengths).tolist()
    text = text_batch(model.prompts, slots, [target] * batch, ["en"] * batch, 0)
    frames = torch.randn(batch, 50 * seconds, model.encoder.hidden_size, dtype=model.projector.linear.weight.dtype)
    rows = SpeechBatch(frames, lengths, text).to(torch.device(device))

    def step() -> None:
        losses(model, rows, recipe.losses).total(recipe.losses).backward()

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return {"clip_s": seconds, "batch": batch, "seconds": timed(step, device, 2), "peak_gb": memory(device)}


def memory(device: str) -> float | None:
    """Most gigabytes that were held at once on the GPU."""
    return round(torch.cuda.max_memory_allocated() / 1e9, 2) if device == "cuda" else None


def packed(model: DiffusionGemmaASR, device: str, quantization: str, seconds: int) -> dict[str, Any]:
    """Experts packed in fewer bits: seconds to pack them, memory afterwards, and a clip decoded; what comes behind it in the
    same process has them too."""
    began = time.perf_counter()
    quantize_experts(model.backbone.model, find_quantizer(quantization), device)
    synchronise(device)
    took = time.perf_counter() - began
    if device == "cuda":
        torch.cuda.empty_cache()
    held = round(torch.cuda.memory_allocated() / 1e9, 2) if device == "cuda" else None
    canvas = rounded(round(TOKENS_PER_S * seconds) + 4)
    measured = ours(model, device, seconds, 1, canvas, 8)
    more = 32 if device == "cuda" else 2
    measured[f"seconds_for_{more}"] = ours(model, device, seconds, more, canvas, 8)["seconds"]
    return measured | {"seconds_to_pack": took, "held_gb": held}


def parts(model: DiffusionGemmaASR, device: str, size: Size) -> dict[str, Callable[[], dict[str, Any]]]:
    """What there is to measure, by name, in the order that tells most first; those that change the model are the last."""
    calls: dict[str, Callable[[], dict[str, Any]]] = {"rates": partial(rates, device)}
    for seconds, batch, steps in product(size.clips_s, size.batches, size.steps):
        for canvas in (rounded(round(TOKENS_PER_S * seconds) + 4), 256):
            name = f"ours {seconds} s, batch {batch}, canvas {canvas}, {steps} steps"
            calls[name] = partial(ours, model, device, seconds, batch, canvas, steps)
            if batch == 1:
                calls[name + ONE_BY_ONE] = partial(ours, model, device, seconds, batch, canvas, steps, Engine)
    for seconds, steps in product(size.clips_s, size.generate_steps):
        calls[f"generate() {seconds} s, {steps} steps"] = partial(theirs, model, device, seconds, steps)
    calls["training step"] = partial(training_step, model, device, size.clips_s[0])
    for name in size.quantizations:
        calls[f"experts in {name}"] = partial(packed, model, device, name, size.clips_s[0])
    return calls


def run(model: DiffusionGemmaASR, size: str, device: str, out: Path, wanted: str) -> None:
    """Measures what `out` does not hold yet of the parts whose whole name matches `wanted`, and the rates."""
    kept = read_results(out) or {"circumstances": circumstances(), "size": size, "parts": {}}
    for name, part in parts(model, device, SIZES[size]).items():
        if name in kept["parts"] or not (name == "rates" or re.fullmatch(wanted, name)):
            continue
        try:
            kept["parts"][name] = part()
        except (torch.cuda.OutOfMemoryError, CheckpointError) as error:  # the latter: a library for fewer bits is absent
            kept["parts"][name] = {"error": str(error).splitlines()[0]}
            if device == "cuda":
                torch.cuda.empty_cache()
        print(name, shown(kept["parts"][name], kept["parts"]["rates"]), flush=True)
        write_results(out, kept)


def limit_ms(part: dict[str, Any], best: dict[str, float]) -> float:
    """What a pass takes at the least, at the measured rates."""
    return 1000 * max(part["bytes"] / best["bytes_s"], part["flop"] / best["flop_s"])


def shown(part: dict[str, Any], best: dict[str, float]) -> str:
    """One line of a part's figures; a pass also as a multiple of its limit."""
    line = ", ".join(f"{key} {value:.4g}" for key, value in part.items() if isinstance(value, float))
    if "ms_a_pass" in part:
        limit = limit_ms(part, best)
        line += f", {part['ms_a_pass'] / limit:.2f} times the limit of {limit:.3g} ms"
    return line or str(part)


HEADING = [
    "clips",
    "canvas",
    "8 steps: s",
    "× real time",
    "ms a pass",
    "3 steps: s",
    "× real time",
    "limit of a pass",
    "memory",
]
COLUMNS = ((8, "seconds", 2), (8, "rtfx", 0), (8, "ms_a_pass", 0), (3, "seconds", 2), (3, "rtfx", 0))  # of the table


def table(measured: dict[str, Any]) -> str:
    """One line for each clip length, batch and canvas that was measured; the other parts behind."""
    best = measured["parts"]["rates"]
    rows: dict[tuple[int, int, int], dict[int, dict[str, Any]]] = {}
    for name, part in measured["parts"].items():
        if name.startswith("ours") and not name.endswith(ONE_BY_ONE) and "error" not in part:
            rows.setdefault((part["clip_s"], part["batch"], part["canvas"]), {})[part["steps"]] = part
    lines = []
    for (seconds, batch, canvas), by_steps in rows.items():
        cells = [f"{batch} × {seconds} s", str(canvas)]
        for steps, key, digits in COLUMNS:
            cells.append(f"{by_steps[steps][key]:.{digits}f}" if steps in by_steps else "–")
        some = next(iter(by_steps.values()))
        lines.append([*cells, f"{limit_ms(some, best):.0f} ms", f"{some['peak_gb']:.0f} GB"])
    others = {
        name: part
        for name, part in measured["parts"].items()
        if name != "rates" and (not name.startswith("ours") or name.endswith(ONE_BY_ONE))
    }
    rates = f"{best['bytes_s'] / 1e12:.1f} TB/s copied, {best['flop_s'] / 1e12:.0f} TFLOP/s multiplied"
    notes = [*(f"{name}: {shown(part, best)}." for name, part in others.items())]
    return "\n".join([markdown(HEADING, lines), "", *notes, f"{rates}; {stated(measured['circumstances'])}."])


def main(arguments: list[str] | None = None) -> None:
    """Measures or reports."""
    parser = argparse.ArgumentParser(description="Speed of the real composition with random weights.")
    parser.add_argument("--size", choices=SIZES, default="real")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=DATA)
    parser.add_argument("--report", action="store_true", help="fill the page with what was measured")
    parser.add_argument("--parts", default=".*", metavar="REGEX", help="the parts to measure, by their whole names")
    args = parser.parse_args(arguments)
    if args.report:
        fill(PAGE, {"full_size": table(read_results(args.out))})
        return
    if args.size == "real" and args.device == "cpu":
        raise SystemExit("the real size needs a GPU of 80 GB; --size tiny shows on a CPU that the parts run")
    run(build(args.size, args.device), args.size, args.device, args.out, args.parts)


if __name__ == "__main__":
    main()
