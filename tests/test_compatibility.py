"""docs/compatibility.md: what it calls accepted is accepted, what it calls refused is refused, and nothing is missing."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from diffusion_gemma_asr.app.cli import main
from diffusion_gemma_asr.app.transcribe import transcribe
from diffusion_gemma_asr.checkpoint.load import load_checkpoint
from diffusion_gemma_asr.errors import AsrError
from diffusion_gemma_asr.strict import check_keywords, from_options, option_names
from diffusion_gemma_asr.transcribe.recognizer import Recognizer
from diffusion_gemma_asr.transcribe.recordings import TranscribeOptions

PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"

# What they take, as of the versions that the page names: options of the command, then what Python alone has.
WHISPER = """
    model model_dir device output_dir output_format verbose task language temperature best_of beam_size patience
    length_penalty suppress_tokens initial_prompt carry_initial_prompt condition_on_previous_text fp16
    temperature_increment_on_fallback compression_ratio_threshold logprob_threshold no_speech_threshold
    word_timestamps prepend_punctuations append_punctuations highlight_words max_line_width max_line_count
    max_words_per_line threads clip_timestamps hallucination_silence_threshold name download_root in_memory
    sample_len prompt prefix suppress_blank without_timestamps max_initial_timestamp
"""
FASTER_WHISPER = """
    model_size_or_path device device_index compute_type cpu_threads num_workers download_root local_files_only files
    revision use_auth_token language task log_progress beam_size best_of patience length_penalty repetition_penalty
    no_repeat_ngram_size temperature compression_ratio_threshold log_prob_threshold no_speech_threshold
    condition_on_previous_text prompt_reset_on_temperature initial_prompt prefix suppress_blank suppress_tokens
    without_timestamps max_initial_timestamp word_timestamps prepend_punctuations append_punctuations multilingual
    vad_filter vad_parameters max_new_tokens chunk_length clip_timestamps hallucination_silence_threshold batch_size
    hotwords language_detection_threshold language_detection_segments threshold neg_threshold min_speech_duration_ms
    max_speech_duration_s min_silence_duration_ms speech_pad_ms
"""
WHISPERX = """
    model model_cache_only model_dir device device_index batch_size compute_type output_dir output_format verbose
    log-level task language align_model interpolate_method timestamp_sanitize no_align return_char_alignments
    vad_method vad_onset vad_offset chunk_size diarize min_speakers max_speakers diarize_model speaker_embeddings
    temperature best_of beam_size patience length_penalty suppress_tokens suppress_numerals initial_prompt hotwords
    condition_on_previous_text fp16 temperature_increment_on_fallback compression_ratio_threshold logprob_threshold
    no_speech_threshold max_line_width max_line_count highlight_words segment_resolution threads hf_token
    print_progress version python-version whisper_arch asr_options vad_model vad_options download_root
    local_files_only use_auth_token num_workers combined_progress progress_callback language_code model_name
    transcript align_model_metadata
"""
THEIRS = {"W": WHISPER.split(), "F": FASTER_WHISPER.split(), "X": WHISPERX.split()}


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """The program with these arguments: its exit status, what it prints, and what it complains of without the box."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main(arguments)
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, " ".join(err.replace("│", " ").split())

    return run


def table(heading: str) -> list[list[str]]:
    """The cells of the rows of the table under a heading."""
    section = re.split(r"^#+ ", PAGE.read_text(encoding="utf-8").split(f"# {heading}\n")[1], flags=re.MULTILINE)[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]  # without the heading and the line under it


def codes(cell: str) -> list[str]:
    return re.findall("`([^`]+)`", cell)


SAME, OTHER = table("The same name"), table("Another name")
REFUSED, VALUES = table("Refused"), table("Values that are refused")
ACCEPTED_AT = [(codes(row[0])[0], place) for row in SAME for place in row[2].split(", ")]
OTHER_NAMES = [name for row in OTHER for name in codes(row[0])]
REFUSED_NAMES = [name for row in REFUSED for name in codes(row[0])]
COMMAND_VALUES = [value for row in VALUES for value in codes(row[0]) if value.startswith("--")]
PYTHON_VALUES = [value for row in VALUES for value in codes(row[0]) if not value.startswith("--")]


@cache
def command_options() -> set[str]:
    """What the command `transcribe` takes, short names and aliases too."""
    app = typer.Typer()
    app.command()(transcribe)
    return {name for parameter in typer.main.get_command(app).params for name in parameter.opts if name.startswith("-")}


@cache
def known(place: str) -> Sequence[str]:
    """Names of options by where they are given."""
    if place == "load":
        return list(inspect.signature(load_checkpoint).parameters)
    if place == "align":
        return list(inspect.signature(Recognizer.align).parameters)
    if place == "command":
        return sorted(name.removeprefix("--") for name in command_options())
    return [*option_names(TranscribeOptions), *inspect.signature(Recognizer.transcribe).parameters]


