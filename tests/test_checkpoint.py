"""Checkpoints: saved and loaded they give equal logits; what does not fit is refused in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusion_gemma_asr.checkpoint import load as load_module
from diffusion_gemma_asr.checkpoint.card import ModelCard
from diffusion_gemma_asr.checkpoint.config_file import read_config_file, write_config
from diffusion_gemma_asr.checkpoint.load import (
    BUNDLED,
    PRESETS,
    find_checkpoint,
    load_adapter,
    load_checkpoint,
    read_adapter,
)
from diffusion_gemma_asr.checkpoint.save import save_checkpoint, save_projector, with_shapes
from diffusion_gemma_asr.errors import CheckpointError
from diffusion_gemma_asr.model.config import BackboneConfig, EncoderConfig, ModelConfig, ProjectorConfig
from diffusion_gemma_asr.model.model import DiffusionGemmaASR
from diffusion_gemma_asr.model.packing import SCALES


@pytest.fixture(scope="module")
def config(whisper_folder: Path, backbone_folder: Path) -> ModelConfig:
    return tiny.model_config(whisper_folder, backbone_folder)


@pytest.fixture(scope="module")
def model(config: ModelConfig) -> DiffusionGemmaASR:
    return tiny.build_model(config)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, model: DiffusionGemmaASR) -> Path:
    """A checkpoint that no test changes."""
    return save_checkpoint(model, tmp_path_factory.mktemp("saved") / "checkpoint")


@pytest.fixture
def folder(tmp_path: Path, saved: Path) -> Path:
    """A checkpoint that its test may change."""
    return shutil.copytree(saved, tmp_path / "checkpoint")


def described(model: DiffusionGemmaASR, **changes: Any) -> DiffusionGemmaASR:
    """The same model under another config."""
    config = replace(model.config, **changes)
    return DiffusionGemmaASR(config, model.encoder, model.projector, model.backbone, model.tokenizer)


@torch.no_grad()
def logits(model: DiffusionGemmaASR) -> tuple[Tensor, Tensor]:
    """The canvas' logits of two clips, (2, 8, V), and their slots, (2, S, H): all trained parts work."""
    rng = np.random.default_rng(0)
    encoded = model.encode([rng.normal(0, 0.1, n).astype(np.float32) for n in (16_000, 9_000)])
    prefill, _ = model.read_prompts(encoded.slots, encoded.slot_lengths, ["en", "en"])
    canvas = torch.randint(model.backbone.vocab_size, (2, 8), generator=torch.Generator().manual_seed(1))
    return model.backbone.denoise_logits(canvas, prefill), encoded.slots


def test_saved_loaded_and_merged_models_give_equal_logits(
    model: DiffusionGemmaASR, saved: Path, config: ModelConfig
) -> None:
    before, slots = logits(model)
    loaded = load_checkpoint(saved, device="cpu", merge_lora=False)
    after, loaded_slots = logits(loaded)
    assert torch.allclose(loaded_slots, slots, atol=1e-5)  # products may round by where the weights lie in memory
    assert torch.allclose(after, before, atol=1e-4)
    loaded.backbone.merge_lora()
    assert not loaded.backbone.lora_state_dict()
    assert torch.allclose(logits(loaded)[0], before, atol=1e-4)  # W + BA rounds once, Wx + BAx twice
    assert torch.allclose(logits(load_checkpoint(saved, device="cpu"))[0], logits(loaded)[0], atol=1e-4)
    other, _ = logits(tiny.build_model(config, seed=1))
    assert not torch.allclose(other, before, atol=1e-2)  # the adapter matters, so equality above means something


def test_an_unscaled_projector_comes_back_unscaled(tmp_path: Path, whisper_folder: Path, backbone_folder: Path) -> None:
    model = tiny.build_model(tiny.model_config(whisper_folder, backbone_folder, scaled=False))
    loaded = load_checkpoint(save_checkpoint(model, tmp_path / "plain"), device="cpu")
    assert not loaded.projector.scaled
    assert torch.allclose(logits(loaded)[1], logits(model)[1], atol=1e-5)


