"""Frozen parts load from folders in the layout of the real ones, whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny_model import tiny_model
from torch import Tensor
from transformers import (
    AutoTokenizer,
    DiffusionGemmaForBlockDiffusion,
    WhisperForConditionalGeneration,
    WhisperModel,
)

from diffusion_gemma_asr.checkpoint import load
from diffusion_gemma_asr.checkpoint.known_configs import diffusiongemma_26b, whisper_large_v3, whisper_small
from diffusion_gemma_asr.checkpoint.parts import load_backbone, load_encoder, read_config
from diffusion_gemma_asr.checkpoint.save import save_checkpoint
from diffusion_gemma_asr.denoise.decode import decode_clips
from diffusion_gemma_asr.denoise.options import DecodeOptions
from diffusion_gemma_asr.errors import AsrError, CheckpointError
from diffusion_gemma_asr.model.backbone import Backbone
from diffusion_gemma_asr.model.config import BackboneConfig, EncoderConfig
from diffusion_gemma_asr.model.encoder import AcousticEncoder
from diffusion_gemma_asr.model.int8 import Int8Linear, int8_available
from diffusion_gemma_asr.model.packing import LEAST, SCALES, is_packed, pack_file
from diffusion_gemma_asr.model.prompt import SPECIAL_TOKENS

SECOND = np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32)


def backbone_of(folder: Path | str, **options: Any) -> Backbone:
    return load_backbone(BackboneConfig(str(folder)), **options)


def encoder_of(folder: Path | str, **options: Any) -> AcousticEncoder:
    return load_encoder(EncoderConfig(str(folder)), **options)


def frames(encoder: AcousticEncoder) -> Tensor:
    with torch.no_grad():
        return encoder(*encoder.features([SECOND]))[0]


# -- the tiny folders are what they claim to be ------------------------------------------------------------


def test_the_tiny_backbone_has_the_published_layout(backbone_folder: Path) -> None:
    names = {path.name for path in backbone_folder.iterdir()}
    index = json.loads((backbone_folder / "model.safetensors.index.json").read_text())["weight_map"]
    shards = {name for name in names if name.endswith(".safetensors")}
    assert shards == set(index.values()) and len(shards) > 1
    total = len(shards)
    assert shards == {f"model-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)}
    assert names - shards == {
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert "model.decoder.layers.2.self_attn.k_proj.weight" in index
    assert "model.decoder.layers.2.self_attn.v_proj.weight" not in index  # full layers: values are the keys
    assert "model.decoder.self_conditioning.gate_proj.weight" in index
    assert "model.encoder.language_model.layers.0.layer_scalar" in index  # the only text weight that is not tied
    assert "lm_head.weight" not in index
    config = json.loads((backbone_folder / "config.json").read_text())
    assert config["architectures"] == ["DiffusionGemmaForBlockDiffusion"]
    assert config["text_config"]["global_head_dim"] == 16
    assert config["text_config"]["num_global_key_value_heads"] == 1


def test_the_tiny_config_has_the_keys_of_the_published_one(backbone_folder: Path) -> None:
    published, tiny_one = diffusiongemma_26b().to_dict(), read_config(backbone_folder).to_dict()
    for section in ("text_config", "vision_config"):
        assert published[section].keys() == tiny_one[section].keys()
    for key in (
        "final_logit_softcapping",
        "use_bidirectional_attention",
        "sliding_window",
        "rope_parameters",
    ):
        assert published["text_config"][key] == tiny_one["text_config"][key]


def test_the_tokenizer_has_the_real_special_tokens(backbone_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(backbone_folder)
    assert type(tokenizer).__name__ == "GemmaTokenizer"
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<eos>", "<bos>", "<|turn>", "<turn|>"]) == [
        0,
        1,
        2,
        105,
        106,
    ]
    for token in SPECIAL_TOKENS.values():
        assert len(tokenizer.encode(token, add_special_tokens=False)) == 1
    for text in (*tiny.SENTENCES, "Unseen words, Ünïcode, 1234: all of it"):
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_generation_defaults_are_the_samplers(backbone_folder: Path) -> None:
    defaults = DiffusionGemmaForBlockDiffusion.from_pretrained(backbone_folder).generation_config
    assert defaults.sampler_config.entropy_bound == 0.1
    assert (defaults.t_max, defaults.t_min, defaults.max_denoising_steps) == (0.8, 0.4, 48)
    assert (defaults.stability_threshold, defaults.confidence_threshold) == (1, 0.005)
    assert defaults.eos_token_id == [1, 106, 50]


def test_published_configurations_build_what_transformers_expects() -> None:
    text = diffusiongemma_26b().text_config
    assert text.layer_types == (["sliding_attention"] * 5 + ["full_attention"]) * 5
    assert (text.per_layer_config[5].head_dim, text.per_layer_config[5].num_key_value_heads) == (512, 2)
    assert (text.per_layer_config[0].head_dim, text.per_layer_config[0].num_key_value_heads) == (256, 8)
    assert (whisper_small().num_mel_bins, whisper_large_v3().num_mel_bins) == (80, 128)


# -- backbones -----------------------------------------------------------------------------------------------


def test_a_sharded_backbone_loads_with_every_weight_in_place(backbone_folder: Path) -> None:
    backbone = backbone_of(backbone_folder)
    state = backbone.model.state_dict()
    index = json.loads((backbone_folder / "model.safetensors.index.json").read_text())["weight_map"]
    for name, shard in index.items():
        assert torch.equal(state[name], load_file(backbone_folder / shard)[name]), name
    tied = state["model.encoder.language_model.layers.0.self_attn.q_proj.weight"]
    assert tied.data_ptr() == state["model.decoder.layers.0.self_attn.q_proj.weight"].data_ptr()
    assert (backbone.hidden_size, backbone.vocab_size, backbone.softcap) == (32, 420, 30.0)
    assert not backbone.training and not any(p.requires_grad for p in backbone.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(backbone_folder: Path, whisper_folder: Path, dtype: torch.dtype) -> None:
    assert {p.dtype for p in backbone_of(backbone_folder, dtype=dtype).parameters()} == {dtype}
    assert {p.dtype for p in encoder_of(whisper_folder, dtype=dtype).parameters()} == {dtype}


@pytest.mark.skipif(not int8_available(), reason="8-bit products are for x86 processors")
def test_encoder_and_projector_in_8_bits(
    whisper_folder: Path, backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_checkpoint(tiny_model(whisper_folder, backbone_folder), tmp_path / "model")
    monkeypatch.setattr(load, "fast_bfloat16", lambda: False)
    asked, auto, plain = (load.load_checkpoint(folder, device="cpu", dtype=dtype) for dtype in ("int8", "auto", "float32"))

    def count(part: torch.nn.Module) -> int:
        return sum(isinstance(module, Int8Linear) for module in part.modules())

    assert count(asked.encoder) == count(auto.encoder) > 0
    assert not any(map(count, (asked.backbone, plain.encoder)))
    assert count(load.load_checkpoint("mini", device="cpu", dtype="int8").projector) > 0  # the tiny one has a single layer
    exact, rounded = (m.encode([SECOND]).slots for m in (plain, asked))
    assert not torch.equal(exact, rounded)
    assert (exact - rounded).norm() < 0.1 * exact.norm()


def test_8_bits_are_refused_where_they_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AsrError, match="dtype int8 is for x86 processors; give auto or one of float32"):
        load.hears_in_int8("int8", torch.device("cuda"))
    assert not load.hears_in_int8("auto", torch.device("cuda"))
    monkeypatch.setattr(load, "int8_available", lambda: False)
    with pytest.raises(AsrError, match="dtype int8 is for x86 processors"):
        load.hears_in_int8("int8", torch.device("cpu"))
    assert not load.hears_in_int8("auto", torch.device("cpu"))


@pytest.mark.parametrize("fast", [True, False])
def test_auto_has_encoder_and_projector_in_bfloat16_where_the_processor_is_fast_at_it(
    whisper_folder: Path, backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    folder = save_checkpoint(tiny_model(whisper_folder, backbone_folder), tmp_path / "model")
    monkeypatch.setattr(load, "fast_bfloat16", lambda: fast)
    model = load.load_checkpoint(folder, device="cpu", dtype="auto")
    wide = torch.bfloat16 if fast else torch.float32
    assert {p.dtype for p in model.encoder.parameters()} == {wide}
    assert {p.dtype for p in model.projector.parameters() if p.dim() > 0} == {wide}
    assert {p.dtype for p in model.backbone.parameters()} == {torch.float32}
    assert {p.dtype for p in load.load_checkpoint(folder, device="cpu").parameters()} == {torch.float32}
    (text,) = [one.text for one in decode_clips(model, [SECOND], DecodeOptions(language="en", steps=2))]
    assert isinstance(text, str)


@pytest.mark.parametrize(
    "told, fast", [({"avx512_bf16": True}, True), ({"amx_bf16": True, "avx512_bf16": False}, True), ({"avx2": True}, False)]
)
def test_which_processors_are_fast_at_bfloat16(monkeypatch: pytest.MonkeyPatch, told: dict[str, bool], fast: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told, raising=False)
    assert load.fast_bfloat16() is fast


def test_a_torch_that_tells_nothing_of_the_processor_is_taken_to_be_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert load.fast_bfloat16() is False


def drop_weights(part: str) -> Callable[[Path], None]:
    def drop(folder: Path) -> None:
        for shard in folder.glob("*.safetensors"):
            weights = load_file(shard)
            kept = {key: value for key, value in weights.items() if part not in key}
            save_file(kept, shard, metadata={"format": "pt"})

    return drop


def truncate(folder: Path) -> None:
    shard = max(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:1000])


def lose(pattern: str) -> Callable[[Path], None]:
    return lambda folder: max(folder.glob(pattern)).unlink()


DAMAGE: list[tuple[str, Callable[[Path], None], str]] = [
    (
        "missing weights",
        drop_weights("layers.1.self_attn.q_proj"),
        "is incomplete: . weights are missing, first model",
    ),
    ("half a shard", truncate, "cannot load the (backbone|encoder)"),
    ("lost shard", lose("*.safetensors"), r"cannot load the (backbone|encoder) .*model.*safetensors"),
    ("no config", lose("config.json"), r"no config\.json; give a folder in the layout"),
    ("no folder", shutil.rmtree, "no such folder; check the name"),
]


@pytest.mark.parametrize(("damage", "message"), [row[1:] for row in DAMAGE], ids=[row[0] for row in DAMAGE])
def test_a_damaged_backbone_is_refused_in_one_line(
    tmp_path: Path, backbone_folder: Path, damage: Callable[[Path], None], message: str
) -> None:
    folder = Path(shutil.copytree(backbone_folder, tmp_path / "backbone"))
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        backbone_of(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["backbone", "encoder"])
def test_packed_weights_load_but_for_rounding(tmp_path: Path, part: str) -> None:
    """Wide enough that some matrices are packed."""
    whole, packed = tmp_path / "whole", tmp_path / "packed"
    load: Callable[[Path], Backbone | AcousticEncoder]
    if part == "backbone":
        load = backbone_of
        tiny.write_backbone(tmp_path / "shards", hidden_size=64, layers=3)
        DiffusionGemmaForBlockDiffusion.from_pretrained(tmp_path / "shards").save_pretrained(whole)  # in one file
    else:
        load = encoder_of
        tiny.write_whisper(whole, width=128)
    shutil.copytree(whole, packed)
    pack_file(packed / "model.safetensors")
    pack_file(packed / "model.safetensors")  # once more changes nothing
    assert is_packed(packed / "model.safetensors") and not is_packed(whole / "model.safetensors")
    names = {name.removesuffix(SCALES) for name in load_file(packed / "model.safetensors") if name.endswith(SCALES)}
    assert names and all(load_file(whole / "model.safetensors")[name].numel() >= LEAST for name in names)
    exact, rounded = load(whole), load(packed)
    differ = 0
    for (name, a), b in zip(exact.state_dict().items(), rounded.state_dict().values(), strict=True):
        assert a.dtype == b.dtype and (a - b).abs().max() <= a.abs().max() / 200, name
        differ += not torch.equal(a, b)
    assert differ >= len(names) / 2
    if part == "backbone":
        assert rounded.model.generation_config.to_dict() == exact.model.generation_config.to_dict()


def test_a_whisper_is_no_backbone(whisper_folder: Path) -> None:
    with pytest.raises(CheckpointError, match="backbone"):
        backbone_of(whisper_folder)


# -- encoders ------------------------------------------------------------------------------------------------


def test_an_encoder_loads_from_a_whole_whisper_and_from_one_without_decoder(tmp_path: Path) -> None:
    whole = tiny.write_whisper(tmp_path / "whole")
    bare = tiny.write_whisper(tmp_path / "bare", encoder_only=True)
    assert any(key.startswith("model.decoder.") for key in load_file(whole / "model.safetensors"))
    assert all(key.startswith("model.encoder.") for key in load_file(bare / "model.safetensors"))
    encoder = encoder_of(whole)
    theirs = WhisperForConditionalGeneration.from_pretrained(whole).model.encoder.state_dict()
    ours = encoder.encoder.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert torch.equal(frames(encoder), frames(encoder_of(bare)))


def test_an_encoder_loads_from_what_other_whisper_classes_save(tmp_path: Path, whisper_folder: Path) -> None:
    """`WhisperModel.save_pretrained` writes `encoder.*`, the encoder's own writes bare names."""
    expected = frames(encoder_of(whisper_folder))
    whisper = WhisperModel.from_pretrained(whisper_folder)
    for name, model in {"model": whisper, "encoder": whisper.encoder}.items():
        model.save_pretrained(tmp_path / name)
        shutil.copy(whisper_folder / "preprocessor_config.json", tmp_path / name)
        assert torch.equal(frames(encoder_of(tmp_path / name)), expected)


