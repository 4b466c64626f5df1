"""Exported folders: stock transformers reads them, and on audio tokens and a draft it gives the canvases of our loop."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny_model import clips
from torch import Tensor
from transformers import AutoTokenizer, DiffusionGemmaForBlockDiffusion
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.diffusion_gemma.generation_diffusion_gemma import EntropyBoundSamplerConfig

from diffusion_gemma_asr.app.cli import main
from diffusion_gemma_asr.checkpoint.export import export_checkpoint, load_audio_parts
from diffusion_gemma_asr.checkpoint.load import load_checkpoint
from diffusion_gemma_asr.checkpoint.save import save_checkpoint
from diffusion_gemma_asr.denoise.canvas import uniform_canvas
from diffusion_gemma_asr.denoise.steps import DenoiseOptions, denoise
from diffusion_gemma_asr.errors import CheckpointError
from diffusion_gemma_asr.model.config import LoraConfig
from diffusion_gemma_asr.model.model import DiffusionGemmaASR
from diffusion_gemma_asr.model.prompt import PromptBuilder

OPTIONS = DenoiseOptions(steps=4, entropy_bound=1.0)  # random weights are never as sure as the default bound expects


def checkpoint(whisper: Path, backbone: Path, folder: Path, shared: bool) -> Path:
    return save_checkpoint(
        tiny.build_model(tiny.model_config(whisper, backbone, lora=LoraConfig(4, 8, shared=shared))), folder
    )


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main(["export", *arguments])
    out = capsys.readouterr()
    return int(left.value.code or 0), out.out, out.err


@torch.no_grad()
def ours(model: DiffusionGemmaASR, canvas: Tensor) -> Tensor:
    """The last arg-max canvas of the plain loop."""
    encoded = model.encode(clips([30_000]))
    prefill, _ = model.read_prompts(encoded.slots, encoded.slot_lengths, ["en"])
    generator = torch.Generator().manual_seed(5)
    uniform_canvas(1, canvas.shape[1], tiny.VOCAB_SIZE, generator)  # generate() draws one, even where it is given another
    return denoise(model.backbone, prefill, canvas, OPTIONS, generator).canvas


@torch.no_grad()
def stock(folder: Path, canvas: Tensor) -> Tensor:
    """The same through transformers alone, but for the audio tokens and the prompt's ids."""
    model = DiffusionGemmaForBlockDiffusion.from_pretrained(folder).eval()
    _, encoder, projector = load_audio_parts(folder)
    slots, lengths = projector(*encoder(*encoder.features(clips([30_000]))))
    prompts = PromptBuilder(AutoTokenizer.from_pretrained(folder))
    model.config.image_token_id = prompts.special["audio"]  # the placeholder of what comes from outside
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        out = model.generate(
            input_ids=prompts.build(lengths.tolist(), ["en"]).ids,
            mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=slots[0])},
            decoder_input_ids=canvas,
            max_new_tokens=canvas.shape[1],
            max_denoising_steps=OPTIONS.steps,
            sampler_config=EntropyBoundSamplerConfig(OPTIONS.entropy_bound),
            t_min=OPTIONS.t_min,
            t_max=OPTIONS.t_max,
            stability_threshold=OPTIONS.stability_threshold,
            confidence_threshold=OPTIONS.confidence_threshold,
        )
    return out.sequences[:, -canvas.shape[1] :]


@pytest.mark.parametrize("shared", [True, False])
def test_stock_generate_gives_what_the_plain_loop_gives(
    shared: bool, whisper_folder: Path, backbone_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoint(whisper_folder, backbone_folder, tmp_path / "checkpoint", shared)
    out = tmp_path / "exported"
    arguments = [str(source), "--out", str(out), *([] if shared else ["--untied"])]
    assert run(arguments, capsys)[:2] == (0, f"{out}\n")
    draft = uniform_canvas(1, tiny.CANVAS_LENGTH, tiny.VOCAB_SIZE, torch.Generator().manual_seed(1))
    model = load_checkpoint(source, device="cpu")
    expected = ours(model, draft)
    assert torch.equal(stock(out, draft), expected)
    assert not torch.equal(ours(model, draft.flip(1)), expected)  # the draft matters
    plain = load_checkpoint(source, device="cpu", merge_lora=False)
    for name, matrix in plain.backbone.model.named_parameters():
        if "lora_B" in name:
            matrix.data.zero_()
    assert not torch.equal(ours(plain, draft), expected)  # so does LoRA


def test_the_layout_is_the_backbones_own(
    whisper_folder: Path, backbone_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def names(folder: Path) -> dict[str, tuple[int, ...]]:
        return {n: tuple(t.shape) for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}

    source = checkpoint(whisper_folder, backbone_folder, tmp_path / "checkpoint", True)
    out = export_checkpoint(load_checkpoint(source, device="cpu"), tmp_path / "exported")
    assert names(out) == names(backbone_folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (backbone_folder / name).read_bytes()
    theirs, own = (json.loads((folder / "config.json").read_text()) for folder in (backbone_folder, out))
    assert own == theirs
    half = export_checkpoint(load_checkpoint(source, device="cpu", dtype="bfloat16"), tmp_path / "half")
    assert json.loads((half / "config.json").read_text())["dtype"] == "bfloat16"
    assert {str(t.dtype) for path in half.glob("*.safetensors") for t in load_file(path).values()} == {"torch.bfloat16"}


def test_what_cannot_be_exported_is_refused_in_one_line_and_leaves_nothing(
    whisper_folder: Path, backbone_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoint(whisper_folder, backbone_folder, tmp_path / "checkpoint", False)
    status, out, err = run([str(source), "--out", str(tmp_path / "exported")], capsys)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "tiny has LoRA of its own in each stack: merged, encoder and decoder are no longer one set of weights" in err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    model = load_checkpoint(source, device="cpu")
    with pytest.raises(CheckpointError, match=r"full exists; give --out another name"):
        export_checkpoint(model, tmp_path / "full", untied=True)
    plain = model.config
    model.config = replace(plain, canvas="aligned")
    with pytest.raises(CheckpointError, match="tiny writes on aligned canvases"):
        export_checkpoint(model, tmp_path / "exported", untied=True)
    model.config = replace(plain, backbone=replace(plain.backbone, name="owner/nowhere"))
    with pytest.raises(CheckpointError, match="cannot write"):
        export_checkpoint(model, tmp_path / "exported", untied=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "full"]


def test_damaged_audio_parts_are_named(whisper_folder: Path, backbone_folder: Path, tmp_path: Path) -> None:
    source = checkpoint(whisper_folder, backbone_folder, tmp_path / "checkpoint", True)
    out = export_checkpoint(load_checkpoint(source, device="cpu"), tmp_path / "exported")
    (out / "audio" / "projector.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match=r"projector\.safetensors is damaged"):
        load_audio_parts(out)
