"""train/mini/whisper_tokens.py: a tokenizer that cuts words as a Whisper does, and a head that begins with its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import write_whisper
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    WhisperForConditionalGeneration,
)

from diffusion_gemma_asr.errors import CheckpointError, DataError, RecipeError
from diffusion_gemma_asr.model.prompt import LANGUAGES, SPECIAL_TOKENS, PromptBuilder
from diffusion_gemma_asr.train.mini.backbone_config import BackboneShape, small_config
from diffusion_gemma_asr.train.mini.text import keep_rows, new_backbone
from diffusion_gemma_asr.train.mini.whisper_tokens import ROW_RMS, load_whisper_tokens, parts_of, plain_bpe, rows_for
from diffusion_gemma_asr.train.run import train_from_recipe

ENGLISH = [
    "the quick brown fox jumps over the lazy dog",
    "she sells sea shells by the sea shore",
    "it's the other brother's turn to sell the shells",
    "they'll go where the others went",
]
FRENCH = ["l'été dernier nous étions à la mer", "où êtes vous allés à noël"]
MANDARIN = ["你好世界", "他是日本人"]
WIDTH = 64


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Whisper with byte pairs of English and French, and random rows that have something in common."""
    folder = tmp_path_factory.mktemp("whisper")
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([" " + line for line in [*ENGLISH, *FRENCH, *LANGUAGES] * 3], 460, show_progress=False)
    write_whisper(folder, width=WIDTH, vocab_size=trained.get_vocab_size())
    model = WhisperForConditionalGeneration.from_pretrained(folder)
    model.model.decoder.embed_tokens.weight.data.add_(1.0)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stage(whisper: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the stage `tokenizer`, with Whisper's tokens for English and French."""
    folder = tmp_path_factory.mktemp("stage")
    for code, lines in {"en": ENGLISH, "fr": FRENCH, "zh": MANDARIN}.items():
        (folder / f"{code}.txt").write_text("\n".join(lines), encoding="utf-8")
    recipe: dict[str, Any] = {"stage": "tokenizer", "name": "t", "text": ["en.txt", "fr.txt", "zh.txt"], "vocab_size": 300}
    recipe |= {"whisper": str(whisper), "whisper_tokens": 120, "own": ["zh"]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    train_from_recipe(folder / "recipe.yaml", folder / "run", "cpu")
    return folder / "run"


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
