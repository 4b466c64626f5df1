"""The annotated tree of the README names what is there, and everything that is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "diffusion_gemma_asr"


def tree() -> list[tuple[int, list[str]]]:
    """(indentation, names) of every line of the tree."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Where things are")[1]
    block = section.split("```")[1].strip("\n")
    rows = []
    for line in block.splitlines():
        names = re.match(r" *((?:[\w./-]+ {1,2}(?! ))*[\w./-]+)", line)
        assert names, line
        rows.append((len(line) - len(line.lstrip()), [n for n in names[1].split() if "." in n or n.endswith("/")]))
    return rows


def test_every_named_path_exists() -> None:
    parent = ROOT
    for indentation, names in tree():
        for name in names:
            path = (parent if indentation else ROOT) / name
            assert path.exists(), path
        if not indentation:
            parent = ROOT / names[0]


def test_every_module_is_named() -> None:
    named = {name for _, names in tree() for name in names}
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [p.name for p in PACKAGE.glob("*.py") if p.name not in named and p.name not in text]
    assert not [name for name in missing if name != "__main__.py"], missing


def test_every_folder_is_named() -> None:
    named = {name for _, names in tree() for name in names}
    folders = {p.name + "/" for p in PACKAGE.iterdir() if p.is_dir() and not p.name.startswith("_") and not p.is_symlink()}
    assert folders <= {name.split("/")[0] + "/" for name in named}