def test_packed_adapters_load_but_for_rounding(tmp_path: Path, backbone_folder: Path) -> None:
    """Wide enough that some matrices are packed."""
    whisper = tiny.write_whisper(tmp_path / "whisper", width=64)
    wide = tiny.model_config(whisper, backbone_folder, projector=ProjectorConfig(hidden_size=128))
    model = tiny.build_model(wide)
    folder = save_checkpoint(model, tmp_path / "packed", packed=True)
    assert any(name.endswith(SCALES) for name in load_file(folder / "adapter.safetensors"))
    loaded = load_checkpoint(folder, device="cpu", merge_lora=False)
    rounded = 0
    for name, weight in model.projector.state_dict().items():
        other = loaded.projector.state_dict()[name]
        assert (weight - other).abs().max() <= weight.abs().max() / 200
        rounded += not torch.equal(weight, other)
    assert rounded > 0


def test_the_config_is_kept(tmp_path: Path, model: DiffusionGemmaASR, saved: Path) -> None:
    assert load_checkpoint(saved, device="cpu").config == with_shapes(model)
    other = described(model, name="other", start="draft", finds_language=True, reads_context=True, languages=("hi", "zh"))
    loaded = load_checkpoint(save_checkpoint(other, tmp_path / "other"), device="cpu")
    assert loaded.config == with_shapes(other)
    silent = described(model, ctc=False)
    assert not load_checkpoint(save_checkpoint(silent, tmp_path / "silent"), device="cpu").config.ctc
    for settings in (other.config, silent.config):
        complete = replace(with_shapes(model), name=settings.name)
        write_config(complete, tmp_path)
        assert read_config_file(tmp_path) == complete


def test_an_adapter_fills_another_model_and_one_without_lora_fills_the_projector(
    tmp_path: Path, model: DiffusionGemmaASR, saved: Path, config: ModelConfig
) -> None:
    other = tiny.build_model(config, seed=1)
    other.projector.scale.fill_(3.0)
    load_adapter(other, saved)
    assert other.projector.scale == 3.0  # the backbone's, not the adapter's
    for name, weight in model.trained().items():
        assert torch.equal(other.trained()[name], weight), name

    alone = tmp_path / "projector"
    save_projector(model.projector, alone)
    own = {f"projector.{name}" for name in model.projector.state_dict()}
    assert read_adapter(alone).keys() == own == {name for name in read_adapter(saved) if name.startswith("projector.")}
    for source, projector_alone in ((alone, False), (saved, True)):
        third = tiny.build_model(config, seed=2)
        before = {name: weight.clone() for name, weight in third.backbone.lora_state_dict().items()}
        load_adapter(third, source, projector_alone)
        assert torch.equal(third.projector.linear.weight, model.projector.linear.weight)
        assert all(torch.equal(third.backbone.lora_state_dict()[name], weight) for name, weight in before.items())


def test_a_checkpoint_holds_the_adapter_alone(saved: Path, model: DiffusionGemmaASR, config: ModelConfig) -> None:
    names = ["README.md", "adapter.safetensors", "config.json", "preprocessor_config.json"]
    assert sorted(path.name for path in saved.iterdir()) == names
    tensors = load_file(saved / "adapter.safetensors")
    assert {key.split(".")[0] for key in tensors} == {"projector", "lora"}
    trained = sum(p.numel() for p in model.trained().values())
    assert sum(value.numel() for value in tensors.values()) == trained + 1  # the scale
    kept = read_config_file(saved)
    assert (kept.encoder.width, kept.encoder.mel_bins) == (16, 80)
    assert (kept.backbone.width, kept.backbone.layers, kept.backbone.vocab_size) == (32, 6, 420)
    assert (kept.name, kept.lora, kept.projector, kept.dtype) == ("tiny", config.lora, config.projector, "float32")


