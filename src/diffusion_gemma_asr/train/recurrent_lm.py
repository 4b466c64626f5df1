"""Trains the language model that judges transcripts (recurrent_lm.py) on text, but for sentences that models are judged by.

What keeps it from learning a few million tokens by heart is what Merity et al. (2018, AWD-LSTM) found: words are left out of
the embeddings, channels between layers and behind them are dropped alike at all places of a sentence, and recurrent weights
are dropped.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer

from ..data.batches import LengthBuckets
from ..prompt import sentence_ends
from ..recurrent_lm import RecurrentLM
from .tokenizer import kept_sentences

BATCH_TOKENS = 8192
LONGEST = 100  # tokens; the rest of longer sentences is left out
WEIGHT_DECAY = 1e-2
WARMUP = 300  # steps
REPORTS = 20  # lines about a training's progress
JUDGED = 64  # sentences at once


class Dropout(NamedTuple):
    """Shares that are left out in training: words, channels of the embeddings, of layers between others and of the last,
    recurrent weights."""

    words: float = 0.05
    embeddings: float = 0.2
    between: float = 0.2
    last: float = 0.2
    recurrent: float = 0.2

    def scaled(self, factor: float) -> Dropout:
        """All of them more or less."""
        return Dropout(*(factor * share for share in self))


def spelled_sentences(
    tokenizer_folder: str | Path, text: Iterable[str | Path], exclude: Iterable[str | Path] = ()
) -> dict[str, list[list[int]]]:
    """All sentences of `text` that are not in `exclude`, both as `read_sentences` takes them, in tokens, by language.

    Raises:
        DataError: a file cannot be read.
    """
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    return {
        code: tokenizer(kept, add_special_tokens=False)["input_ids"]
        for code, kept in kept_sentences(text, exclude).items()
    }


def train(
    model: RecurrentLM, rows: Sequence[Sequence[int]], epochs: float, lr: float, dropout: Dropout, seed: int = 1,
    dev: dict[str, list[list[int]]] | None = None, minutes: float = math.inf, log: Path | None = None,
) -> RecurrentLM:  # fmt: skip
    """Trains on sentences of token ids, on the device on which the model is; prints its progress.

    Args:
        epochs: times that each sentence is seen; the learning rate falls along a cosine to nothing.
        dev: sentences by language; what their tokens cost is printed.
        minutes: if it would take longer, the learning rate falls with the time, and it ends then.
        log: file to which the progress is added, a line of JSON each time.
    """
    torch.manual_seed(seed)
    device = next(model.parameters()).device
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    biases = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": biases, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), fused=True)
    buckets = LengthBuckets([min(len(row), LONGEST) + 1 for row in rows], BATCH_TOKENS, len(rows), seed)
    began, step, shown, seen, cost, told = time.monotonic(), 0, 0, 0, torch.zeros((), device=device), 0
    model.train()
    while (done := max(shown / (epochs * len(rows)), (time.monotonic() - began) / (60 * minutes))) < 1:
        batch = [rows[i] for i in buckets.at(step)]
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * done))
        ids, count = _padded(batch, model.bos, model.eos)
        found = loss(model, ids.to(device, non_blocking=True), dropout)
        optimizer.zero_grad(set_to_none=True)
        (found / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step, shown, seen, cost = step + 1, shown + len(batch), seen + count, cost + found.detach()
        if int(done * REPORTS) > told:
            nats, costs = float(cost) / seen, {} if dev is None else nats_a_token(model, dev)
            line = f"step {step}, {done:.0%}, {time.monotonic() - began:.0f} s: {nats:.3f} nats a token"
            if costs:
                line += "; dev " + " ".join(f"{code} {value:.3f}" for code, value in costs.items())
            print(line, flush=True)
            if log is not None:
                judged = {f"nats_{code}": round(value, 4) for code, value in costs.items()}
                with log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": step, "loss": round(nats, 4), "evaluation": judged}) + "\n")
            seen, cost, told = 0, torch.zeros((), device=device), int(done * REPORTS)
    return model.eval()


def loss(model: RecurrentLM, ids: Tensor, dropout: Dropout) -> Tensor:
    """What the tokens of padded sentences (B, L) cost in all, with what stands before and behind them and -1 behind that."""
    targets = ids[:, 1:].long()
    keep = 1 - dropout.words
    weight = model.embedding.weight
    if dropout.words:
        weight = weight * (torch.rand(len(weight), 1, device=ids.device) < keep) / keep
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
        rows = _drop_channels(F.embedding(ids[:, :-1].clamp(min=0).long(), weight), dropout.embeddings)
        for number, layer in enumerate(model.layers):
            recurrent = F.dropout(layer.get_parameter("weight_hh_l0"), dropout.recurrent)
            rows, _ = torch.func.functional_call(layer, {"weight_hh_l0": recurrent}, (rows,))
            last = number == len(model.layers) - 1
            rows = _drop_channels(rows, dropout.last if last else dropout.between)
        logits = model.logits(rows)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")


def _drop_channels(rows: Tensor, share: float) -> Tensor:
    """Rows (B, L, C) without a share of each sentence's channels, the same at all its places."""
    return rows * F.dropout(torch.ones_like(rows[:, :1]), share) if share else rows


