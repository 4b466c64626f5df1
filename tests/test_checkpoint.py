"""Checkpoints of ours: saved and loaded they give equal logits; what does not fit is refused in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusion_gemma_asr import checkpoint as checkpoint_module
from diffusion_gemma_asr.beam import DraftLM
from diffusion_gemma_asr.checkpoint import (
    load_adapter,
    load_checkpoint,
    push_to_hub,
    save_checkpoint,
)
from diffusion_gemma_asr.checkpoint_config import read_checkpoint_config
from diffusion_gemma_asr.errors import CheckpointError
from diffusion_gemma_asr.model import DiffusionGemmaASR
from diffusion_gemma_asr.model_card import ModelCard, render_card
from diffusion_gemma_asr.ngram import NgramLM
from diffusion_gemma_asr.recipe import LmRecipe, ModelRecipe, ProjectorRecipe, SourceRecipe
from diffusion_gemma_asr.recurrent_lm import RecurrentLM


@pytest.fixture(scope="module")
def recipe(whisper_folder: Path, backbone_folder: Path) -> ModelRecipe:
    return tiny.model_recipe(whisper_folder, backbone_folder)


@pytest.fixture(scope="module")
def model(recipe: ModelRecipe) -> DiffusionGemmaASR:
    return tiny.build_model(recipe)


@pytest.fixture
def folder(tmp_path: Path, model: DiffusionGemmaASR, recipe: ModelRecipe) -> Path:
    return save_checkpoint(model, tmp_path / "checkpoint", recipe)


@torch.no_grad()
def logits(model: DiffusionGemmaASR) -> tuple[Tensor, Tensor]:
    """The canvas' logits of two clips, (2, 8, V), and their slots, (2, S, H): all trained parts work."""
    rng = np.random.default_rng(0)
    clips = [rng.normal(0, 0.1, n).astype(np.float32) for n in (16_000, 9_000)]
    slots, lengths = model.encode_audio(clips)
    prefill, _ = model.read_prompts(slots, lengths, ["en", "en"])
    canvas = torch.randint(model.backbone.vocab_size, (2, 8), generator=torch.Generator().manual_seed(1))
    return model.backbone.denoise_logits(canvas, prefill), slots


def test_saved_loaded_and_merged_models_give_equal_logits(
    model: DiffusionGemmaASR, folder: Path, recipe: ModelRecipe
) -> None:
    before, slots = logits(model)
    loaded = load_checkpoint(folder, device="cpu", merge_lora=False)
    after, loaded_slots = logits(loaded)
    assert torch.allclose(loaded_slots, slots, atol=1e-5)  # not equal: products may round by where the weights lie in memory
    assert torch.allclose(after, before, atol=1e-4)
    loaded.backbone.merge_lora()
    assert not loaded.backbone.lora_state_dict()
    assert torch.allclose(logits(loaded)[0], before, atol=1e-4)  # W + BA rounds once, Wx + BAx twice
    assert torch.allclose(logits(load_checkpoint(folder, device="cpu"))[0], logits(loaded)[0], atol=1e-4)
    other, _ = logits(tiny.build_model(recipe, seed=1))
    assert not torch.allclose(
        other, before, atol=1e-2
    )  # the adapter matters, so equality above means something


def test_an_unscaled_projector_comes_back_unscaled(
    tmp_path: Path, whisper_folder: Path, backbone_folder: Path
) -> None:
    recipe = tiny.model_recipe(whisper_folder, backbone_folder, scaled=False)
    model = tiny.build_model(recipe)
    loaded = load_checkpoint(save_checkpoint(model, tmp_path / "plain", recipe), device="cpu")
    assert not loaded.projector.scaled
    assert torch.allclose(logits(loaded)[1], logits(model)[1], atol=1e-5)


