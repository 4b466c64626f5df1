"""Adapters of other programs: read by shape from every container, equal in what they compute, or refused in one line."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny_model import clips
from torch import Tensor

import diffusion_gemma_asr
from diffusion_gemma_asr.app.cli import main
from diffusion_gemma_asr.checkpoint.config_file import read_config_file
from diffusion_gemma_asr.checkpoint.load import load_checkpoint
from diffusion_gemma_asr.model.config import LoraConfig, ModelConfig, ProjectorConfig
from diffusion_gemma_asr.model.ctc import DraftToken
from diffusion_gemma_asr.model.drafts import GreedyCtc
from diffusion_gemma_asr.model.model import DiffusionGemmaASR

PUBLISHED = ProjectorConfig(24, scaled=False)
ENCODER, DECODER = "model.encoder.language_model.", "model.decoder."


def foreign_model(
    whisper: Path, backbone: Path, projector: ProjectorConfig = PUBLISHED, shared: bool = False
) -> DiffusionGemmaASR:
    """What the foreign adapter was trained as: frames padded to 30 s, output as the linear layer gives it."""
    config: ModelConfig = tiny.model_config(whisper, backbone, projector=projector, lora=LoraConfig(4, 8, shared=shared))
    return tiny.build_model(replace(config, encoder=replace(config.encoder, silence_s=30.0)))


def foreign_names(
    model: DiffusionGemmaASR, prefix: str = "base_model.model."
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Projector and LoRA as another program might name them."""
    own = model.projector.state_dict()
    projector = {}
    for number in range(len(model.projector.strides)):
        projector[f"audio.convs.{2 * number}.weight"] = own[f"conv{number + 1}.weight"]
        projector[f"audio.convs.{2 * number}.bias"] = own[f"conv{number + 1}.bias"]
    projector |= {"audio.out.weight": own["linear.weight"], "audio.out.bias": own["linear.bias"]}
    stack = "" if model.config.lora.shared else ENCODER
    lora = {prefix + name.replace(ENCODER, stack): value for name, value in model.backbone.lora_state_dict().items()}
    return {k: v.clone() for k, v in projector.items()}, {k: v.clone() for k, v in lora.items()}


def write_safetensors(folder: Path, model: DiffusionGemmaASR) -> list[str]:
    projector, lora = foreign_names(model)
    save_file(projector | lora, folder / "adapter.safetensors")
    return [str(folder / "adapter.safetensors"), "--lora_alpha", "8"]


def write_pt(folder: Path, model: DiffusionGemmaASR) -> list[str]:
    projector, lora = foreign_names(model, "module.base.")
    named = {name.replace(".weight", ".default.weight"): value for name, value in lora.items()}
    content = {"projector": projector, "lora": named, "step": 7, "optimizer": {"state": [torch.zeros(3, 3, 3)]}}
    torch.save(content | {"config": {"lora_alpha": 8}}, folder / "adapter.pt")
    return [str(folder / "adapter.pt")]


