"""train/mini/: each stage of the small models' ladder, a few steps of it, and what it leaves behind."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from sounds import tone, write
from torch import nn

import diffusion_gemma_asr
from diffusion_gemma_asr.checkpoint.load import read_projector
from diffusion_gemma_asr.checkpoint.parts import load_backbone, load_encoder, load_tokenizer
from diffusion_gemma_asr.checkpoint.save import save_projector
from diffusion_gemma_asr.data.features import FeatureCache
from diffusion_gemma_asr.data.manifest import Utterance, read_manifest, write_manifest
from diffusion_gemma_asr.errors import CheckpointError, DataError, RecipeError
from diffusion_gemma_asr.model.backbone import Backbone
from diffusion_gemma_asr.model.config import BackboneConfig, EncoderConfig, ProjectorConfig
from diffusion_gemma_asr.model.encoder import AcousticEncoder
from diffusion_gemma_asr.model.projector import AudioProjector
from diffusion_gemma_asr.train.loop import run
from diffusion_gemma_asr.train.mini.backbone_config import BackboneShape, small_config
from diffusion_gemma_asr.train.mini.phonemes import PhonemeTimes
from diffusion_gemma_asr.train.mini.sentences import joined
from diffusion_gemma_asr.train.mini.student import EncoderShape, Student, folded, go_on, save_encoder, whisper_config
from diffusion_gemma_asr.train.mini.text import BackboneRecipe, Curriculum, TextTrainer, new_backbone, warm_start
from diffusion_gemma_asr.train.mini.tokenizer import train_tokenizer
from diffusion_gemma_asr.train.recipe_files import load_recipe_as
from diffusion_gemma_asr.train.run import train_from_recipe

TEXTS = ["the quick fox", "lazy dog", "by the sea", "she sells shells", "it is fine"]
RECIPES = Path(__file__).parents[1] / "recipes"
SHAPE = {
    "hidden": 32, "layers": 2, "heads": 4, "head_dim": 8, "intermediate": 32, "experts": 2, "top_k": 1,
    "expert_intermediate": 16,
}  # fmt: skip
PROJECTOR = {"hidden_size": 12, "strides": [2, 2]}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer and tones, whose phonemes are known for all but the last."""
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
    write_manifest(folder / "dev.jsonl", [Utterance(str(folder / "0.wav"), "the sea", "en", 1.2)])
    return folder


def write_recipe(folder: Path, name: str, **changes: Any) -> Path:
    """A recipe of the repository with some sections changed, three steps long, in `folder`."""
    content = yaml.safe_load((RECIPES / name).read_text(encoding="utf-8"))
    content["train"] |= {"steps": 3, "warmup_steps": 1, "save_every": 2, "eval_every": 3, "accumulation": 1}
    for section, values in changes.items():
        content[section] = content[section] | values if isinstance(values, dict) and section in content else values
    path = folder / Path(name).name
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}), encoding="utf-8")
    return path