def test_what_canvases_start_with_is_kept(
    tmp_path: Path, model: DiffusionGemmaASR, recipe: ModelRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "start", "draft")
    monkeypatch.setattr(model, "draft_weight", 0.5)
    folder = save_checkpoint(model, tmp_path / "drafted", recipe)
    loaded = load_checkpoint(folder, device="cpu")
    assert (loaded.start, loaded.draft_weight) == ("draft", 0.5)
    for key in ("start", "draft_weight"):
        edit_config(lambda config, key=key: config.pop(key))(folder)  # as checkpoints were before there was a choice
    loaded = load_checkpoint(folder, device="cpu")
    assert (loaded.start, loaded.draft_weight) == ("noise", 0.0)


def test_the_language_model_of_drafts_travels_along(
    tmp_path: Path, model: DiffusionGemmaASR, recipe: ModelRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_checkpoint(save_checkpoint(model, tmp_path / "without", recipe), device="cpu").lm is None
    counted = NgramLM.count([[9, 8, 7]] * 3, model.backbone.vocab_size, 2, 1, order=3)
    reads = RecurrentLM(model.backbone.vocab_size, 8, 8, 1, 2, 1).eval()
    monkeypatch.setattr(model, "lm", DraftLM(counted, 2, 1, 0.25, 1.0, recurrent=reads))
    folder = save_checkpoint(model, tmp_path / "with", recipe)
    lm = load_checkpoint(folder, device="cpu").lm
    assert lm is not None and (lm.weight, lm.bonus) == (0.25, 1.0)
    assert lm.lm.logprobs([[9, 8]], [7]) == counted.logprobs([[9, 8]], [7])
    assert lm.recurrent is not None
    assert lm.recurrent.scores([[9, 8]]) == pytest.approx(reads.scores([[9, 8]]), abs=0.01)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "`ngram.npz`" in card and "`recurrent.safetensors`" in card
    (folder / "ngram.npz").unlink()
    with pytest.raises(CheckpointError, match=r"ngram\.npz cannot be read"):
        load_checkpoint(folder, device="cpu")


def test_an_adapter_fills_another_model_and_one_without_lora_fills_the_projector(
    tmp_path: Path, model: DiffusionGemmaASR, folder: Path, recipe: ModelRecipe
) -> None:
    other = tiny.build_model(recipe, seed=1)
    other.projector.scale.fill_(3.0)
    load_adapter(other, folder)
    assert other.projector.scale == 3.0  # the backbone's, not the adapter's
    for name, weight in model.trained().items():
        assert torch.equal(other.trained()[name], weight), name

    alone = tmp_path / "projector"
    alone.mkdir()
    tensors = {key: value for key, value in load_file(folder / "adapter.safetensors").items() if "lora" not in key}
    save_file(tensors, alone / "adapter.safetensors")
    for source, projector_alone in ((alone, False), (folder, True)):
        third = tiny.build_model(recipe, seed=2)
        before = {name: weight.clone() for name, weight in third.backbone.lora_state_dict().items()}
        load_adapter(third, source, projector_alone)
        assert torch.equal(third.projector.linear.weight, model.projector.linear.weight)
        assert all(torch.equal(third.backbone.lora_state_dict()[name], weight) for name, weight in before.items())


def test_a_checkpoint_says_what_languages_it_knows_and_whether_it_finds_them(
    tmp_path: Path, model: DiffusionGemmaASR, recipe: ModelRecipe, folder: Path
) -> None:
    loaded = load_checkpoint(folder, device="cpu")
    assert (loaded.languages, loaded.finds_language) == (("en", "de"), False)
    save_checkpoint(model, tmp_path / "finder", replace(recipe, finds_language=True))
    assert load_checkpoint(tmp_path / "finder", device="cpu").finds_language
    content = json.loads((folder / "config.json").read_text())
    del content["finds_language"]  # as version 2 wrote it
    shutil.copytree(folder, tmp_path / "old")
    (tmp_path / "old" / "config.json").write_text(json.dumps(content))
    assert not load_checkpoint(tmp_path / "old", device="cpu").finds_language


def test_a_checkpoint_holds_the_adapter_alone(
    folder: Path, model: DiffusionGemmaASR, recipe: ModelRecipe
) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "adapter.safetensors",
        "config.json",
        "preprocessor_config.json",
    ]
    tensors = load_file(folder / "adapter.safetensors")
    assert {key.split(".")[0] for key in tensors} == {"projector", "lora"}
    assert (
        sum(value.numel() for value in tensors.values())
        == sum(p.numel() for p in model.trained().values()) + 1
    )
    config = read_checkpoint_config(folder)
    assert config.model == recipe
    assert (config.encoder.width, config.encoder.mel_bins) == (16, 80)
    assert (config.backbone.width, config.backbone.layers) == (32, 6)
    assert config.drafts and config.dtype == "float32"


