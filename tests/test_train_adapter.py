"""train/adapter.py: a recipe becomes a checkpoint, and a killed run becomes the same one."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from sounds import tone, write
from torch import Tensor

import diffusion_gemma_asr
from diffusion_gemma_asr.data.features import FeatureCache
from diffusion_gemma_asr.data.manifest import Utterance, read_manifest, write_manifest
from diffusion_gemma_asr.denoise.decode import decode_clips
from diffusion_gemma_asr.denoise.options import DecodeOptions
from diffusion_gemma_asr.errors import AsrError, CheckpointError, DataError, RecipeError
from diffusion_gemma_asr.model.prompt import AUTO
from diffusion_gemma_asr.train.adapter import AdapterTrainer, build_model, draft_cached, learning, transcribe_cached
from diffusion_gemma_asr.train.loop import Metrics, run
from diffusion_gemma_asr.train.recipe import load_recipe
from diffusion_gemma_asr.train.run import train_from_recipe

STEPS, SAVE_EVERY, KILLED_IN = 6, 2, 3
SPOKEN = {
    220: "the quick fox",
    330: "Lazy dog!",
    440: "by the sea",
    550: "seven eight nine",
    660: "it's fine",
}


@pytest.fixture(scope="module")
def recipe(backbone_folder: Path, whisper_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe over tones of different length: four to train on, in two lists, one held out."""
    folder = tmp_path_factory.mktemp("corpus")
    rows = []
    for i, (hertz, text) in enumerate(SPOKEN.items()):
        duration = 1.6 + 0.3 * i
        sound = write(folder / f"{hertz}.wav", tone(hertz, duration))
        rows.append(Utterance(str(sound), text, "en", duration))
    for name, some in {"a": rows[:3], "b": rows[3:4], "dev": rows[4:]}.items():
        write_manifest(folder / f"{name}.jsonl", some)
    content: dict[str, Any] = {
        "model": {
            "name": "tiny",
            "encoder": {"name": str(whisper_folder)},
            "backbone": {"name": str(backbone_folder)},
            "projector": {"hidden_size": 16},
            "lora": {"rank": 2, "alpha": 4, "dropout": 0.1},
        },
        "train": {
            "steps": STEPS,
            "batch_size": 2,
            "accumulation": 2,
            "lr": 0.01,
            "dtype": "float32",
            "spec_augment": {"time_width": 10, "channel_width": 3},
            "others": [0.0, 0.3],
            "save_every": SAVE_EVERY,
            "eval_every": 3,
            "monitor_samples": 1,
        },
        "data": {
            "train": [{"manifest": "a.jsonl"}, {"manifest": "b.jsonl", "weight": 0.5}],
            "dev": ["dev.jsonl"],
            "transcript": "plain",
        },
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return folder / "tiny.yaml"


def changed(recipe: Path, name: str, **sections: dict[str, Any]) -> Path:
    """The recipe with some keys of its sections changed, beside it under another name."""
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    for section, values in sections.items():
        content[section] = content.get(section, {}) | values
    path = recipe.with_name(f"{name}.yaml")
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert train_from_recipe(recipe, folder, "cpu") == folder / "checkpoint"
    return folder


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of log.jsonl, without the times."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def adapter_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "checkpoint" / "adapter.safetensors")


def train_until_killed(recipe_file: Path, folder: Path) -> None:
    """Trains, and dies in the second micro-batch of the step after KILLED_IN."""
    torch.set_num_threads(1)  # as here: sums depend on it
    recipe = load_recipe(recipe_file)
    model = build_model(recipe)
    trainer = AdapterTrainer(recipe, model, folder)

    def loss_of(step: int, micro: int) -> tuple[Tensor, Metrics]:
        if (step, micro) == (KILLED_IN, 1):
            os.kill(os.getpid(), signal.SIGKILL)
        return trainer.loss_of(step, micro)

    run(learning(model, recipe.losses), loss_of, folder, recipe.train, trainer.evaluate, trainer.settings)


def test_the_log_has_a_line_a_step_with_the_three_losses(whole: Path) -> None:
    records = read_log(whole)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    for record in records:
        for name in ("diffusion", "autoregressive", "ctc", "canvas_accuracy", "next_token_accuracy"):
            assert isinstance(record[name], float)
        assert record["diffusion"] > 0 and record["autoregressive"] > 0 and record["ctc"] > 0
        total = record["diffusion"] + record["autoregressive"] + record["ctc"]  # weights of 1
        assert record["loss"] == pytest.approx(total, abs=1e-4)
    judged = [record["step"] for record in records if "evaluation" in record]
    assert judged == [3, 6]
    figures = records[-1]["evaluation"]
    assert [name for name in figures if name.startswith("error_rate_")] and len(figures) == 5


def test_the_checkpoint_holds_what_was_trained_and_transcribes(whole: Path) -> None:
    recognizer = diffusion_gemma_asr.load(whole / "checkpoint", device="cpu", dtype="float32", merge_lora=False)
    state = torch.load(whole / "state.pt", weights_only=True)["weights"]
    loaded = recognizer.model.trained()
    assert loaded.keys() == state.keys() and len(state) > 10
    for name, weight in state.items():
        assert torch.equal(loaded[name], weight), name
    lora_b = [weight for name, weight in state.items() if "lora_B" in name]
    assert lora_b and all(bool(weight.any()) for weight in lora_b)  # all of them began as zeros and have moved
    assert isinstance(recognizer.transcribe(tone(440, 2.0), language="en").text, str)


def test_only_the_adapter_was_trained(whole: Path, recipe: Path) -> None:
    fresh = build_model(load_recipe(recipe))
    trained = diffusion_gemma_asr.load(whole / "checkpoint", device="cpu", dtype="float32", merge_lora=False).model
    changing, after = fresh.trained(), trained.state_dict()
    same = {name: torch.equal(value, after[name]) for name, value in fresh.state_dict().items()}
    assert not any(same[name] for name in changing)
    assert all(equal for name, equal in same.items() if name not in changing)
    assert len(same) > len(changing)


def frozen_frames(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file of frames: another time means that the encoder ran again."""
    return {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in (folder / "frames").glob("*.f16")}


@pytest.mark.skipif(os.name != "posix", reason="kill -9")
def test_a_killed_run_resumes_to_the_same_adapter_without_the_encoder(recipe: Path, whole: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")  # forks before torch has started any thread
    process = context.Process(target=train_until_killed, args=(recipe, tmp_path))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [record["step"] for record in read_log(tmp_path)] == list(range(1, KILLED_IN + 1))
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == SAVE_EVERY
    assert not (tmp_path / "checkpoint").exists()

    before = frozen_frames(tmp_path)
    train_from_recipe(recipe, tmp_path, "cpu")
    assert frozen_frames(tmp_path) == before != {}
    expected, resumed = adapter_of(whole), adapter_of(tmp_path)
    assert expected.keys() == resumed.keys()
    for name, weight in expected.items():
        assert torch.equal(resumed[name], weight), name
    assert read_log(tmp_path) == read_log(whole)


def test_a_finished_run_can_be_asked_for_again(recipe: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "checkpoint")
    log = (tmp_path / "copy" / "log.jsonl").read_bytes()
    before = frozen_frames(tmp_path / "copy")
    train_from_recipe(recipe, tmp_path / "copy", "cpu")
    assert (tmp_path / "copy" / "log.jsonl").read_bytes() == log and frozen_frames(tmp_path / "copy") == before
    expected, again = adapter_of(whole), adapter_of(tmp_path / "copy")
    assert all(torch.equal(again[name], weight) for name, weight in expected.items())


def test_a_loss_without_weight_does_not_count(recipe: Path, whole: Path, tmp_path: Path) -> None:
    path = changed(
        recipe,
        "diffusion",
        model={"ctc": False},
        losses={"ctc": 0.0, "autoregressive": 0.0, "diffusion": 2.0},
        train={"steps": 1, "monitor_samples": 0},
        data={"cache_dir": str(whole / "frames")},
    )
    train_from_recipe(path, tmp_path, "cpu")
    (record,) = read_log(tmp_path)
    assert record["loss"] == pytest.approx(2 * record["diffusion"], abs=1e-4)
    assert not record.keys() & {"autoregressive", "ctc"} and not (tmp_path / "frames").exists()
    assert json.loads((tmp_path / "checkpoint" / "config.json").read_text())["ctc"] is False


def test_ctc_alone_trains_the_projector_and_a_second_run_starts_from_it(recipe: Path, whole: Path, tmp_path: Path) -> None:
    sections: dict[str, dict[str, Any]] = {
        "losses": {"ctc": 1.0, "autoregressive": 0.0, "diffusion": 0.0},
        "train": {"steps": 2, "monitor_samples": 2},
        "data": {"cache_dir": str(whole / "frames"), "train": [{"manifest": "a.jsonl", "first": 1}]},
    }
    train_from_recipe(changed(recipe, "ctc", **sections), tmp_path / "ctc", "cpu")
    records = read_log(tmp_path / "ctc")
    assert all(record["loss"] == record["ctc"] and "diffusion" not in record for record in records)
    assert all(name.startswith("error_rate_draft_") for name in records[-1]["evaluation"])  # drafts are judged
    trained = adapter_of(tmp_path / "ctc")
    assert not any(weight.any() for name, weight in trained.items() if "lora_B" in name)

    sections["train"] |= {"start_from": str(tmp_path / "ctc" / "checkpoint"), "lr": 1e-30, "monitor_samples": 0}
    train_from_recipe(changed(recipe, "next", **sections), tmp_path / "next", "cpu")
    after = adapter_of(tmp_path / "next")
    assert all(torch.equal(after[name], weight) for name, weight in trained.items())
    assert not torch.equal(trained["projector.linear.weight"], adapter_of(whole)["projector.linear.weight"])

    sections["train"] |= {"optimizer": "muon", "lr": 0.01, "batch_frames": 1, "steps": 1}
    train_from_recipe(changed(recipe, "muon", **sections), tmp_path / "muon", "cpu")
    moved = adapter_of(tmp_path / "muon")["projector.linear.weight"] - trained["projector.linear.weight"]
    assert 0 < moved.square().mean().sqrt() < 0.01  # one step of Muon: 0.2 times the learning rate
    assert diffusion_gemma_asr.load(tmp_path / "muon" / "checkpoint").transcribe(tone(440, 1.0), language="en") is not None

    sections["model"] = {"projector": {"hidden_size": 17}}
    with pytest.raises(CheckpointError, match=r"projector\.conv1\.weight is \(16, 16, 7\)"):
        train_from_recipe(changed(recipe, "other", **sections), tmp_path / "other", "cpu")


def test_an_earlier_adapter_is_kept(recipe: Path, whole: Path, tmp_path: Path) -> None:
    train = {"steps": 3, "eval_every": 2, "keep": [2]}
    data = {"cache_dir": str(whole / "frames")}
    train_from_recipe(changed(recipe, "kept", train=train, data=data), tmp_path / "kept", "cpu")
    earlier, last = (load_file(tmp_path / "kept" / name / "adapter.safetensors") for name in ("checkpoint-2", "checkpoint"))
    assert earlier.keys() == last.keys() and not torch.equal(*(x["projector.linear.weight"] for x in (earlier, last)))
    with pytest.raises(RecipeError, match=r"'train\.keep' must be multiples of train\.eval_every, which is 2, found \[3\]"):
        load_recipe(changed(recipe, "odd", train=train | {"keep": [3]}))


def test_frames_that_the_projector_has_not_met_are_left_as_they_are(recipe: Path, whole: Path, tmp_path: Path) -> None:
    data = {"cache_dir": str(whole / "frames"), "train": [{"manifest": "a.jsonl"}, {"manifest": "b.jsonl", "unheard": True}]}
    train = {"others": [0.2, 0.3], "spec_augment": {"time_bands": 2, "time_width": 10, "channel_width": 3}}
    told = load_recipe(changed(recipe, "unheard", data=data, train=train))
    trainer = AdapterTrainer(told, build_model(told), tmp_path)
    assert trainer.data.unheard.tolist() == [False, False, False, True]
    chosen = [0, 3, 1]
    frames, lengths = trainer.data.cache.batch([trainer.data.utterances[i] for i in chosen])
    changes = (trainer.augmented(frames, lengths, chosen) != frames).any(-1).any(-1)
    assert changes.tolist() == [True, False, True]


def test_drafts_are_learnt_from_and_languages_found(recipe: Path, whole: Path, tmp_path: Path) -> None:
    path = changed(
        recipe,
        "drafts",
        model={"start": "draft", "finds_language": True, "reads_context": True, "languages": ["en", "de"]},
        losses={"draft_share": 1.0, "unroll": 0.5},
        train={"unnamed": 0.5, "context": 0.5, "steps": 2},
        data={"cache_dir": str(whole / "frames")},
    )
    train_from_recipe(path, tmp_path, "cpu")
    figures = read_log(tmp_path)[-1]["evaluation"]
    assert {"language", "error_rate_auto"} <= {name.rpartition("_")[0] for name in figures}
    config = diffusion_gemma_asr.load(tmp_path / "checkpoint").model.config
    assert (config.start, config.finds_language, config.reads_context) == ("draft", True, True)


def test_cached_frames_are_transcribed_as_the_sound_is(recipe: Path, whole: Path) -> None:
    model = diffusion_gemma_asr.load(whole / "checkpoint", device="cpu").model
    rows = read_manifest(recipe.with_name("a.jsonl"))
    cache = FeatureCache.open(whole / "frames", rows)
    decoded = transcribe_cached(model, rows, cache, batch_size=2)
    from_sound = decode_clips(
        model, [tone(hertz, u.duration) for hertz, u in zip(SPOKEN, rows, strict=False)], DecodeOptions("en")
    )
    assert [d.draft for d in decoded] == draft_cached(model, rows, cache) == [d.draft for d in from_sound]
    assert all(d.language == "en" and d.tokens for d in decoded)
    auto = transcribe_cached(model, rows, cache, AUTO, batch_size=2)  # it knows one language
    assert [d.text for d in auto] == [d.text for d in decoded]


# -- what cannot be gone on with, or trained on --------------------------------------------------------------------


def resumed(recipe: Path, whole: Path, tmp_path: Path, change: Callable[[Path], None]) -> Path:
    """A copy of the finished run after `change`, which is then asked for again."""
    shutil.copytree(whole, tmp_path / "run")
    change(tmp_path / "run")
    return train_from_recipe(recipe, tmp_path / "run", "cpu")


@pytest.mark.parametrize("size", [0, 1000])
def test_a_state_that_was_cut_short_is_named(recipe: Path, whole: Path, tmp_path: Path, size: int) -> None:
    with pytest.raises(CheckpointError, match=r"state\.pt is damaged or was cut short"):
        resumed(recipe, whole, tmp_path, lambda folder: os.truncate(folder / "state.pt", size))


@pytest.mark.parametrize(
    ("section", "values", "named"),
    [
        ("train", {"optimizer": "muon"}, r"train\.optimizer was adamw, is muon"),
        ("train", {"lr": 0.02}, r"train\.lr was 0\.01, is 0\.02"),
        ("losses", {"ctc": 0.5}, r"losses\.ctc was 1\.0, is 0\.5"),
        ("model", {"projector": {"hidden_size": 32}}, r"model\.projector\.hidden_size was 16, is 32"),
        ("data", {"train": [{"manifest": "a.jsonl"}]}, r"data was \w+, is \w+"),
    ],
)
def test_a_run_of_another_recipe_is_not_gone_on_with(
    recipe: Path, whole: Path, tmp_path: Path, section: str, values: dict[str, Any], named: str
) -> None:
    other = changed(recipe, "other-settings", **{section: values})
    with pytest.raises(CheckpointError, match=rf"state\.pt was made with other settings \(.*{named}.*another folder"):
        resumed(other, whole, tmp_path, lambda folder: None)


def test_a_run_may_become_longer_and_be_judged_otherwise(recipe: Path, whole: Path, tmp_path: Path) -> None:
    longer = changed(recipe, "longer", train={"steps": STEPS + 1, "eval_every": 1, "monitor_samples": 0})
    resumed(longer, whole, tmp_path, lambda folder: None)
    assert [record["step"] for record in read_log(tmp_path / "run")] == list(range(1, STEPS + 2))


def test_an_encoder_that_was_trained_on_is_another_encoder(
    recipe: Path, whisper_folder: Path, whole: Path, tmp_path: Path
) -> None:
    """Of the same name, place and shape: neither its frames nor the run's state are used."""
    shutil.copytree(whisper_folder, tmp_path / "encoder")
    weights = load_file(tmp_path / "encoder" / "model.safetensors")
    weights = {name: weight * 1.1 for name, weight in weights.items()}
    save_file(weights, tmp_path / "encoder" / "model.safetensors", metadata={"format": "pt"})
    path = changed(recipe, "retrained", model={"encoder": {"name": str(tmp_path / "encoder")}})
    with pytest.raises(DataError, match="holds frames of another encoder"):
        resumed(path, whole, tmp_path, lambda folder: None)
    shutil.rmtree(tmp_path / "run" / "frames")
    with pytest.raises(CheckpointError, match=r"state\.pt was made with other settings \(encoder was \w+, is \w+\)"):
        train_from_recipe(path, tmp_path / "run", "cpu")


def test_texts_that_do_not_fit_into_their_sound_are_named(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = read_manifest(recipe.with_name("a.jsonl"))
    long = [Utterance(u.audio_filepath, " ".join([u.text] * 20), "en", u.duration) for u in rows]
    write_manifest(recipe.with_name("long.jsonl"), [*long[:1], *rows[1:]])
    data = {"train": [{"manifest": "long.jsonl"}]}
    path = changed(recipe, "crowded", data=data, train={"steps": 1, "monitor_samples": 0})
    train_from_recipe(path, tmp_path / "some", "cpu")
    printed = " ".join(capfd.readouterr().err.split())
    assert "warning: 1 of 3 transcripts do not fit into their sound, first" in printed and "220.wav" in printed
    write_manifest(recipe.with_name("long.jsonl"), long)
    with pytest.raises(DataError, match="3 of 3 transcripts do not fit into their sound"):
        train_from_recipe(path, tmp_path / "all", "cpu")


def test_mistakes_are_named_before_anything_is_trained(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(AsrError, match="device elsewhere cannot be used"):
        train_from_recipe(recipe, tmp_path / "run", "elsewhere")
    with pytest.raises(RecipeError, match=r"gone\.yaml"):
        train_from_recipe(tmp_path / "gone.yaml", tmp_path / "run", "cpu")
    path = changed(recipe, "missing", data={"dev": ["missing.jsonl"]})
    with pytest.raises(DataError, match=r"missing\.jsonl: no such manifest"):
        train_from_recipe(path, tmp_path / "run", "cpu")
    assert not (tmp_path / "run").exists()