def read_log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def same(folder: Path, other: Path) -> bool:
    """Whether two runs ended in the same weights."""
    a, b = (torch.load(path / "state.pt", weights_only=True)["weights"] for path in (folder, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# -- backbone --------------------------------------------------------------------------------------------------


def backbone_recipe(corpus: Path, **changes: Any) -> Path:
    texts = {"text": ["en.txt", "zh.txt", "manifest.jsonl"], "exclude": ["dev.jsonl"], "dev": {"en": "dev.jsonl"}}
    sections: dict[str, Any] = {
        "tokenizer": "tokenizer",
        "shape": SHAPE,
        "data": texts,
        "losses": {"self_conditioning": 1.0},
    }
    sections["curriculum"] = {"clean": 1, "until": 2}
    train = {"batch_size": 4, "unnamed": 0.5, "unroll_from": 1}
    return write_recipe(corpus, "mini/1-backbone.yaml", train=train | changes, **sections)


@pytest.fixture(scope="module")
def text_run(corpus: Path) -> Path:
    folder = corpus / "text"
    assert train_from_recipe(backbone_recipe(corpus), folder, "cpu") == folder / "backbone"
    return folder


@pytest.fixture(scope="module")
def backbone(text_run: Path) -> Backbone:
    return load_backbone(BackboneConfig(str(text_run / "backbone")))


def test_a_backbone_is_left_in_the_real_layout(text_run: Path, backbone: Backbone) -> None:
    records = read_log(text_run)
    assert [record["step"] for record in records] == [1, 2, 3]
    assert all(record["diffusion"] > 0 and record["autoregressive"] > 0 for record in records)
    judged = {"errors_of_slots_en", "errors_8_steps_en", "errors_8_steps_from_slots_en"}
    assert judged <= records[-1]["evaluation"].keys()
    assert (backbone.hidden_size, backbone.vocab_size) == (32, 320)
    state = torch.load(text_run / "state.pt", weights_only=True)["weights"]
    loaded = dict(backbone.named_parameters())
    name = next(name for name in state if name.endswith("layers.0.self_attn.q_proj.weight"))
    torch.testing.assert_close(loaded[name], state[name], atol=1e-3, rtol=1e-3)


def test_a_stage_that_was_interrupted_ends_as_one_that_was_not(corpus: Path, text_run: Path) -> None:
    path = backbone_recipe(corpus)
    recipe = load_recipe_as(BackboneRecipe, path)
    trainer = TextTrainer(recipe, torch.device("cpu"))
    trained = {n: p for n, p in trainer.reader.backbone.named_parameters() if "vision" not in n}

    def interrupt(step: int) -> dict[str, float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # step 3 is lost
        run(trained, trainer.loss_of, corpus / "broken", recipe.train, interrupt, trainer.settings)
    assert torch.load(corpus / "broken" / "state.pt", weights_only=True)["step"] == 2
    train_from_recipe(path, corpus / "broken", "cpu")
    assert same(corpus / "broken", text_run)


def test_a_run_is_not_continued_by_another_recipe(corpus: Path, text_run: Path) -> None:
    with pytest.raises(CheckpointError, match=r"state\.pt was made with other settings \(.*train\.seed was 1, is 2\)"):
        train_from_recipe(backbone_recipe(corpus, seed=2), text_run, "cpu")


def test_a_backbone_goes_on_from_one_with_another_tokenizer(corpus: Path, text_run: Path, backbone: Backbone) -> None:
    """Tokens of the same spelling keep their rows, and everything but the rows is the old backbone's."""
    other = train_tokenizer({"en": ["the quick fox she sells"] * 3, "de": ["schöne füchse"] * 3}, 330, corpus / "other")
    new = new_backbone(small_config(other, BackboneShape(**SHAPE)))
    vocabulary = load_tokenizer(BackboneConfig(str(text_run / "backbone"))).get_vocab()
    shared = {token: i for token, i in other.get_vocab().items() if token in vocabulary}
    assert warm_start(new, other, text_run / "backbone") == len(shared) < len(other)
    for token, i in shared.items():
        assert torch.equal(new.lm_head_weight[i], backbone.lm_head_weight[vocabulary[token]])
    old = dict(backbone.named_parameters())
    kept = [name for name, p in new.named_parameters() if p.shape == old[name].shape and torch.equal(p, old[name])]
    assert len(kept) == len(old) - 1


def test_the_curriculum_grows_linearly() -> None:
    curriculum = Curriculum(clean=10, until=30)
    assert [curriculum.level(step) for step in (0, 10, 20, 30, 99)] == [0, 0, 0.5, 1, 1]
    with pytest.raises(RecipeError, match=r"curriculum\.clean"):
        Curriculum(clean=3, until=3)


def test_a_share_of_the_sentences_goes_on_with_those_that_follow() -> None:
    targets = [[10 + i] * (1 + i % 4) + [1] for i in range(300)]  # 1 ends each
    assert joined(targets, 0.0, 20, random.Random(0)) == targets
    rows = joined(targets, 0.5, 20, random.Random(0))
    longer = [i for i, row in enumerate(rows) if row != targets[i]]
    assert 0.3 < len(longer) / len(rows) < 0.6 and max(map(len, rows)) <= 20
    for i, row in enumerate(rows):
        assert row.count(1) == 1 and row[-1] == 1
        following = [token for target in targets[i : i + 20] for token in target[:-1]]
        assert row[:-1] == following[: len(row) - 1]


# -- encoder ---------------------------------------------------------------------------------------------------


def test_phonemes_lie_on_their_frames(corpus: Path) -> None:
    times = PhonemeTimes([corpus / "phonemes.jsonl"])
    assert times.symbols == ["_", "a", "b"]
    known, unknown = (Utterance(str(corpus / f"{i}.wav"), "", "en", 1.2) for i in (0, 4))
    assert times.frames(known, 62).tolist() == [0] * 10 + [1] * 25 + [2] * 25 + [-100] * 2
    assert (times.frames(unknown, 5) == -100).all()
    with pytest.raises(DataError, match="holds no times of phonemes"):
        PhonemeTimes([corpus / "en.txt"])


def encoder_recipe(corpus: Path, text_run: Path, **changes: Any) -> Path:
    sections: dict[str, Any] = {
        "shape": {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32},
        "backbone": str(text_run / "backbone"),
        "projector": PROJECTOR | {"layers": 0},
        "teacher_frames": "teacher-frames",
        "projector_from": "reads-teacher",
        "train": {"batch_frames": 300, "dtype": "float32"},
        "data": {
            "train": [{"manifest": "manifest.jsonl", "phonemes": "phonemes.jsonl"}],
            "dev": {"tones": "manifest.jsonl"},
            "dev_count": 2,
        },
    }
    return write_recipe(corpus, "mini/4-encoder.yaml", **sections | changes)


@pytest.fixture(scope="module")
def teacher(corpus: Path, backbone: Backbone) -> AudioProjector:
    """Frames of a teacher in `teacher-frames`, and the projector that reads them, also in `reads-teacher`."""
    rng = np.random.default_rng(0)
    rows = read_manifest(corpus / "manifest.jsonl")

    def compute(some: list[Utterance]) -> list[np.ndarray]:
        return [rng.normal(size=(60, 24)).astype(np.float32) for _ in some]

    FeatureCache.build(corpus / "teacher-frames", rows, 24, compute, "teacher")
    config = ProjectorConfig(hidden_size=12, strides=(2, 2))
    projector = AudioProjector(config, 24, backbone.hidden_size, backbone.embedding_scale())
    save_projector(projector, corpus / "reads-teacher")
    return projector


@pytest.fixture(scope="module")
def encoder_run(corpus: Path, text_run: Path, teacher: AudioProjector) -> Path:
    folder = corpus / "encoder"
    assert train_from_recipe(encoder_recipe(corpus, text_run), folder, "cpu") == folder / "encoder"
    return folder


def test_an_encoder_learns_from_frames_phonemes_and_ctc(
    encoder_run: Path, teacher: AudioProjector, backbone: Backbone
) -> None:
    """What reads its frames is the teacher's projector behind its map to the teacher's frames, folded into one."""
    records = read_log(encoder_run)
    assert [record["step"] for record in records] == [1, 2, 3]
    assert all(record[name] > 0 for record in records for name in ("teacher", "phonemes", "tokens"))
    assert {"teacher_tones", "error_rate_draft_tones"} <= records[-1]["evaluation"].keys()
    state = torch.load(encoder_run / "state.pt", weights_only=True)["weights"]
    encoder = load_encoder(EncoderConfig(str(encoder_run / "encoder")))
    assert encoder.hidden_size == 16 and encoder.encoder.config.encoder_layers == 1
    torch.testing.assert_close(  # float16
        encoder.encoder.layers[0].fc1.weight.detach(), state["acoustic.encoder.layers.0.fc1.weight"], atol=1e-3, rtol=1e-3
    )
    wide, narrow = (
        AudioProjector(ProjectorConfig(hidden_size=12, strides=(2, 2)), width, backbone.hidden_size, float(teacher.scale))
        for width in (24, 16)
    )
    trained = {n.removeprefix("projector."): v for n, v in state.items() if n.startswith("projector.")}
    wide.load_state_dict(trained | {"scale": teacher.scale})
    narrow.load_state_dict(read_projector(encoder_run / "projector"))
    x, lengths = torch.randn(2, 31, 16), torch.tensor([31, 20])
    x[1, 20:] = 0
    with torch.no_grad():
        imitated = x @ state["teacher_head.weight"].T
        torch.testing.assert_close(narrow(x, lengths)[0], wide(imitated, lengths)[0], atol=1e-4, rtol=1e-4)


def test_an_encoder_goes_on_deeper_and_without_its_teacher(corpus: Path, text_run: Path, encoder_run: Path) -> None:
    recipe = encoder_recipe(
        corpus, text_run, teacher_frames=None, projector_from="encoder/projector", start_from="encoder",
        shape={"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32},
        losses={"teacher": 0.0}, train={"batch_frames": 300, "dtype": "float32", "tempo": [0.9, 1.1]},
    )  # fmt: skip
    train_from_recipe(recipe, corpus / "continued", "cpu")
    records = read_log(corpus / "continued")
    assert all(record["tokens"] > 0 and record["phonemes"] > 0 and "teacher" not in record for record in records)
    old, new = (read_projector(folder / "projector")["conv1.weight"] for folder in (encoder_run, corpus / "continued"))
    assert old.shape == new.shape and not torch.equal(old, new)
    deeper = load_encoder(EncoderConfig(str(corpus / "continued" / "encoder")))
    assert deeper.encoder.config.encoder_layers == 2


def test_a_new_layer_begins_as_nothing(corpus: Path, encoder_run: Path) -> None:
    tokenizer = load_tokenizer(BackboneConfig(str(corpus / "text" / "backbone")))
    deeper = Student(AcousticEncoder.from_config(whisper_config(tokenizer, EncoderShape(16, 2, 2, 32))), 3).eval()
    go_on(deeper, encoder_run)
    before = load_encoder(EncoderConfig(str(encoder_run / "encoder")))
    mel, lengths = before.features([tone(300, 1.0)])
    with torch.no_grad():
        torch.testing.assert_close(deeper.acoustic(mel, lengths)[0], before(mel, lengths)[0], atol=1e-4, rtol=1e-4)


def test_a_linear_map_is_folded_into_a_projector() -> None:
    projector = AudioProjector(ProjectorConfig(hidden_size=8), 10, 6)
    head = nn.Linear(4, 10, bias=False)
    x, lengths = torch.randn(1, 20, 4), torch.tensor([20])
    with torch.no_grad():
        torch.testing.assert_close(
            folded(projector, head)(x, lengths)[0], projector(head(x), lengths)[0], atol=1e-5, rtol=1e-4
        )


def test_an_encoder_is_written_and_read_back(corpus: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(BackboneConfig(str(corpus / "text" / "backbone")))
    encoder = AcousticEncoder.from_config(whisper_config(tokenizer, EncoderShape(16, 2, 2, 32))).eval()
    save_encoder(encoder, tmp_path)
    mel, lengths = encoder.features([tone(300, 1.0), tone(500, 0.7)])
    with torch.no_grad():
        again = load_encoder(EncoderConfig(str(tmp_path)))(mel, lengths)[0]
        torch.testing.assert_close(again, encoder(mel, lengths)[0], atol=1e-2, rtol=1e-2)  # through float16


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"teacher_frames": None}, r"'losses\.teacher' must be set with teacher_frames alone"),
        ({"projector_from": None}, r"'losses\.tokens' must be set with projector_from alone"),
        ({"train": {"tempo": [0.9, 1.1]}}, r"'train\.tempo' must be left out with teacher_frames"),
        ({"train": {"batch_frame": 3}}, "unknown key 'batch_frame' in section 'train'; did you mean 'batch_frames'"),
        ({"train": {"lr": "3e-3x"}}, r"'train\.lr' must be a number"),
    ],
)
def test_a_stage_names_what_is_wrong_in_its_recipe(
    corpus: Path, text_run: Path, tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(RecipeError, match=expected):
        train_from_recipe(encoder_recipe(corpus, text_run, **changes), tmp_path / "run", "cpu")
    assert not (tmp_path / "run").exists()


def test_a_teacher_needs_frames_of_everything(corpus: Path, text_run: Path, tmp_path: Path) -> None:
    rows = read_manifest(corpus / "manifest.jsonl")
    FeatureCache.build(corpus / "some", rows[:2], 4, lambda batch: [np.zeros((5, 4), np.float32) for _ in batch], "teacher")
    for frames, expected in (("nowhere", "no frames there"), ("some", "lacks 3 utterances")):
        with pytest.raises(DataError, match=expected):
            train_from_recipe(encoder_recipe(corpus, text_run, teacher_frames=frames), tmp_path / "run", "cpu")


# -- reading, adapter, bundle ------------------------------------------------------------------------------------


def speech_recipe(corpus: Path, text_run: Path, name: str, model: dict[str, Any], **train: Any) -> Path:
    backbone = {"backbone": {"name": str(text_run / "backbone")}, "encoder": {"name": str(corpus / "encoder/encoder")}}
    content = yaml.safe_load((RECIPES / name).read_text(encoding="utf-8"))
    content["model"] |= backbone | {"projector": PROJECTOR, "lora": {"rank": 2}, "languages": ["en"]} | model
    given = {"steps": 3, "batch_size": 3, "warmup_steps": 1, "eval_every": 3, "save_every": 2, "accumulation": 1}
    content["train"] |= given | {"dtype": "float32"} | train
    content["data"] |= {"train": [{"manifest": "manifest.jsonl"}], "dev": ["manifest.jsonl"], "cache_dir": None}
    path = corpus / f"speech-{Path(name).name}"
    content = {key: value for key, value in content.items() if key not in ("frozen_projector", "unspoken")}
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def reading_run(corpus: Path, text_run: Path, encoder_run: Path) -> Path:
    recipe = speech_recipe(corpus, text_run, "mini/3-reading.yaml", {}, start_from=str(encoder_run / "projector"))
    assert train_from_recipe(recipe, corpus / "reading", "cpu") == corpus / "reading" / "backbone"
    return corpus / "reading"


def test_the_backbone_learns_to_read_with_the_projector(encoder_run: Path, reading_run: Path, backbone: Backbone) -> None:
    records = read_log(reading_run)
    assert [record["step"] for record in records] == [1, 2, 3]
    assert all(record[name] > 0 for record in records for name in ("diffusion", "autoregressive", "ctc"))
    taught = dict(load_backbone(BackboneConfig(str(reading_run / "backbone"))).named_parameters())
    changed = {name for name, p in backbone.named_parameters() if not torch.equal(p, taught[name])}
    assert any("experts" in name for name in changed) and not any("vision" in name for name in changed)
    old, new = (load_file(run / "projector" / "adapter.safetensors") for run in (encoder_run, reading_run))
    assert old.keys() == new.keys() and not torch.equal(old["projector.conv1.weight"], new["projector.conv1.weight"])


def test_the_ladder_ends_in_a_bundle_that_needs_nothing_else(corpus: Path, text_run: Path, reading_run: Path) -> None:
    backbone = {"backbone": {"name": str(reading_run / "backbone")}}
    recipe = speech_recipe(corpus, text_run, "mini.yaml", backbone, start_from=str(reading_run / "projector"))
    checkpoint = train_from_recipe(recipe, corpus / "adapter", "cpu")
    content = yaml.safe_load((RECIPES / "mini/5-bundle-mini.yaml").read_text(encoding="utf-8"))
    (corpus / "bundle.yaml").write_text(yaml.safe_dump(content | {"checkpoint": "adapter/checkpoint"}), encoding="utf-8")
    moved = train_from_recipe(corpus / "bundle.yaml", corpus / "bundle", "cpu").rename(corpus / "moved")
    config = json.loads((moved / "config.json").read_text(encoding="utf-8"))
    assert (config["encoder"]["name"], config["backbone"]["name"], config["start"]) == ("encoder", "backbone", "draft")
    assert "Real speech" in (moved / "README.md").read_text(encoding="utf-8")
    before, after = (diffusion_gemma_asr.load(folder, device="cpu").model for folder in (checkpoint, moved))
    sizes = [p.shape for model in (before, after) for p in model.parameters()]
    assert sizes[: len(sizes) // 2] == sizes[len(sizes) // 2 :]
    encoded = [model.encode([tone(440, 1.0)]).slots for model in (before, after)]
    torch.testing.assert_close(*encoded, atol=0.05, rtol=0.05)  # 8 bits a weight


def test_a_bundle_may_leave_the_encoder_to_a_hub(corpus: Path, text_run: Path, reading_run: Path) -> None:
    recipe = speech_recipe(corpus, text_run, "mini.yaml", {}, steps=1, monitor_samples=0, start_from=None)
    checkpoint = train_from_recipe(recipe, corpus / "short", "cpu")
    content = {"stage": "bundle", "name": "b", "checkpoint": str(checkpoint), "encoder": "someone/whisper"}
    content["card"] = {"training_data": "Tones.", "limits": "None."}
    (corpus / "hub.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    folder = train_from_recipe(corpus / "hub.yaml", corpus / "hub", "cpu")
    assert not (folder / "encoder").exists() and (folder / "backbone").is_dir()
    assert json.loads((folder / "config.json").read_text())["encoder"]["name"] == "someone/whisper"
    model = diffusion_gemma_asr.load(folder, encoder=corpus / "encoder" / "encoder", device="cpu").model
    assert model.projector.conv1.weight.dtype == torch.float32 and model.config.name == "mini"