def test_the_model_card_has_what_a_hub_and_a_reader_need(
    tmp_path: Path, model: DiffusionGemmaASR, recipe: ModelRecipe
) -> None:
    published = replace(
        recipe,
        encoder=SourceRecipe("openai/whisper-small", "abc123"),
        backbone=SourceRecipe("google/diffusiongemma-26B-A4B-it"),
    )
    card = ModelCard(training_data="Ten hours of speech.", results={"dev": "WER 12.3 %"}, limits="Not for court records.")
    text = (save_checkpoint(model, tmp_path / "card", published, card) / "README.md").read_text()
    header = text.split("---")[1]
    assert "license: apache-2.0" in header and "automatic-speech-recognition" in header
    assert "- openai/whisper-small\n- google/diffusiongemma-26B-A4B-it" in header
    assert "- en\n- de" in header
    assert "`openai/whisper-small` at `abc123`" in text
    assert "Not for court records." in text and "Ten hours of speech." in text and "| dev | WER 12.3 % |" in text
    trained = sum(p.numel() for p in model.trained().values())
    assert f"{trained:,} parameters" in text
    spelling = replace(published, projector=ProjectorRecipe(spelling_layers=4))
    told = "speller, trained: 4 layers of width 256"
    assert told in render_card(spelling, card, trained) and told not in text
    sounding = render_card(replace(spelling, lm=LmRecipe(lexicon="words.npz")), card, trained)
    assert f"{told}, characters and phonemes by CTC" in sounding and "`words.npz`" in sounding and "words.npz" not in text


def test_frozen_parts_inside_the_folder_move_with_it(
    tmp_path: Path, model: DiffusionGemmaASR, recipe: ModelRecipe
) -> None:
    """As the bundled model has them: folders `encoder` and `backbone` beside the adapter, relative names."""
    bundle = tmp_path / "bundle"
    shutil.copytree(recipe.encoder.name, bundle / "encoder")
    shutil.copytree(recipe.backbone.name, bundle / "backbone")
    inside = replace(
        recipe, encoder=SourceRecipe(str(bundle / "encoder")), backbone=SourceRecipe(str(bundle / "backbone"))
    )
    save_checkpoint(model, bundle, inside)
    config = json.loads((bundle / "config.json").read_text())
    assert (config["encoder"]["name"], config["backbone"]["name"]) == ("encoder", "backbone")
    moved = bundle.rename(tmp_path / "moved")
    assert torch.allclose(logits(load_checkpoint(moved, device="cpu"))[0], logits(model)[0], atol=1e-4)


def test_saving_again_replaces_the_files_and_keeps_others(
    folder: Path, model: DiffusionGemmaASR, recipe: ModelRecipe
) -> None:
    (folder / "notes.txt").write_text("mine")
    (folder / "adapter.safetensors").write_bytes(b"old")
    save_checkpoint(model, folder, recipe)
    assert (folder / "notes.txt").read_text() == "mine"
    load_checkpoint(folder, device="cpu")
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]  # nothing temporary is left


