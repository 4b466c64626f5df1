"""train/text.py, whisper.py, distill.py and reading.py: the mini model's first stages, a few steps each, and what they
leave behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from sounds import tone, write
from transformers import AutoTokenizer, WhisperForConditionalGeneration

from diffusion_gemma_asr.backbone import Backbone
from diffusion_gemma_asr.checkpoint import read_projector, save_projector
from diffusion_gemma_asr.data.features import FeatureCache
from diffusion_gemma_asr.data.manifest import Utterance, read_manifest, write_manifest
from diffusion_gemma_asr.encoder import AcousticEncoder
from diffusion_gemma_asr.errors import CheckpointError, DataError
from diffusion_gemma_asr.projector import AudioProjector
from diffusion_gemma_asr.recipe import load_recipe
from diffusion_gemma_asr.train.backbone_config import small_config
from diffusion_gemma_asr.train.distill import train_student
from diffusion_gemma_asr.train.reading import train_reading
from diffusion_gemma_asr.train.text import new_backbone, train_text
from diffusion_gemma_asr.train.text import warm_start as text_warm_start
from diffusion_gemma_asr.train.tokenizer import train_tokenizer
from diffusion_gemma_asr.train.whisper import (
    HybridWhisper,
    PhonemeTimes,
    save_encoder,
    train_whisper,
    warm_start,
    whisper_config,
)

TEXTS = ["the quick fox", "lazy dog", "by the sea", "she sells shells", "it is fine"]
RECIPES = Path(__file__).parents[1] / "recipes" / "mini"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a tokenizer and a corpus of tones, whose phonemes are known for all but the last."""
    folder = tmp_path_factory.mktemp("mini")
    train_tokenizer({"en": TEXTS * 3}, 320, folder / "tokenizer")
    rows, times = [], []
    for i, text in enumerate(TEXTS):
        sound = write(folder / f"{i}.wav", tone(220 + 110 * i, 1.2))
        rows.append(Utterance(str(sound), text, "en", 1.2))
        times.append({"audio_filepath": f"{i}.wav", "phonemes": [["_", 0.0, 0.2], ["a", 0.2, 0.7], ["b", 0.7, 1.2]]})
    write_manifest(folder / "manifest.jsonl", rows)
    (folder / "phonemes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in times[:-1]))
    (folder / "en.txt").write_text("\n".join(TEXTS * 2))
    (folder / "zh.txt").write_text("你好\n他是日本人。\n我們\n", encoding="utf-8")
    return folder


def recipe_of(name: str, **changes: Any) -> dict[str, Any]:
    """A recipe of the repository with some sections changed: its keys are thus those that the code reads."""
    recipe = yaml.safe_load((RECIPES / name).read_text(encoding="utf-8"))
    recipe["loop"] |= {"steps": 3, "warmup_steps": 1, "save_every": 2, "evaluate_every": 3}
    for section, values in changes.items():
        recipe[section] = recipe[section] | values if isinstance(values, dict) else values
    return recipe


def read_log(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "log.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def backbone(run_folder: Path) -> Backbone:
    """What the first stage makes."""
    sizes = {"hidden": 32, "layers": 2, "heads": 4, "head_dim": 8, "intermediate": 32, "experts": 2, "top_k": 1,
             "expert_intermediate": 16}  # fmt: skip
    texts = [str(run_folder / name) for name in ("en.txt", "zh.txt", "manifest.jsonl")]
    dev = str(run_folder / "dev.jsonl")
    write_manifest(run_folder / "dev.jsonl", [Utterance(str(run_folder / "0.wav"), "the sea", "en", 1.2)])
    recipe = recipe_of(
        "1-backbone.yaml", model=sizes, data={"text": texts, "exclude": [dev], "dev": {"en": dev}}, self_conditioning=1.0,
        unroll_from=1, curriculum={"clean": 1, "until": 2}, batch_size=4, unnamed=0.5,
    )  # fmt: skip
    train_text(recipe, run_folder)
    return Backbone.from_pretrained(run_folder / "backbone")


def test_phonemes_lie_on_their_frames(run_folder: Path) -> None:
    times = PhonemeTimes([run_folder / "phonemes.jsonl"])
    assert times.symbols == ["_", "a", "b"]
    known, unknown = (Utterance(str(run_folder / f"{i}.wav"), "", "en", 1.2) for i in (0, 4))
    assert times.frames(known, 62).tolist() == [0] * 10 + [1] * 25 + [2] * 25 + [-100] * 2
    assert (times.frames(unknown, 5) == -100).all()


def test_the_first_stage_leaves_a_backbone_in_the_real_layout(run_folder: Path, backbone: Backbone) -> None:
    records = read_log(run_folder / "backbone-run")
    assert [record["step"] for record in records] == [1, 2, 3]
    assert all(record["diffusion"] > 0 and record["autoregressive"] > 0 for record in records)
    judged = {"errors_of_slots_en", "errors_8_steps_en", "errors_8_steps_from_slots_en"}
    assert judged <= records[-1]["evaluation"].keys()
    assert (backbone.hidden_size, backbone.vocab_size) == (32, 320)
    state = torch.load(run_folder / "backbone-run" / "state.pt", weights_only=True)["weights"]
    loaded = dict(backbone.named_parameters())
    name = next(name for name in state if name.endswith("layers.0.self_attn.q_proj.weight"))
    torch.testing.assert_close(loaded[name], state[name], atol=1e-3, rtol=1e-3)


def test_the_first_stage_goes_on_from_a_backbone_with_another_tokenizer(run_folder: Path, backbone: Backbone) -> None:
    """Tokens of the same spelling keep their rows, and everything but the rows is the old backbone's."""
    other = train_tokenizer({"en": ["the quick fox she sells"] * 3, "de": ["schöne füchse"] * 3}, 330, run_folder / "other")
    sizes = {"hidden": 32, "layers": 2, "heads": 4, "head_dim": 8, "intermediate": 32, "experts": 2, "top_k": 1,
             "expert_intermediate": 16}  # fmt: skip
    new = new_backbone(small_config(other, **sizes))
    vocabulary = AutoTokenizer.from_pretrained(run_folder / "tokenizer").get_vocab()
    shared = {token: i for token, i in other.get_vocab().items() if token in vocabulary}
    assert text_warm_start(new, other, run_folder / "backbone") == len(shared) < len(other)
    for token, i in shared.items():
        assert torch.equal(new.lm_head_weight[i], backbone.lm_head_weight[vocabulary[token]])
    old = dict(backbone.named_parameters())
    same = [name for name, p in new.named_parameters() if p.shape == old[name].shape and torch.equal(p, old[name])]
    assert len(same) == len(old) - 1


@pytest.fixture(scope="module")
def second_stage(run_folder: Path, backbone: Backbone) -> Path:
    """The run's folder with what the second stage adds to it."""
    manifest = str(run_folder / "manifest.jsonl")
    train = [{"manifest": manifest, "phonemes": str(run_folder / "phonemes.jsonl"), "weight": 1.0}]
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
             "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}  # fmt: skip
    data = {"train": train, "dev": {"tones": manifest}, "dev_count": 2}
    recipe = recipe_of(
        "2-encoder.yaml", model=sizes, projector_size=24, data=data, batch_frames=300, weights={"autoregressive": 0.3}
    )
    train_whisper(recipe, run_folder)
    return run_folder


def test_the_second_stage_leaves_an_encoder_a_projector_and_a_whisper(second_stage: Path, backbone: Backbone) -> None:
    run_folder = second_stage
    records = read_log(run_folder / "whisper-run")
    assert [record["step"] for record in records] == [1, 2, 3]
    for record in records:
        assert all(record[name] > 0 for name in ("autoregressive", "characters", "tokens", "phonemes"))
    assert {"character_cer_tones", "token_wer_tones", "decoder_wer_tones"} <= records[-1]["evaluation"].keys()
    state = torch.load(run_folder / "whisper-run" / "state.pt", weights_only=True)["weights"]

    encoder = AcousticEncoder.from_pretrained(run_folder / "encoder")
    saved = state["whisper.model.encoder.layers.0.fc1.weight"]
    torch.testing.assert_close(encoder.encoder.layers[0].fc1.weight, saved, atol=1e-3, rtol=1e-3)  # float16
    projector = AudioProjector(16, backbone.hidden_size, 24, scale=backbone.embedding_scale())
    adapter = load_file(run_folder / "projector" / "adapter.safetensors")
    projector.load_state_dict({name.removeprefix("projector."): value for name, value in adapter.items()})
    assert torch.equal(projector.conv1.weight.detach(), state["projector.conv1.weight"])
    whisper = WhisperForConditionalGeneration.from_pretrained(run_folder / "whisper")
    assert whisper.config.d_model == 16 and whisper.config.vocab_size == 320


def test_the_second_stage_goes_on_from_a_checkpoint_with_a_narrower_projector(run_folder: Path, backbone: Backbone) -> None:
    """It hears what the checkpoint hears, and its decoder, without a weight, is neither run nor saved."""
    tokenizer = AutoTokenizer.from_pretrained(run_folder / "tokenizer")
    config = whisper_config(
        tokenizer, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32,
    )  # fmt: skip
    before, after = (HybridWhisper(config, "\0ab", 3, backbone, size).eval() for size in (8, 24))
    folder = run_folder / "narrow"
    save_encoder(before.acoustic, folder / "encoder")
    save_projector(before.projector, folder)
    warm_start(after, folder)
    mel, lengths = after.acoustic.features([tone(300, 1.0), tone(500, 0.7)])
    with torch.no_grad():
        slots = [model.projector(*model.acoustic(mel, lengths))[0] for model in (before, after)]
    torch.testing.assert_close(slots[0], slots[1], atol=1e-3, rtol=1e-2)  # the encoder went through float16

    wider = HybridWhisper(config, "\0ab", 3, backbone, 4)
    with pytest.raises(CheckpointError, match="8 channels"):
        warm_start(wider, folder)


def test_without_a_weight_the_decoder_is_left_out(run_folder: Path, backbone: Backbone) -> None:
    folder = run_folder / "without-decoder"
    for part in ("tokenizer", "backbone"):
        shutil.copytree(run_folder / part, folder / part)
    manifest = str(run_folder / "manifest.jsonl")
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
             "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}  # fmt: skip
    data = {"train": [{"manifest": manifest, "weight": 1.0}], "dev": {"tones": manifest}, "dev_count": 2}
    train_whisper(
        recipe_of("2-encoder-continued.yaml", model=sizes, projector_size=8, data=data), folder
    )
    assert all("autoregressive" not in record for record in read_log(folder / "whisper-run"))
    assert (folder / "encoder").is_dir() and not (folder / "whisper").exists()


def test_an_encoder_learns_from_the_frames_of_another(run_folder: Path, backbone: Backbone) -> None:
    """First by the frames alone, then with the projector that reads the teacher, which is folded into one that reads it."""
    manifest = str(run_folder / "manifest.jsonl")
    rows = read_manifest(manifest)
    rng = np.random.default_rng(0)
    frames = run_folder / "teacher-frames"
    FeatureCache.build(frames, rows, 24, lambda some: [rng.normal(size=(60, 24)).astype(np.float32) for _ in some])
    wide = AudioProjector(24, backbone.hidden_size, 12, backbone.embedding_scale(), (2, 2))
    save_projector(wide, run_folder / "reads-teacher")
    sizes = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
    train = [{"manifest": manifest, "phonemes": str(run_folder / "phonemes.jsonl"), "weight": 1.0}]
    told = {"model": sizes, "data": {"train": train, "dev": {"tones": manifest}, "dev_count": 2}, "batch_frames": 300,
            "teacher_frames": str(frames)}  # fmt: skip
    first, second = run_folder / "distilled", run_folder / "hearing"
    train_student(recipe_of("../mini6/2-encoder.yaml", backbone=str(run_folder / "backbone"), **told), first)
    records = read_log(first / "student-run")
    assert [record["step"] for record in records] == [1, 2, 3]
    assert all(record["teacher"] > 0 and record["phonemes"] > 0 and "tokens" not in record for record in records)
    assert records[-1]["evaluation"]["teacher_tones"] > 0 and not (first / "projector").exists()

    recipe = recipe_of(
        "../mini6/3-encoder-ctc.yaml", backbone=str(run_folder / "backbone"), projector={"hidden_size": 12},
        projector_from=str(run_folder / "reads-teacher"), **told,
    )  # fmt: skip
    train_student(recipe, second, first)
    assert all(record["tokens"] > 0 for record in read_log(second / "student-run"))
    assert "token_wer_tones" in read_log(second / "student-run")[-1]["evaluation"]
    state = torch.load(second / "student-run" / "state.pt", weights_only=True)["weights"]
    own = AudioProjector(16, backbone.hidden_size, 12, backbone.embedding_scale(), (2, 2))
    wide.load_state_dict(
        {n.removeprefix("projector."): v for n, v in state.items() if n.startswith("projector.")} | {"scale": wide.scale}
    )
    own.load_state_dict(read_projector(second / "projector"))
    x, lengths = torch.randn(2, 31, 16), torch.tensor([31, 20])
    x[1, 20:] = 0
    with torch.no_grad():
        imitated = x @ state["teacher_head.weight"].T
        torch.testing.assert_close(own(x, lengths)[0], wide(imitated, lengths)[0], atol=1e-4, rtol=1e-4)

    third = run_folder / "continued"
    del told["teacher_frames"]
    told["model"] = sizes | {"encoder_layers": 2}
    recipe = recipe_of(
        "../mini6/4-encoder-continued.yaml", backbone=str(run_folder / "backbone"), projector={"hidden_size": 12},
        projector_from=str(second / "projector"), **told,
    )  # fmt: skip
    train_student(recipe, third, second)
    records = read_log(third / "student-run")
    assert all(record["tokens"] > 0 and record["phonemes"] > 0 and "teacher" not in record for record in records)
    old, new = (read_projector(folder / "projector")["conv1.weight"] for folder in (second, third))
    assert old.shape == new.shape and not torch.equal(old, new)
    assert AcousticEncoder.from_pretrained(third / "encoder").encoder.config.encoder_layers == 2


def test_a_teacher_must_have_heard_everything(run_folder: Path) -> None:
    rows = read_manifest(run_folder / "manifest.jsonl")
    with pytest.raises(DataError, match="no frames there"):
        FeatureCache.open(run_folder / "nowhere", rows)
    some = FeatureCache.build(run_folder / "some", rows[:2], 4, lambda batch: [np.zeros((5, 4), np.float32) for _ in batch])
    assert some.width == 4 and FeatureCache.open(run_folder / "some", rows[:2]).length(rows[0]) == 5
    with pytest.raises(DataError, match="lacks 3 utterances"):
        FeatureCache.open(run_folder / "some", rows)


def test_the_third_stage_teaches_the_backbone_to_read(second_stage: Path, backbone: Backbone) -> None:
    run_folder = second_stage
    manifest = run_folder / "manifest.jsonl"
    content = yaml.safe_load((RECIPES / "3-reading.yaml").read_text(encoding="utf-8"))
    content |= {"encoder": {"name": str(run_folder / "encoder")}, "backbone": {"name": str(run_folder / "backbone")}}
    content["projector"] |= {"hidden_size": 24}
    content["train"] |= {"steps": 3, "batch_size": 3, "warmup_steps": 1, "eval_every": 3, "save_every": 2,
                         "start_from": str(run_folder / "projector")}  # fmt: skip
    content["data"] |= {"train": [{"manifest": str(manifest)}], "dev": [str(manifest)], "cache_dir": None}
    path = run_folder / "reading.yaml"
    path.write_text(yaml.safe_dump(content))
    train_reading(load_recipe(path), run_folder / "reading")
    records = read_log(run_folder / "reading")
    assert [record["step"] for record in records] == [1, 2, 3]
    assert all(record[name] > 0 for record in records for name in ("diffusion", "autoregressive", "ctc"))

    taught = dict(Backbone.from_pretrained(run_folder / "reading" / "backbone").named_parameters())
    changed = {name for name, p in backbone.named_parameters() if not torch.equal(p, taught[name])}
    assert any("experts" in name for name in changed) and not any("vision" in name for name in changed)
    old, new = (load_file(run_folder / part / "adapter.safetensors") for part in ("projector", "reading/projector"))
    assert old.keys() == new.keys() and not torch.equal(old["projector.conv1.weight"], new["projector.conv1.weight"])
