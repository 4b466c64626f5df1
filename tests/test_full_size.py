"""benchmarks/full_size.py on its tiny composition: every part runs, and a run that was interrupted goes on."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "full_size.py"


@pytest.fixture(scope="module")
def full_size() -> ModuleType:
    sys.path.insert(0, str(SCRIPT.parent))  # of its neighbours
    spec = importlib.util.spec_from_file_location("full_size", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_parts_are_measured_once(full_size: ModuleType, tmp_path: Path) -> None:
    """A run that was interrupted behind the fourth part goes on with the fifth."""
    out = tmp_path / "results" / "measured.json"
    full_size.main(["--size", "tiny", "--device", "cpu", "--out", str(out)])
    whole = json.loads(out.read_text())
    kinds = [name.split()[0] for name in whole["parts"]]
    assert kinds == ["rates", *["ours"] * 6, "generate()", "training", "experts"]
    assert sum(name.endswith("one by one") for name in whole["parts"]) == 2
    for part in whole["parts"].values():
        assert "error" in part or all(value > 0 for value in part.values() if value is not None)
    assert all(part["peak_gb"] is None for name, part in whole["parts"].items() if name.startswith("ours"))
    kept = dict(list(whole["parts"].items())[:4])
    out.write_text(json.dumps(whole | {"parts": kept}))
    full_size.main(["--size", "tiny", "--device", "cpu", "--out", str(out)])
    again = json.loads(out.read_text())["parts"]
    assert list(again) == list(whole["parts"]) and {name: again[name] for name in kept} == kept


def test_what_was_measured_stands_in_the_table(full_size: ModuleType) -> None:
    part = {
        "clip_s": 10, "batch": 8, "canvas": 48, "steps": 8, "seconds": 0.5, "ms_a_pass": 60.0, "rtfx": 160.0,
        "peak_gb": 53.0, "bytes": 2e9, "flop": 1e9,
    }  # fmt: skip
    parts = {"rates": {"bytes_s": 1e12, "flop_s": 1e15}, "ours a": part, "ours b": {"error": "no memory"}}
    parts["generate() 10 s"] = part | {"batch": 1}
    parts["ours a, kernels launched one by one"] = part | {"seconds": 0.9}
    facts = {"gpu": "a GPU", "torch": "2", "transformers": "5", "date": "today", "commit": "abc"}
    text = full_size.table({"parts": parts, "circumstances": facts})
    assert "| 8 × 10 s | 48 | 0.50 | 160 | 60 | – | – | 2 ms | 53 GB |" in text and text.count("\n| ") == 2
    assert "one by one: clip" not in text and "one by one: seconds 0.9" in text
    assert "generate() 10 s: " in text and "30.00 times the limit of 2 ms" in text
    assert "a GPU, torch 2, transformers 5, today, commit abc." in text


def test_a_pass_costs_what_its_weights_say(full_size: ModuleType) -> None:
    model = full_size.build("tiny", "cpu")
    config = model.backbone.config
    one, many = full_size.cost(model, 1), full_size.cost(model, 10_000)
    assert many["flop"] == pytest.approx(10_000 * one["flop"])
    experts = sum(p.numel() for name, p in model.backbone.model.model.decoder.named_parameters() if ".experts." in name)
    unused = 1 - config.top_k_experts / config.num_experts
    assert many["bytes"] - one["bytes"] == pytest.approx(4 * experts * unused)


def test_the_real_size_wants_a_gpu(full_size: ModuleType) -> None:
    with pytest.raises(SystemExit, match="needs a GPU of 80 GB"):
        full_size.main(["--device", "cpu"])


def test_parts_can_be_chosen(full_size: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "measured.json"
    full_size.main(["--size", "tiny", "--device", "cpu", "--out", str(out), "--parts", r"generate\(\) .*"])
    assert [name.split()[0] for name in json.loads(out.read_text())["parts"]] == ["rates", "generate()"]