def test_the_model_card_has_what_a_hub_and_a_reader_need(tmp_path: Path, model: DiffusionGemmaASR) -> None:
    published = described(
        model,
        encoder=EncoderConfig("openai/whisper-small", "abc123"),
        backbone=BackboneConfig("google/diffusiongemma-26B-A4B-it"),
    )
    card = ModelCard(training_data="Ten hours of speech.", results={"dev": "WER 12.3 %"}, limits="Not for court records.")
    text = (save_checkpoint(published, tmp_path / "card", card) / "README.md").read_text()
    header = text.split("---")[1]
    assert "license: apache-2.0" in header and "automatic-speech-recognition" in header
    assert "- openai/whisper-small\n- google/diffusiongemma-26B-A4B-it" in header
    assert "- en\n- de" in header
    assert "`openai/whisper-small` at `abc123`" in text
    assert "Not for court records." in text and "Ten hours of speech." in text and "| dev | WER 12.3 % |" in text
    assert f"{sum(p.numel() for p in model.trained().values()):,} parameters" in text
    assert str(tmp_path) not in text


def bundled_parts(model: DiffusionGemmaASR, bundle: Path) -> DiffusionGemmaASR:
    """The model with its frozen parts copied into a folder, as those inside the package have them."""
    shutil.copytree(model.config.encoder.name, bundle / "encoder")
    shutil.copytree(model.config.backbone.name, bundle / "backbone")
    encoder, backbone = EncoderConfig(str(bundle / "encoder")), BackboneConfig(str(bundle / "backbone"))
    return described(model, encoder=encoder, backbone=backbone)


def test_frozen_parts_inside_the_folder_move_with_it(tmp_path: Path, model: DiffusionGemmaASR) -> None:
    bundle = tmp_path / "bundle"
    save_checkpoint(bundled_parts(model, bundle), bundle)
    names = json.loads((bundle / "config.json").read_text())
    assert (names["encoder"]["name"], names["backbone"]["name"]) == ("encoder", "backbone")
    moved = bundle.rename(tmp_path / "moved")
    assert torch.allclose(logits(load_checkpoint(moved, device="cpu"))[0], logits(model)[0], atol=1e-4)


def test_saving_again_replaces_the_files_and_keeps_others(folder: Path, model: DiffusionGemmaASR) -> None:
    (folder / "notes.txt").write_text("mine")
    (folder / "adapter.safetensors").write_bytes(b"old")
    save_checkpoint(model, folder)
    assert (folder / "notes.txt").read_text() == "mine"
    load_checkpoint(folder, device="cpu")
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]  # nothing temporary is left


def test_a_save_that_fails_leaves_what_was_there(folder: Path, model: DiffusionGemmaASR) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    class FullDisk:
        """A feature extractor for whose file there is no room."""

        feature_size = model.encoder.extractor.feature_size

        def save_pretrained(self, folder: Path) -> None:
            raise OSError(28, "No space left on device")

    failing = described(model)
    failing.encoder = type(model.encoder)(model.encoder.encoder, FullDisk())  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"cannot write the checkpoint .*No space left"):
        save_checkpoint(failing, folder)
    with pytest.raises(CheckpointError, match="No space left"):
        save_checkpoint(failing, folder.parent / "new")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    with pytest.raises(CheckpointError, match="cannot write the checkpoint"):
        save_checkpoint(model, folder / "config.json" / "under a file")