def nats_a_token(model: RecurrentLM, dev: dict[str, list[list[int]]]) -> dict[str, float]:
    """What a token of each language's sentences costs."""
    device = next(model.parameters()).device
    found = {}
    model.eval()
    with torch.no_grad():
        for code, rows in dev.items():
            cost, count, in_order = 0.0, 0, sorted(rows, key=len)
            for start in range(0, len(rows), JUDGED):
                ids, tokens = _padded(in_order[start : start + JUDGED], model.bos, model.eos)
                cost += float(loss(model, ids.to(device), Dropout(0, 0, 0, 0, 0)))
                count += tokens
            found[code] = cost / count
    model.train()
    return found


def _padded(rows: Sequence[Sequence[int]], bos: int, eos: int) -> tuple[Tensor, int]:
    """Sentences (B, L) with what stands before and behind them, -1 behind that; how many tokens are to be predicted."""
    ended = [[bos, *row, eos] if len(row) <= LONGEST else [bos, *row[:LONGEST]] for row in rows]
    found = np.full((len(ended), max(map(len, ended))), -1, dtype=np.int32)
    for place, row in zip(found, ended, strict=True):
        place[: len(row)] = row
    ids = torch.from_numpy(found)
    return ids.pin_memory() if torch.cuda.is_available() else ids, sum(map(len, ended)) - len(ended)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the language model that reads whole sentences.")
    parser.add_argument("tokenizer", help="folder of the tokenizer")
    parser.add_argument("file", type=Path, help=".safetensors to write")
    parser.add_argument("text", nargs="+", help="files CODE.txt with a sentence of that language a line, and manifests")
    parser.add_argument("--exclude", nargs="*", default=(), help="the same, of sentences that are not learnt")
    parser.add_argument("--dev", nargs="*", default=(), help="the same, of sentences whose cost is printed")
    parser.add_argument("--start_from", help="file of a model to go on with, whose sizes count")
    parser.add_argument("--width", type=int, default=512, help="of embeddings and of the last layer")
    parser.add_argument("--hidden", type=int, default=1024, help="width of the layers before the last")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dropout", type=float, default=1.0, help="factor on all shares of Dropout")
    parser.add_argument("--epochs", type=float, default=23.0)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--minutes", type=float, default=math.inf, help="ends after so many, the schedule with it")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    sentences = spelled_sentences(args.tokenizer, args.text, args.exclude)
    for code, rows in sentences.items():
        print(f"{code}: {len(rows)} sentences, {sum(map(len, rows))} tokens")
    torch.manual_seed(args.seed)
    if args.start_from is None:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
        sizes = args.width, args.hidden, args.layers
        model = RecurrentLM(len(tokenizer), *sizes, *sentence_ends(tokenizer))
    else:
        model = RecurrentLM.load(args.start_from).requires_grad_(True)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    dev = spelled_sentences(args.tokenizer, args.dev) if args.dev else None
    rows = [row for part in sentences.values() for row in part]
    args.file.parent.mkdir(parents=True, exist_ok=True)
    log = args.file.with_suffix(".jsonl")
    log.unlink(missing_ok=True)
    train(model, rows, args.epochs, args.lr, Dropout().scaled(args.dropout), args.seed, dev, args.minutes, log)
    model.save(args.file)
    print(f"{args.file}: {sum(p.numel() for p in model.parameters())} parameters, {args.file.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
