"""The stage `hearing`: a Whisper's decoder that reads audio tokens, carried over into a DiffusionGemma's layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from sounds import tone, write
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from whisper_stage import ENGLISH, WIDTH, small_whisper, tokenizer_stage, trained_whisper

from diffusion_gemma_asr.checkpoint.parts import load_backbone
from diffusion_gemma_asr.data.manifest import Utterance, write_manifest
from diffusion_gemma_asr.errors import CheckpointError, RecipeError
from diffusion_gemma_asr.model.config import BackboneConfig
from diffusion_gemma_asr.model.prompt import PromptBuilder
from diffusion_gemma_asr.train.adapter import build_model
from diffusion_gemma_asr.train.decoder_start import read_acoustic
from diffusion_gemma_asr.train.mini.acoustic_tokens import CONSTANT, AcousticTokens, HeardUtterance, with_constant
from diffusion_gemma_asr.train.mini.backbone_config import BackboneShape, small_config
from diffusion_gemma_asr.train.mini.carry_over import carry_over
from diffusion_gemma_asr.train.mini.join_audio import LOUD, join_audio
from diffusion_gemma_asr.train.mini.listener import Listener, load_listener, rows_of
from diffusion_gemma_asr.train.mini.text import new_backbone
from diffusion_gemma_asr.train.mini.text_layers import TextLayers, text_rows
from diffusion_gemma_asr.train.mini.whisper_tokens import read_rows
from diffusion_gemma_asr.train.recipe import load_recipe
from diffusion_gemma_asr.train.run import train_from_recipe

SHAPE = {
    "hidden": WIDTH,
    "layers": 2,
    "heads": 4,
    "kv_heads": 4,
    "head_dim": WIDTH // 2,
    "intermediate": 136,
    "turning": 0.25,
}
OTHERS = {"experts": 2, "top_k": 1, "expert_intermediate": 8}
LANGUAGES = ["en", "fr"]
STRIDE = 4


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_whisper(small_whisper(tmp_path_factory.mktemp("whisper")), tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def stage(whisper: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_stage(whisper, tmp_path_factory.mktemp("stage"))


@pytest.fixture(scope="module")
def tokenizer(stage: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(stage)


def new_layers(stage: Path, tokenizer: PreTrainedTokenizerBase, **shape: int) -> tuple[TextLayers, torch.Tensor]:
    torch.manual_seed(0)
    layers = TextLayers(new_backbone(small_config(tokenizer, BackboneShape(**SHAPE | shape, **OTHERS))))
    rows, turn = with_constant(read_rows(stage / "rows.safetensors", (len(tokenizer), WIDTH)))
    layers.backbone.lm_head_weight.data.copy_(rows)
    return layers.requires_grad_(False), turn


def new_listener(stage: Path, whisper: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[Listener, float]:
    rows = read_rows(stage / "rows.safetensors", (len(tokenizer), WIDTH))
    speeds = 10_000.0 ** (-torch.arange(4) / 16)
    listener, factor = load_listener(str(whisper), tokenizer, rows, LANGUAGES, STRIDE, speeds)
    torch.manual_seed(3)
    for layer in listener.layers:
        layer.self_attn.waves.data.normal_(std=0.3)
    return listener.requires_grad_(False), factor


def drawn(tokenizer: PreTrainedTokenizerBase, count: int, seed: int) -> list[HeardUtterance]:
    """Utterances of random ordinary tokens and random sound."""
    generator = torch.Generator().manual_seed(seed)
    ordinary = tokenizer.encode(" ".join(ENGLISH), add_special_tokens=False)
    chosen = torch.randint(len(ordinary), (count, 10), generator=generator).tolist()
    sounds = torch.randn(count, 14, WIDTH, generator=generator)
    sizes = torch.randint(8, 15, (count,), generator=generator).tolist()
    made = zip(sounds, sizes, chosen, strict=True)
    return [HeardUtterance(sound[:n], [ordinary[i] for i in row], k % 2) for k, (sound, n, row) in enumerate(made)]


def likeness(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """How alike both vary over tokens, as a cosine."""
    return float(torch.cosine_similarity((found - found.mean(0)).flatten(), (wanted - wanted.mean(0)).flatten(), dim=0))


def heard_by(layers: TextLayers, prompts: PromptBuilder, tokens_of: AcousticTokens, one: HeardUtterance) -> torch.Tensor:
    """(n + 1, H) what the layers write the utterance's tokens and its end from."""
    rows = text_rows(prompts, [len(one.tokens)], [LANGUAGES[one.language]], [[*one.text, 1]])
    return layers(rows, tokens_of.unit(one.tokens)[None], torch.tensor([len(one.tokens)]))[rows.spoken]


