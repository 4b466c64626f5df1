"""recurrent_lm.py: a language model that reads whole sentences, and how it is trained."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffusion_gemma_asr.errors import CheckpointError
from diffusion_gemma_asr.recurrent_lm import RecurrentLM
from diffusion_gemma_asr.train import recurrent_lm as training
from diffusion_gemma_asr.train.recurrent_lm import Dropout, loss, nats_a_token, spelled_sentences, train

BOS, EOS, PLURAL, SINGULAR, WORDS = 1, 2, 3, 4, range(5, 10)
NO_DROPOUT = Dropout(0, 0, 0, 0, 0)
SENTENCES = [[5, 6, 7], [5, 6], [5, 6, 7, 8], [], [9], [5, 6], [5, 9, 7]]


def small_model(seed: int = 0) -> RecurrentLM:
    torch.manual_seed(seed)
    return RecurrentLM(12, 8, 16, 2, BOS, EOS).eval()


def agreeing(count: int, seed: int) -> list[list[int]]:
    """Sentences whose last token is that of their first, four words before."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        number = rng.choice((PLURAL, SINGULAR))
        rows.append([number, *rng.choices(WORDS, k=4), number])
    return rows


def test_sentences_cost_what_their_tokens_cost_one_by_one() -> None:
    model = small_model()
    expected = []
    for sentence in SENTENCES:
        rows = torch.tensor([[BOS, *sentence]])
        states = model.embedding(rows)
        for layer in model.layers:
            states, _ = layer(states)
        logprobs = model.logits(states)[0].log_softmax(-1)
        expected.append(float(logprobs[range(len(sentence) + 1), [*sentence, EOS]].sum().detach()))
    assert model.scores(SENTENCES) == pytest.approx(expected, abs=1e-4)
    assert len({round(value, 3) for value in expected}) == 6  # two sentences are the same
    assert model.scores([]) == []


def test_equal_beginnings_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = small_model(), []
    step = model._step
    monkeypatch.setattr(model, "_step", lambda tokens, states: (read.append(len(tokens)), step(tokens, states))[1])
    model.scores(SENTENCES)
    assert read == [1, 2, 2, 2, 1]  # nothing; 5, 9; 56, 59; 567, 597; 5678


def test_the_loss_of_a_batch_is_the_sum_of_its_sentences() -> None:
    model = small_model()
    ids, count = training._padded(SENTENCES, BOS, EOS)
    assert count == sum(len(row) + 1 for row in SENTENCES)
    assert float(loss(model, ids, NO_DROPOUT).detach()) == pytest.approx(-sum(model.scores(SENTENCES)), rel=1e-4)
    torch.manual_seed(0)
    assert float(loss(model, ids, Dropout()).detach()) != pytest.approx(-sum(model.scores(SENTENCES)), rel=1e-4)


def test_every_sentence_is_in_one_batch_of_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "BATCH_TOKENS", 40)
    rows = [[i % 12] * (i % 13) for i in range(60)]
    padded = training._padded
    for seed in range(3):
        batches: list[list[list[int]]] = []
        seen = batches.append
        monkeypatch.setattr(training, "_padded", lambda rows, *ends, seen=seen: (seen(rows), padded(rows, *ends))[1])
        train(small_model(), rows, 1, 1e-3, NO_DROPOUT, seed)
        assert sorted(row for batch in batches for row in batch) == sorted(rows)
        assert max((1 + max(map(len, batch))) * len(batch) for batch in batches) <= 40 < 60


def test_it_learns_what_lies_far_apart(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(training, "BATCH_TOKENS", 256)
    monkeypatch.setattr(training, "WARMUP", 10)
    model = small_model()
    rows, dev = agreeing(800, 1), {"fr": agreeing(50, 2)}
    before = nats_a_token(model, dev)["fr"]
    train(model, rows, 12, 2e-2, NO_DROPOUT, dev=dev, log=tmp_path / "log.jsonl")
    after = nats_a_token(model, dev)["fr"]
    # Of 7 tokens the first may be either, four may be any word, and the last two are known: (log 2 + 4 log 5) / 7.
    best = (np.log(2) + 4 * np.log(5)) / 7
    assert best - 0.05 < after < best + 0.08 < before
    right, wrong = model.scores([[PLURAL, 5, 6, 7, 8, PLURAL], [PLURAL, 5, 6, 7, 8, SINGULAR]])
    assert right > wrong + 2
    said = capsys.readouterr().out
    assert said.count("nats a token; dev fr") == training.REPORTS - 1
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(logged) == training.REPORTS - 1 and logged[-1]["loss"] < logged[0]["loss"]
    assert logged[-1]["evaluation"]["nats_fr"] == pytest.approx(after, abs=0.05)


def test_training_ends_with_its_time() -> None:
    model = small_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, agreeing(20, 1), 1e6, 1e-3, Dropout(), minutes=0.01)
    assert not torch.equal(before["embedding.weight"], model.state_dict()["embedding.weight"])


def test_a_saved_model_says_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = RecurrentLM(600, 64, 128, 3, BOS, EOS).eval()
    model.save(tmp_path / "recurrent.safetensors")
    loaded = RecurrentLM.load(tmp_path / "recurrent.safetensors")
    assert (loaded.bos, loaded.eos, len(loaded.layers)) == (BOS, EOS, 3)
    assert loaded.scores(SENTENCES) == pytest.approx(model.scores(SENTENCES), abs=0.1)  # 8 bits
    parameters = sum(p.numel() for p in model.parameters())
    assert (tmp_path / "recurrent.safetensors").stat().st_size < 1.2 * parameters
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("content", [b"no", None])
def test_another_file_is_told(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "recurrent.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"recurrent\.safetensors cannot be read as a recurrent language model"):
        RecurrentLM.load(tmp_path / "recurrent.safetensors")


def test_weights_of_something_else_are_told(tmp_path: Path) -> None:

    save_file({"w": torch.zeros(3)}, tmp_path / "recurrent.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read as a recurrent language model"):
        RecurrentLM.load(tmp_path / "recurrent.safetensors")


def test_text_is_spelled_but_for_what_is_kept_out(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "fr.txt").write_text("la rose est là\nla porte est là\n")
    (tmp_path / "out" / "fr.txt").write_text("la rose est là\n")
    tokenizer = Path(training.__file__).parents[1] / "presets/mini6/backbone"
    whole = spelled_sentences(tokenizer, [tmp_path / "fr.txt"])
    kept = spelled_sentences(tokenizer, [tmp_path / "fr.txt"], [tmp_path / "out" / "fr.txt"])
    assert len(whole["fr"]) == 2 and kept == {"fr": whole["fr"][1:]}
