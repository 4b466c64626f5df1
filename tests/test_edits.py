"""Layouts of canvases: drafts laid out for correction, and what they have to become."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion_gemma_asr.denoise.canvas import SPARE, align_edits, edit_canvases, edit_layout

ROWS = st.lists(st.integers(1, 3), max_size=4)


def edits(layout: list[int], row: list[int]) -> int:
    return sum(a != b for a, b in zip(layout, row, strict=True))


@pytest.mark.parametrize(
    ("draft", "target", "row"),
    [
        ([7, 8], [7, 8], [0, 7, 0, 8, 0]),
        ([7, 9, 8], [7, 8], [0, 7, 0, 0, 0, 8, 0]),  # one too many: a blank, and nothing moves
        ([7, 8], [7, 9, 8], [0, 7, 9, 8, 0]),  # one missing: into the gap
        ([7, 9], [7, 8], [0, 7, 0, 8, 0]),
        ([7], [7, 8, 9], [0, 7, 8, 9]),
        ([], [], [0]),
    ],
)
def test_corrections_are_made_in_place(draft: list[int], target: list[int], row: list[int]) -> None:
    layout = edit_layout(draft, 0)
    assert len(layout) == 2 * len(draft) + 1 + SPARE
    assert align_edits(target, layout, 0) == row + [0] * (len(layout) - len(row))


@given(draft=st.lists(st.integers(1, 3), max_size=2), target=ROWS)
def test_no_other_way_needs_fewer_edits(draft: list[int], target: list[int]) -> None:
    layout = edit_layout(draft, 0)
    row = align_edits(target, layout, 0)
    assert row is not None and [token for token in row if token] == target
    placed = (dict(zip(places, target, strict=True)) for places in combinations(range(len(layout)), len(target)))
    assert edits(layout, row) == min(edits(layout, [p.get(i, 0) for i in range(len(layout))]) for p in placed)


def test_a_target_that_does_not_fit_is_told() -> None:
    layout = edit_layout([5], 0)
    assert align_edits(range(1, len(layout) + 1), layout, 0) == list(range(1, len(layout) + 1))
    assert align_edits(range(1, len(layout) + 2), layout, 0) is None


def test_canvases_of_a_batch() -> None:
    shown, clean, usable = edit_canvases([[7, 9], []], [[7], [5] * 9], (2, 1), 0, 4)
    assert shown.tolist() == [[0, 7, 0, 9, 0, 0, 0, 0, 2, 1], [1] * 10]
    assert clean.tolist() == [[0, 7, 0, 0, 0, 0, 0, 0, 2, 1], [1] * 10]
    assert usable.tolist() == [True, False]
    assert edit_canvases([[7]], [[7]], (2, 1), 0, 30)[0].shape == (1, 30)
