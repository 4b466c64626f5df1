"""baselines/: the autoregressive decoders write what their models find most probable, batched as alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_model import clips, tiny_model
from torch import Tensor
from transformers import AutoTokenizer

from diffusion_gemma_asr.baselines.autoregressive import Autoregressive, greedy
from diffusion_gemma_asr.baselines.whisper import Whisper
from diffusion_gemma_asr.errors import CheckpointError
from diffusion_gemma_asr.model import DiffusionGemmaASR
from diffusion_gemma_asr.prompt import PromptBuilder
from diffusion_gemma_asr.train.tokenizer import train_tokenizer
from diffusion_gemma_asr.train.whisper import whisper_config

SECONDS = (0.7, 1.6, 1.1)


@pytest.fixture
def model(whisper_folder: Path, backbone_folder: Path) -> DiffusionGemmaASR:
    return tiny_model(whisper_folder, backbone_folder)


@torch.no_grad()
def by_hand(model: DiffusionGemmaASR, slots: Tensor, n: int, language: str) -> list[int]:
    """Greedy decoding that reads prompt and transcript anew for each token."""
    row = model.prompts.row(n, language)
    ids = torch.tensor([row])
    embeds = model.backbone.embed(ids)
    embeds[ids == model.prompts.special["audio"]] = slots[:n]
    written: list[int] = []
    while len(written) < n:
        mask = torch.ones(embeds.shape[:2], dtype=torch.bool)
        token = int(model.backbone.logits(model.backbone.prefill(embeds, mask)[1][:, -1]).argmax())
        if token in model.prompts.end_ids:
            break
        written.append(token)
        embeds = torch.cat([embeds, model.backbone.embed(torch.tensor([[token]]))], 1)
    return written


def test_the_backbone_writes_token_after_token_what_it_finds_most_probable(model: DiffusionGemmaASR) -> None:
    slots, lengths = model.encode_audio(clips([int(16_000 * s) for s in SECONDS]))
    languages = ["en", "de", "fr"]
    found = greedy(model, slots, lengths, languages)
    assert found == [by_hand(model, slots[i], int(lengths[i]), languages[i]) for i in range(3)]
    assert len({tuple(row) for row in found}) == 3


def test_an_end_token_ends_its_row_alone(model: DiffusionGemmaASR, monkeypatch: pytest.MonkeyPatch) -> None:
    slots, lengths = model.encode_audio(clips([int(16_000 * s) for s in SECONDS]))
    whole = greedy(model, slots, lengths, ["en"] * 3)
    stop = whole[1][len(whole[1]) // 2]  # from now on this token ends a transcript
    monkeypatch.setattr(PromptBuilder, "end_ids", (*model.prompts.end_ids, stop))
    cut = [row[: row.index(stop)] if stop in row else row for row in whole]
    assert greedy(model, slots, lengths, ["en"] * 3) == cut
    rows = Autoregressive(model, "tiny").transcribe(clips([int(16_000 * s) for s in SECONDS]), ["en"] * 3)
    assert [row.passes for row in rows] == [len(row) + 1 for row in cut]


@pytest.fixture
def small_whisper(tmp_path: Path) -> Path:
    """An untrained Whisper as the mini model's stage 2 leaves it: no language tokens, its tokenizer beside it."""
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

    tokenizer = train_tokenizer({"en": ["a sea shell", "the quick fox"]}, 320, tmp_path)
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
             "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}  # fmt: skip
    torch.manual_seed(3)
    model = WhisperForConditionalGeneration(whisper_config(tokenizer, **sizes))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.3
    model.save_pretrained(tmp_path)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(tmp_path)
    return tmp_path


@torch.no_grad()
def test_a_whisper_of_ours_hears_frames_without_padding(small_whisper: Path) -> None:
    system = Whisper(small_whisper)
    (clip,) = clips([16_000])
    frames, _ = system.acoustic(*system.acoustic.features([clip]))
    assert frames.shape[1] == 50
    ids = [system.model.config.bos_token_id]
    while len(ids) <= 50 and ids[-1] != system.model.config.eos_token_id:
        logits = system.model(encoder_outputs=(frames,), decoder_input_ids=torch.tensor([ids])).logits
        ids.append(int(logits[0, -1].argmax()))
    (found,) = system.transcribe([clip], ["en"])
    assert found.text == AutoTokenizer.from_pretrained(small_whisper).decode(ids, skip_special_tokens=True).strip()
    assert found.text and found.passes == len(ids)


def test_a_missing_whisper_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="gone"):
        Whisper(tmp_path / "gone")
