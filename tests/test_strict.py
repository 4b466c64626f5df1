"""Settings in files and options by name: every key known, every value possible, or one line that says what is wrong."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from diffusion_gemma_asr.errors import AsrError, RecipeError
from diffusion_gemma_asr.strict import (
    check_keywords,
    from_mapping,
    from_options,
    option,
    option_names,
    require,
    resolve_source,
    suggest,
)


@dataclass(frozen=True)
class Inner:
    rank: int = 4
    ratio: float = 0.5


@dataclass(frozen=True)
class Outer:
    name: str
    kind: Literal["one", "two"] = "one"
    size: int | None = None
    strides: tuple[int, int] = (4, 2)
    codes: tuple[str, ...] = ("en",)
    folder: Path | None = None
    on: bool = False
    inner: Inner = field(default_factory=Inner)
    rows: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, Inner] = field(default_factory=dict)


def test_a_mapping_becomes_a_dataclass() -> None:
    assert from_mapping(Outer, {"name": "a"}) == Outer("a")
    content = {
        "name": "a",
        "kind": "two",
        "size": 3,
        "strides": [2, 1],
        "codes": ["hi", "zh"],
        "folder": "x/y",
        "on": True,
        "inner": {"rank": 8, "ratio": 1},
        "rows": {"any": [1, "two"]},
        "parts": {"p": {"rank": 2}},
    }
    whole = from_mapping(Outer, content)
    assert whole == Outer(
        "a", "two", 3, (2, 1), ("hi", "zh"), Path("x/y"), True, Inner(8, 1.0), {"any": [1, "two"]}, {"p": Inner(2)}
    )
    assert type(whole.inner.ratio) is float
    assert from_mapping(Outer, {"name": "a", "size": None}).size is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "'name' is missing; add it"),
        ({"name": 3}, "'name' must be text, found 3"),
        ({"name": "a", "nmae": "b"}, "unknown key 'nmae' at the top level; did you mean 'name'?"),
        ({"name": "a", "zzz": 1}, "unknown key 'zzz' at the top level; known here: name, kind, "),
        ({"name": "a", "inner": {"rnak": 1}}, "unknown key 'rnak' in section 'inner'; did you mean 'rank'?"),
        ({"name": "a", "inner": 3}, "'inner' must be a section of key: value lines, found 3"),
        ({"name": "a", "inner": {"rank": "8"}}, "'inner.rank' must be a whole number, found the text '8'"),
        ({"name": "a", "inner": {"rank": True}}, "'inner.rank' must be a whole number, found true"),
        ({"name": "a", "inner": {"ratio": float("nan")}}, "'inner.ratio' must be a number, found nan"),
        ({"name": "a", "inner": {"ratio": "3e-3"}}, "'inner.ratio' must be a number, found the text '3e-3'"),
        ({"name": "a", "inner": {"rank": None}}, "'inner.rank' must be a whole number, found nothing"),
        ({"name": "a", "kind": "three"}, "'kind' must be one of one, two, found the text 'three'"),
        ({"name": "a", "strides": [1, 2, 3]}, r"'strides' must be a list of 2, found the list \[1, 2, 3\]"),
        ({"name": "a", "strides": 4}, "'strides' must be a list, found 4"),
        ({"name": "a", "codes": ["en", 3]}, r"'codes\[1\]' must be text, found 3"),
        ({"name": "a", "on": 1}, "'on' must be true or false, found 1"),
        ({"name": "a", "rows": []}, "'rows' must be a section"),
        ({"name": "a", "parts": {"p": {"rank": 1.5}}}, "'parts.p.rank' must be a whole number, found 1.5"),
    ],
)
def test_what_is_wrong_is_named(content: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        from_mapping(Outer, content)
    assert "\n" not in str(caught.value)


def test_require() -> None:
    require(True, "x", 3, "anything")
    with pytest.raises(RecipeError, match="'x' must be at least 4, found 3"):
        require(False, "x", 3, "at least 4")


# -- options by name -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Deep:
    steps: int = option(8, "Steps.", min=1)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise AsrError(f"steps is {self.steps}")


@dataclass(frozen=True)
class Options:
    deep: Deep = field(default_factory=Deep)
    batch_size: int = option(16, "Rows.")


def test_flat_names_reach_options_inside_options() -> None:
    assert from_options(Options, {}) == Options()
    assert from_options(Options, {"steps": 3, "batch_size": 2}) == Options(Deep(3), 2)
    assert from_options(Options, {"deep": Deep(5)}) == Options(Deep(5))
    assert option_names(Options) == ["steps", "batch_size"]
    with pytest.raises(AsrError, match="steps is 0"):
        from_options(Options, {"steps": 0})


def test_a_wrong_name_is_one_error_with_the_nearest_one() -> None:
    with pytest.raises(AsrError, match=r"stpes is no option here; did you mean 'steps'\?"):
        from_options(Options, {"stpes": 3})
    with pytest.raises(AsrError, match="xyz is no option here; known are batch_size, steps"):
        from_options(Options, {"xyz": 3})


def test_keywords_of_a_function() -> None:
    def load(name: str, *, device: str = "cpu", dtype: str = "auto") -> None: ...

    check_keywords(load, {"device": "cuda"})
    with pytest.raises(AsrError, match=r"devise is no option here; did you mean 'device'\?"):
        check_keywords(load, {"devise": "cuda"})
    with pytest.raises(AsrError, match="name is no option here; known are device, dtype"):
        check_keywords(load, {"name": "x"})


def test_suggest() -> None:
    assert suggest("lerning_rate", ["learning_rate", "steps"]) == "; did you mean 'learning_rate'?"
    assert suggest("qqqq", ["learning_rate", "steps"]) == ""


# -- folders and hub names ---------------------------------------------------------------------------------------


def test_folders_are_told_from_hub_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    inside = str(tmp_path / "owner" / "name")
    assert resolve_source("owner/name", tmp_path) == inside
    assert resolve_source("owner/other", tmp_path) == "owner/other"
    assert resolve_source("./other", tmp_path) == str(tmp_path / "other")
    assert resolve_source("../name", tmp_path / "owner") == str(tmp_path / "name")
    assert resolve_source(inside, Path("/elsewhere")) == inside
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_source("~/owner", Path("/elsewhere")) == str(tmp_path / "owner")