def one_line(message: str, name: str) -> bool:
    return name in message and "\n" not in message


def test_the_page_is_read() -> None:
    """Else the tests below would hold for nothing."""
    assert len(SAME) > 25 and len(OTHER_NAMES) > 20 and len(REFUSED_NAMES) > 40
    assert len(COMMAND_VALUES) > 5 and len(PYTHON_VALUES) > 3
    for rows in (SAME, OTHER, REFUSED, VALUES):
        assert all(len(row) == len(rows[0]) and codes(row[0]) and set(row[1].split()) <= set("WFX") for row in rows)


def test_every_option_of_theirs_is_there_once() -> None:
    names = [codes(row[0])[0] for row in SAME] + OTHER_NAMES + REFUSED_NAMES
    assert len(names) == len(set(names))
    assert set(names) == {name for theirs in THEIRS.values() for name in theirs}


def test_each_is_said_to_be_of_somebody_who_has_it() -> None:
    for row in [*SAME, *OTHER, *REFUSED]:
        for letter in row[1].split():
            assert set(codes(row[0])) & set(THEIRS[letter]), row[0]
        for name in codes(row[0]):
            assert any(name in THEIRS[letter] for letter in row[1].split()), name
            assert {letter for letter in THEIRS if name in THEIRS[letter]} <= set(row[1].split()), name


@pytest.mark.parametrize(("name", "place"), ACCEPTED_AT)
def test_the_same_name_is_accepted(name: str, place: str, run: Run) -> None:
    if place == "program":
        status, out, _ = run(f"--{name}")
        assert status == 0 and out.startswith("diffusion-gemma-asr ")
    else:
        assert place in ("command", "transcribe", "load")
        assert name in known(place)


@pytest.mark.parametrize("name", [row[0].strip("`") for row in SAME])
def test_where_the_same_name_is_not_said_to_be_taken_it_is_not(name: str) -> None:
    places = {place for accepted, place in ACCEPTED_AT if accepted == name}
    assert {place for place in ("command", "transcribe", "load") if name in known(place)} == places - {"program"}


def test_short_names() -> None:
    short = {code for row in SAME for code in codes(row[3]) if re.fullmatch("-[a-z]", code)}
    assert short == {"-o", "-f"} and short <= command_options()


@pytest.mark.parametrize("here", sorted({code for row in OTHER for code in codes(row[2])}))
def test_the_other_name_is_accepted(here: str) -> None:
    name = re.split("[= ]", here)[0]
    if name.startswith("--"):
        assert name in command_options()
    elif not name.startswith("HF_"):  # the hub's own
        assert any(name in known(place) for place in ("transcribe", "load", "align"))


@pytest.mark.parametrize("name", OTHER_NAMES + REFUSED_NAMES)
def test_names_that_are_not_ours_are_refused(name: str, run: Run) -> None:
    with pytest.raises(AsrError) as caught:
        from_options(TranscribeOptions, {name: 1})
    assert one_line(str(caught.value), f"{name} is no option here")
    with pytest.raises(AsrError) as caught:
        check_keywords(load_checkpoint, {name: 1})
    assert one_line(str(caught.value), f"{name} is no option here")
    assert name not in known("align")
    status, out, complaint = run("transcribe", "a.wav", f"--{name}", "1")
    assert (status, out) == (2, "")
    assert f"No such option: --{name.replace('-', '_')}" in complaint


@pytest.mark.parametrize("arguments", COMMAND_VALUES)
def test_values_that_the_command_refuses(arguments: str, run: Run) -> None:
    option, value = arguments.split()
    status, out, complaint = run("transcribe", "a.wav", option, value)
    assert (status, out) == (2, "")
    named = {"--compute_type": "dtype"}.get(option, option.removeprefix("--"))
    assert "Invalid value" in complaint and named in complaint


@pytest.mark.parametrize("given", PYTHON_VALUES)
def test_values_that_python_refuses(given: str) -> None:
    name, value = given.split("=")
    parsed: Any = ast.literal_eval(value)
    with pytest.raises(AsrError) as caught:
        from_options(TranscribeOptions, {name: parsed})
    assert one_line(str(caught.value), name)


def test_examples_of_values_that_are_taken() -> None:
    (shown,) = (row[3] for row in SAME if codes(row[0]) == ["clip_timestamps"])
    forms = [code if code[0].isdigit() else ast.literal_eval(code) for code in codes(shown)]
    assert len(forms) == 3
    assert {from_options(TranscribeOptions, {"clip_timestamps": form}).clip_timestamps for form in forms} == {(0.0, 30.0)}
    options = from_options(TranscribeOptions, {"language": "en,de", "vad_method": "energy", "no_speech_threshold": 1})
    assert options.decode.codes == ("en", "de")