def test_a_save_that_fails_leaves_what_was_there(
    folder: Path, model: DiffusionGemmaASR, recipe: ModelRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_module, "save_file", full_disk)
    with pytest.raises(CheckpointError, match=r"cannot write the checkpoint .*No space left"):
        save_checkpoint(model, folder, recipe)
    with pytest.raises(CheckpointError, match="No space left"):
        save_checkpoint(model, folder.parent / "new", recipe)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_merged_model_has_no_adapter_to_save(tmp_path: Path, recipe: ModelRecipe) -> None:
    model = tiny.build_model(recipe)
    model.backbone.merge_lora()
    with pytest.raises(CheckpointError, match="save the checkpoint before merging"):
        save_checkpoint(model, tmp_path / "merged", recipe)


def test_a_wrong_encoder_is_refused_with_both_shapes(folder: Path, whisper_128_folder: Path) -> None:
    expected = r"trained for an encoder 16 wide with 80 mel bins .*whisper-128 is 24 wide with 128"
    with pytest.raises(CheckpointError, match=expected):
        load_checkpoint(folder, device="cpu", encoder=whisper_128_folder)


def test_a_wrong_backbone_is_refused_with_both_shapes(folder: Path, tmp_path: Path) -> None:
    for options in ({"hidden_size": 48}, {"layers": 3}):
        wrong = tiny.write_backbone(tmp_path / f"wrong-{options}", **options)
        width, layers = options.get("hidden_size", 32), options.get("layers", 6)
        expected = rf"backbone 32 wide with 6 layers .*420.*is {width} wide with {layers} layers and 420"
        with pytest.raises(CheckpointError, match=expected):
            load_checkpoint(folder, device="cpu", backbone=wrong)


def test_parts_of_the_wrong_kind_are_refused(
    folder: Path, whisper_folder: Path, backbone_folder: Path
) -> None:
    with pytest.raises(CheckpointError, match="is a diffusion_gemma; it must be a Whisper"):
        load_checkpoint(folder, device="cpu", encoder=backbone_folder)
    with pytest.raises(CheckpointError, match="is a whisper; it must be a DiffusionGemma"):
        load_checkpoint(folder, device="cpu", backbone=whisper_folder)


def edit_config(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def edit_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "adapter.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter.safetensors")

    return edit


def truncate(folder: Path) -> None:
    path = folder / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def first_lora(tensors: dict[str, Tensor]) -> str:
    return next(key for key in tensors if "lora_A" in key)


DAMAGE: list[tuple[str, Callable[[Path], None], str]] = [
    ("no config", lambda f: (f / "config.json").unlink(), r"is no checkpoint: it has no config\.json"),
    (
        "no adapter",
        lambda f: (f / "adapter.safetensors").unlink(),
        r"is no checkpoint: it has no adapter\.safe",
    ),
    ("half an adapter", truncate, r"adapter\.safetensors is damaged \(.*fetch or save it again"),
    ("no JSON", lambda f: (f / "config.json").write_text('{"format": 1'), r"config\.json cannot be read"),
    (
        "foreign config",
        lambda f: (f / "config.json").write_text('{"model_type": "x"}'),
        "is not of this program",
    ),
    (
        "newer",
        edit_config(lambda c: c.update(format=2)),
        "has format 2 of version .*; update diffusion-gemma-asr",
    ),
    (
        "unknown key",
        edit_config(lambda c: c["lora"].update(ranks=3)),
        "unknown key 'ranks' .*did you mean 'rank'",
    ),
    ("missing key", edit_config(lambda c: c["encoder"].pop("width")), "'encoder.width' is missing"),
    (
        "lost projector",
        edit_tensors(lambda t: t.pop("projector.linear.bias")),
        "differ, first projector.linear",
    ),
    ("lost LoRA", edit_tensors(lambda t: t.pop(first_lora(t))), "LoRA matrices do not fit this backbone: 1 "),
    (
        "other rank",
        edit_config(lambda c: c["lora"].update(rank=8)),
        r"is \(4, .* in the adapter, but .* needs \(8,",
    ),
    (
        "other projector",
        edit_config(lambda c: c["projector"].update(hidden_size=32)),
        "of different checkpoints",
    ),
    ("lost encoder", edit_config(lambda c: c["encoder"].update(name="./gone")), "gone: no such folder"),
]


