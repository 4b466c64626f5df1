"""Language "auto": prompts that name none, and the first token behind them that says which one it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_model import clips, tiny_model

from diffusion_gemma_asr.denoise.decode import decode_clips, draft_clips, find_languages
from diffusion_gemma_asr.denoise.options import DecodeOptions
from diffusion_gemma_asr.errors import AsrError, CheckpointError
from diffusion_gemma_asr.languages import AUTO, LANGUAGES
from diffusion_gemma_asr.model.model import DiffusionGemmaASR

CODES = ("en", "es", "fr", "zh")  # these models of random weights know
FEW = {"steps": 2, "entropy_bound": 2.0}


@pytest.fixture(scope="module")
def model(whisper_folder: Path, backbone_folder: Path) -> DiffusionGemmaASR:
    return tiny_model(whisper_folder, backbone_folder, languages=CODES, finds_language=True, reads_context=True)


@pytest.fixture(scope="module")
def audio() -> list[np.ndarray]:
    return clips([16_000, 24_000, 9000, 36_000, 5000, 12_000])


def found(model: DiffusionGemmaASR, audio: list[np.ndarray], codes: tuple[str, ...], batch_size: int = 16) -> list[str]:
    options = DecodeOptions()
    rows = draft_clips(model, model.encode(audio))
    return find_languages(model, rows, codes, options, batch_size)


def test_a_prompt_without_a_language_names_none(model: DiffusionGemmaASR) -> None:
    spelled = model.tokenizer.decode(model.prompts.row(2, AUTO))
    assert "Transcribe the speech." in spelled and not any(name in spelled for name in LANGUAGES.values())


def test_a_marker_is_the_code_and_a_newline(model: DiffusionGemmaASR) -> None:
    for code in LANGUAGES:
        assert model.tokenizer.decode(model.prompts.marker(code)) == f"{code}\n"
    assert model.prompts.language_tokens(CODES) == [model.prompts.marker(code)[0] for code in CODES]


def test_the_language_is_one_of_those_asked_for(model: DiffusionGemmaASR, audio: list[np.ndarray]) -> None:
    for codes in (CODES, ("zh", "en"), ("fr",)):
        assert set(found(model, audio, codes)) <= set(codes)


def test_the_language_does_not_depend_on_the_batch(model: DiffusionGemmaASR, audio: list[np.ndarray]) -> None:
    together = found(model, audio, CODES)
    assert [found(model, [clip], CODES)[0] for clip in audio] == together
    assert found(model, audio, CODES, batch_size=2) == together
    assert found(model, audio[::-1], CODES[::-1]) == together[::-1]


def test_it_is_the_likeliest_first_token_behind_the_prompt(model: DiffusionGemmaASR, audio: list[np.ndarray]) -> None:
    languages = found(model, audio, CODES)
    for clip, language in zip(audio, languages, strict=True):
        encoded = model.encode([clip])
        with torch.no_grad():
            _, hidden = model.read_prompts(encoded.slots, encoded.slot_lengths, [AUTO])
            logits = model.backbone.logits(hidden[0, -1])
        scores = {code: float(logits[model.prompts.marker(code)[0]]) for code in CODES}
        assert language == max(scores, key=scores.__getitem__)
    assert len(set(languages)) > 1, "all clips are of one language: nothing to show"


@pytest.mark.parametrize("start", ["noise", "draft"])
def test_a_language_that_was_found_gives_what_its_name_gives(
    model: DiffusionGemmaASR, audio: list[np.ndarray], start: str
) -> None:
    auto = decode_clips(model, audio[:3], DecodeOptions(start=start, **FEW))  # type: ignore[arg-type]
    for clip, decoded in zip(audio, auto, strict=False):
        (named,) = decode_clips(model, [clip], DecodeOptions(language=decoded.language, start=start, **FEW))  # type: ignore[arg-type]
        assert (named.tokens, named.language) == (decoded.tokens, decoded.language)
    few = decode_clips(model, audio, DecodeOptions("zh, fr", start=start, **FEW))  # type: ignore[arg-type]
    assert {decoded.language for decoded in few} <= {"zh", "fr"}


def test_languages_of_each_clip_may_be_given(model: DiffusionGemmaASR, audio: list[np.ndarray]) -> None:
    options = DecodeOptions(**FEW)  # type: ignore[arg-type]
    mixed = decode_clips(model, audio[:2], options, languages=["fr", "zh"])
    assert [decoded.language for decoded in mixed] == ["fr", "zh"]
    for clip, decoded in zip(audio, mixed, strict=False):
        (alone,) = decode_clips(model, [clip], DecodeOptions(decoded.language, **FEW))  # type: ignore[arg-type]
        assert alone.tokens == decoded.tokens
    with pytest.raises(AsrError, match="not trained for language 'hi'"):
        decode_clips(model, audio[:2], options, languages=["fr", "hi"])


def test_a_named_language_that_the_model_does_not_know_is_refused(model: DiffusionGemmaASR, audio: list[np.ndarray]) -> None:
    with pytest.raises(AsrError, match="model tiny was not trained for language 'de'; it knows en, es, fr, zh"):
        decode_clips(model, audio, DecodeOptions(language="de"))
    with pytest.raises(AsrError, match="was not trained for language 'hi'"):
        decode_clips(model, audio, DecodeOptions(language="en,hi"))


def test_a_model_that_cannot_find_the_language_says_so(
    whisper_folder: Path, backbone_folder: Path, audio: list[np.ndarray]
) -> None:
    several = tiny_model(whisper_folder, backbone_folder, languages=("en", "de"))
    with pytest.raises(AsrError, match="not trained to find the language; name one of en, de"):
        decode_clips(several, audio[:1], DecodeOptions())
    (named,) = decode_clips(several, audio[:1], DecodeOptions(language="de", steps=1))
    one = tiny_model(whisper_folder, backbone_folder, languages=("de",))
    (only,) = decode_clips(one, audio[:1], DecodeOptions(steps=1))
    assert (only.language, only.tokens) == ("de", named.tokens)


def test_codes_that_begin_with_one_token_cannot_be_told_apart(model: DiffusionGemmaASR) -> None:
    assert model.prompts.marker("en")[0] != model.prompts.marker("fr")[0]
    with pytest.raises(CheckpointError, match="name the language"):
        model.prompts.language_tokens(["en", "fr", "en"])
