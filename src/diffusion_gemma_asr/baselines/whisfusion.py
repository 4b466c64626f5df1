"""A recogniser after Whisfusion (Kwon et al. 2025, arXiv 2508.07048): absorbing-mask diffusion on a frozen encoder's frames.

A canvas of masks is filled in a few passes: every pass predicts all positions, and the surest stay. Several candidates are
filled at once (parallel diffusion decoding), and the one whose tokens were surest on average wins.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..encoder import length_mask
from ..objective import write_canvas
from ..projector import output_length
from .canvas_decoder import CanvasDecoder, draw_rows

CANDIDATES = 4
TEMPERATURE = 0.7  # of what the candidates but the first draw
SPARE = 2  # canvas positions beyond one for every 160 ms


class MaskDiffusion(nn.Module):
    """Tokens, an end of transcript that also fills the rest of the canvas, and a mask.

    Args:
        decoder: whose last symbol is the mask.
        end: id of the end of transcript.
        steps: passes that fill a canvas.
    """

    def __init__(self, decoder: CanvasDecoder, end: int, steps: int):
        super().__init__()
        self.decoder, self.end, self.steps = decoder, end, steps
        self.mask = decoder.embed.num_embeddings - 1

    def canvas_length(self, frame_lengths: Tensor) -> Tensor:
        """(B,) positions for clips of so many 20 ms frames."""
        return output_length(frame_lengths) + SPARE

    def loss(self, frames: Tensor, frame_lengths: Tensor, targets: Sequence[Sequence[int]]) -> Tensor:
        """Cross-entropy of the masked positions, the share of them drawn from (0, 1] a row; each row counts as much."""
        lengths = self.canvas_length(frame_lengths)
        cut = [row[:n] for row, n in zip(targets, lengths.tolist(), strict=True)]
        canvas = write_canvas(cut, int(lengths.max()), self.end)
        inside = length_mask(lengths, canvas.shape[1])
        share = 1 - torch.rand(len(canvas), device=canvas.device)
        hidden = (torch.rand(canvas.shape, device=canvas.device) < share[:, None]) & inside
        logits = self.decoder(canvas.masked_fill(hidden, self.mask), lengths, frames, frame_lengths)
        losses = F.cross_entropy(logits.transpose(1, 2), canvas, reduction="none")  # (B, C)
        return ((losses * hidden).sum(1) / (share * lengths)).mean()

    @torch.no_grad()
    def decode(
        self, frames: Tensor, frame_lengths: Tensor, generators: Sequence[torch.Generator], candidates: int = CANDIDATES
    ) -> list[list[int]]:
        """Transcripts without their end, of B clips with a generator each."""
        lengths = self.canvas_length(frame_lengths)
        best: list[list[int]] = [[] for _ in lengths]
        scores = [float("-inf")] * len(best)
        for candidate in range(candidates):
            temperature = TEMPERATURE if candidate else 0.0
            canvas, sure = self._fill(frames, frame_lengths, lengths, temperature, generators)
            for row, (tokens, score) in enumerate(zip(canvas.tolist(), sure.tolist(), strict=True)):
                if score > scores[row]:
                    scores[row] = score
                    tokens = tokens[: int(lengths[row])]
                    best[row] = tokens[: tokens.index(self.end)] if self.end in tokens else tokens
        return best

    def passes(self, row: Sequence[int]) -> int:
        """Of the decoder for any clip."""
        return self.steps * CANDIDATES

    def _fill(
        self, frames: Tensor, frame_lengths: Tensor, lengths: Tensor, temperature: float,
        generators: Sequence[torch.Generator],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """One candidate a row: canvas (B, C), and (B,) the mean log-probability of its tokens when they were kept."""
        size = int(lengths.max())
        inside = length_mask(lengths, size)
        canvas = torch.full((len(lengths), size), self.mask)
        kept = torch.zeros(canvas.shape)  # log-probability of the tokens that stay
        for step in range(1, self.steps + 1):
            logits = self.decoder(canvas, lengths, frames, frame_lengths)
            logits[..., self.mask] = float("-inf")
            log_probs = logits.log_softmax(-1)
            if temperature == 0:
                drawn = log_probs.argmax(-1)
            else:
                drawn = draw_rows((logits / temperature).softmax(-1), lengths, generators, self.end)
            found = log_probs.gather(-1, drawn[..., None])[..., 0]
            open_ = (canvas == self.mask) & inside
            # As many positions as the step asks for are filled in the end; those filled before come first.
            order = torch.where(open_, found, torch.where(inside, 1.0, float("-inf"))).argsort(-1, descending=True)
            rank = order.argsort(-1)
            chosen = open_ & (rank < (lengths * step / self.steps).ceil()[:, None])
            canvas = torch.where(chosen, drawn, canvas)
            kept = torch.where(chosen, found, kept)
        return canvas, kept.sum(1) / lengths