def read_by(layers: TextLayers, prompts: PromptBuilder, tokens_of: AcousticTokens, one: HeardUtterance) -> torch.Tensor:
    """The same by the backbone itself, all of whose layers audio tokens go through."""
    backbone = layers.backbone
    ids = torch.tensor([[*prompts.row(len(one.tokens), LANGUAGES[one.language]), *one.text]])
    embeds = backbone.embed(ids).clone()
    embeds[ids == prompts.special["audio"]] = LOUD * tokens_of.unit(one.tokens)
    return backbone.prefill(embeds, torch.ones_like(ids, dtype=torch.bool))[1][0, -len(one.text) - 1 :]


def test_the_layers_write_what_the_decoder_writes(stage: Path, whisper: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """First over text alone, then with audio tokens in the prompt; on utterances that nothing was fitted to."""
    layers, turn = new_layers(stage, tokenizer)
    assert (layers.backbone.lm_head_weight[:, -1] == CONSTANT).all()
    listener, factor = new_listener(stage, whisper, tokenizer)
    prompts, fitted, others = PromptBuilder(tokenizer), drawn(tokenizer, 200, 1), drawn(tokenizer, 12, 2)
    tokens_of = AcousticTokens.of(fitted, turn)

    def wanted(one: HeardUtterance) -> torch.Tensor:
        states = listener(
            one.tokens[None], torch.tensor([len(one.tokens)]), torch.tensor([one.text]), torch.tensor([one.language])
        )
        return states[0] @ turn

    def found(by: Any) -> torch.Tensor:
        return torch.cat([by(layers, prompts, tokens_of, one) for one in others])[:, :-1]

    target = torch.cat([wanted(one) for one in others])[:, :-1]
    before = likeness(found(heard_by), target)
    kept = carry_over(listener, layers, tokens_of, prompts, fitted, LANGUAGES, factor)
    heard = found(heard_by)
    assert before < 0.3 and kept > 0.6 and likeness(heard, target) > 0.8
    deaf = torch.cat([heard_by(layers, prompts, tokens_of, one._replace(tokens=others[0].tokens)) for one in others])[:, :-1]
    assert likeness(deaf, target) < likeness(heard, target) - 0.03  # it is the sound that it hears
    told = [(tokens_of.unit(one.tokens), LANGUAGES[one.language], one.text) for one in fitted]
    shares = join_audio(layers, prompts, told)
    assert len(shares) == 2 and min(shares) > 0.9
    assert likeness(found(read_by), heard) > 0.8


def test_acoustic_tokens_of_frames_are_those_of_the_listener(
    stage: Path, whisper: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    listener, _ = new_listener(stage, whisper, tokenizer)
    _, turn = new_layers(stage, tokenizer)
    frames = torch.randn(1, 3 * STRIDE, WIDTH)
    tokens, counts = listener.hear(frames, torch.tensor([3 * STRIDE - 1]))
    assert counts.tolist() == [3]
    torch.testing.assert_close(tokens[0, 0], frames[0, :STRIDE].mean(0))  # to begin with
    tokens_of = AcousticTokens.of(drawn(tokenizer, 4, 0), turn)
    made = tokens_of.projection(listener)(frames.transpose(1, 2))[0].T
    torch.testing.assert_close(torch.nn.functional.rms_norm(made, (WIDTH,)), tokens_of.unit(tokens[0]), atol=1e-5, rtol=1e-4)


def test_rows_of_targets() -> None:
    ids, wanted = rows_of([[5, 6, 1], [7, 1]])
    assert ids.tolist() == [[5, 6], [7, 1]] and wanted.tolist() == [[5, 6, 1], [7, 1, -100]]


@pytest.mark.parametrize(
    "wrong",
    [{"layers": 3}, {"heads": 2, "kv_heads": 2}, {"kv_heads": 2}, {"head_dim": 16}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_backbone_of_other_sizes_is_an_error(
    stage: Path, whisper: Path, tokenizer: PreTrainedTokenizerBase, wrong: dict[str, int]
) -> None:
    layers, turn = new_layers(stage, tokenizer, **wrong)
    listener, factor = new_listener(stage, whisper, tokenizer)
    heard = drawn(tokenizer, 2, 1)
    with pytest.raises(CheckpointError, match=f"to begin as this Whisper's decoder, 'shape.{next(iter(wrong))}' must be"):
        carry_over(listener, layers, AcousticTokens.of(heard, turn), PromptBuilder(tokenizer), heard, LANGUAGES, factor)


# -- the stage ---------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(stage: Path, whisper: Path, tmp_path: Path) -> dict[str, Any]:
    rows = []
    for number, text in enumerate(ENGLISH):
        sound = write(tmp_path / f"{number}.wav", tone(220 + 110 * number, 1.2))
        rows.append(Utterance(str(sound), text, "en", 1.2))
    write_manifest(tmp_path / "manifest.jsonl", rows)
    loop = {"steps": 4, "lr": 3e-3, "eval_every": 4, "save_every": 2}
    return {
        "stage": "hearing",
        "name": "h",
        "whisper": str(whisper),
        "encoder": {"name": str(whisper)},
        "tokenizer": str(stage),
        "rows": str(stage / "rows.safetensors"),
        "languages": LANGUAGES,
        "shape": SHAPE | OTHERS,
        "listener": loop,
        "train": loop | {"batch_size": 4},
        "data": {"train": [{"manifest": "manifest.jsonl"}], "dev": ["manifest.jsonl"]},
        "fitted": 4,
    }


def ran(folder: Path, content: dict[str, Any]) -> Path:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return train_from_recipe(folder / "recipe.yaml", folder / "run", "cpu")


def test_the_stage_leaves_a_backbone_and_a_projector_s_start(recipe: dict[str, Any], whisper: Path, tmp_path: Path) -> None:
    made = ran(tmp_path, recipe)
    assert made == tmp_path / "run" / "backbone"
    backbone = load_backbone(BackboneConfig(str(made)))
    assert backbone.config.num_hidden_layers == 2 and (backbone.lm_head_weight[:, -1] - CONSTANT).abs().max() < 1e-3
    for part in ("listener", "layers"):
        lines = [json.loads(line) for line in (tmp_path / "run" / part / "log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 3, 4] and lines[-1]["loss"] < lines[0]["loss"]
        assert lines[-1]["evaluation"].keys() == {f"nats_a_token_{tmp_path.name}/manifest"}
    weights = load_file(made / "model.safetensors")
    assert ran(tmp_path, recipe) == made  # nothing is left to do
    again = load_file(made / "model.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    projector = {"hidden_size": 12, "strides": [2, 2], "acoustic": True}
    adapter: dict[str, Any] = {
        "model": {"name": "a", "encoder": {"name": str(whisper)}, "backbone": {"name": str(made)}, "projector": projector},
        "train": {"steps": 1, "batch_size": 2, "acoustic": str(tmp_path / "run")},
        "data": recipe["data"],
    }
    (tmp_path / "adapter.yaml").write_text(yaml.safe_dump(adapter))
    model = build_model(load_recipe(tmp_path / "adapter.yaml"))
    assert float(model.projector.acoustic_scale) == LOUD
    for name, tensor in read_acoustic(tmp_path / "run").items():
        assert torch.equal(model.projector.state_dict()[name], tensor)
    del adapter["model"]["projector"]["acoustic"]
    (tmp_path / "adapter.yaml").write_text(yaml.safe_dump(adapter))
    with pytest.raises(RecipeError, match=r"'train\.acoustic' is set, but 'model\.projector\.acoustic' is not"):
        load_recipe(tmp_path / "adapter.yaml")


def test_what_is_not_there_is_an_error(recipe: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no acoustic tokens there .*; run the stage 'hearing'"):
        read_acoustic(tmp_path)
    with pytest.raises(CheckpointError, match="no rows of tokens there"):
        ran(tmp_path, recipe | {"rows": str(tmp_path / "none.safetensors")})
    with pytest.raises(RecipeError, match="'fitted' must be at least 1"):
        ran(tmp_path, recipe | {"fitted": 0})
