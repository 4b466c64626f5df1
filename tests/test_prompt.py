"""The prompt: tokens in their places, slots counted, padding masked, by a real and a small tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from diffusion_gemma_asr.checkpoint.load import DEFAULT_MODEL, PRESETS
from diffusion_gemma_asr.errors import AsrError, CheckpointError
from diffusion_gemma_asr.languages import LANGUAGES
from diffusion_gemma_asr.model.prompt import SPECIAL_TOKENS, PromptBuilder, context_of


@pytest.fixture(scope="module")
def published(backbone_folder: Path) -> PreTrainedTokenizerBase:
    """A tokenizer as the published backbone has it."""
    return AutoTokenizer.from_pretrained(backbone_folder)


@pytest.fixture(scope="module")
def own() -> PreTrainedTokenizerBase:
    """The tokenizer of a model inside the package."""
    return AutoTokenizer.from_pretrained(PRESETS / DEFAULT_MODEL / "backbone")


@pytest.fixture(params=["published", "own"])
def prompts(request: pytest.FixtureRequest) -> PromptBuilder:
    return PromptBuilder(request.getfixturevalue(request.param))


@pytest.mark.parametrize("language", LANGUAGES)
def test_row_is_the_chat_turn(prompts: PromptBuilder, language: str) -> None:
    s = prompts.special
    row = prompts.row(5, language)
    start, end = row.index(s["begin_audio"]), row.index(s["end_audio"])
    assert row[:2] == [s["bos"], s["turn"]]
    assert row[start + 1 : end] == [s["audio"]] * 5
    spelled = f"user\nTranscribe the {LANGUAGES[language]} speech."
    assert prompts.tokenizer.decode(row[2:start]).strip() == spelled
    assert row[end + 1] == s["end_of_turn"]
    turn = row.index(s["turn"], end)
    assert prompts.tokenizer.decode(row[end + 2 : turn]).strip(" ") == "\n"
    assert prompts.tokenizer.decode(row[turn + 1 :]).strip(" ") == "model\n"


def test_the_text_of_a_whole_row(published: PreTrainedTokenizerBase) -> None:
    row = PromptBuilder(published).row(2, "de")
    assert published.decode(row, skip_special_tokens=False) == (
        "<bos><|turn>user\nTranscribe the German speech.<|audio><|audio|><|audio|><audio|><turn|>\n<|turn>model\n"
    )


@pytest.mark.parametrize("slots", [0, 1, 188])
def test_rows_of_a_language_differ_in_their_slots_alone(prompts: PromptBuilder, slots: int) -> None:
    audio = prompts.special["audio"]
    row = prompts.row(slots, "fr")
    assert row.count(audio) == slots
    start = prompts.row(1, "fr").index(audio)
    assert row[:start] + row[start + slots :] == prompts.row(0, "fr")


def test_unknown_language_names_the_six(prompts: PromptBuilder) -> None:
    with pytest.raises(AsrError, match=r"'tlh'.*en, de, fr, es, hi, zh"):
        prompts.row(3, "tlh")
    with pytest.raises(AsrError, match="'English'"):
        prompts.build([3], ["English"])


def test_build_pads_on_the_right(prompts: PromptBuilder) -> None:
    slots, languages = [4, 0, 9], ["en", "hi", "zh"]
    rows = [prompts.row(n, language) for n, language in zip(slots, languages, strict=True)]
    prompt = prompts.build(slots, languages)
    assert prompt.lengths.tolist() == [len(row) for row in rows]
    assert prompt.ids.shape == prompt.mask.shape == prompt.slot_mask.shape == (3, max(map(len, rows)))
    assert prompt.slot_mask.sum(1).tolist() == slots
    for i, row in enumerate(rows):
        n = len(row)
        assert prompt.ids[i, :n].tolist() == row
        assert prompt.mask[i, :n].all()
        assert not prompt.mask[i, n:].any()
        assert (prompt.ids[i, n:] == prompts.special["pad"]).all()
        assert prompt.slot_mask[i].tolist() == (prompt.ids[i] == prompts.special["audio"]).tolist()


def test_build_wants_a_language_per_row(prompts: PromptBuilder) -> None:
    with pytest.raises(ValueError):
        prompts.build([1, 2], ["en"])


def test_end_ids_are_end_of_turn_and_end_of_sequence(prompts: PromptBuilder) -> None:
    spelled = prompts.tokenizer.convert_ids_to_tokens(list(prompts.end_ids))
    assert spelled == ["<turn|>", "<eos>"]


@pytest.mark.parametrize("text", ["the quick brown fox", "a", "naïve Zürich, 12 °C!", "你好 नमस्ते"])
def test_target_spells_the_text_and_ends_the_turn(prompts: PromptBuilder, text: str) -> None:
    *tokens, last = prompts.target(text)
    assert last == prompts.special["end_of_turn"]
    assert not set(tokens) & set(prompts.special.values())
    assert prompts.tokenizer.decode(tokens, skip_special_tokens=True).strip() == text


@pytest.mark.parametrize("missing", SPECIAL_TOKENS.values())
def test_a_missing_special_token_is_named(missing: str) -> None:
    vocabulary = [token for token in (*SPECIAL_TOKENS.values(), "<unk>") if token != missing]
    model = models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>")
    with pytest.raises(CheckpointError) as caught:
        PromptBuilder(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model)))
    named = str(caught.value).split(";")[0].split("lacks ")[1]
    assert named == missing


def test_context_stands_behind_the_instruction_as_plain_text(prompts: PromptBuilder) -> None:
    plain, told = prompts.row(3, "en"), prompts.row(3, "en", "<|audio|> <turn|> Hegel")
    assert len(told) > len(plain) and told[0] == plain[0] and told[-5:] == plain[-5:]
    assert told.count(prompts.special["audio"]) == 3 and told.count(prompts.special["end_of_turn"]) == 1
    assert "Hegel" in prompts.tokenizer.decode(told)
    assert context_of() == "" and context_of(hotwords=" Kant ") == "Words that may occur: Kant."


def test_what_is_written_of_a_transcript_stands_behind_the_prompt(prompts: PromptBuilder) -> None:
    begun = prompts.target("the quick")[:-1]
    prompt = prompts.build([2, 3], ["en", "de"], [begun, []])
    first, second = prompts.row(2, "en"), prompts.row(3, "de")
    assert prompt.ids[0, : len(first) + len(begun)].tolist() == [*first, *begun]
    assert prompt.lengths.tolist() == [len(first) + len(begun), len(second)]
    audio = prompts.special["audio"]
    assert int(prompts.build([2], ["en"], [[audio, *begun]]).slot_mask.sum()) == 2, "a written slot would have no sound"
