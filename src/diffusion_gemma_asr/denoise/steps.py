"""From a random canvas to a transcript: entropy-bound denoising, pure functions and the loop over a backbone.

Every step the backbone sees the whole canvas and predicts every position. A token is drawn for each; the ones
with the lowest entropy are kept, as many as stay nearly independent of each other, and the other positions
are filled with new noise. The arg-max of the prediction is the draft, and in the end the result.

The acceptance rule is that of Ben-Hamu et al., "Accelerated Sampling from Masked Diffusion Models via Entropy
Bounded Unmasking" (arXiv 2505.24857). Schedule, self-conditioning, stop rule and the order of the draws are
those of `DiffusionGemmaForBlockDiffusion.generate()` in transformers, which gives the same canvas step by
step from the same weights and generator state, in float32 (in bfloat16 it rounds the self-conditioning logits
first). Unlike it, this loop takes a prompt of embeddings and a canvas of any length. What transcribes is
`engine.Engine`, which makes the same steps; this is the readable account of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import AsrError
from .canvas import Generators, draw_groups, uniform_canvas

PrefillT = TypeVar("PrefillT", contravariant=True)
Sampler = Callable[[Tensor, Generators], tuple[Tensor, Tensor]]
PICK_BLOCK = 64  # tokens summed at a time when one is drawn by inversion


class Denoiser(Protocol[PrefillT]):
    """What the loop needs of a backbone."""

    @property
    def vocab_size(self) -> int:
        """V, the number of token ids."""

    def denoise_logits(self, canvas: Tensor, prefill: PrefillT, self_conditioning: Tensor | None = None, /) -> Tensor:
        """Predict every position of the canvas.

        Args:
            canvas: (B, C) long.
            prefill: what the prompt left behind.
            self_conditioning: (B, C, V), the temperature-scaled logits of the last step; None at the first.

        Returns:
            (B, C, V) float32.
        """


@dataclass(frozen=True)
class DenoiseOptions:
    """How to denoise. Raises AsrError on values out of range.

    Attributes:
        steps: most denoising steps (passes of the decoder), at least 1.
        entropy_bound: nats; how dependent on each other the tokens kept in one step may be. At 0, in effect,
            one token is kept a step.
        t_max, t_min: temperature falls linearly from t_max at the first step towards t_min after the last.
        stability_threshold: a row stops early only if its arg-max canvas has not changed for so many steps.
        confidence_threshold: nats; a row stops early only if its mean token entropy is below this; 0: never.
    """

    steps: int = 8
    entropy_bound: float = 0.1
    t_max: float = 0.8
    t_min: float = 0.4
    stability_threshold: int = 1
    confidence_threshold: float = 0.005

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise AsrError(f"steps is {self.steps}: denoising takes at least 1 step")
        if not 0 < self.t_min <= self.t_max:
            raise AsrError(f"t_min {self.t_min} and t_max {self.t_max}: choose 0 < t_min <= t_max")
        for name in ("entropy_bound", "stability_threshold", "confidence_threshold"):
            if not self.__dict__[name] >= 0:
                raise AsrError(f"{name} is {self.__dict__[name]}: choose 0 or more")


class StopRule(Protocol):
    """When a row stops, as in `DenoiseOptions`: numbers, or tensors (B,) where rows differ."""

    @property
    def stability_threshold(self) -> int | Tensor: ...

    @property
    def confidence_threshold(self) -> float | Tensor: ...


@dataclass(frozen=True)
class DenoiseResult:
    """What denoising found, for B rows of C positions.

    Attributes:
        canvas: (B, C) long, the arg-max canvas of each row's last step.
        logprobs: (B, C) float32, log-probability of these tokens in that step's prediction, at temperature 1.
        entropy: (B, C) float32, nats, of that step's temperature-scaled prediction, by which it was judged.
        steps: (B,) long, passes each row used before it stopped.
    """

    canvas: Tensor
    logprobs: Tensor
    entropy: Tensor
    steps: Tensor


def temperature_at(steps_left: int, options: DenoiseOptions) -> float:
    """Temperature of a step: linear in the steps left, which count down from options.steps to 1."""
    share_left = torch.tensor(steps_left / options.steps)  # float32: rounded as in generate()
    return float(options.t_min + (options.t_max - options.t_min) * share_left)


def token_entropy(probs: Tensor) -> Tensor:
    """Entropy of each position's distribution: (..., V) probabilities -> (...) nats."""
    return torch.special.entr(probs).sum(dim=-1)


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of given tokens: logits (..., V), tokens (...) long -> (...)."""
    return logits.gather(-1, tokens[..., None])[..., 0] - logits.logsumexp(dim=-1)


def sample(logits: Tensor, generator: Generators) -> tuple[Tensor, Tensor]:
    """Draw a token for every position.

    Args:
        logits: (B, C, V), already scaled by temperature.
        generator: on the device of the logits; one per row also keeps the temporaries to one row, (C, V).

    Returns:
        tokens (B, C) long and the entropy (B, C) float32, nats, of the distributions they were drawn from.
    """
    tokens = torch.empty(logits.shape[:2], dtype=torch.long, device=logits.device)
    entropy = torch.empty(logits.shape[:2], dtype=torch.float32, device=logits.device)
    for rows, own in draw_groups(len(logits), generator):
        probs = logits[rows].softmax(dim=-1, dtype=torch.float32)  # (b, C, V)
        drawn = torch.multinomial(probs.flatten(0, 1), num_samples=1, generator=own)  # (b * C, 1)
        tokens[rows] = drawn.view(probs.shape[:2])
        entropy[rows] = token_entropy(probs)
    return tokens, entropy


def sample_by_inversion(logits: Tensor, generator: Generators) -> tuple[Tensor, Tensor]:
    """As `sample`, but from one uniform number a position instead of one for each of the V tokens."""
    tokens = torch.empty(logits.shape[:2], dtype=torch.long, device=logits.device)
    entropy = torch.empty(logits.shape[:2], dtype=torch.float32, device=logits.device)
    for rows, own in draw_groups(len(logits), generator):
        probs = logits[rows].softmax(dim=-1, dtype=torch.float32)  # (b, C, V)
        uniform = torch.rand(probs.shape[:2], generator=own, device=logits.device)
        tokens[rows] = pick(probs.flatten(0, 1), uniform.flatten()).view(uniform.shape)
        entropy[rows] = token_entropy(probs)
    return tokens, entropy


def pick(weights: Tensor, uniform: Tensor) -> Tensor:
    """Index i of each row with chance weights[i] / sum(weights), by inverting the cumulative sum: of blocks, then in one.

    Args:
        weights: (N, V) float32, not negative.
        uniform: (N,) in [0, 1).

    Returns:
        (N,) long.
    """
    if spare := -weights.shape[1] % PICK_BLOCK:
        weights = F.pad(weights, (0, spare))
    blocks = weights.view(len(weights), -1, PICK_BLOCK)  # (N, K, PICK_BLOCK)
    sums = blocks.sum(-1)  # (N, K)
    risen = sums.cumsum(-1)
    wanted = uniform[:, None] * risen[:, -1:]
    block = _rising_past(risen, wanted, sums)  # (N, 1)
    wanted = wanted - F.pad(risen, (1, 0)).gather(1, block)
    inside = blocks.gather(1, block[..., None].expand(-1, -1, PICK_BLOCK))[:, 0]  # (N, PICK_BLOCK)
    return (block * PICK_BLOCK + _rising_past(inside.cumsum(-1), wanted, inside))[:, 0]


def _rising_past(risen: Tensor, wanted: Tensor, parts: Tensor) -> Tensor:
    """(N, 1) first place where `risen` (N, K) exceeds `wanted` (N, 1); rounding never leads behind the last part above 0."""
    places = torch.arange(parts.shape[1], device=parts.device)
    last = torch.where(parts > 0, places, 0).amax(-1, keepdim=True)
    return torch.minimum((risen <= wanted).sum(-1, keepdim=True), last)


def accept(entropy: Tensor, entropy_bound: float | Tensor) -> Tensor:
    """Choose the tokens to keep: the surest ones, as long as they are nearly independent of each other.

    In order of rising entropy, a position is taken while the entropies before it sum to at most the bound.
    That sum, of all taken but the largest, bounds the mutual information of the tokens taken together, so
    that drawing them in parallel costs little (arXiv 2505.24857). The surest position is always taken.

    Args:
        entropy: (B, C) nats.
        entropy_bound: nats, >= 0; one for all rows, or (B, 1).

    Returns:
        (B, C) bool, True at the positions to keep.
    """
    rising, order = entropy.sort(dim=-1)
    before = F.pad(rising.cumsum(dim=-1)[:, :-1], (1, 0))  # (B, C): sum of the entropies before each
    taken = before <= entropy_bound
    return torch.zeros_like(taken).scatter(-1, order, taken)


def renoise(tokens: Tensor, accepted: Tensor, vocab_size: int, generator: Generators) -> Tensor:
    """Keep the accepted tokens and fill the other positions with new noise.

    Args:
        tokens: (B, C) long.
        accepted: (B, C) bool.
        vocab_size, generator: of the noise, see `uniform_canvas`.

    Returns:
        (B, C) long, the canvas of the next step.
    """
    noise = uniform_canvas(len(tokens), tokens.shape[1], vocab_size, generator, tokens.device)
    return torch.where(accepted, tokens, noise)


def should_stop(unchanged: Tensor, mean_entropy: Tensor, options: StopRule) -> Tensor:
    """Tell which rows are done: their draft is stable and, on average over the canvas, sure.

    Args:
        unchanged: (B,) long, for how many steps in a row the arg-max canvas has been what it is now.
        mean_entropy: (B,) nats, of the temperature-scaled prediction, over the canvas.
        options: of all rows, or of each as tensors (B,).

    Returns:
        (B,) bool.
    """
    return (unchanged >= options.stability_threshold) & (mean_entropy < options.confidence_threshold)


def cut_at_end(canvas: Tensor, end_ids: Collection[int]) -> list[list[int]]:
    """Read the tokens of each row before its first end token; all of them if it has none.

    Args:
        canvas: (B, C) long.
        end_ids: ids that end a transcript.

    Returns:
        B lists of at most C ids. Row b's log-probabilities are `logprobs[b, : len(tokens)]`.
    """
    rows: list[list[int]] = canvas.tolist()
    ends = [next((i for i, token in enumerate(row) if token in end_ids), len(row)) for row in rows]
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


@torch.no_grad()
def denoise(
    backbone: Denoiser[PrefillT],
    prefill: PrefillT,
    canvas: Tensor,
    options: DenoiseOptions,
    generator: Generators,
    on_step: Callable[[int, Tensor, Tensor], None] | None = None,
    sampler: Sampler = sample,
) -> DenoiseResult:
    """Denoise canvases until every row is done or the steps are used up.

    A row that is done keeps its canvas, draft and self-conditioning while the others go on. With a single
    generator the rows share its draws, so a row's result depends on its batch; with one per row it does not.

    Args:
        backbone: predicts the canvas.
        prefill: what the backbone's encoder made of the B prompts.
        canvas: (B, C) long, usually `uniform_canvas`; any length.
        options: steps, temperatures, acceptance and stop rule.
        generator: on the device of the canvas; one, one per row, or None for torch's default.
        on_step: called after every step with its number, from 1, the arg-max canvas and the entropy (B, C).
        sampler: how tokens are drawn: `sample`, as transformers does, or `sample_by_inversion`.

    Returns:
        The last arg-max canvas of every row, with log-probabilities, entropy and the steps used.
    """
    draft = torch.full_like(canvas, -1)
    logprobs = torch.zeros(canvas.shape, device=canvas.device)
    entropy = torch.zeros_like(logprobs)
    unchanged = torch.zeros(len(canvas), dtype=torch.long, device=canvas.device)
    steps = torch.zeros_like(unchanged)
    done = torch.zeros_like(unchanged, dtype=torch.bool)
    conditioning: Tensor | None = None  # (B, C, V)

    for steps_left in range(options.steps, 0, -1):
        temperature = temperature_at(steps_left, options)
        logits = backbone.denoise_logits(canvas, prefill, conditioning) / temperature  # (B, C, V)
        if conditioning is not None and done.any():
            logits[done] = conditioning[done]
        conditioning = logits
        steps += ~done

        drawn, entropy = sampler(logits, generator)
        accepted = accept(entropy, options.entropy_bound)
        renoised = renoise(drawn, accepted, backbone.vocab_size, generator)
        canvas = torch.where(done[:, None], canvas, renoised)
        previous, draft = draft, logits.argmax(dim=-1)
        unchanged = torch.where((draft == previous).all(dim=-1), unchanged + 1, 0)

        last = should_stop(unchanged, entropy.mean(dim=-1), options) | (steps_left == 1)
        for row in (last & ~done).nonzero().flatten().tolist():  # a row at a time: (C, V), not (B, C, V)
            logprobs[row] = token_logprobs(logits[row] * temperature, draft[row])
        done |= last
        if on_step is not None:
            on_step(options.steps - steps_left + 1, draft, entropy)
        if done.all():
            break
    return DenoiseResult(canvas=draft, logprobs=logprobs, entropy=entropy, steps=steps)
