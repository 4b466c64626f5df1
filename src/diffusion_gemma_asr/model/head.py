"""The output head: hidden states to logits over the vocabulary, a few positions at a time.

The head has up to 262,144 rows: float32 logits of one thousand positions are 1 GB, and their backward pass needs
several such matrices. What needs logits walks over the positions in chunks (`Head.over_chunks`); the backward pass
computes each chunk anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 2**24  # logits of one chunk: 64 MB in float32
SAFE_SOFTCAP = 60.0  # float32 holds the sum of exp(logit) over any vocabulary up to here

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Head:
    """A soft-capped output head.

    Attributes:
        weight: (V, H), one row for each token of the vocabulary.
        softcap: bound of the logits' absolute value.
        chunk_elements: logits that exist at a time in `over_chunks`.
    """

    weight: Tensor
    softcap: float
    chunk_elements: int = CHUNK_ELEMENTS

    def logits(self, hidden: Tensor) -> Tensor:
        """Projects hidden states on the vocabulary and squashes the result into (-softcap, softcap).

        The product runs in the dtype of the head, the rest in float32 (float64 for a float64 head).

        Args:
            hidden: (..., H).

        Returns:
            (..., V) logits, softcap * tanh(hidden @ weight.T / softcap). Source: Gemma 2 (arXiv:2408.00118).
        """
        return self.cap(F.linear(hidden.to(self.weight.dtype), self.weight))

    def cap(self, logits: Tensor) -> Tensor:
        """Squashes raw products (...) into (-softcap, softcap), in float32 at least; without a gradient in their own
        memory."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if logits.requires_grad:
            return self.softcap * torch.tanh(logits / self.softcap)
        return logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def over_chunks(self, function: Callable[..., T], *tensors: Tensor) -> list[T]:
        """Calls `function(*parts)` on parts of the tensors; the backward pass computes each part anew.

        One chunk alone is not computed anew: it fits, and small vocabularies keep their full speed.

        Args:
            function: takes one part of each tensor, and may use this head; must be deterministic.
            tensors: each (N, ...), split along the first dimension so that the logits of a part are `chunk_elements` at
                most. N may be 0: that is one empty part.

        Returns:
            what each call returned, in order.
        """
        size = max(1, self.chunk_elements // len(self.weight))
        parts = list(zip(*(tensor.split(size) for tensor in tensors), strict=True))
        if len(parts) == 1 or not torch.is_grad_enabled():
            return [function(*part) for part in parts]
        return [checkpoint(function, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]

    def log_probs(self, hidden: Tensor, columns: Tensor, mask: Tensor) -> Tensor:
        """Log-probabilities of some tokens at each position.

        The log-normaliser is computed over the whole vocabulary, in chunks.

        Args:
            hidden: (B, S, H) hidden states.
            columns: (B, K) long, the tokens wanted for each row; one may occur more than once.
            mask: (B, S) bool, the positions to normalise.

        Returns:
            (B, S, K) log-probabilities, 0 outside the mask. Float32 (float64 for a float64 head).
        """
        log_z, _ = self.log_normalisers(hidden[mask])  # (mask.sum(),)
        rows = F.embedding(columns, self.weight)  # (B, K, H)
        logits = self.cap(hidden.to(self.weight.dtype) @ rows.transpose(1, 2))  # (B, S, K)
        nothing = torch.zeros(mask.shape, dtype=log_z.dtype, device=log_z.device)
        log_z = nothing.masked_scatter(mask, log_z)  # (B, S)
        return (logits.to(log_z.dtype) - log_z[..., None]).masked_fill(~mask[..., None], 0.0)

    def log_normalisers(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What turns a logit into a log-probability, and the most probable token.

        Where the head is frozen, the gradient is computed along with the value (`_FrozenNormaliser`): no logit is
        computed anew or kept.

        Args:
            hidden: (N, H) hidden states.

        Returns:
            (N,) the logarithm of the sum of exp(logit) over the vocabulary, float32 (float64 for a float64 head), and (N,)
            long, the token with the highest logit, without a gradient.
        """
        if not self.weight.requires_grad and self.softcap <= SAFE_SOFTCAP:
            return _FrozenNormaliser.apply(hidden, self)  # type: ignore[no-any-return]

        def of(hidden: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.logits(hidden)
            return logits.logsumexp(-1), logits.detach().argmax(-1)

        values, best = zip(*self.over_chunks(of, hidden), strict=True)
        return torch.cat(values), torch.cat(best)

    def token_log_probs(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Log-probability of one token at each position: hidden (N, H), tokens (N,) long → (N,) float32."""
        return self.token_logits(hidden, tokens) - self.log_normalisers(hidden)[0]

    def token_logits(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """The logit of one token at each position: hidden (N, H), tokens (N,) long → (N,) float32 (float64 for a float64
        head)."""
        rows = F.embedding(tokens, self.weight)
        products = hidden.to(self.weight.dtype).to(torch.promote_types(rows.dtype, torch.float32)) * rows
        return self.cap(products.sum(-1))

    def best(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The most probable token at each position: hidden (..., H) → tokens (...) long, their log-probabilities (...)."""
        parts = self.over_chunks(lambda part: self.logits(part).log_softmax(-1).max(-1), hidden.flatten(0, -2))
        shape = hidden.shape[:-1]
        return torch.cat([p.indices for p in parts]).view(shape), torch.cat([p.values for p in parts]).view(shape)


class _FrozenNormaliser(torch.autograd.Function):
    """`Head.log_normalisers` through a frozen head.

    The gradient of each value to its hidden state is one vector, the mean of the head's rows under the probabilities times
    the slope of the soft cap. It is computed in the forward pass, while the logits are there; the backward pass scales it.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head) -> tuple[Tensor, Tensor]:
        """(N, H) → (N,) logarithms of sums, (N,) most probable tokens."""
        wants = ctx.needs_input_grad[0]
        size = max(1, head.chunk_elements // len(head.weight))
        values, best, gradients = [], [], []
        for part in hidden.to(head.weight.dtype).split(size):
            logits = F.linear(part, head.weight)  # (n, V)
            capped = logits.to(torch.promote_types(logits.dtype, torch.float32)).div_(head.softcap).tanh_()
            best.append(capped.argmax(-1))
            weights = (head.softcap * capped).exp_()
            total = weights.sum(-1)
            values.append(total.log())
            if wants:  # weights * (1 - capped²), the slope of the cap, without further memory
                weights.addcmul_(weights, capped.square_(), value=-1)
                gradients.append(weights.to(head.weight.dtype) @ head.weight / total[:, None])
        if wants:
            ctx.save_for_backward(torch.cat(gradients))
            ctx.dtype = hidden.dtype
        tokens = torch.cat(best)
        ctx.mark_non_differentiable(tokens)
        return torch.cat(values), tokens

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None]:
        """Gradient of the values (N,) → of the hidden states (N, H)."""
        (gradients,) = ctx.saved_tensors
        return (gradients * grad[:, None]).to(ctx.dtype), None
