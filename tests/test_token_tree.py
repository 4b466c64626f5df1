"""Rows of tokens as a tree: what they have in common stands there once."""

from __future__ import annotations

from diffusion_gemma_asr.denoise.token_tree import Tree


def test_what_rows_begin_with_in_common_stands_there_once() -> None:
    tree = Tree.of([[7, 8, 9], [7, 8], [], [7, 5], [7, 8, 9]])
    assert tree.tokens == [7, 8, 9, 5] and tree.before == [0, 1, 2, 1]
    assert tree.paths == [[1, 2, 3], [1, 2], [], [1, 4], [1, 2, 3]]
    assert tree.ends == [3, 2, 0, 4, 3]


def test_a_token_sees_those_that_lead_to_it() -> None:
    seen = Tree.of([[7, 8, 9], [7, 5], [8]]).seen().int().tolist()
    assert seen == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 1, 0], [0, 0, 0, 0, 1]]
    assert Tree.of([[], []]).seen().shape == (0, 0)
