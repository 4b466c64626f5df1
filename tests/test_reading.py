"""The stage `reading` with a frozen projector: audio tokens of sentences that nobody has spoken, prompts without blanks."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from sounds import tone, write
from tiny_model import speech_batch, tiny_model

from diffusion_gemma_asr.checkpoint.load import load_adapter
from diffusion_gemma_asr.checkpoint.parts import load_backbone
from diffusion_gemma_asr.checkpoint.save import save_projector
from diffusion_gemma_asr.data.manifest import Utterance, write_manifest
from diffusion_gemma_asr.errors import RecipeError
from diffusion_gemma_asr.model.config import BackboneConfig, ProjectorConfig
from diffusion_gemma_asr.model.ctc import only
from diffusion_gemma_asr.train.adapter import build_model
from diffusion_gemma_asr.train.mini.reading import ReadingRecipe, ReadingTrainer, drowned
from diffusion_gemma_asr.train.mini.sentences import random_rows
from diffusion_gemma_asr.train.mini.slot_bank import MOST, SlotBank
from diffusion_gemma_asr.train.objective import SpeechBatch, losses
from diffusion_gemma_asr.train.recipe import LossRecipe
from diffusion_gemma_asr.train.recipe_files import load_recipe_as
from diffusion_gemma_asr.train.run import train_from_recipe

EMBEDDINGS = -torch.arange(20.0)[:, None]  # of 20 tokens; those of the utterances below are positive


def said(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers)[:, None]


def drawn(bank: SlotBank, language: str, tokens: list[int], seed: int = 0) -> list[float]:
    return bank.draw(language, tokens, random.Random(seed)).flatten().tolist()


# -- the bank ------------------------------------------------------------------------------------------------


@pytest.fixture
def bank() -> SlotBank:
    bank = SlotBank(EMBEDDINGS)
    bank.add("en", [5, 6, 7], said(1, 2, 3, 4, 5), [2, 3, 4])  # the last slot is behind the last token
    bank.add("fr", [6, 8], said(6, 7), [1, 1])  # nothing of 8 is heard before its end
    return bank


def test_what_an_utterance_says_is_its_own_audio_tokens(bank: SlotBank) -> None:
    assert len(bank) == 2
    assert drawn(bank, "en", [5, 6, 7]) == [1, 2, 3, 4, 5]
    assert drawn(bank, "en", [5, 6]) == [1, 2, 3]
    assert drawn(bank, "fr", [6, 8]) == [6, 7]


def test_pieces_follow_each_other(bank: SlotBank) -> None:
    assert drawn(bank, "en", [7, 5]) == [4, 5, 1, 2]
    assert drawn(bank, "en", [6, 6, 7]) == [3, 3, 4, 5]


def test_the_same_language_comes_first(bank: SlotBank) -> None:
    assert drawn(bank, "fr", [6]) == [6]
    assert drawn(bank, "fr", [5]) == [1, 2]  # nobody says it in French
    assert drawn(bank, "en", [8]) == [7]


def test_what_nobody_says_is_an_embedding(bank: SlotBank) -> None:
    assert drawn(bank, "en", [9, 5]) == [-9, 1, 2]
    assert bank.draw("en", [], random.Random(0)).shape == (0, 1)


def test_it_knows_what_somebody_says(bank: SlotBank) -> None:
    assert bank.known == [5, 6, 7, 8]
    rows = random_rows(300, 3, bank.known, 1, random.Random(0))
    assert {len(row) - 1 for row in rows} == {1, 2, 3} and {token for row in rows for token in row[:-1]} == {5, 6, 7, 8}
    assert len(random_rows(0, 3, [5], 1, random.Random(0))) == 1


def test_of_a_frequent_token_some_places_are_remembered() -> None:
    bank = SlotBank(EMBEDDINGS)
    for number in range(4 * MOST):
        bank.add("en", [3], said(number + 1), [1])
    found = {drawn(bank, "en", [3], seed)[0] for seed in range(400)}
    assert len(found) == MOST and max(found) > 2 * MOST


# -- prompts without blanks ------------------------------------------------------------------------------------


def test_some_slots_of_each_row_in_order() -> None:
    slots = torch.arange(1.0, 9.0).view(2, 4, 1).requires_grad_()
    kept = torch.tensor([[True, False, True, True], [False, True, False, False]])
    shorter, lengths = only(slots, kept)
    assert lengths.tolist() == [3, 1] and shorter[..., 0].tolist() == [[1, 3, 4], [6, 0, 0]]
    shorter.sum().backward()
    assert slots.grad is not None and torch.equal(slots.grad[..., 0], kept.float())
    assert only(slots, torch.zeros_like(kept))[0].shape == (2, 0, 1)


def test_a_batch_with_fewer_placeholders_is_one_built_so(whisper_folder: Path, backbone_folder: Path) -> None:
    model = tiny_model(whisper_folder, backbone_folder)
    whole, shorter = (speech_batch(model, ["the fox", "she"], frames).text for frames in ([150, 90], [80, 30]))
    counts = shorter.slot_mask.sum(1)
    assert (whole.slot_mask.sum(1) > counts).all()
    cut = whole.with_slots(counts)
    for name in ("mask", "slot_mask", "target_mask", "lengths", "canvas", "counts"):
        assert torch.equal(getattr(cut, name), getattr(shorter, name)), name
    assert torch.equal(cut.ids[cut.mask], shorter.ids[shorter.mask])
    assert cut.transcripts() == whole.transcripts()


def test_blanks_stay_out_of_prompts_and_in_drafts(whisper_folder: Path, backbone_folder: Path) -> None:
    """Each blank's probability lies between 0 and 1: between the middle two of them, half of the audio tokens are read."""
    plain = tiny_model(whisper_folder, backbone_folder)
    encoded = plain.encode([tone(300, 2.0), tone(500, 1.2)])
    probability = plain.head.logits(encoded.slots).softmax(-1)[..., plain.blank]
    used = plain.read_mask(encoded.slots, encoded.slot_lengths)
    order = probability[used].sort().values
    limit = float(order[len(order) // 2 - 1 : len(order) // 2 + 1].mean())
    model = tiny_model(whisper_folder, backbone_folder, projector=ProjectorConfig(hidden_size=24, skip_blanks=limit))
    slots, lengths = model.read_slots(encoded.slots, encoded.slot_lengths)
    expected = [row[keep & (p < limit)] for row, keep, p in zip(encoded.slots, used, probability, strict=True)]
    assert lengths.tolist() == [len(row) for row in expected] and 0 < int(lengths.sum()) < int(used.sum())
    for row, n, wanted in zip(slots, lengths.tolist(), expected, strict=True):
        assert torch.equal(row[:n], wanted) and not row[n:].any()
    prefill, _ = model.read_prompts(encoded.slots, encoded.slot_lengths, ["en", "en"])
    longer, _ = plain.read_prompts(encoded.slots, encoded.slot_lengths, ["en", "en"])
    assert torch.equal(longer.lengths - prefill.lengths, encoded.slot_lengths - lengths)
    assert model.greedy.drafts(encoded) == plain.greedy.drafts(encoded)
    batch = speech_batch(model, ["the fox", "she"], [150, 90])
    parts = losses(model, batch, LossRecipe(draft_share=0.5))
    assert all(value > 0 for name, value in parts.figures().items() if "accuracy" not in name)
    parts.total(LossRecipe()).backward()
    assert model.projector.linear.weight.grad is not None


# -- the stage -------------------------------------------------------------------------------------------------


@pytest.fixture
def content(tmp_path: Path, whisper_folder: Path, backbone_folder: Path) -> dict[str, Any]:
    """A recipe of the stage, with a projector to start from."""
    model = tiny_model(
        whisper_folder, backbone_folder, lora=False, projector=ProjectorConfig(hidden_size=24, skip_blanks=0.9)
    )
    save_projector(model.projector, tmp_path / "projector")
    rows = []
    for i, text in enumerate(("the quick fox", "she sells", "by the sea")):
        sound = write(tmp_path / f"{i}.wav", tone(300 + 100 * i, 2.0))
        rows.append(Utterance(str(sound), text, "en", 2.0))
    write_manifest(tmp_path / "speech.jsonl", rows)
    (tmp_path / "en.txt").write_text("the sea sells\nquick by the fox\nshe\n", encoding="utf-8")
    return {
        "stage": "reading",
        "model": {
            "name": "tiny",
            "encoder": {"name": str(whisper_folder)},
            "backbone": {"name": str(backbone_folder)},
            "projector": {"hidden_size": 24, "skip_blanks": 0.9},
        },
        "train": {
            "steps": 4,
            "batch_size": 3,
            "lr": 0.01,
            "dtype": "float32",
            "eval_every": 4,
            "save_every": 2,
            "start_from": "projector",
        },
        "data": {"train": [{"manifest": "speech.jsonl"}], "dev": ["speech.jsonl"], "transcript": "plain"},
        "frozen_projector": True,
        "unspoken": {"share": 0.5, "batch_tokens": 90, "max_tokens": 40, "bank": 2, "text": ["en.txt"]},
    }


def written(folder: Path, content: dict[str, Any]) -> Path:
    path = folder / "reading.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def test_speech_and_unspoken_sentences_train_the_backbone_alone(tmp_path: Path, content: dict[str, Any]) -> None:
    train_from_recipe(written(tmp_path, content), tmp_path / "run", "cpu")
    records = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text(encoding="utf-8").splitlines()]
    kinds = [{name for name in record if name.startswith(("diffusion", "ctc"))} for record in records]
    assert {frozenset(kind) for kind in kinds} == {
        frozenset({"diffusion", "ctc"}),
        frozenset({"diffusion_unspoken", "ctc_unspoken"}),
    }
    old, new = (load_file(folder / "projector/adapter.safetensors") for folder in (tmp_path, tmp_path / "run"))
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    state = torch.load(tmp_path / "run/state.pt", weights_only=True)["weights"]
    assert all(name.startswith("backbone.") for name in state)


def test_frozen_rows_stay_the_head_of_the_projector(tmp_path: Path, content: dict[str, Any], backbone_folder: Path) -> None:
    content |= {"frozen_rows": True}
    train_from_recipe(written(tmp_path, content), tmp_path / "run", "cpu")
    assert not any("ctc" in line for line in (tmp_path / "run/log.jsonl").read_text(encoding="utf-8").splitlines())
    state = torch.load(tmp_path / "run/state.pt", weights_only=True)["weights"]
    assert state and not any("embed_tokens" in name or "lm_head" in name for name in state)
    old, new = (load_backbone(BackboneConfig(str(folder))) for folder in (backbone_folder, tmp_path / "run/backbone"))
    assert torch.equal(old.lm_head_weight.half(), new.lm_head_weight.half())  # as it is written
    assert not all(torch.equal(*pair) for pair in zip(old.parameters(), new.parameters(), strict=True))


def test_random_rows_come_first(tmp_path: Path, content: dict[str, Any]) -> None:
    content["unspoken"] |= {"curriculum": {"clean": 2, "until": 3, "length": 4}}
    train_from_recipe(written(tmp_path, content), tmp_path / "run", "cpu")
    records = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert ["diffusion_random" in record for record in records[:2]] == [True, True] and "ctc" not in records[0]
    assert "diffusion_random" not in records[3]


def test_sentences_are_learnt_without_sound_and_in_noise(tmp_path: Path, content: dict[str, Any]) -> None:
    content["unspoken"] |= {"silent": 0.5, "drowned": 0.3, "share": 0.9}
    content["train"] |= {"steps": 6}
    train_from_recipe(written(tmp_path, content), tmp_path / "run", "cpu")
    records = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = ("diffusion", "autoregressive", "ctc")
    kinds = {frozenset(name for name in record if name.startswith(losses)) for record in records}
    assert frozenset({"autoregressive_silent"}) in kinds
    assert frozenset({"diffusion_unspoken", "autoregressive_unspoken"}) in kinds


def test_drafts_are_corrected_behind_prompts_without_sound(tmp_path: Path, content: dict[str, Any]) -> None:
    content |= {"overheard": 0.7}
    content["unspoken"] |= {"share": 0.5}
    content["train"] |= {"steps": 16}
    train_from_recipe(written(tmp_path, content), tmp_path / "run", "cpu")
    records = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text(encoding="utf-8").splitlines()]
    kinds = {
        frozenset(name for name in record if name.startswith(("diffusion", "autoregressive", "ctc"))) for record in records
    }
    assert {frozenset({"diffusion_overheard"}), frozenset({"diffusion_unspoken_overheard"})} < kinds


