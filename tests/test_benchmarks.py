"""benchmarks/: circles of a small package are counted, and what is measured of a tiny model stands in the tables."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from sounds import write
from tiny_model import clips, tiny_model

from diffusion_gemma_asr.audio.read import load_audio
from diffusion_gemma_asr.checkpoint.load import find_checkpoint
from diffusion_gemma_asr.data.manifest import Utterance, write_manifest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
EXAMPLE = BENCHMARKS.parent / "examples" / "en.flac"
FACTS = {"gpu": "a GPU", "torch": "2", "transformers": "5", "date": "today", "commit": "abc"}


@pytest.fixture(scope="module", autouse=True)
def importable() -> Iterator[None]:
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def structure() -> ModuleType:
    import structure

    return structure


def package(root: Path, **files: str) -> Path:
    """A repository whose package holds these files, by their paths with __ for a slash."""
    for name, text in files.items():
        path = root / "src" / "diffusion_gemma_asr" / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (root / "tests").mkdir()
    (root / "tests" / "test_a.py").write_text("x = 1\n")
    return root


def test_circles_are_found_between_files_and_between_folders(structure: ModuleType, tmp_path: Path) -> None:
    root = package(
        tmp_path,
        audio__read="from ..model.a import x\n",
        model__a="from .b import y\n",
        model__b="def late():\n    from . import a\n",
        model__c="from ..data import d\n",
        data__d="from ..model.a import x\n",
    )
    graph = structure.imports(root / "src" / "diffusion_gemma_asr")
    assert graph["audio/read"] == {"model/a"} and graph["model/c"] == {"data/d"}
    assert structure.circles(graph) == [["model/a", "model/b"]]
    assert structure.circles(structure.folders(graph)) == [["data", "model"]]


def test_the_table_counts_names_lines_and_parameters(structure: ModuleType, tmp_path: Path) -> None:
    root = package(
        tmp_path,
        errors="class E(Exception):\n    pass\n",
        audio__read="def f(self, a, b, *, c):\n    pass\n",
        app__cli="x = 1\n" * 5,
    )
    page = tmp_path / "docs" / "architecture.md"
    page.parent.mkdir()
    page.write_text("before\n<!-- table structure -->\nold\n<!-- end structure -->\nbehind\n")
    structure.main(["--root", str(root), "--write"])
    rows = [line.split(" | ")[-1].strip(" |") for line in page.read_text().splitlines() if line.startswith("|")]
    assert rows[2:] == ["3", "2 / 4", "0 + 0", "4 (`audio/read.py: f`)", "9 / 1"]
    assert page.read_text().startswith("before\n") and page.read_text().endswith("<!-- end structure -->\nbehind\n")


def test_languages_are_measured_by_list(whisper_folder: Path, backbone_folder: Path, tmp_path: Path) -> None:
    import languages

    model = tiny_model(whisper_folder, backbone_folder, languages=("de",), finds_language=True)
    sounds = clips([16_000, 40_000])
    rows = [
        Utterance(str(write(tmp_path / f"{i}.wav", sound)), "ein satz", "de", len(sound) / 16_000)
        for i, sound in enumerate(np.clip(sound, -1, 1) for sound in sounds)
    ]
    result = languages.measure_list(model, rows)
    assert {*result["systems"], "whisper"} == set(languages.SYSTEMS) and result["count"] == 2
    wrong = [result["systems"][name] for name in ("chosen", "candidates")]
    fewer = [row["substitutions"] + row["deletions"] + row["insertions"] for row in wrong]
    words = wrong[0]["reference"]
    changed = result["changed"]
    assert changed["better"] - changed["worse"] == pytest.approx((fewer[0] - fewer[1]) / words, abs=1e-4)
    assert all(one["said"] == "ein satz" for one in changed["examples"])
    assert (result["language_found"], result["language_count"]) == (1.0, 1)  # one is over 2 s; it knows one language
    measured = {"lists": {"synthetic de": result}, "circumstances": FACTS}
    table = languages.table(measured)
    assert "| errors after Whisper's normaliser" in table and "| synthetic de (2) |" in table and "100.0% of 1" in table
    assert "own decoder" not in table and "a second of sound, without reading, encoder and projector: CTC draft " in table
    assert "| synthetic de | ein satz | " in languages.examples(measured) or not changed["examples"]
    short = languages.short_table({"tiny": measured})
    assert "| `tiny`, synthetic: CTC draft | – | " in short and "Whisper's normaliser" in short


def test_the_server_is_measured_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    import serve

    results = {
        "load": dict(requests=9, clients=3, lost=0, as_in_batch=9, speed=8.0, batch_speed=10.0, p50_s=1.0, p95_s=2.0),
        "beside": dict(long_s=120.0, long_one_whole=True, idle_s=0.5, beside_s=0.75, beside_p95_s=1.0, count=7),
        "memory": dict(many=100, brief_s=1.0, memory_mb=[500.0, 501.0, 502.0]),
    }
    monkeypatch.setattr(serve, "PARTS", {name: lambda size, part=part: part for name, part in results.items()})
    monkeypatch.setattr(serve, "circumstances", lambda: FACTS)
    stored: list[list[str]] = []
    measured: dict[str, object] = {}
    serve.measure(["memory", "load"], serve.SMALL, measured, lambda now: stored.append(list(now)))
    assert stored == [["memory"], ["memory", "load"]]
    text = serve.table(measured)
    assert "| of that of `transcribe_many` | 0.80 |" in text and "beside" not in text
    assert "| memory, 10 and 100 requests later | 500 MB, 502 MB |" in text and text.count("a GPU, torch 2") == 1
    serve.measure(["beside"], serve.SMALL, measured, lambda now: None)
    assert "| the same beside 2 minutes, 7 times | 750 ms (1.5 ×) |" in serve.table(measured)


def test_the_table_of_several_gpus_is_arithmetic(tmp_path: Path) -> None:
    import scale

    def part(clip_s: int, canvas: int, rtfx: float) -> dict[str, float]:
        return {"clip_s": clip_s, "batch": 4, "canvas": canvas, "steps": 8, "rtfx": rtfx}

    parts = {"rates": {}, "ours a": part(10, 48, 7.0), "ours b": part(30, 128, 200.0), "ours c": part(30, 256, 9.0)}
    text = scale.table({"parts": parts, "circumstances": FACTS}, price=3.0)
    (line,) = [line for line in text.splitlines() if line.startswith("| 4 × 30 s, 8 steps |")]
    assert line.split(" | ")[1:] == ["200", "1,600", "12,800", "50.0 h", "6.2 h", "0.8 h", "$15.00 |"]
    assert "Assumed: $3.00" in text and "arithmetic" in text and "a GPU, torch 2" in text


def test_lora_of_all_kinds_is_trained_and_told(tmp_path: Path) -> None:
    """On a bundled model; what is measured already is not trained again."""
    import shared_lora

    said, clip = "follow the river until you reach the mill", load_audio(EXAMPLE)
    rows = []
    for number in range(4):
        sound = write(tmp_path / f"{number}.wav", clip[number * 500 :])
        rows.append(Utterance(str(sound), said, "en", (len(clip) - number * 500) / 16_000))
    for name, some in {"train": rows[:3], "dev": rows[3:]}.items():
        write_manifest(tmp_path / f"{name}.jsonl", some)
    page = tmp_path / "page.md"
    page.write_text("<!-- table shared -->\n<!-- end shared -->\n")
    places = {"train": "train.jsonl", "dev": "dev.jsonl", "frames": "frames", "data": "data.json", "page": "page.md"}
    arguments = [part for name, file in places.items() for part in (f"--{name}", str(tmp_path / file))]
    arguments += ["--model", "mini", "--encoder", str(find_checkpoint("mini") / "encoder")]
    shared_lora.main([*arguments, "--steps", "1", "--seeds", "1"])
    (tmp_path / "train.jsonl").unlink()  # a second time nothing is trained
    shared_lora.main([*arguments, "--steps", "1", "--seeds", "1"])
    lines = [line.strip("| ").split(" | ") for line in page.read_text().splitlines() if line.startswith("|")][2:]
    counts = [int(line[1].replace(",", "")) for line in lines]
    assert counts[0] == 0 and counts[1] == 2 * counts[2] == counts[3] > 0
    assert all(0 < float(line[2]) < 20 and line[3].endswith("%") for line in lines)
    results = json.loads((tmp_path / "data.json").read_text())["runs"]
    starts = [by_seed["0"]["before"] for by_seed in results.values()]
    assert starts[0] == starts[1] == starts[2]  # new LoRA does nothing, and all see the same canvases
    assert "1 steps of 8 utterances of " in page.read_text() and "one seed" in page.read_text()