@pytest.mark.parametrize(("damage", "message"), [row[1:] for row in DAMAGE], ids=[row[0] for row in DAMAGE])
def test_a_damaged_checkpoint_is_refused_in_one_line(
    folder: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(folder, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["./nowhere", "nowhere", "/no/where", "a/b/c"])
def test_a_checkpoint_that_does_not_exist(name: str) -> None:
    with pytest.raises(
        CheckpointError, match="no such checkpoint; give mini6 or mini or mini-whisper-base, an existing folder, or a hub"
    ):
        load_checkpoint(name)


def test_a_hub_repository_that_cannot_be_fetched() -> None:
    with pytest.raises(
        CheckpointError, match="nobody/nothing is no folder here and cannot be fetched"
    ) as caught:
        load_checkpoint("nobody/nothing", local_files_only=True)
    assert "\n" not in str(caught.value)


def test_a_hub_repository_in_the_cache_is_loaded_by_name(
    folder: Path, model: DiffusionGemmaASR, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def snapshot(name: str, revision: str | None, local_files_only: bool) -> str:
        asked.append((name, revision, local_files_only))
        return str(folder)

    monkeypatch.setattr(checkpoint_module, "snapshot_download", snapshot)
    loaded = load_checkpoint("someone/asr", device="cpu", revision="v1")
    assert asked == [("someone/asr", "v1", False)]
    assert torch.allclose(logits(loaded)[0], logits(model)[0], atol=1e-4)


def test_mini_is_the_bundled_folder(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checkpoint_module, "PRESETS", tmp_path / "presets")
    with pytest.raises(CheckpointError, match=r"bundled model .* is missing.*reinstall"):
        load_checkpoint("mini")
    shutil.copytree(folder, tmp_path / "presets" / "mini")
    assert load_checkpoint("mini", device="cpu").backbone.hidden_size == 32


def test_an_unknown_quantization_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="quantization 'int3' is unknown"):
        load_checkpoint(tmp_path / "nothing", quantization="int3")


class FakeHub:
    """Keeps what would be uploaded."""

    uploads: list[dict]

    def __init__(self) -> None:
        type(self).uploads = []

    def create_repo(self, repository: str, private: bool, exist_ok: bool) -> None:
        if repository == "not/mine":
            raise OSError("403 Forbidden\nmore")

    def upload_folder(self, **options: object) -> FakeHub:
        type(self).uploads.append(options)
        return self

    commit_url = "https://hub/commit/1"


def test_pushing_uploads_the_checkpoint_s_files(
    tmp_path: Path, model: DiffusionGemmaASR, recipe: ModelRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_module, "HfApi", FakeHub)
    local = save_checkpoint(model, tmp_path / "local", recipe)
    with pytest.raises(CheckpointError, match=r"names the local folder .*, which nobody else has"):
        push_to_hub(local, "me/asr")
    published = replace(recipe, encoder=SourceRecipe("o/w"), backbone=SourceRecipe("g/d"))
    folder = save_checkpoint(model, tmp_path / "published", published)
    assert push_to_hub(folder, "me/asr") == "https://hub/commit/1"
    assert FakeHub.uploads[0]["allow_patterns"] == [
        "adapter.safetensors",
        "config.json",
        "README.md",
        "preprocessor_config.json",
    ]
    with pytest.raises(CheckpointError, match=r"cannot upload to not/mine: 403 Forbidden$"):
        push_to_hub(folder, "not/mine")
