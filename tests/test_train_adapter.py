"""train/adapter.py: a recipe becomes a checkpoint, and a killed run becomes the same one."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

import pytest
import torch
import yaml
from safetensors.torch import load_file
from sounds import tone, write
from torch import Tensor

import diffusion_gemma_asr
from diffusion_gemma_asr.backbone import Backbone
from diffusion_gemma_asr.beam import DraftLM
from diffusion_gemma_asr.checkpoint import save_checkpoint
from diffusion_gemma_asr.data.espeak import library_name
from diffusion_gemma_asr.data.manifest import Utterance, write_manifest
from diffusion_gemma_asr.data.phonemes import pronounced
from diffusion_gemma_asr.encoder import AcousticEncoder
from diffusion_gemma_asr.errors import CheckpointError, DataError, RecipeError
from diffusion_gemma_asr.info import count_parts, render
from diffusion_gemma_asr.lexicon import lexicon_of, symbols_of
from diffusion_gemma_asr.ngram import NgramLM
from diffusion_gemma_asr.projector import LinearProjector
from diffusion_gemma_asr.recipe import load_recipe
from diffusion_gemma_asr.train import adapter
from diffusion_gemma_asr.train.adapter import train_from_recipe
from diffusion_gemma_asr.train.bundle import bundle
from diffusion_gemma_asr.waveform import WaveformFrames

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
        "name": "tiny",
        "encoder": {"name": str(whisper_folder)},
        "backbone": {"name": str(backbone_folder)},
        "projector": {"hidden_size": 16},
        "lora": {"rank": 2, "alpha": 4, "dropout": 0.1},
        "train": {
            "steps": STEPS,
            "batch_size": 2,
            "accumulation": 2,
            "lr": 0.01,
            "dtype": "float32",
            "spec_augment": {"time_width": 10, "channel_width": 3},
            "save_every": SAVE_EVERY,
            "eval_every": 3,
            "monitor_samples": 1,
        },
        "data": {
            "train": [
                {"manifest": str(folder / "a.jsonl")},
                {"manifest": str(folder / "b.jsonl"), "weight": 0.5},
            ],
            "dev": [str(folder / "dev.jsonl")],
            "transcript": "plain",
        },
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return folder / "tiny.yaml"


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


def forbid_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    def heard(self: AcousticEncoder, mel: Tensor, lengths: Tensor) -> NoReturn:
        raise AssertionError("the frozen encoder ran again")

    monkeypatch.setattr(AcousticEncoder, "forward", heard)


def train_until_killed(recipe: Path, folder: Path) -> None:
    """Trains, and dies in the second micro-batch of the step after KILLED_IN."""
    original, calls = adapter.weighted_loss, 0

    def dying(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2 * KILLED_IN + 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    with patch.object(adapter, "weighted_loss", dying):
        train_from_recipe(recipe, folder, "cpu")


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
    assert [name for name in figures if name.startswith("wer_")] and len(figures) == 5


def test_the_checkpoint_holds_what_was_trained_and_transcribes(whole: Path) -> None:
    model = diffusion_gemma_asr.load(whole / "checkpoint", device="cpu", merge_lora=False)
    state = torch.load(whole / "state.pt", weights_only=True)["weights"]
    loaded = model.trained()
    assert loaded.keys() == state.keys() and len(state) > 10
    for name, weight in state.items():
        assert torch.equal(loaded[name], weight), name
    lora_b = [weight for name, weight in state.items() if "lora_B" in name]
    assert lora_b and all(
        bool(weight.any()) for weight in lora_b
    )  # all of them began as zeros and have moved
    (decoded,) = model.transcribe_batch([tone(440, 2.0)])
    assert isinstance(decoded.text, str) and len(decoded.tokens) == len(decoded.logprobs)


def test_a_bundle_holds_all_parts_and_transcribes_alone(whole: Path, recipe: Path, tmp_path: Path) -> None:
    bundle(recipe, whole, tmp_path / "bundle")
    moved = (tmp_path / "bundle").rename(tmp_path / "moved")
    clips = [tone(440, 2.0), tone(300, 1.0)]
    folders = whole / "checkpoint", moved
    before, after = (diffusion_gemma_asr.load(f, device="cpu", merge_lora=False).transcribe_batch(clips) for f in folders)
    for one, other in zip(before, after, strict=True):  # in half precision, and products may round by where the weights lie
        assert one.draft == other.draft
    config = json.loads((moved / "config.json").read_text(encoding="utf-8"))
    assert (config["encoder"]["name"], config["backbone"]["name"]) == ("encoder", "backbone")


def test_only_the_adapter_was_trained(whole: Path, recipe: Path) -> None:
    fresh = adapter.build_model(adapter.load_recipe(recipe))
    trained = diffusion_gemma_asr.load(whole / "checkpoint", device="cpu", merge_lora=False)
    changing, after = fresh.trained(), trained.state_dict()
    same = {name: torch.equal(value, after[name]) for name, value in fresh.state_dict().items()}
    assert not any(same[name] for name in changing)
    assert all(equal for name, equal in same.items() if name not in changing)
    assert len(same) > len(changing)


def test_a_model_without_an_acoustic_encoder_is_trained_saved_and_loaded(recipe: Path, tmp_path: Path) -> None:
    """40 ms frames of samples through a linear layer: the same command, another recipe."""
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    content |= {"encoder": {"name": "waveform"}, "projector": {"kind": "linear"}}
    content["train"] |= {"steps": 1, "eval_every": 1}
    path = tmp_path / "waveform.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    checkpoint = train_from_recipe(path, tmp_path / "run", "cpu")
    model = diffusion_gemma_asr.load(checkpoint, device="cpu")
    assert isinstance(model.encoder, WaveformFrames) and isinstance(model.projector, LinearProjector)
    assert model.projector.linear.weight.shape[1] == 640
    slots, lengths = model.encode_audio([tone(300, 1.0), tone(300, 0.41)])
    assert lengths.tolist() == [25, 11] and slots.shape[1] == 25
    (decoded,) = model.transcribe_batch([tone(440, 1.0)])
    assert isinstance(decoded.text, str)
    assert "linear" in render(path)


@pytest.mark.skipif(os.name != "posix", reason="kill -9")
def test_a_killed_run_resumes_to_the_same_adapter_without_the_encoder(
    recipe: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = multiprocessing.get_context("forkserver")  # forks before torch has started any thread
    process = context.Process(target=train_until_killed, args=(recipe, tmp_path))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [record["step"] for record in read_log(tmp_path)] == list(range(1, KILLED_IN + 1))
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == SAVE_EVERY
    assert not (tmp_path / "checkpoint").exists()

    forbid_encoder(monkeypatch)
    train_from_recipe(recipe, tmp_path, "cpu")
    expected, found = adapter_of(whole), adapter_of(tmp_path)
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name
    assert read_log(tmp_path) == read_log(whole)


def test_a_finished_run_can_be_asked_for_again(
    recipe: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "checkpoint")
    forbid_encoder(monkeypatch)
    monkeypatch.setattr(adapter, "weighted_loss", None)  # neither a step
    train_from_recipe(recipe, tmp_path / "copy", "cpu")
    expected, found = adapter_of(whole), adapter_of(tmp_path / "copy")
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_a_loss_without_weight_does_not_count(recipe: Path, whole: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    content["losses"] = {"ctc": 0.0, "autoregressive": 0.0, "diffusion": 2.0}
    content["train"] |= {"steps": 1, "monitor_samples": 0}
    content["data"]["cache_dir"] = str(whole / "frames")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    train_from_recipe(tmp_path / "tiny.yaml", tmp_path / "run", "cpu")
    (record,) = read_log(tmp_path / "run")
    assert record["loss"] == pytest.approx(2 * record["diffusion"], abs=1e-4)
    assert record["autoregressive"] == 0 and not (tmp_path / "run" / "frames").exists()


def test_a_bundle_may_leave_the_encoder_to_a_hub(whole: Path, recipe: Path, whisper_folder: Path, tmp_path: Path) -> None:
    """As `mini-whisper-base` has it; what is trained is kept in half precision."""
    bundle(recipe, whole, tmp_path / "bundle", encoder_name="someone/whisper")
    assert not (tmp_path / "bundle" / "encoder").exists() and (tmp_path / "bundle" / "backbone").is_dir()
    assert json.loads((tmp_path / "bundle" / "config.json").read_text())["encoder"]["name"] == "someone/whisper"
    halves = load_file(tmp_path / "bundle" / "adapter.safetensors")
    for name, value in adapter_of(whole).items():
        torch.testing.assert_close(halves[name].float(), value.half().float() if value.ndim else value)
    model = diffusion_gemma_asr.load(tmp_path / "bundle", encoder=whisper_folder, device="cpu")
    assert model.projector.conv1.weight.dtype == torch.float32
    assert isinstance(diffusion_gemma_asr.transcribe(tone(440, 1.0), model), diffusion_gemma_asr.Transcript)


def test_bundles_may_share_a_language_model(whole: Path, recipe: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "checkpoint", tmp_path / "run" / "checkpoint")
    model = diffusion_gemma_asr.load(whole / "checkpoint", merge_lora=False)
    counted = NgramLM.count([[9, 8, 7]] * 3, model.backbone.vocab_size, 2, 1, order=3)
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    counted.save(tmp_path / "text.npz")
    content["lm"] = {"file": str(tmp_path / "text.npz"), "weight": 0.25}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    built = adapter.build_model(load_recipe(tmp_path / "tiny.yaml"))
    save_checkpoint(built, tmp_path / "run" / "checkpoint", load_recipe(tmp_path / "tiny.yaml").model)
    bundle(recipe, tmp_path / "run", tmp_path / "one")
    bundle(recipe, tmp_path / "run", tmp_path / "two", lm="../one/ngram.npz")
    assert (tmp_path / "one" / "ngram.npz").is_file() and not (tmp_path / "two" / "ngram.npz").exists()
    for name in ("one", "two"):
        lm = diffusion_gemma_asr.load(tmp_path / name).lm
        assert lm is not None and lm.weight == 0.25
        assert lm.lm.logprobs([[9, 8]], [7]) == counted.logprobs([[9, 8]], [7])


def test_ctc_alone_trains_the_projector_and_a_second_run_starts_from_it(
    recipe: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    content["losses"] = {"ctc": 1.0, "autoregressive": 0.0, "diffusion": 0.0}
    content["train"] |= {"steps": 2, "monitor_samples": 2}
    content["data"]["cache_dir"] = str(whole / "frames")
    content["data"]["train"][0]["first"] = 1
    (tmp_path / "ctc.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    with monkeypatch.context() as patched:
        patched.setattr(Backbone, "prefill", None)  # CTC alone does not run the backbone
        train_from_recipe(tmp_path / "ctc.yaml", tmp_path / "ctc", "cpu")
    assert all(record["loss"] == record["ctc"] for record in read_log(tmp_path / "ctc"))
    assert all(name.startswith("wer_draft_") for name in read_log(tmp_path / "ctc")[-1]["evaluation"])  # drafts are judged
    trained = adapter_of(tmp_path / "ctc")
    assert not any(weight.any() for name, weight in trained.items() if "lora_B" in name)

    told = {"start_from": str(tmp_path / "ctc" / "checkpoint"), "steps": 1, "lr": 1e-30, "monitor_samples": 0}
    content["train"] |= told
    (tmp_path / "next.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    train_from_recipe(tmp_path / "next.yaml", tmp_path / "next", "cpu")
    after = adapter_of(tmp_path / "next")
    assert all(torch.equal(after[name], weight) for name, weight in trained.items())
    assert not torch.equal(trained["projector.linear.weight"], adapter_of(whole)["projector.linear.weight"])

    content["projector"] |= {"layers": 1, "layer_width": 64}  # deeper than what it starts from
    content["train"] |= {"optimizer": "muon", "lr": 0.01, "batch_frames": 1}
    (tmp_path / "deep.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    train_from_recipe(tmp_path / "deep.yaml", tmp_path / "deep", "cpu")
    deep = adapter_of(tmp_path / "deep")
    assert deep.keys() > trained.keys() and deep["projector.deep.out_proj.weight"].any()  # 0 before it learns
    rms = {name: float(weight.square().mean().sqrt()) for name, weight in deep.items()}
    assert rms["projector.deep.out_proj.weight"] < 0.01  # one step of Muon: 0.2 times the learning rate
    loaded = diffusion_gemma_asr.load(tmp_path / "deep" / "checkpoint")
    assert "1 layers" not in render(recipe) and "1 layers of width 64" in render(tmp_path / "deep.yaml")
    assert diffusion_gemma_asr.transcribe(tone(440, 1.0), loaded).text is not None

    content["projector"]["hidden_size"] += 1
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"projector\.conv1\.weight is \(16, 16, 7\), but this model's projector is"):
        train_from_recipe(tmp_path / "other.yaml", tmp_path / "other", "cpu")


def test_a_speller_learns_alone_and_its_drafts_are_denoised(recipe: Path, whole: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    content["projector"] |= {"spelling_layers": 1, "spelling_width": 64}
    content["losses"] = {"spelling": 1.0, "ctc": 0.0, "autoregressive": 0.0, "diffusion": 0.0}
    content["train"] |= {"steps": 2, "monitor_samples": 2, "start_from": str(whole / "checkpoint"), "lr": 0.01}
    content["data"]["cache_dir"] = str(whole / "frames")
    (tmp_path / "spell.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    train_from_recipe(tmp_path / "spell.yaml", tmp_path / "spell", "cpu")
    assert all(record["loss"] == record["spelling"] for record in read_log(tmp_path / "spell"))
    before, after = adapter_of(whole), adapter_of(tmp_path / "spell")
    assert after.keys() - before.keys() == {name for name in after if name.startswith("projector.speller.")} != set()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert "speller of 1 layers" in render(tmp_path / "spell.yaml")

    content["losses"] = {"draft_share": 1.0}
    content["train"] |= {"steps": 1, "start_from": str(tmp_path / "spell" / "checkpoint")}
    (tmp_path / "next.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    train_from_recipe(tmp_path / "next.yaml", tmp_path / "next", "cpu")
    learnt = adapter_of(tmp_path / "next")
    assert {name.startswith("projector.speller.") for name in after if not torch.equal(after[name], learnt[name])} == {False}

    model = diffusion_gemma_asr.load(tmp_path / "next" / "checkpoint")
    assert model.start == "draft" and model.drafts
    ends = model.prompts.special["bos"], model.prompts.special["eos"]
    rows = [model.prompts.target(text)[:-1] for text in SPOKEN.values()]
    for lm in (None, DraftLM(NgramLM.count(rows, model.backbone.vocab_size, *ends, order=2, least=1), *ends)):
        model.lm = lm
        alone = [model.transcribe_batch([tone(hertz, 1.0)])[0] for hertz in (440, 330)]
        together = model.transcribe_batch([tone(hertz, 1.0) for hertz in (440, 330)])
        assert [row.draft for row in alone] == [row.draft for row in together]
        for row in together:
            for token, logprob, drafted in zip(row.tokens, row.logprobs, row.draft_tokens, strict=False):
                assert token != drafted.id or logprob <= math.log(drafted.probability) + 1e-6  # both begin alike, or not
        frames, lengths = model.encoder(*model.encoder.features([tone(440, 1.0)]))
        (draft,) = model.listen(frames, lengths)[2] or ()
        assert model.text([token.id for token in draft]) == together[0].draft
        assert model.listen(frames, lengths, drafts=False)[2] is None


@pytest.mark.skipif(library_name() is None, reason="needs the espeak-ng library (Debian: apt-get install espeak-ng)")
def test_a_speller_learns_phonemes_of_a_dictionary(recipe: Path, whole: Path, tmp_path: Path) -> None:
    texts = [*SPOKEN.values()]
    said = {text: {tuple(way): 9} for text, way in zip(texts, pronounced(texts, "en", "en-us"), strict=True)}
    lexicon_of({"en": said}, symbols_of({"en": said}, 1)).save(tmp_path / "words.npz")
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    content["projector"] |= {"spelling_layers": 1, "spelling_width": 64}
    content["losses"] = {"spelling": 1.0, "ctc": 0.0, "autoregressive": 0.0, "diffusion": 0.0}
    content["train"] |= {"steps": 1, "monitor_samples": 2, "start_from": str(whole / "checkpoint"), "lr": 0.01}
    content["data"]["cache_dir"] = str(whole / "frames")
    (tmp_path / "spell.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    train_from_recipe(tmp_path / "spell.yaml", tmp_path / "spell", "cpu")

    content["lm"] = {"lexicon": str(tmp_path / "words.npz")}
    content["losses"] |= {"spelling": 0.5, "phonemes": 2.0}
    content["train"] |= {"start_from": str(tmp_path / "spell" / "checkpoint")}  # which has no phonemes
    (tmp_path / "sound.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    train_from_recipe(tmp_path / "sound.yaml", tmp_path / "sound", "cpu")
    for record in read_log(tmp_path / "sound"):
        assert record["loss"] == pytest.approx(0.5 * record["spelling"] + 2.0 * record["phonemes"], rel=1e-4)
    before, after = adapter_of(tmp_path / "spell"), adapter_of(tmp_path / "sound")
    assert after.keys() - before.keys() == {f"projector.speller.phonemes.{part}" for part in ("weight", "bias")}
    assert not torch.equal(before["projector.speller.head.weight"], after["projector.speller.head.weight"])
    counts = [next(p for p in count_parts(load_recipe(tmp_path / f"{name}.yaml")) if p.name == "projector").parameters
              for name in ("spell", "sound")]  # fmt: skip
    assert counts[1] - counts[0] == sum(after[name].numel() for name in after.keys() - before.keys())

    model = diffusion_gemma_asr.load(tmp_path / "sound" / "checkpoint")
    assert model.lexicon is not None and sorted(set(model.lexicon.words)) == sorted(SPOKEN.values())
    ends = model.prompts.special["bos"], model.prompts.special["eos"]
    rows = [model.prompts.target(text)[:-1] for text in SPOKEN.values()]
    model.lm = DraftLM(NgramLM.count(rows, model.backbone.vocab_size, *ends, order=2, least=1), *ends)
    assert model.search is not None and model.search.sounded is not None
    assert isinstance(model.transcribe_batch([tone(440, 1.0)])[0].draft, str)
    save_checkpoint(diffusion_gemma_asr.load(tmp_path / "sound" / "checkpoint", merge_lora=False), tmp_path / "again",
                    load_recipe(tmp_path / "sound.yaml").model)  # fmt: skip
    assert (tmp_path / "again" / "lexicon.npz").is_file()
    (tmp_path / "again" / "lexicon.npz").unlink()
    with pytest.raises(CheckpointError, match=r"lexicon\.npz cannot be read as a dictionary"):
        diffusion_gemma_asr.load(tmp_path / "again")


@pytest.mark.parametrize(("section", "told", "named"), [
    ("losses", {"spelling": 1.0}, "losses.spelling"),
    ("losses", {"phonemes": 1.0}, "losses.phonemes"),
    ("projector", {"kind": "linear", "spelling_layers": 1}, "projector.spelling_layers"),
    ("projector", {"spelling_width": 100}, "projector.spelling_width"),
])  # fmt: skip
def test_what_cannot_spell_is_named(recipe: Path, tmp_path: Path, section: str, told: dict[str, Any], named: str) -> None:
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    content[section] = content.get(section, {}) | told
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(RecipeError, match=named.replace(".", r"\.")):
        load_recipe(tmp_path / "tiny.yaml")


def test_mistakes_are_named_before_anything_is_trained(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"gone\.yaml"):
        train_from_recipe(tmp_path / "gone.yaml", tmp_path / "run")
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    content["data"]["dev"] = [str(tmp_path / "missing.jsonl")]
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(DataError, match=r"missing\.jsonl: no such manifest"):
        train_from_recipe(tmp_path / "tiny.yaml", tmp_path / "run")
    assert not (tmp_path / "run").exists()
