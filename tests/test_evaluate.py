"""evaluate/: a run that is killed and resumed gives the summary of a whole one; what cannot be used is named and counted."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sounds import pitch, tone, write
from tiny_model import tiny_model
from typer.testing import CliRunner

from diffusion_gemma_asr import cli
from diffusion_gemma_asr.data.manifest import Utterance, read_manifest, write_manifest
from diffusion_gemma_asr.denoise import DenoiseOptions
from diffusion_gemma_asr.errors import DataError
from diffusion_gemma_asr.evaluate import command
from diffusion_gemma_asr.evaluate.compare import compare
from diffusion_gemma_asr.evaluate.report import write_report
from diffusion_gemma_asr.evaluate.run import PREDICTIONS, evaluate, read_predictions
from diffusion_gemma_asr.evaluate.systems import CtcGreedy, Diffusion, Hypothesis
from diffusion_gemma_asr.model import DiffusionGemmaASR

HERTZ = [220, 330, 440, 550, 660, 770, 880]


class PitchSystem:
    """Writes the pitch that it hears; `wrong` is what it hears wrongly. Dies in the batch after `dies_after` batches."""

    def __init__(self, wrong: int = 0, dies_after: int | None = None):
        self.wrong, self.dies_after, self.batches = wrong, dies_after, 0

    def settings(self) -> dict[str, Any]:
        return {"system": "pitch", "wrong": self.wrong}

    def transcribe(self, clips: Sequence[np.ndarray], languages: Sequence[str]) -> list[Hypothesis]:
        self.batches += 1
        if self.dies_after is not None and self.batches > self.dies_after:
            raise KeyboardInterrupt
        assert len(clips) == len(languages)
        heard = [round(pitch(clip) / 110) * 110 for clip in clips]
        return [Hypothesis(f"tone of {'low' if h == self.wrong else 'high'} pitch {h}", 3) for h in heard]


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
    assert summary["sound_s"] == pytest.approx(sum(u.duration for u in utterances), abs=0.01)
    assert summary["speed"]["rtfx"] > 0 and summary["settings"]["batch_size"] == 3
    assert [n for n, _ in seen] == [3, 6, 7] and seen[-1][1] == 1
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    rows = read_predictions(tmp_path / "run")
    assert [row.audio_filepath for row in rows] == [u.audio_filepath for u in utterances]
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


def test_a_folder_belongs_to_one_setting(utterances: list[Utterance], tmp_path: Path) -> None:
    evaluate(PitchSystem(), utterances, tmp_path / "run")
    with pytest.raises(DataError, match=r"run with other settings \(wrong\); give another --out"):
        evaluate(PitchSystem(wrong=1), utterances, tmp_path / "run")


def test_what_cannot_be_used_is_skipped_and_counted(utterances: list[Utterance], tmp_path: Path) -> None:
    manifest = tmp_path / "m.jsonl"
    gone = Utterance(str(tmp_path / "gone.wav"), "nothing", "en", 1.0)
    long = Utterance(str(write(tmp_path / "long.wav", tone(220, 31))), "long", "en", 3.0)
    write_manifest(manifest, [*utterances[:2], gone, long])
    with manifest.open("a") as file:
        file.write('{"audio_filepath": "a.wav", "language": "en", "duration": 1.0}\nnot JSON\n')
    skipped: list[str] = []
    rows = read_manifest(manifest, skipped=skipped)
    assert len(rows) == 4
    assert "m.jsonl, line 5: missing or wrong field 'text'" in skipped[0] and "line 6: not JSON" in skipped[1]
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
        def transcribe(self, clips: Sequence[np.ndarray], languages: Sequence[str]) -> list[Hypothesis]:
            assert list(languages) == ["hi"]
            return [Hypothesis("हीन्दी", 1)]

    found = evaluate(Hindi(), [Utterance(sound, "हिन्दी", "hi", 0.5)], tmp_path / "run")["languages"]["hi"]
    assert found["unit"] == "character" and found["error_rate"] == 0.0
    assert found["with_marks"]["substitutions"] == 1


def test_the_share_of_languages_found_counts_all_and_longer_clips(utterances: list[Utterance], tmp_path: Path) -> None:
    """Right in what sounds low, wrong in the rest; of two clips of over 2 s one is right."""

    class Finder(PitchSystem):
        def transcribe(self, clips: Sequence[np.ndarray], languages: Sequence[str]) -> list[Hypothesis]:
            return [Hypothesis("tone", 1, "en" if pitch(clip) < 500 else "de") for clip in clips]

    longer = [
        Utterance(str(write(tmp_path / "sound" / f"long{hertz}.wav", tone(hertz, 2.5))), "Tone.", "en", 2.5)
        for hertz in (300, 600)
    ]
    summary = evaluate(Finder(), [*utterances, *longer], tmp_path / "run", 3)
    english = summary["languages"]["en"]
    assert english["language_found"] == pytest.approx(4 / 9, abs=1e-5)
    assert (english["language_found_over_2_s"], english["over_2_s"]) == (0.5, 2)
    told = evaluate(PitchSystem(), utterances, tmp_path / "told", 3)
    assert "language_found" not in told["languages"]["en"]


def test_the_report_is_one_page_with_differences_and_players(utterances: list[Utterance], tmp_path: Path) -> None:
    evaluate(PitchSystem(wrong=440), utterances, tmp_path / "a")
    evaluate(PitchSystem(wrong=550), utterances, tmp_path / "b")
    page = write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "report.html", audio=2).read_text(encoding="utf-8")
    assert '<span class="substitute">high</span>' in page and '<span class="substitute">low</span>' in page
    assert page.count("<audio") == 2 and "data:audio/wav;base64," in page
    assert page.count('class="utterance"') == 7 and page.index("550.wav") < page.index("440.wav")  # worst first
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


def test_our_systems_write_what_the_model_does(model: DiffusionGemmaASR) -> None:
    clips = [tone(440, 0.6), tone(300, 0.9)]
    options = DenoiseOptions(steps=2)
    decoded = model.transcribe_batch(clips, ["en", "de"], options, seed=3, start="draft")
    found = Diffusion(model, "tiny", options, "draft", 3).transcribe(clips, ["en", "de"])
    assert found == [Hypothesis(row.text, row.steps) for row in decoded]
    drafts = CtcGreedy(model, "tiny").transcribe(clips, ["en", "de"])
    assert [row.text for row in drafts] == [row.draft for row in decoded]


def test_the_commands_from_end_to_end(
    model: DiffusionGemmaASR, utterances: list[Utterance], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "load", lambda name, device: model)
    manifest, out = tmp_path / "m.jsonl", tmp_path / "out"
    write_manifest(manifest, utterances[:3])
    with manifest.open("a") as file:
        file.write('{"audio_filepath": "a.wav", "language": "en", "duration": 1.0}\n')
    runner = CliRunner()
    found = runner.invoke(cli.app, ["evaluate", "--recipe", "mini", "--manifest", str(manifest), "--out", str(out),
                                    "--steps", "1,2", "--engine", "reference"])  # fmt: skip
    assert found.exit_code == 0, found.output
    assert (out / "report.html").is_file() and "steps-2" in found.output
    assert "skipped: " in found.output and "m.jsonl, line 4: missing or wrong field 'text'" in found.output
    for n in (1, 2):
        settings = json.loads((out / f"steps-{n}" / "summary.json").read_text())["settings"]
        assert (settings["steps"], settings["engine"], settings["canvas"]) == (n, "reference", "fitted")
    untold = runner.invoke(cli.app, ["evaluate", str(manifest), "--out", str(tmp_path / "untold"), "--find_language"])
    assert untold.exit_code == 0, untold.output
    summary = json.loads((tmp_path / "untold" / "summary.json").read_text())
    assert summary["languages"]["en"]["language_found"] == 1.0  # it knows one alone
    ctc = runner.invoke(cli.app, ["evaluate", str(manifest), "--out", str(tmp_path / "ctc"), "--system", "ctc"])
    assert ctc.exit_code == 0, ctc.output
    compared = runner.invoke(cli.app, ["compare", str(out / "steps-2"), str(tmp_path / "ctc")])
    assert compared.exit_code == 0 and "diffusion" in compared.output, compared.output
    wrong = runner.invoke(cli.app, ["evaluate", str(manifest), "--out", str(out), "--steps", "many"])
    assert wrong.exit_code == 2
    nothing = runner.invoke(cli.app, ["evaluate", "--out", str(out)])
    assert nothing.exit_code == 2 and "give a manifest" in nothing.output


def test_each_data_set_has_its_own_rates(
    utterances: list[Utterance], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "load_systems", lambda *_: {tmp_path / "out": PitchSystem(wrong=440)})
    lists = [str(tmp_path / f"{name}.jsonl") for name in "ab"]
    for path, rows in zip(lists, (utterances[:4], utterances[3:]), strict=True):  # one utterance is in both
        write_manifest(Path(path), rows)
    found = CliRunner().invoke(cli.app, ["evaluate", *lists, "--out", str(tmp_path / "out")])
    assert found.exit_code == 0, found.output
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    rates = [summary["data_sets"][path]["en"] for path in lists]
    assert [(r["utterances"], r["substitutions"]) for r in rates] == [(4, 1), (3, 0)]
    assert (summary["languages"]["en"]["utterances"], summary["languages"]["en"]["substitutions"]) == (7, 1)
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(f"<td>{data}</td>" in page for data in [*lists, "all"])