def write_peft(folder: Path, model: DiffusionGemmaASR) -> list[str]:
    projector, lora = foreign_names(model)
    save_file(lora, folder / "adapter_model.safetensors")
    save_file(projector, folder / "projector.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": model.config.backbone.name}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    (folder / "training_args.bin").write_bytes(pickle.dumps(Path("x")))
    return [str(folder)]


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of `import`."""
    with pytest.raises(SystemExit) as left:
        main(["import", *arguments])
    out = capsys.readouterr()
    return int(left.value.code or 0), out.out, out.err


@torch.no_grad()
def logits(model: DiffusionGemmaASR) -> Tensor:
    """Of a canvas, behind a prompt with sound."""
    encoded = model.encode(clips([30_000]))
    prefill, _ = model.read_prompts(encoded.slots, encoded.slot_lengths, ["en"])
    return model.backbone.denoise_logits(torch.arange(12)[None], prefill)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("write", [write_safetensors, write_pt, write_peft])
def test_an_adapter_of_any_layout_computes_what_it_did(
    write: Any, shared: bool, whisper_folder: Path, backbone_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = foreign_model(whisper_folder, backbone_folder, shared=shared)
    (tmp_path / "theirs").mkdir()
    arguments = write(tmp_path / "theirs", model)
    parts = ["--encoder", str(whisper_folder), "--backbone", str(backbone_folder), "--languages", "en,de"]
    status, out, err = run([*arguments, *parts, "--out", str(tmp_path / "ours")], capsys)
    assert (status, out.strip()) == (0, str(tmp_path / "ours")), err
    assert "assumed: strides 4,2; --strides says otherwise" in err and "alpha is" not in err
    assert "greedy CTC hears" in err and "its drafts are not used" in err  # random weights hear nothing
    loaded = load_checkpoint(tmp_path / "ours", device="cpu", merge_lora=False)
    config = loaded.config
    assert config.encoder.silence_s == 30 and not config.ctc and config.languages == ("en", "de")
    assert config.projector == PUBLISHED and config.lora == LoraConfig(4, 8, shared=shared)
    torch.testing.assert_close(logits(loaded), logits(model), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("kernels", "strides", "given"),
    [((16,), (8,), []), ((3, 3, 3), (2, 2, 2), []), ((7, 5), (2, 2), ["--strides", "2,2"])],
)
def test_other_convolutions(
    kernels: tuple[int, ...],
    strides: tuple[int, ...],
    given: list[str],
    whisper_folder: Path,
    backbone_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shape = ProjectorConfig(24, strides, scaled=False, kernels=kernels)
    model = foreign_model(whisper_folder, backbone_folder, shape)
    parts = ["--encoder", str(whisper_folder), "--backbone", str(backbone_folder), *given]
    status, _, err = run([*write_safetensors(tmp_path, model), *parts, "--out", str(tmp_path / "ours")], capsys)
    assert status == 0, err
    loaded = load_checkpoint(tmp_path / "ours", device="cpu", merge_lora=False)
    assert loaded.config.projector == shape
    torch.testing.assert_close(logits(loaded), logits(model), atol=0, rtol=0)


def test_lora_on_some_modules_leaves_the_others_as_they_are(
    whisper_folder: Path, backbone_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = foreign_model(whisper_folder, backbone_folder)
    projector, lora = foreign_names(model)
    kept = {name: value for name, value in lora.items() if DECODER in name and ("q_proj" in name or "v_proj" in name)}
    save_file(projector | kept, tmp_path / "a.safetensors")
    parts = ["--encoder", str(whisper_folder), "--backbone", str(backbone_folder), "--lora_alpha", "8"]
    status, _, err = run([str(tmp_path / "a.safetensors"), *parts, "--out", str(tmp_path / "ours")], capsys)
    assert status == 0 and "34 of 44 attention matrices have no LoRA and stay as they are" in err
    for name, matrix in model.backbone.model.named_parameters():
        if "lora_B" in name and not any(name.replace(".default", "") in other for other in kept):
            matrix.data.zero_()
    loaded = load_checkpoint(tmp_path / "ours", device="cpu", merge_lora=False)
    torch.testing.assert_close(logits(loaded), logits(model), atol=0, rtol=0)


def test_what_a_lone_number_means_is_asked_for(
    whisper_folder: Path, backbone_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = foreign_model(whisper_folder, backbone_folder)
    projector, lora = foreign_names(model)
    save_file(projector | lora | {"audio.scale": torch.tensor([3.0])}, tmp_path / "a.safetensors")
    parts = ["--encoder", str(whisper_folder), "--backbone", str(backbone_folder), "--lora_alpha", "8"]
    command = [str(tmp_path / "a.safetensors"), *parts, "--out", str(tmp_path / "ours")]
    status, _, err = run(command, capsys)
    assert (status, err.count("\n")) == (1, 1) and "what is the number audio.scale for? Give --scale factor or" in err
    with torch.no_grad():
        plain = model.encode(clips([9000])).slots
        for meaning in ("factor", "rms"):
            assert run([*command, "--scale", meaning], capsys)[0] == 0
            loaded = load_checkpoint(tmp_path / "ours", device="cpu")
            assert loaded.config.projector.scaled == (meaning == "rms")
            slots = loaded.encode(clips([9000])).slots
            expected = 3 * (plain if meaning == "factor" else torch.nn.functional.rms_norm(plain, plain.shape[-1:]))
            torch.testing.assert_close(slots, expected, atol=1e-5, rtol=1e-5)


def test_an_adapter_that_hears_is_known_by_its_drafts(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    whisper_folder: Path,
    backbone_folder: Path,
) -> None:
    """A head that spells the example out of any audio tokens, and one that spells something else."""
    model = foreign_model(whisper_folder, backbone_folder)
    command = [*write_safetensors(tmp_path, model), "--encoder", str(whisper_folder), "--backbone", str(backbone_folder)]
    command += ["--languages", "en", "--out", str(tmp_path / "ours")]
    for said, heard in (("Follow the river until you reach the mill", True), ("Something else", False)):
        tokens = [DraftToken(token, i, i + 1, 1.0) for i, token in enumerate(model.tokenizer(said)["input_ids"])]
        monkeypatch.setattr(GreedyCtc, "drafts", lambda self, encoded, tokens=tokens: [tokens])
        status, _, err = run(command, capsys)
        assert status == 0 and f'greedy CTC hears "{said}" for "Follow the river until you reach the mill."' in err, err
        assert ("not used" in err) != heard and read_config_file(tmp_path / "ours").ctc == heard


def test_where_the_frozen_parts_are_not_here_a_line_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Shapes of the published parts, which nobody has to name; one layer has LoRA."""
    convolutions = {"c.0.weight": torch.zeros(1280, 768, 7), "c.1.weight": torch.zeros(1280, 1280, 5)}
    layer = "base_model.model.model.decoder.layers.0.self_attn.q_proj"
    lora = {f"{layer}.lora_A.weight": torch.ones(16, 2816), f"{layer}.lora_B.weight": torch.ones(16 * 256, 16)}
    save_file(convolutions | {"out.weight": torch.zeros(2816, 1280)} | lora, tmp_path / "small.safetensors")
    status, _, err = run([str(tmp_path / "small.safetensors"), "--out", str(tmp_path / "ours")], capsys)
    assert status == 0, err
    assert "assumed: the encoder is openai/whisper-small, which has frames 768 wide; --encoder says otherwise" in err
    assert "assumed: the backbone is google/diffusiongemma-26B-A4B-it" in err and "229 of 230 attention" in err
    assert "not checked by ear, so its drafts are not used" in err
    config = read_config_file(tmp_path / "ours")
    assert (config.name, config.dtype, config.lora.rank, config.lora.alpha) == ("small", "bfloat16", 16, 32)
    assert sum(t.numel() for n, t in load_file(tmp_path / "ours/adapter.safetensors").items() if "lora." in n) == 22_978_560