def with_earlier_projector(tmp_path: Path, content: dict[str, Any], whisper: Path, backbone: Path) -> ReadingTrainer:
    """A trainer without unspoken sentences, whose `drafts_from` names one projector with weights of its own."""
    torch.manual_seed(1)
    settings = ProjectorConfig(hidden_size=24, skip_blanks=0.9)
    earlier = tiny_model(whisper, backbone, lora=False, projector=settings)
    save_projector(earlier.projector, tmp_path / "earlier")
    content |= {"drafts_from": ["earlier"]}
    content.pop("unspoken")
    content["train"] |= {"others": [0.4, 0.5], "unnamed": 0.99}
    content["model"] |= {"finds_language": True}
    recipe = load_recipe_as(ReadingRecipe, written(tmp_path, content))
    model = build_model(recipe, torch.device("cpu"), torch.float32, lora=False)
    load_adapter(model, tmp_path / "projector", projector_alone=True)
    return ReadingTrainer(recipe, model, tmp_path / "run")


def test_another_projector_writes_the_drafts(
    tmp_path: Path, content: dict[str, Any], whisper_folder: Path, backbone_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content |= {"overheard": 1.0}
    trainer = with_earlier_projector(tmp_path, content, whisper_folder, backbone_folder)
    model, (writer,) = trainer.model, trainer.writers
    own = {name: value.clone() for name, value in model.projector.state_dict().items()}
    heard: list[torch.Tensor] = []
    writer.register_forward_pre_hook(lambda module, inputs: heard.append(inputs[0].clone()))
    model.projector.register_forward_pre_hook(lambda module, inputs: pytest.fail("the model's own projector was asked"))
    batches: list[SpeechBatch] = []
    spoken = trainer.spoken
    monkeypatch.setattr(trainer, "spoken", lambda *args, **named: batches.append(spoken(*args, **named)) or batches[-1])
    _, figures = trainer.loss_of(0, 0)
    assert "diffusion_overheard" in figures
    batch = trainer.batch(trainer.data.mixture.at(0))
    assert torch.equal(heard[0], batch.frames)  # not augmented
    width = batches[0].text.ids.shape[1]
    assert torch.equal(batches[0].text.ids, batch.text.ids[:, :width])  # in decoding such prompts name the language
    wanted = load_file(tmp_path / "earlier/adapter.safetensors")
    for name, value in writer.state_dict().items():
        assert torch.equal(model.projector.state_dict()[name], own[name])
        if name != "scale":
            assert torch.equal(value, wanted[f"projector.{name}"])


def test_prompts_with_sound_are_heard_by_all_projectors(
    tmp_path: Path, content: dict[str, Any], whisper_folder: Path, backbone_folder: Path
) -> None:
    content |= {"overheard": 1e-6}
    trainer = with_earlier_projector(tmp_path, content, whisper_folder, backbone_folder)
    heard: list[tuple[str, torch.Tensor]] = []
    for name, projector in (("own", trainer.model.projector), ("earlier", *trainer.writers)):
        projector.register_forward_pre_hook(lambda module, inputs, name=name: heard.append((name, inputs[0].clone())))
    for step in range(8):
        _, figures = trainer.loss_of(step, 0)
        assert {"diffusion", "autoregressive"} <= figures.keys()
        plain = trainer.batch(trainer.data.mixture.at(step * trainer.recipe.train.accumulation)).frames
        name, frames = heard[-1]
        assert torch.equal(frames, plain) == (name == "earlier")  # what the model's own knows by heart is augmented
    assert {name for name, _ in heard} == {"own", "earlier"} and len(heard) == 8


def test_noise_takes_the_place_of_a_share_of_the_audio_tokens() -> None:
    slots, rng = torch.zeros(50, 24), random.Random(0)
    noisy = [drowned(slots, 0.2, 3.0, rng) for _ in range(200)]
    touched = [row.abs().sum(1) > 0 for row in noisy]
    assert not slots.any()
    assert 0.1 < torch.stack(touched).float().mean() < 0.22  # stretches may lie over each other
    for row, mask in zip(noisy, touched, strict=True):
        torch.testing.assert_close(row[mask].pow(2).mean(1).sqrt(), torch.full((int(mask.sum()),), 3.0))
    assert drowned(slots[:0], 0.5, 1.0, rng).shape == (0, 24)


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(tmp_path: Path, content: dict[str, Any]) -> None:
    train_from_recipe(written(tmp_path, content), tmp_path / "whole", "cpu")
    content["train"] |= {"steps": 2}
    train_from_recipe(written(tmp_path, content), tmp_path / "parts", "cpu")
    content["train"] |= {"steps": 4}
    train_from_recipe(written(tmp_path, content), tmp_path / "parts", "cpu")
    logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").open()] for name in ("whole", "parts")]
    assert [r["step"] for r in logs[1]] == [1, 2, 3, 4]
    assert sorted(logs[0][2]) == sorted(logs[1][2])  # the same kinds of sentences


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"train": {"steps": 1, "batch_size": 1}}, "'frozen_projector' is set, but 'train.start_from' names no projector"),
        ({"frozen_projector": False}, "'unspoken' wants 'frozen_projector'"),
        ({"unspoken": {"share": 1.0, "batch_tokens": 9, "max_tokens": 9, "text": []}}, r"'unspoken\.share' must be"),
        ({"unspoken": {"share": 0.5, "batch_tokens": 9, "max_tokens": 10, "text": []}}, r"'unspoken\.batch_tokens' must be"),
        (
            {"unspoken": {"share": 0.5, "batch_tokens": 9, "max_tokens": 9, "text": [], "bank": 0}},
            r"'unspoken\.bank' must be",
        ),
        (
            {"unspoken": {"share": 0.5, "batch_tokens": 9, "max_tokens": 9, "text": [], "silent": 1.0}},
            r"'unspoken\.silent' must be",
        ),
        ({"overheard": 1.5}, r"'overheard' must be"),
        ({"overheard": 0.5, "losses": {"diffusion": 0.0}}, r"'overheard' wants 'losses\.diffusion' and 'frozen_projector'"),
        ({"drafts_from": ["projector"]}, "'drafts_from' names projectors for the drafts of 'overheard' passes"),
        (
            {
                "unspoken": {"share": 0.5, "batch_tokens": 9, "max_tokens": 9, "text": [], "silent": 0.5},
                "losses": {"autoregressive": 0.0},
            },
            r"'unspoken\.silent' wants 'losses\.autoregressive'",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(
    tmp_path: Path, content: dict[str, Any], change: dict[str, Any], expected: str
) -> None:
    with pytest.raises(RecipeError, match=expected):
        train_from_recipe(written(tmp_path, content | change), tmp_path / "run", "cpu")
    assert not (tmp_path / "run").exists()


def test_acoustic_tokens_are_read_in_every_pass_but_silent_ones(
    tmp_path: Path, content: dict[str, Any], whisper_folder: Path, backbone_folder: Path
) -> None:
    settings = ProjectorConfig(hidden_size=24, skip_blanks=0.9, acoustic=True)
    model = tiny_model(whisper_folder, backbone_folder, lora=False, projector=settings)
    save_projector(model.projector, tmp_path / "acoustic")
    content["model"]["projector"] = {"hidden_size": 24, "skip_blanks": 0.9, "acoustic": True}
    content["train"] |= {"start_from": "acoustic", "steps": 12}
    content |= {"overheard": 0.5}
    content["unspoken"] |= {"share": 0.3}
    with pytest.raises(RecipeError, match=r"'unspoken\.silent' must be 1, since nothing is cut out of acoustic tokens"):
        train_from_recipe(written(tmp_path, content), tmp_path / "run", "cpu")
    content["unspoken"] |= {"silent": 1.0}
    train_from_recipe(written(tmp_path, content), tmp_path / "run", "cpu")
    records = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text(encoding="utf-8").splitlines()]
    kinds = {name for record in records for name in record if name.startswith(("diffusion", "autoregressive"))}
    assert kinds == {"diffusion", "autoregressive", "diffusion_overheard", "autoregressive_silent"}