def test_an_encoder_of_128_mel_bins(whisper_128_folder: Path) -> None:
    encoder = encoder_of(whisper_128_folder)
    mel, lengths = encoder.features([SECOND])
    assert mel.shape == (1, 128, 100) and lengths.tolist() == [100]
    assert frames(encoder).shape == (1, 50, 24)


def test_loading_an_encoder_says_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Without its decoder a Whisper is what we want: no table of missing weights."""
    encoder_of(tiny.write_whisper(tmp_path, encoder_only=True))
    heard = caplog.text + "".join(capfd.readouterr())
    assert "MISSING" not in heard and "UNEXPECTED" not in heard


@pytest.mark.parametrize(("damage", "message"), [row[1:] for row in DAMAGE], ids=[row[0] for row in DAMAGE])
def test_a_damaged_encoder_is_refused_in_one_line(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    folder = tiny.write_whisper(tmp_path / "whisper")
    damage(folder)
    with pytest.raises(CheckpointError, match=message.replace("first model", "first layers")) as caught:
        encoder_of(folder)
    assert "\n" not in str(caught.value)


def test_an_encoder_without_its_feature_extractor(tmp_path: Path) -> None:
    folder = tiny.write_whisper(tmp_path / "whisper")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match="cannot read the features of"):
        encoder_of(folder)


# -- hub names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [backbone_of, encoder_of, read_config])
def test_a_hub_name_that_cannot_be_fetched(load: Callable[..., object]) -> None:
    with pytest.raises(CheckpointError, match="nobody/nothing") as caught:
        load("nobody/nothing", local_files_only=True)
    assert "\n" not in str(caught.value)


def test_a_hub_name_in_the_cache_is_loaded(tmp_path: Path, whisper_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of huggingface_hub, laid out by hand: models--OWNER--NAME/{refs,snapshots}."""
    repository = tmp_path / "models--openai--whisper-small"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(whisper_folder, repository / "snapshots" / ("0" * 40))
    for module in (
        "huggingface_hub.constants.HF_HUB_CACHE",
        "huggingface_hub.file_download.constants.HF_HUB_CACHE",
    ):
        monkeypatch.setattr(module, str(tmp_path))
    encoder = encoder_of("openai/whisper-small", local_files_only=True)
    assert encoder.hidden_size == 16