def test_inspecting_prints_names_and_shapes_and_writes_nothing(
    whisper_folder: Path, backbone_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_peft(tmp_path, foreign_model(whisper_folder, backbone_folder))
    before = sorted(tmp_path.rglob("*"))
    status, out, err = run([str(tmp_path), "--inspect"], capsys)
    assert (status, err) == (0, "")
    assert "audio.convs.0.weight  (24, 16, 7)  float32\n" in out and "lora_alpha = 8\n" in out
    assert sorted(tmp_path.rglob("*")) == before
    assert run([str(tmp_path)], capsys)[0] == 2  # where to?


def test_what_cannot_be_used_is_refused_in_one_line(
    whisper_folder: Path, backbone_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = foreign_model(whisper_folder, backbone_folder)
    projector, lora = foreign_names(model)
    first_a = next(name for name in lora if "lora_A" in name)
    both = projector | lora
    files: dict[str, tuple[dict[str, Tensor], str]] = {
        "no lora": (projector, "no LoRA matrices in it"),
        "no projector": (lora, "no convolutions in it"),
        "norm": (both | {"audio.norm.weight": torch.ones(24)}, r"audio.norm.weight (24,) has no place in a projector"),
        "two matrices": (both | {"audio.more.weight": torch.ones(24, 24)}, "2 matrices beside the LoRA"),
        "chain": (both | {"audio.convs.2.weight": torch.ones(24, 9, 5)}, "do not follow each other"),
        "linear": (both | {"audio.out.weight": torch.ones(32, 20)}, "does not take the 24 channels"),
        "bias": (both | {"audio.out.bias": torch.ones(3)}, "the bias of audio.out.weight is (3,), not (32,)"),
        "even": (both | {"audio.convs.0.weight": torch.ones(24, 16, 8), "audio.convs.2.weight": torch.ones(24, 24, 4)},
                 "make 189 audio tokens of 30 s, not 188"),
        "four": (both | {f"audio.convs.{n}.weight": torch.ones(24, 24, 3) for n in (4, 6)}, "4 convolutions; give as many"),
        "width": (both | {"audio.convs.0.weight": torch.ones(24, 20, 7)}, "is no Whisper 20 wide"),
        "rank": (both | {first_a: torch.ones(5, 32)}, "LoRA of several ranks (4, 5)"),
        "shape": (both | {first_a: torch.ones(4, 31)}, "is (4, 31), but this backbone needs (4, 32)"),
        "alone": ({name: value for name, value in both.items() if name != first_a}, "only one of the two matrices"),
        "target": (both | {"model.decoder.layers.0.mlp.up_proj.lora_A.weight": torch.ones(4, 32)}, "has no place here"),
        "layer": (both | {first_a.replace("layers.0", "layers.9"): torch.ones(4, 32)}, "is no module of this backbone"),
        "dora": (both | {"model.decoder.layers.0.self_attn.q_proj.lora_magnitude_vector": torch.ones(4)}, "has no place"),
    }  # fmt: skip
    parts = ["--encoder", str(whisper_folder), "--backbone", str(backbone_folder), "--out", str(tmp_path / "ours")]
    for name, (tensors, message) in files.items():
        save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / f"{name}.safetensors")
        status, out, err = run([str(tmp_path / f"{name}.safetensors"), *parts], capsys)
        assert (status, out, err.count("\n")) == (1, "", 1) and message in err, (name, err)
    save_file(both, tmp_path / "a.safetensors")
    for given, message in (
        (["--scale", "rms"], "no number in it that --scale rms"),
        (["--languages", "xx"], "language 'xx'"),
    ):
        status, _, err = run([str(tmp_path / "a.safetensors"), *parts, *given], capsys)
        assert (status, err.count("\n")) == (1, 1) and message in err
    without_encoder = [str(tmp_path / "a.safetensors"), "--backbone", str(backbone_folder), "--out", str(tmp_path / "ours")]
    save_file(both, tmp_path / "a.safetensors")
    assert (
        "which encoder has frames 16 wide? Nothing in the files says it; give --encoder" in run(without_encoder, capsys)[2]
    )
    assert not (tmp_path / "ours").exists()


def test_damaged_and_pickled_files_are_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"a": torch.ones(9)}, tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:-9])
    torch.save({"a": torch.ones(999)}, tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:-99])
    (tmp_path / "text.pt").write_text("no weights")
    (tmp_path / "list.txt").write_text("examples/en.flac\n")
    torch.save({"a": torch.ones(2), "code": ModelConfig}, tmp_path / "classes.pt")
    torch.save({"a": torch.ones(2), "path": Path("x")}, tmp_path / "objects.pt")
    torch.save({"step": 3}, tmp_path / "empty.pt")
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text("{")
    save_file({"a": torch.ones(9)}, tmp_path / "peft" / "adapter_model.safetensors")
    (tmp_path / "twice").mkdir()
    for name in ("one", "two"):
        save_file({"a": torch.ones(9)}, tmp_path / "twice" / f"{name}.safetensors")
    (tmp_path / "none").mkdir()
    cases = {
        "cut.safetensors": "is damaged", "cut.pt": "is damaged, or no file of PyTorch", "text.pt": "is damaged",
        "list.txt": "is damaged",
        "classes.pt": "holds pickled classes", "objects.pt": "holds pickled classes", "empty.pt": "no tensors in it",
        "peft": "adapter_config.json cannot be read", "twice": "a is in one.safetensors and in two.safetensors",
        "none": "no weights in it", "missing.pt": "no such file",
    }  # fmt: skip
    for name, message in cases.items():
        status, out, err = run([str(tmp_path / name), "--out", str(tmp_path / "ours")], capsys)
        assert (status, out, err.count("\n")) == (1, "", 1) and message in err, (name, err)
    assert "cannot be fetched from the hub" in run(["owner/name", "--inspect"], capsys)[2]


def test_a_checkpoint_of_this_program_is_not_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["import", str(Path(diffusion_gemma_asr.__file__).parent / "presets" / "mini"), "--out", str(tmp_path / "out")])
    assert "checkpoint of this program" in capsys.readouterr().err and not (tmp_path / "out").exists()