def test_what_cannot_be_saved(tmp_path: Path, config: ModelConfig) -> None:
    model = tiny.build_model(config)
    model.backbone.merge_lora()
    with pytest.raises(CheckpointError, match="save the checkpoint before merging"):
        save_checkpoint(model, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


# -- what does not fit ---------------------------------------------------------------------------------------------


def test_a_wrong_encoder_is_refused_with_both_shapes(saved: Path, whisper_128_folder: Path) -> None:
    expected = r"trained for an encoder 16 wide with 80 mel bins .*whisper-128 is 24 wide with 128"
    with pytest.raises(CheckpointError, match=expected):
        load_checkpoint(saved, device="cpu", encoder=whisper_128_folder)


def test_a_wrong_backbone_is_refused_with_both_shapes(saved: Path, tmp_path: Path) -> None:
    for options in ({"hidden_size": 48}, {"layers": 3}):
        wrong = tiny.write_backbone(tmp_path / f"wrong-{options}", **options)
        width, layers = options.get("hidden_size", 32), options.get("layers", 6)
        expected = rf"backbone 32 wide with 6 layers .*420.*is {width} wide with {layers} layers and 420"
        with pytest.raises(CheckpointError, match=expected):
            load_checkpoint(saved, device="cpu", backbone=wrong)


def test_parts_of_the_wrong_kind_are_refused(saved: Path, whisper_folder: Path, backbone_folder: Path) -> None:
    with pytest.raises(CheckpointError, match="is a diffusion_gemma; it must be a Whisper"):
        load_checkpoint(saved, device="cpu", encoder=backbone_folder)
    with pytest.raises(CheckpointError, match="is a whisper; it must be a DiffusionGemma"):
        load_checkpoint(saved, device="cpu", backbone=whisper_folder)


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
        edit_config(lambda c: c.update(format=3)),
        "has format 3 of version .*; use the version that wrote it",
    ),
    (
        "unknown key",
        edit_config(lambda c: c["lora"].update(ranks=3)),
        "unknown key 'ranks' .*did you mean 'rank'",
    ),
    ("missing key", edit_config(lambda c: c["encoder"].pop("width")), "'encoder.width' is missing"),
    ("missing name", edit_config(lambda c: c["backbone"].pop("name")), "'backbone.name' is missing"),
    ("missing layers", edit_config(lambda c: c["backbone"].update(layers=None)), "'backbone.layers' is missing"),
    ("wrong value", edit_config(lambda c: c["lora"].update(rank="four")), "'lora.rank' must be a whole number, found"),
    ("older", edit_config(lambda c: c.update(format=1)), "has format 1 of version .*; use the version that wrote it"),
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
def test_a_damaged_checkpoint_is_refused_in_one_line(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(folder, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["./nowhere", "nowhere", "/no/where", "a/b/c"])
def test_a_checkpoint_that_does_not_exist(name: str) -> None:
    with pytest.raises(
        CheckpointError, match=f"no such checkpoint; give {' or '.join(BUNDLED)}, an existing folder, or a hub"
    ):
        load_checkpoint(name)


def test_a_hub_repository_that_cannot_be_fetched() -> None:
    with pytest.raises(CheckpointError, match="nobody/nothing is no folder here and cannot be fetched") as caught:
        load_checkpoint("nobody/nothing", local_files_only=True)
    assert "\n" not in str(caught.value)


def test_a_hub_repository_in_the_cache_is_loaded_by_name(
    tmp_path: Path, saved: Path, model: DiffusionGemmaASR, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache of huggingface_hub, laid out by hand: models--OWNER--NAME/{refs,snapshots}."""
    repository = tmp_path / "models--someone--asr"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "v1").write_text("1" * 40)
    shutil.copytree(saved, repository / "snapshots" / ("1" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    loaded = load_checkpoint("someone/asr", device="cpu", revision="v1", local_files_only=True)
    assert torch.allclose(logits(loaded)[0], logits(model)[0], atol=1e-4)
    with pytest.raises(CheckpointError, match="cannot be fetched"):
        load_checkpoint("someone/asr", device="cpu", revision="v2", local_files_only=True)


def test_bundled_models_are_found_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert [find_checkpoint(name) for name in BUNDLED] == [PRESETS / "mini"] * 2
    assert read_config_file(PRESETS / "mini").name == "mini"
    monkeypatch.setattr(load_module, "PRESETS", tmp_path)  # as in a package that lost its data
    with pytest.raises(CheckpointError, match=r"bundled model .* is missing.*reinstall"):
        load_checkpoint("mini")


def test_base_is_mini_with_the_published_encoder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []

    def refuse(entry: EncoderConfig, source: EncoderConfig, local_files_only: bool) -> None:
        asked.append(source.name)
        raise CheckpointError("far enough")

    monkeypatch.setattr(load_module, "check_encoder", refuse)
    for name, encoder in (("base", None), ("mini", None), ("base", tmp_path)):
        with pytest.raises(CheckpointError, match="far enough"):
            load_checkpoint(name, encoder=encoder)
    assert asked == ["openai/whisper-base", str(PRESETS / "mini" / "encoder"), str(tmp_path)]


def test_an_unknown_quantization_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="quantization 'int3' is unknown"):
        load_checkpoint(tmp_path / "nothing", quantization="int3")
