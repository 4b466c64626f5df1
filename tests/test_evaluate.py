"""evaluate/: a run that is killed and resumed gives the summary of a whole one; what cannot be used is named and counted."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from sounds import pitch, tone, write
from tiny_model import tiny_model

from diffusion_gemma_asr.checkpoint.save import save_checkpoint
from diffusion_gemma_asr.data.manifest import Utterance, read_manifest, write_manifest
from diffusion_gemma_asr.denoise.decode import decode_clips
from diffusion_gemma_asr.denoise.options import DecodeOptions
from diffusion_gemma_asr.errors import AsrError, DataError
from diffusion_gemma_asr.evaluate.command import compare_command, evaluate_command, evaluate_systems
from diffusion_gemma_asr.evaluate.compare import compare
from diffusion_gemma_asr.evaluate.options import EvaluateOptions
from diffusion_gemma_asr.evaluate.predictions import PREDICTIONS, read_predictions
from diffusion_gemma_asr.evaluate.protocol import Hypothesis
from diffusion_gemma_asr.evaluate.report import write_report
from diffusion_gemma_asr.evaluate.run import evaluate
from diffusion_gemma_asr.evaluate.systems import CtcGreedy, Diffusion, describe, load_systems
from diffusion_gemma_asr.model.model import DiffusionGemmaASR
from diffusion_gemma_asr.strict import from_options
from diffusion_gemma_asr.transcribe.recognizer import Recognizer
from diffusion_gemma_asr.transcribe.recordings import TranscribeOptions

HERTZ = [220, 330, 440, 550, 660, 770, 880]


class PitchSystem:
    """Writes the pitch that it hears; `wrong` is what it hears wrongly. Dies in the batch after `dies_after` batches."""

    longest_s = 30.0
    languages = ("en", "de", "hi")

    def __init__(self, wrong: int = 0, dies_after: int | None = None):
        self.wrong, self.dies_after, self.batches = wrong, dies_after, 0

    def settings(self) -> dict[str, Any]:
        return {"system": "pitch", "wrong": self.wrong}

    def transcribe(self, sounds: Sequence[np.ndarray], languages: Sequence[str]) -> list[Hypothesis]:
        self.batches += 1
        if self.dies_after is not None and self.batches > self.dies_after:
            raise KeyboardInterrupt
        assert len(sounds) == len(languages)
        heard = [round(pitch(clip) / 110) * 110 for clip in sounds]
        return [Hypothesis(f"tone of {'low' if h == self.wrong else 'high'} pitch {h}", "pitch", 3) for h in heard]


@pytest.fixture
def utterances(tmp_path: Path) -> list[Utterance]:
    rows = []
    for i, hertz in enumerate(HERTZ):
        path = write(tmp_path / "sound" / f"{hertz}.wav", tone(hertz, 0.5 + 0.1 * i))
        rows.append(Utterance(str(path), f"Tone of high pitch, {hertz}!", "en", 0.5 + 0.1 * i))
    return rows


@pytest.fixture(autouse=True)
def sound_folder(tmp_path: Path) -> None:
    (tmp_path / "sound").mkdir()


def without_times(summary: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in summary.items() if key != "speed"}


def test_counts_speed_and_settings_are_in_the_summary(utterances: list[Utterance], tmp_path: Path) -> None:
    seen = []
    summary = evaluate(
        PitchSystem(wrong=440), utterances, tmp_path / "run", 3, on_batch=lambda n, edits: seen.append((n, edits.errors))
    )
    english = summary["languages"]["en"]
    assert (english["substitutions"], english["deletions"], english["insertions"]) == (1, 0, 0)
    assert english["reference"] == 5 * 7 and english["error_rate"] == pytest.approx(1 / 35, abs=1e-5)
    assert english["low"] <= english["error_rate"] <= english["high"]
    assert (summary["utterances"], summary["skipped"], summary["passes"]) == (7, 0, 3)
    assert summary["decoders"] == english["decoders"] == {"pitch": 7}
    assert summary["sound_s"] == pytest.approx(sum(u.duration for u in utterances), abs=0.01)
    assert summary["speed"]["rtfx"] > 0 and summary["settings"]["batch_size"] == 3
    assert [n for n, _ in seen] == [3, 6, 7] and seen[-1][1] == 1
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    rows = read_predictions(tmp_path / "run")
    assert [row.key for row in rows] == [u.key for u in utterances]
    assert rows[2].hypothesis == "tone of low pitch 440" and rows[2].reference_normalised == "tone of high pitch 440"


@pytest.mark.parametrize("cut", [0, 25])
def test_a_killed_run_goes_on_to_the_same_summary(utterances: list[Utterance], tmp_path: Path, cut: int) -> None:
    whole = evaluate(PitchSystem(wrong=440), utterances, tmp_path / "whole", 2)
    with pytest.raises(KeyboardInterrupt):
        evaluate(PitchSystem(wrong=440, dies_after=3), utterances, tmp_path / "killed", 2)
    path = tmp_path / "killed" / PREDICTIONS
    text = path.read_text()
    assert len(text.splitlines()) == 4  # the first batch ran twice, to warm up
    path.write_text(text[: len(text) - cut])  # a line cut short: its batch is done again
    again = PitchSystem(wrong=440)
    assert without_times(evaluate(again, utterances, tmp_path / "killed", 2)) == without_times(whole)
    assert again.batches == (3 if cut == 0 else 4)
    strip = [re.sub(r'"seconds": [\d.]+', "", (tmp_path / run / PREDICTIONS).read_text()) for run in ("whole", "killed")]
    assert strip[0] == strip[1]


def test_a_folder_belongs_to_one_setting_and_one_list(utterances: list[Utterance], tmp_path: Path) -> None:
    evaluate(PitchSystem(), utterances, tmp_path / "run")
    with pytest.raises(DataError, match=r"run with other settings \(wrong\); give another --out"):
        evaluate(PitchSystem(wrong=1), utterances, tmp_path / "run")
    others = [*utterances[1:], Utterance(utterances[0].audio_filepath, "Another text.", "en", 0.5)]
    with pytest.raises(DataError, match=r"other settings \(utterances_sha256\)"):
        evaluate(PitchSystem(), others, tmp_path / "run")


def test_parts_of_a_file_are_utterances_of_their_own(tmp_path: Path) -> None:
    """Two pitches in one file, each with its text."""
    sound = str(write(tmp_path / "sound" / "both.wav", np.concatenate([tone(330, 1.0), tone(660, 1.0)])))
    rows = [Utterance(sound, f"Tone of high pitch, {hertz}!", "en", 1.0, offset=i) for i, hertz in enumerate((330, 660))]
    summary = evaluate(PitchSystem(), rows, tmp_path / "run")
    assert (summary["utterances"], summary["sound_s"], summary["languages"]["en"]["error_rate"]) == (2, 2.0, 0.0)
    page = write_report([tmp_path / "run"], tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("<audio") == 1  # the other one is not all of its file


def test_lines_of_another_version_are_refused(tmp_path: Path) -> None:
    (tmp_path / PREDICTIONS).write_text('{"audio_filepath": "a.wav", "edits": [0, 0, 0, 0]}\n')
    with pytest.raises(DataError, match="line 1 is of another version"):
        read_predictions(tmp_path)


def test_a_summary_is_json_where_nothing_was_said(tmp_path: Path) -> None:
    sound = str(write(tmp_path / "a.wav", tone(440, 0.5)))
    summary = evaluate(PitchSystem(), [Utterance(sound, "...", "de", 0.5)], tmp_path / "run")
    assert summary["languages"]["de"]["error_rate"] is None and summary["languages"]["de"]["insertions"] == 5

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert json.loads((tmp_path / "run" / "summary.json").read_text(), parse_constant=refuse) == summary
    assert compare([tmp_path / "run"])[0]["error_rate"] is None
    assert "WER –" in write_report([tmp_path / "run"] * 2, tmp_path / "report.html").read_text(encoding="utf-8")


def test_what_cannot_be_used_is_skipped_and_counted(utterances: list[Utterance], tmp_path: Path) -> None:
    manifest = tmp_path / "m.jsonl"
    gone = Utterance(str(tmp_path / "gone.wav"), "nothing", "en", 1.0)
    long = Utterance(str(write(tmp_path / "long.wav", tone(220, 31))), "long", "en", 31.0)
    write_manifest(manifest, [*utterances[:2], gone, long])
    with manifest.open("a") as file:
        file.write('{"audio_filepath": "a.wav", "language": "en", "duration": 1.0}\nnot JSON\n')
    skipped: list[str] = []
    rows = read_manifest(manifest, max_duration_s=math.inf, skipped=skipped)
    assert len(rows) == 4
    assert "m.jsonl, line 5: missing or wrong field text" in skipped[0] and "line 6: not JSON" in skipped[1]
    summary = evaluate(PitchSystem(), rows, tmp_path / "run", 2, skipped)
    assert (summary["utterances"], summary["skipped"]) == (2, 4)
    assert any("gone.wav" in why for why in summary["skipped_why"])
    assert any("longer than 30 s" in why for why in summary["skipped_why"])
    assert summary["languages"]["en"]["error_rate"] == 0.0
    with pytest.raises(DataError, match=r"nothing to evaluate.*line 5"):
        evaluate(PitchSystem(), [], tmp_path / "none", 2, skipped)


def test_other_languages_have_both_rules(tmp_path: Path) -> None:
    sound = str(write(tmp_path / "a.wav", tone(440, 0.5)))

    class Hindi(PitchSystem):
        def transcribe(self, sounds: Sequence[np.ndarray], languages: Sequence[str]) -> list[Hypothesis]:
            assert list(languages) == ["hi"]
            return [Hypothesis("हीन्दी", "pitch")]

    summary = evaluate(Hindi(), [Utterance(sound, "हिन्दी", "hi", 0.5)], tmp_path / "run")
    hindi = summary["languages"]["hi"]
    assert hindi["unit"] == "character" and hindi["error_rate"] == 0.0
    assert hindi["with_marks"]["substitutions"] == 1
    assert summary["passes"] is None and summary["normaliser"] == "Whisper's normaliser"


def test_the_share_of_languages_found_counts_all_and_longer_clips(utterances: list[Utterance], tmp_path: Path) -> None:
    """Right in what sounds low, wrong in the rest; of two clips of over 2 s one is right."""

    class Finder(PitchSystem):
        def transcribe(self, sounds: Sequence[np.ndarray], languages: Sequence[str]) -> list[Hypothesis]:
            return [Hypothesis("tone", "pitch", 1, "en" if pitch(sound) < 500 else "de") for sound in sounds]

    longer = [
        Utterance(str(write(tmp_path / "sound" / f"long{hertz}.wav", tone(hertz, 2.5))), "Tone.", "en", 2.5)
        for hertz in (300, 600)
    ]
    summary = evaluate(Finder(), [*utterances, *longer], tmp_path / "run", 3)
    english = summary["languages"]["en"]
    assert english["language_found"] == pytest.approx(4 / 9, abs=1e-5)
    assert (english["language_found_over_2_s"], english["over_2_s"]) == (0.5, 2)
    named = evaluate(PitchSystem(), utterances, tmp_path / "named", 3)
    assert "language_found" not in named["languages"]["en"]


def test_the_report_is_one_page_with_differences_and_players(utterances: list[Utterance], tmp_path: Path) -> None:
    evaluate(PitchSystem(wrong=440), utterances, tmp_path / "a")
    evaluate(PitchSystem(wrong=550), utterances, tmp_path / "b")
    page = write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "report.html", audio=2).read_text(encoding="utf-8")
    assert '<span class="substitute">high</span>' in page and '<span class="substitute">low</span>' in page
    assert page.count("<audio") == 2 and "data:audio/wav;base64," in page
    assert page.count('class="utterance"') == 7 and page.index("550.wav") < page.index("440.wav")  # worst first
    assert "Error rates after Whisper's normaliser" in page
    assert "<th>written by</th>" in page and "<td>pitch 7</td>" in page
    assert "<svg" in page and not re.search(r'(src|href)="https?:', page)


def test_runs_are_compared_on_what_they_share(utterances: list[Utterance], tmp_path: Path) -> None:
    evaluate(PitchSystem(), utterances, tmp_path / "a")
    evaluate(PitchSystem(wrong=440), utterances[:5], tmp_path / "b")
    first, second = compare([tmp_path / "a", tmp_path / "b"])
    assert first["utterances"] == second["utterances"] == 5 and first["error_rate"] == 0
    assert second["against_first"]["difference"] == pytest.approx(1 / 25)
    with pytest.raises(DataError, match="holds no run"):
        compare([tmp_path / "a", tmp_path])
    evaluate(PitchSystem(), utterances[5:], tmp_path / "c")
    with pytest.raises(DataError, match="no utterance in common"):
        compare([tmp_path / "b", tmp_path / "c"])


@pytest.fixture(scope="module")
def model(whisper_folder: Path, backbone_folder: Path) -> DiffusionGemmaASR:
    return tiny_model(whisper_folder, backbone_folder)


CLIPS, CODES = [tone(440, 0.6), tone(300, 0.9), tone(500, 0.7)], ["en", "de", "en"]


def test_the_system_is_the_path_that_users_call(model: DiffusionGemmaASR) -> None:
    options = TranscribeOptions(DecodeOptions(steps=2, seed=3), vad_method="energy")
    rows = Diffusion(model, {}, options).transcribe(CLIPS, CODES)
    users = Recognizer(model)
    wanted = [
        users.transcribe(clip, vad_method="energy", steps=2, seed=3, language=code)
        for clip, code in zip(CLIPS, CODES, strict=True)
    ]
    assert [row.text for row in rows] == [transcript.text for transcript in wanted]
    written = [{segment.decoder for segment in transcript.segments} or {"none"} for transcript in wanted]
    assert [row.decoder for row in rows] == ["+".join(sorted(decoders)) for decoders in written]


def test_what_is_no_speech_is_written_by_nobody(model: DiffusionGemmaASR) -> None:
    minute = np.zeros(60 * 16_000, np.float32)
    assert Diffusion(model, {}, TranscribeOptions()).transcribe([minute], ["en"]) == [Hypothesis("", "none")]


def test_whole_clips_are_what_the_model_decodes(model: DiffusionGemmaASR) -> None:
    options = TranscribeOptions(DecodeOptions(steps=2, seed=3, start="draft"))
    decoded = decode_clips(model, CLIPS, options.decode, languages=CODES)
    rows = Diffusion(model, {}, options, clips=True).transcribe(CLIPS, CODES)
    assert rows == [Hypothesis(row.text, "denoising", row.steps) for row in decoded]
    drafts = CtcGreedy(model, {}).transcribe(CLIPS, CODES)
    assert [row.text for row in drafts] == [row.draft for row in decoded]


def test_settings_are_what_changes_the_result(model: DiffusionGemmaASR) -> None:
    def settings(find_language: bool = False, clips: bool = False, **named: Any) -> dict[str, Any]:
        return Diffusion(model, {"model": "m"}, from_options(TranscribeOptions, named), find_language, clips).settings()

    assert settings(batch_size=3) == settings() == settings(language="de")
    others = [settings(steps=4), settings(no_speech_threshold=0.5), settings(clips=True), settings(find_language=True)]
    assert all(other != settings() for other in others)


def test_options_of_the_same_name_as_those_within_come_first() -> None:
    options = from_options(EvaluateOptions, {"steps": "1,4", "language": "de", "seed": 7, "batch_size": 2})
    assert options.language == "de" and options.transcribe.decode.language == "auto"
    assert {n: (o.decode.steps, o.decode.seed, o.batch_size) for n, o in options.sweep().items()} == {
        1: (1, 7, 2),
        4: (4, 7, 2),
    }
    with pytest.raises(AsrError, match="steps is 'many'; give numbers such as 8 or 1,2,4,8"):
        EvaluateOptions(steps="many")
    with pytest.raises(AsrError, match="at least 1"):
        EvaluateOptions(steps="8,0")
    with pytest.raises(AsrError, match="find_language is for the system diffusion"):
        EvaluateOptions(system="ctc", find_language=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, whisper_folder: Path, backbone_folder: Path) -> Path:
    """A tiny checkpoint."""
    config = tiny.model_config(whisper_folder, backbone_folder)
    return save_checkpoint(tiny.build_model(config), tmp_path_factory.mktemp("evaluate") / "checkpoint")


@pytest.mark.parametrize("system", ["diffusion", "ctc", "autoregressive"])
def test_every_system_is_loaded_as_asked(folder: Path, tmp_path: Path, system: Any) -> None:
    ((out, loaded),) = load_systems(EvaluateOptions(model=str(folder), system=system, dtype="bfloat16"), tmp_path).items()
    settings = loaded.settings()
    assert out == tmp_path and (settings["system"], settings["dtype"], settings["device"]) == (system, "bfloat16", "cpu")
    with pytest.raises(AsrError, match="device nowhere cannot be used"):
        load_systems(EvaluateOptions(model=str(folder), system=system, device="nowhere"), tmp_path)
    with pytest.raises(AsrError, match="3-bit"):
        load_systems(EvaluateOptions(model=str(folder), system=system, quantization="3-bit"), tmp_path)


def test_an_encoder_may_be_named(folder: Path, whisper_folder: Path, tmp_path: Path) -> None:
    options = EvaluateOptions(model=str(folder), system="ctc", encoder=str(whisper_folder))
    assert load_systems(options, tmp_path)[tmp_path].settings()["encoder"] == str(whisper_folder)
    with pytest.raises(AsrError, match="nowhere"):
        load_systems(EvaluateOptions(model=str(folder), encoder=str(tmp_path / "nowhere")), tmp_path)


def test_a_whisper_is_loaded_as_asked_too(whisper_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(AsrError, match="device nowhere cannot be used"):
        load_systems(EvaluateOptions(model=str(whisper_folder), system="whisper", device="nowhere"), tmp_path)
    with pytest.raises(AsrError, match="leave it out with the system whisper"):
        load_systems(EvaluateOptions(model=str(whisper_folder), system="whisper", quantization="bnb-4bit"), tmp_path)
    with pytest.raises(AsrError, match="brings its encoder"):
        load_systems(EvaluateOptions(model=str(whisper_folder), system="whisper", encoder="other"), tmp_path)


def test_a_model_is_known_again_by_what_its_files_hold(folder: Path, model: DiffusionGemmaASR, tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    before = describe(model, str(other))
    assert before["model_sha256"] == describe(model, str(folder))["model_sha256"]
    (other / "adapter.safetensors").write_bytes(b"another")
    assert describe(model, str(other))["model_sha256"] != before["model_sha256"]


def test_the_commands_from_end_to_end(
    folder: Path, utterances: list[Utterance], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    manifest, out = tmp_path / "m.jsonl", tmp_path / "out"
    foreign = Utterance(utterances[3].audio_filepath, "Bonjour.", "fr", 0.8)
    write_manifest(manifest, [*utterances[:3], foreign])
    with manifest.open("a") as file:
        file.write('{"audio_filepath": "a.wav", "language": "en", "duration": 1.0}\n')
    named = {"model": str(folder), "device": "cpu", "vad_method": "energy"}

    def run(target: Path, **others: Any) -> None:
        evaluate_command([str(manifest)], target, from_options(EvaluateOptions, named | others))

    run(out, steps="1,2")
    printed = capsys.readouterr()
    assert (out / "report.html").is_file() and "steps-2" in printed.out
    assert "error rates after Whisper's normaliser" in printed.out
    assert "m.jsonl, line 5: missing or wrong field" in printed.err and "language 'fr' is none of en, de" in printed.err
    for n in (1, 2):
        summary = json.loads((out / f"steps-{n}" / "summary.json").read_text())
        assert (summary["settings"]["steps"], summary["settings"]["vad_method"], summary["skipped"]) == (n, "energy", 2)
        assert sum(summary["decoders"].values()) == 3
    with pytest.raises(DataError, match=r"other settings \(seed\)"):
        run(out, steps="1,2", seed=1)
    run(tmp_path / "ctc", system="ctc")
    capsys.readouterr()
    compare_command([out / "steps-2", tmp_path / "ctc"])
    assert "diffusion" in capsys.readouterr().out


def test_languages_are_found_where_they_are_not_named(
    whisper_folder: Path, backbone_folder: Path, utterances: list[Utterance], tmp_path: Path
) -> None:
    """A model of one language finds that one."""
    config = tiny.model_config(whisper_folder, backbone_folder, languages=("en",), finds_language=True)
    saved = save_checkpoint(tiny.build_model(config), tmp_path / "checkpoint")
    write_manifest(tmp_path / "m.jsonl", utterances[:2])
    for clips in (False, True):
        out = tmp_path / f"clips-{clips}"
        chosen = EvaluateOptions(model=str(saved), device="cpu", steps="1", find_language=True, clips=clips)
        evaluate_command([str(tmp_path / "m.jsonl")], out, chosen)
        summary = json.loads((out / "summary.json").read_text())
        assert clips is False or summary["languages"]["en"]["language_found"] == 1.0
        assert summary["settings"]["language"] == "auto"


def test_each_data_set_has_its_own_rates(utterances: list[Utterance], tmp_path: Path) -> None:
    data_sets = {u.key: "a" for u in utterances[:4]} | {u.key: "b" for u in utterances[4:]}
    evaluate_systems({tmp_path / "out": PitchSystem(wrong=440)}, utterances, data_sets)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    rates = [summary["data_sets"][name]["en"] for name in "ab"]
    assert [(r["utterances"], r["substitutions"]) for r in rates] == [(4, 1), (3, 0)]
    assert (summary["languages"]["en"]["utterances"], summary["languages"]["en"]["substitutions"]) == (7, 1)
    page = write_report([tmp_path / "out"], tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(f"<td>{data}</td>" in page for data in ("a", "b", "all"))


def test_an_utterance_of_two_lists_counts_in_the_first(folder: Path, utterances: list[Utterance], tmp_path: Path) -> None:
    lists = [tmp_path / f"{name}.jsonl" for name in "ab"]
    write_manifest(lists[0], [*utterances[:2], utterances[0]])  # one line twice
    write_manifest(lists[1], utterances[1:3])
    options = EvaluateOptions(model=str(folder), device="cpu", system="ctc")
    evaluate_command([str(path) for path in lists], tmp_path / "out", options)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [summary["data_sets"][str(path)]["en"]["utterances"] for path in lists] == [2, 1]
