"""Language "auto": prompts that name none, transcripts that begin with a code, and how it is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_model import clips, tiny_model

from diffusion_gemma_asr.denoise import DenoiseOptions
from diffusion_gemma_asr.edits import edit_canvases
from diffusion_gemma_asr.engine import Finished
from diffusion_gemma_asr.errors import AsrError, CheckpointError
from diffusion_gemma_asr.model import DiffusionGemmaASR
from diffusion_gemma_asr.objective import SpeechBatch, text_batch
from diffusion_gemma_asr.prompt import AUTO, LANGUAGES, PromptBuilder

CODES = tuple(LANGUAGES)


@pytest.fixture(scope="module")
def model(whisper_folder: Path, backbone_folder: Path) -> DiffusionGemmaASR:
    found = tiny_model(whisper_folder, backbone_folder)
    found.languages, found.finds_language = CODES, True
    # The tiny tokenizer spells codes in different lengths: two bytes each here.
    byte = found.tokenizer.convert_tokens_to_ids
    found.prompts.marker = lambda code: byte([f"<0x{65 + CODES.index(code):02X}>", "<0x0A>"])  # type: ignore[method-assign]
    return found


def batch_of(model: DiffusionGemmaASR, unnamed: list[bool]) -> SpeechBatch:
    targets = [model.prompts.target(text) for text in ("the quick fox", "sea")]
    text = text_batch(model.prompts, [3, 3], targets, ["de", "zh"], 2, unnamed)
    return SpeechBatch(torch.randn(2, 20, model.encoder.hidden_size), torch.tensor([20, 20]), text)


def test_a_prompt_without_a_language_names_none(model: DiffusionGemmaASR) -> None:
    row = model.prompts.row(2, AUTO)
    spelled = model.tokenizer.decode(row)
    assert "Transcribe the speech." in spelled and not any(name in spelled for name in LANGUAGES.values())


def test_the_transcript_then_begins_with_the_code_and_a_newline(model: DiffusionGemmaASR) -> None:
    named, unnamed = batch_of(model, [False, False]).text, batch_of(model, [False, True]).text
    marker = model.prompts.marker("zh")
    assert model.tokenizer.decode(PromptBuilder(model.tokenizer).marker("zh")) == "zh\n"
    assert unnamed.leads.tolist() == [0, len(marker)] and named.leads.tolist() == [0, 0]
    target = model.prompts.target("sea")
    assert unnamed.canvas[1, : len(marker) + len(target)].tolist() == [*marker, *target]
    assert unnamed.ids[1, unnamed.target_mask[1]].tolist() == [*marker, *target]
    assert unnamed.canvas[0, : int(named.target_mask[0].sum())].tolist() == model.prompts.target("the quick fox")


def test_ctc_and_drafts_hear_nothing_of_the_code(model: DiffusionGemmaASR) -> None:
    named, unnamed = batch_of(model, [False, False]), batch_of(model, [True, True])
    for batch in (named, unnamed):
        spoken, counts = batch.text.spoken()
        rows = [row[:n] for row, n in zip(spoken.tolist(), counts.tolist(), strict=True)]
        assert rows == [model.prompts.target(text)[:-1] for text in ("the quick fox", "sea")]
    torch.manual_seed(0)
    frames = torch.randn(2, 80, model.encoder.hidden_size)
    losses = [model.ctc_loss(SpeechBatch(frames, torch.tensor([80, 80]), b.text)) for b in (named, unnamed)]
    assert float(losses[0].detach()) == float(losses[1].detach())


def test_a_drafted_canvas_shows_blanks_where_the_code_has_to_come() -> None:
    shown, corrected, usable = edit_canvases([[7], [8]], [[7], [9]], (1, 2), 0, 4, [[5, 6], []])
    assert usable.all() and shown.shape == corrected.shape
    assert shown[0, :4].tolist() == [0, 0, 0, 7] and corrected[0, :4].tolist() == [5, 6, 0, 7]
    assert shown[1, :2].tolist() == [0, 8] and corrected[1, 1] == 9


@pytest.mark.parametrize("start", ["noise", "draft"])
def test_a_language_is_found_and_its_code_is_no_part_of_the_transcript(model: DiffusionGemmaASR, start: str) -> None:
    audio = clips([16000, 24000])
    few = DenoiseOptions(steps=2, entropy_bound=2.0)  # each step magnifies rounding some tenfold
    found = model.transcribe_batch(audio, AUTO, few, start=start)
    assert all(decoded.language in CODES for decoded in found)
    again = model.transcribe_batch(audio[1:], AUTO, few, start=start, engine="reference")
    assert again[0].text == found[1].text and again[0].language == found[1].language
    only = model.transcribe_batch(audio, AUTO, start=start, among=["hi", "fr"])
    assert all(decoded.language in ("hi", "fr") for decoded in only)


def test_the_code_on_the_canvas_decides(model: DiffusionGemmaASR, monkeypatch: pytest.MonkeyPatch) -> None:
    marker, target = model.prompts.marker("es"), model.prompts.target("the quick fox")
    canvas = torch.tensor([*marker, *target, 1, 1])
    done = Finished(canvas, torch.arange(len(canvas)).float(), 2)
    monkeypatch.setattr("diffusion_gemma_asr.decoding.run_fast", lambda *_: iter([(0, done)]))
    (decoded,) = model.transcribe_batch(clips([16000]), AUTO)
    assert (decoded.language, decoded.text, decoded.tokens) == ("es", "the quick fox", target[:-1])
    assert decoded.logprobs == list(range(len(marker), len(marker) + len(target) - 1))


def test_without_a_code_the_likeliest_first_tokens_decide(model: DiffusionGemmaASR, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a sum over the log-probabilities that the backbone gives the marker's tokens behind the prompt."""
    canvas = torch.tensor([9] * 12 + [1])
    monkeypatch.setattr(
        "diffusion_gemma_asr.decoding.run_fast", lambda *_: iter([(0, Finished(canvas, torch.zeros(13), 1))])
    )
    audio = clips([16000])
    (decoded,) = model.transcribe_batch(audio, AUTO)
    slots, lengths = model.encode_audio(audio)
    scores = {}
    for code in CODES:
        marker = model.prompts.marker(code)
        with torch.no_grad():
            _, hidden = model.read_prompts(slots, lengths, [AUTO], [marker])
        logits = model.backbone.softcap * torch.tanh(hidden[0] @ model.backbone.lm_head_weight.T / model.backbone.softcap)
        before = logits[-len(marker) - 1 : -1].log_softmax(-1)
        scores[code] = float(before[torch.arange(len(marker)), torch.tensor(marker)].sum())
    assert decoded.language == max(scores, key=scores.__getitem__)


def test_a_language_that_is_named_is_reported(model: DiffusionGemmaASR) -> None:
    assert [d.language for d in model.transcribe_batch(clips([8000, 9000]), ["de", "fr"])] == ["de", "fr"]


def test_what_was_not_trained_for_it(model: DiffusionGemmaASR, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "finds_language", False)
    with pytest.raises(AsrError, match="not trained to find the language; name it, one of en, de, fr, es, hi, zh"):
        model.transcribe_batch(clips([8000]), AUTO)
    monkeypatch.setattr(model, "languages", ("hi",))
    assert model.transcribe_batch(clips([8000]), AUTO)[0].language == "hi"
    with pytest.raises(AsrError, match="'xx' is not one of en"):
        model.transcribe_batch(clips([8000]), AUTO, among=["xx", "en"])


def test_codes_of_unequal_length_have_no_place_on_a_canvas(
    model: DiffusionGemmaASR, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = PromptBuilder(model.tokenizer)
    monkeypatch.setattr(prompts, "marker", lambda code: [1] * (1 + (code == "zh")))
    with pytest.raises(CheckpointError, match="name the language"):
        _ = prompts.markers
