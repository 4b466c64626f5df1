"""train/mini/whisper_tokens.py: a tokenizer that cuts words as a Whisper does, and a head that begins with its rows.
train/mini/decoder_backbone.py: layers that begin as those of its decoder."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    WhisperForConditionalGeneration,
)
from transformers.models.whisper.modeling_whisper import WhisperModel
from whisper_stage import ENGLISH, FRENCH, MANDARIN, WIDTH, small_whisper, tokenizer_stage, trained_whisper

from diffusion_gemma_asr.checkpoint.parts import load_pretrained
from diffusion_gemma_asr.errors import CheckpointError, DataError, RecipeError
from diffusion_gemma_asr.model.backbone import Backbone
from diffusion_gemma_asr.model.prompt import LANGUAGES, SPECIAL_TOKENS, PromptBuilder
from diffusion_gemma_asr.train.mini.backbone_config import BackboneShape, small_config
from diffusion_gemma_asr.train.mini.decoder_backbone import begin_as_decoder, decoder_states
from diffusion_gemma_asr.train.mini.decoder_text import Spelling
from diffusion_gemma_asr.train.mini.text import keep_rows, new_backbone
from diffusion_gemma_asr.train.mini.whisper_tokens import ROW_RMS, load_whisper_tokens, parts_of, plain_bpe, rows_for
from diffusion_gemma_asr.train.run import train_from_recipe


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_whisper(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="module")
def stage(whisper: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_stage(whisper, tmp_path_factory.mktemp("stage"))


@pytest.fixture(scope="module")
def tokenizer(stage: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(stage)


def as_whisper(whisper: Path, line: str) -> list[str]:
    tokens = AutoTokenizer.from_pretrained(whisper).tokenize(" " + line)
    return [bytes(map(ord, token.replace("\u0120", " "))).decode("latin-1") for token in tokens]


def test_words_are_cut_as_whisper_cuts_them(whisper: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    for line in ENGLISH:
        assert [token.replace("\u2581", " ") for token in tokenizer.tokenize(line)] == as_whisper(whisper, line), line


def test_tokens_with_letters_of_several_bytes_are_found_again(whisper: Path) -> None:
    tokens = load_whisper_tokens(str(whisper))
    whole = plain_bpe(tokens.parts, "éàêùë")
    for line in FRENCH:
        pieces = whole.encode(line).tokens
        assert "".join(pieces) == "\u2581" + line.replace(" ", "\u2581")
        longer = [piece for piece in pieces if len(piece) > 1]
        assert longer and all(piece in tokens.numbers for piece in longer)
    assert any("é" in token and len(token) > 1 for token in tokens.parts)


def test_tokens_whose_merge_is_not_told_are_merged_from_their_longest_beginning() -> None:
    made = parts_of(["a", "b", "ab", "abc", "xyz", "abcab"], {"ab": ("a", "b")})
    assert made == {"ab": ("a", "b"), "abc": ("ab", "c"), "abcab": ("abc", "ab")}  # of "xyz" no part is a token


def test_all_that_a_token_is_merged_from_is_there_too(whisper: Path) -> None:
    tokens = load_whisper_tokens(str(whisper))
    few, more = (tokens.needed({"en": ENGLISH, "fr": FRENCH}, count) for count in (20, 80))
    assert 20 < len(few) < len(more) and {*few} < {*more}
    for token in more:
        assert all(len(part) == 1 or part in more for part in tokens.parts[token])


def test_the_tokenizer_serves_prompts_and_every_language(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<eos>", "<bos>"]) == [0, 1, 2]
    builder = PromptBuilder(tokenizer)
    assert len({*builder.language_tokens([*LANGUAGES])}) == len(LANGUAGES)
    for line in [*ENGLISH, *FRENCH, *MANDARIN, "日本 the été ґ"]:
        ids = tokenizer.encode(line, add_special_tokens=False)
        assert tokenizer.decode(ids) == line and not {*ids} & {*builder.special.values()}
    assert tokenizer.tokenize("你好")[1:] == ["你", "好"]


def test_the_head_begins_with_whispers_rows(whisper: Path, stage: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = load_file(stage / "rows.safetensors")["rows"].float()
    assert rows.shape == (len(tokenizer), WIDTH)
    assert rows.square().mean().sqrt() == pytest.approx(ROW_RMS, rel=0.01)
    tokens = load_whisper_tokens(str(whisper))
    theirs = tokens.rows - tokens.rows[[*tokens.numbers.values()]].mean(0)
    vocabulary = tokenizer.get_vocab()
    both = [token for token in vocabulary if token in tokens.numbers]
    assert len(both) > 80
    for token in both:
        mine, whispers = rows[vocabulary[token]], theirs[tokens.numbers[token]]
        assert torch.cosine_similarity(mine, whispers, dim=0) > 0.999, token
    others = rows[[vocabulary[token] for token in [*SPECIAL_TOKENS.values(), "你"]]]
    assert (others.norm(dim=1) > 0.5 * rows.norm(dim=1).mean()).all()
    assert torch.equal(rows_for(vocabulary, tokens), rows_for(vocabulary, tokens))


def test_a_backbone_keeps_the_rows(stage: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    def backbone(hidden: int) -> Any:
        return new_backbone(small_config(tokenizer, BackboneShape(hidden, 2, 4, 8, 16, 2, 1, 8)))

    kept = backbone(WIDTH)
    keep_rows(kept, stage / "rows.safetensors")
    assert torch.equal(kept.lm_head_weight, load_file(stage / "rows.safetensors")["rows"].float())
    assert not kept.lm_head_weight.requires_grad and kept.embed(torch.tensor([[5]])).requires_grad is False
    with pytest.raises(CheckpointError, match=r"rows\.safetensors: \(\d+, 64\) rows and columns, .* has \(\d+, 32\)"):
        keep_rows(backbone(32), stage / "rows.safetensors")
    with pytest.raises(CheckpointError, match=r"no rows of tokens there .*; run the stage 'tokenizer'"):
        keep_rows(kept, tmp_path / "rows.safetensors")


def test_a_whisper_is_for_some_languages(tmp_path: Path) -> None:
    recipe = {"stage": "tokenizer", "name": "t", "text": ["en.txt"], "vocab_size": 300, "whisper": "openai/whisper-base"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(RecipeError, match="'own' must be a list of at least one language"):
        train_from_recipe(tmp_path / "recipe.yaml", tmp_path / "run", "cpu")
    (tmp_path / "en.txt").write_text("mill\n")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"own": ["ja"]}))
    with pytest.raises(DataError, match=r"'own': there is no text in ja; 'text' has en"):
        train_from_recipe(tmp_path / "recipe.yaml", tmp_path / "run", "cpu")
    del recipe["whisper"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"own": ["en"]}))
    with pytest.raises(RecipeError, match="'own' must be left out without 'whisper'"):
        train_from_recipe(tmp_path / "recipe.yaml", tmp_path / "run", "cpu")


DECODER = {"hidden": WIDTH, "layers": 3, "heads": 2, "kv_heads": 2, "head_dim": WIDTH // 2, "intermediate": 136}
OTHERS = {"experts": 2, "top_k": 1, "expert_intermediate": 8}


@pytest.fixture(scope="module")
def spoken(whisper: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_whisper(whisper, tmp_path_factory.mktemp("spoken"))


def spelling_of(tokenizer: PreTrainedTokenizerBase, whisper: Path) -> Spelling:
    return Spelling.of(AutoTokenizer.from_pretrained(whisper), tokenizer, ["en"], 61)


def sentences_of(tokenizer: PreTrainedTokenizerBase, whisper: Path, count: int, seed: int) -> list[tuple[list[int], str]]:
    """Sentences of random tokens that Whisper has too."""
    rng, both = random.Random(seed), [*spelling_of(tokenizer, whisper).numbers]
    return [([*rng.choices(both, k=12), PromptBuilder(tokenizer).special["end_of_turn"]], "en") for _ in range(count)]


def likeness(backbone: Backbone, tokenizer: PreTrainedTokenizerBase, whisper: Path) -> float:
    """How alike the last hidden states of both vary over tokens of new sentences, as a cosine."""
    model, spelling = load_pretrained(WhisperModel, whisper, "decoder").eval(), spelling_of(tokenizer, whisper)
    rows = [row[:-1] for row, _ in sentences_of(tokenizer, whisper, 8, seed=2)]
    prompt, states = PromptBuilder(tokenizer).row(0, "en"), []
    with torch.no_grad():
        _, wanted = decoder_states(model, [[61, *(spelling.numbers[token] for token in row)] for row in rows], begun=1)
        for row in rows:
            ids = torch.tensor([[*prompt, *row]])
            states.append(backbone.prefill(backbone.embed(ids), torch.ones_like(ids, dtype=torch.bool))[1][0, -len(row) :])
    found = torch.cat(states)
    return float(torch.cosine_similarity((found - found.mean(0)).flatten(), (wanted - wanted.mean(0)).flatten(), dim=0))


def test_a_backbone_begins_as_a_decoder(stage: Path, spoken: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    torch.manual_seed(0)
    backbone = new_backbone(small_config(tokenizer, BackboneShape(**DECODER, **OTHERS)))
    keep_rows(backbone, stage / "rows.safetensors")
    assert backbone.config.layer_types == ["sliding_attention"] * 2 + ["full_attention"]
    before = likeness(backbone, tokenizer, spoken)
    kept = begin_as_decoder(backbone, PromptBuilder(tokenizer), str(spoken), sentences_of(tokenizer, spoken, 300, seed=1))
    after = likeness(backbone, tokenizer, spoken)
    assert before < 0.3 and kept > 0.7 and after > 0.85, (before, kept, after)


@pytest.mark.parametrize("wrong", [{"layers": 2}, {"heads": 4, "kv_heads": 4}, {"kv_heads": 1}, {"head_dim": 16}])
def test_a_backbone_of_other_sizes_does_not(spoken: Path, tokenizer: PreTrainedTokenizerBase, wrong: dict[str, int]) -> None:
    backbone = new_backbone(small_config(tokenizer, BackboneShape(**DECODER | wrong, **OTHERS)))
    with pytest.raises(CheckpointError, match=f"to begin as the decoder of .*, 'shape.{next(iter(wrong))}' must be"):
        begin_as_decoder(backbone, PromptBuilder(tokenizer), str(spoken), sentences_of(tokenizer, spoken, 2, seed=1))


def test_nor_does_one_whose_sentences_whisper_cannot_write(spoken: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    backbone = new_backbone(small_config(tokenizer, BackboneShape(**DECODER, **OTHERS)))
    prompts = PromptBuilder(tokenizer)
    with pytest.raises(CheckpointError, match="can write none of the sentences"):
        begin_as_decoder(backbone, prompts, str(spoken), [(prompts.target("你好"), "zh")])


def test_a_decoder_learns_to_write_what_nobody_says(stage: Path, whisper: Path, tmp_path: Path) -> None:
    """Its loss falls, it stays a whole Whisper, and only sentences in its tokens are read."""
    (tmp_path / "en.txt").write_text("\n".join(ENGLISH * 5), encoding="utf-8")
    (tmp_path / "zh.txt").write_text("\n".join(MANDARIN), encoding="utf-8")
    recipe: dict[str, Any] = {"stage": "decoder", "name": "d", "whisper": str(whisper), "tokenizer": str(stage)}
    recipe["train"] = {"steps": 40, "lr": 1e-2, "batch_size": 4, "batch_tokens": 400, "eval_every": 20, "save_every": 20}
    recipe["data"] = {
        "text": ["en.txt", "zh.txt"],
        "dev": {"en": "en.txt", "zh": "zh.txt"},
        "dev_count": 2,
        "max_tokens": 60,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    made = train_from_recipe(tmp_path / "recipe.yaml", tmp_path / "run", "cpu")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] - 0.4  # its rows, which stay as they are, hardly tell tokens apart
    evaluated = [line["evaluation"] for line in lines if "evaluation" in line]
    assert evaluated[-1]["nats_a_character_en"] < evaluated[0]["nats_a_character_en"]
    assert not any("zh" in key for key in evaluated[0])
    before, after = (
        WhisperForConditionalGeneration.from_pretrained(folder).float().state_dict() for folder in (whisper, made)
    )
    changed = {name for name in before if not torch.allclose(before[name].float(), after[name], atol=2e-3)}
    assert changed and all(name.startswith("model.decoder.layer") for name in changed)
    assert AutoTokenizer.from_pretrained(made).get_vocab() == AutoTokenizer.from_pretrained(whisper).get_vocab()


def test_a_decoder_that_can_write_nothing_is_an_error(stage: Path, whisper: Path, tmp_path: Path) -> None:
    (tmp_path / "zh.txt").write_text("\n".join(MANDARIN), encoding="utf-8")
    recipe: dict[str, Any] = {"stage": "decoder", "name": "d", "whisper": str(whisper), "tokenizer": str(stage)}
    recipe["train"] = {"steps": 1, "batch_size": 4, "batch_tokens": 400}
    recipe["data"] = {"text": ["zh.txt"], "dev": {}, "dev_count": 2, "max_tokens": 60}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(CheckpointError, match="can write none of the sentences: are its tokens those of"):
        train_from_recipe(tmp_path / "recipe.yaml", tmp_path / "run", "cpu")
