"""A small Whisper with a tokenizer of its own, and the stage `tokenizer` on it, for tests only."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from tiny import write_whisper
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast, WhisperForConditionalGeneration

from diffusion_gemma_asr.model.prompt import LANGUAGES
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


def small_whisper(folder: Path) -> Path:
    """A Whisper with byte pairs of English and French, and random rows that have something in common."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([" " + line for line in [*ENGLISH, *FRENCH, *LANGUAGES] * 3], 460, show_progress=False)
    write_whisper(folder, width=WIDTH, vocab_size=trained.get_vocab_size(), decoder_layers=2)
    model = WhisperForConditionalGeneration.from_pretrained(folder)
    model.model.decoder.embed_tokens.weight.data.add_(1.0)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer).save_pretrained(folder)
    return folder


def tokenizer_stage(whisper: Path, folder: Path) -> Path:
    """The folder of the stage `tokenizer`, with Whisper's tokens for English and French."""
    for code, lines in {"en": ENGLISH, "fr": FRENCH, "zh": MANDARIN}.items():
        (folder / f"{code}.txt").write_text("\n".join(lines), encoding="utf-8")
    recipe: dict[str, Any] = {"stage": "tokenizer", "name": "t", "text": ["en.txt", "fr.txt", "zh.txt"], "vocab_size": 300}
    recipe |= {"whisper": str(whisper), "whisper_tokens": 120, "own": ["zh"]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    train_from_recipe(folder / "recipe.yaml", folder / "run", "cpu")
    return folder / "run"


def trained_whisper(whisper: Path, folder: Path) -> Path:
    """The same Whisper as training makes them: positions matter little, blocks much, and hidden states share most."""
    shutil.copytree(whisper, folder, dirs_exist_ok=True)
    model = WhisperForConditionalGeneration.from_pretrained(folder)
    torch.manual_seed(0)
    decoder = model.model.decoder
    decoder.embed_tokens.weight.data.add_(0.3 * torch.randn(WIDTH))
    decoder.embed_positions.weight.data.mul_(0.05)
    for name, parameter in decoder.layers.named_parameters():
        if name.endswith("weight") and "norm" not in name:
            parameter.data.mul_(4.0)
    model.save_pretrained(folder)
    return folder
