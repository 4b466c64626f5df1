"""The output head: hidden states to logits over the vocabulary, a few positions at a time.

The head has up to 262,144 rows: float32 logits of one thousand positions are 1 GB, and their backward pass needs
several such matrices. What needs logits walks over the positions in chunks (`Head.over_chunks`); the backward pass
computes each chunk anew.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..memory import of_device

# Logits of one chunk: 4 MB in float32 stay in the cache of a CPU, 256 MB keep a GPU busy.
CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}
SAFE_SOFTCAP = 60.0  # float32 holds the sum of exp(logit) over any vocabulary up to here

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Head:
    """A soft-capped output head.

    Attributes:
        weight: (V, H), one row for each token of the vocabulary.
        softcap: bound of the logits' absolute value.
        chunk_elements: logits that exist at a time in `over_chunks`; None is `CHUNK_ELEMENTS` of the device.
    """

    weight: Tensor
    softcap: float
    chunk_elements: int | None = None

    @property
    def chunk_size(self) -> int:
        """Positions of one chunk, at least 1."""
        elements = self.chunk_elements or of_device(CHUNK_ELEMENTS, self.weight.device)
        return max(1, elements // len(self.weight))

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

    def mean_rows(self, hidden: Tensor) -> Tensor:
        """What self-conditioning takes of a prediction: hidden (N, H) → (N, H) the mean of the head's rows under the
        probabilities at each position."""

        def of(hidden: Tensor) -> Tensor:
            return self.logits(hidden).softmax(-1).to(self.weight.dtype) @ self.weight

        return torch.cat(self.over_chunks(of, hidden))

    def over_chunks(self, function: Callable[..., T], *tensors: Tensor) -> list[T]:
        """Calls `function(*parts)` on parts of the tensors; the backward pass computes each part anew.

        One chunk alone is not computed anew: it fits, and small vocabularies keep their full speed.

        Args:
            function: takes one part of each tensor, and may use this head; must be deterministic.
            tensors: each (N, ...), split along the first dimension into parts of `chunk_size`. N may be 0: that is one
                empty part.

        Returns:
            what each call returned, in order.
        """
        parts = list(zip(*(tensor.split(self.chunk_size) for tensor in tensors), strict=True))
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
        log_z = self.log_normalisers(hidden[mask])  # (mask.sum(),)
        rows = F.embedding(columns, self.weight)  # (B, K, H)
        logits = self.cap(hidden.to(self.weight.dtype) @ rows.transpose(1, 2))  # (B, S, K)
        nothing = torch.zeros(mask.shape, dtype=log_z.dtype, device=log_z.device)
        log_z = nothing.masked_scatter(mask, log_z)  # (B, S)
        return (logits.to(log_z.dtype) - log_z[..., None]).masked_fill(~mask[..., None], 0.0)

    def log_normalisers(self, hidden: Tensor) -> Tensor:
        """What turns a logit into a log-probability: hidden (N, H) → (N,) the logarithm of the sum of exp(logit) over the
        vocabulary, float32 (float64 for a float64 head)."""
        return self._reduced(hidden, None)[0]

    def token_log_probs(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Log-probability of one token at each position: hidden (N, H), tokens (N,) long → (N,) float32."""
        return self.judged(hidden, tokens)[0]

    def judged(self, hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What `token_log_probs` gives, and the most probable token at each position, (N,) long, without a gradient."""
        values, best = self._reduced(hidden, tokens)
        return -values, best

    def _reduced(self, hidden: Tensor, tokens: Tensor | None) -> tuple[Tensor, Tensor]:
        """(N,) log-normalisers, less the logit of a token where there are some; (N,) most probable tokens, for those alone.

        Where the head is frozen, the gradient is computed along with the value (`_FrozenReduction`): no logit is computed
        anew or kept.
        """
        if not self.weight.requires_grad and self.softcap <= SAFE_SOFTCAP:
            return _FrozenReduction.apply(hidden, tokens, self)

        def of(hidden: Tensor, *tokens: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.logits(hidden)
            values = logits.logsumexp(-1)
            for chosen in tokens:
                values = values - logits.gather(-1, chosen[:, None])[:, 0]
            return values, logits.detach().argmax(-1)

        values, best = zip(*self.over_chunks(of, hidden, *(() if tokens is None else (tokens,))), strict=True)
        return torch.cat(values), torch.cat(best)

    def best(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The most probable token at each position: hidden (..., H) → tokens (...) long, their log-probabilities (...)."""
        tokens, values, _ = self.best_beside(hidden, 0)
        return tokens, values

    def best_beside(self, hidden: Tensor, token: int) -> tuple[Tensor, Tensor, Tensor]:
        """As `best`, and the log-probability of one token at each position (...)."""

        def of(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits = self.logits(hidden)
            highest, tokens = logits.max(-1)
            log_z = logits.logsumexp(-1)
            return tokens, highest - log_z, logits[..., token] - log_z

        parts = zip(*self.over_chunks(of, hidden.flatten(0, -2)), strict=True)
        tokens, values, beside = (torch.cat(part).view(hidden.shape[:-1]) for part in parts)
        return tokens, values, beside


class _FrozenReduction(torch.autograd.Function):
    """`Head._reduced` through a frozen head.

    The gradient of each value to its hidden state is one vector: the mean of the head's rows under the probabilities, less
    the row of the token, each times the slope of the soft cap. It is computed in the forward pass, while the logits are
    there; the backward pass scales it.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, tokens: Tensor | None, head: Head) -> tuple[Tensor, Tensor]:
        """(N, H), (N,) → (N,) values, (N,) most probable tokens, none where there are no tokens."""
        wants, size = ctx.needs_input_grad[0], head.chunk_size
        values, best, gradients = [], [], []
        for first, part in zip(itertools.count(0, size), hidden.to(head.weight.dtype).split(size)):
            logits = F.linear(part, head.weight)  # (n, V)
            capped = logits.to(torch.promote_types(logits.dtype, torch.float32)).div_(head.softcap).tanh_()
            if tokens is not None:
                best.append(capped.argmax(-1))
            shares = (head.softcap * capped).exp_()
            total = shares.sum(-1)
            chosen = None if tokens is None else tokens[first : first + size, None]
            here = 0.0 if chosen is None else capped.gather(-1, chosen)[:, 0]
            values.append(total.log() - head.softcap * here)
            if wants:  # shares * (1 - capped²), the slope of the cap, without further memory
                shares.div_(total[:, None])
                if chosen is not None:
                    shares.scatter_add_(-1, chosen, -torch.ones_like(total)[:, None])
                shares.addcmul_(shares, capped.square_(), value=-1)
                gradients.append(shares.to(head.weight.dtype) @ head.weight)
        if wants:
            ctx.save_for_backward(torch.cat(gradients))
            ctx.dtype = hidden.dtype
        ids = torch.cat(best) if best else torch.empty(0, dtype=torch.long, device=hidden.device)
        ctx.mark_non_differentiable(ids)
        return torch.cat(values), ids

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        """Gradient of the values (N,) → of the hidden states (N, H)."""
        (gradients,) = ctx.saved_tensors
        return (gradients * grad[:, None]).to(ctx.dtype), None, None
