"""evaluate/baselines/: the autoregressive decoders write what their models find most probable, batched as alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from tiny_model import clips, tiny_model
from torch import Tensor
from transformers import AutoTokenizer, WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

from diffusion_gemma_asr.errors import CheckpointError
from diffusion_gemma_asr.evaluate.baselines.autoregressive import Autoregressive, greedy
from diffusion_gemma_asr.evaluate.baselines.whisper import Whisper
from diffusion_gemma_asr.model.model import DiffusionGemmaASR

SOUNDS = clips([11_200, 25_600, 17_600])
LANGUAGES = ["en", "de", "fr"]


@pytest.fixture(scope="module")
def model(whisper_folder: Path, backbone_folder: Path) -> DiffusionGemmaASR:
    return tiny_model(whisper_folder, backbone_folder)


@torch.no_grad()
def by_hand(model: DiffusionGemmaASR, slots: Tensor, n: int, language: str) -> list[int]:
    """Greedy decoding that reads prompt and transcript anew for each token."""
    ids = torch.tensor([model.prompts.row(n, language)])
    embeds = model.backbone.embed(ids)
    embeds[ids == model.prompts.special["audio"]] = slots[:n]
    written: list[int] = []
    while len(written) < n:
        mask = torch.ones(embeds.shape[:2], dtype=torch.bool)
        token = int(model.head.logits(model.backbone.prefill(embeds, mask)[1][:, -1]).argmax())
        if token in model.prompts.end_ids:
            break
        written.append(token)
        embeds = torch.cat([embeds, model.backbone.embed(torch.tensor([[token]]))], 1)
    return written


def test_the_backbone_writes_token_after_token_what_it_finds_most_probable(model: DiffusionGemmaASR) -> None:
    encoded = model.encode(SOUNDS)
    rows = greedy(model, encoded, LANGUAGES)
    lengths = encoded.slot_lengths.tolist()
    assert rows == [by_hand(model, encoded.slots[i], lengths[i], LANGUAGES[i]) for i in range(3)]
    assert len({tuple(row) for row in rows}) == 3


def test_a_batch_is_its_clips_alone_and_a_pass_is_a_token(model: DiffusionGemmaASR) -> None:
    system = Autoregressive(model, {})
    rows = system.transcribe(SOUNDS, LANGUAGES)
    alone = [system.transcribe([sound], [code])[0] for sound, code in zip(SOUNDS, LANGUAGES, strict=True)]
    assert rows == alone
    tokens = greedy(model, model.encode(SOUNDS), LANGUAGES)
    assert [(row.text, row.passes) for row in rows] == [(model.text(row), len(row) + 1) for row in tokens]


def test_an_end_token_ends_its_row_alone(whisper_folder: Path, backbone_folder: Path) -> None:
    """In an output head of its own the end of the turn is a little likelier than what the middle row writes halfway."""
    model = tiny_model(whisper_folder, backbone_folder)
    encoded = model.encode(SOUNDS)
    whole = greedy(model, encoded, ["en"] * 3)
    stop = whole[1][len(whole[1]) // 2]
    end = model.prompts.special["end_of_turn"]
    weight = model.head.weight.detach().clone()
    weight[end] = 1.01 * weight[stop]
    model.backbone.model.lm_head.weight = torch.nn.Parameter(weight)
    rows = greedy(model, encoded, ["en"] * 3)
    cut = [row[: row.index(stop)] if stop in row else row for row in whole]
    assert rows[1] == cut[1] != whole[1]
    assert rows == cut


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained Whisper of English alone, with the tokenizer of the tiny backbone beside it."""
    folder = tmp_path_factory.mktemp("whisper")
    tiny.write_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = WhisperConfig(
        vocab_size=len(tokenizer), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_target_positions=32, pad_token_id=0,
        bos_token_id=2, eos_token_id=1, decoder_start_token_id=2, begin_suppress_tokens=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = WhisperForConditionalGeneration(config)
        for parameter in model.parameters():
            parameter.data = torch.randn(parameter.shape) * 0.3
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)
    return folder


@torch.no_grad()
def test_whisper_reads_clips_padded_to_30_s(whisper: Path) -> None:
    system = Whisper(whisper)
    features = system.extractor(SOUNDS[0], sampling_rate=16_000, return_tensors="pt")["input_features"]
    assert features.shape == (1, 80, 3000)
    ids = [2]
    while len(ids) < 32 and ids[-1] != 1:
        logits = system.model(features, decoder_input_ids=torch.tensor([ids])).logits
        ids.append(int(logits[0, -1].argmax()))
    (row,) = system.transcribe([SOUNDS[0]], ["en"])
    expected = system.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert row.text and expected.startswith(row.text[:20])
    assert system.languages == ("en",) and row.decoder == "whisper"


def test_whisper_takes_device_and_dtype(whisper: Path) -> None:
    settings = Whisper(whisper, "cpu", torch.bfloat16).settings()
    assert (settings["dtype"], settings["device"]) == ("bfloat16", "cpu")
    assert settings["model_sha256"] == Whisper(whisper).settings()["model_sha256"]


def test_a_missing_whisper_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="gone"):
        Whisper(tmp_path / "gone")
