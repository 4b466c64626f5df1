"""The house keeps its order: who imports whom, how long files are, how many parameters a function has."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "diffusion_gemma_asr"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)

# Each room may import those before it.
ORDER = [
    "errors", "files", "memory", "strict", "languages",
    "audio", "model", "denoise", "transcribe", "drafts", "checkpoint",
    "__init__",  # the names of the package
    "data", "evaluate", "train", "server", "app", "__main__", "hf",
]  # fmt: skip
LAZY = {"checkpoint": "drafts"}  # inside functions alone: what most checkpoints do not need
LINES, PARAMETERS, TOP_NAMES = 400, 8, 16
MANY_PARAMETERS = {"checkpoint.load.load_checkpoint"}  # its keywords are its options, each with a default


def name_of(path: Path) -> str:
    """A module's name inside the package: "model.head"; of a folder's __init__ the folder's."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


NAMES = {name_of(path) for path in MODULES}


def nodes(tree: ast.AST, inside: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """All nodes, and whether they are inside a function."""
    for node in ast.iter_child_nodes(tree):
        deeper = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield node, inside
        yield from nodes(node, deeper)


def imports_of(path: Path) -> list[tuple[str, bool]]:
    """Modules of the package that a module imports, for its type annotations alone or not, and whether a function does."""
    package = path.relative_to(PACKAGE).parts[:-1]
    wanted: list[tuple[str, bool]] = []
    for node, inside in nodes(tree_of(path)):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = [*base, *(node.module.split(".") if node.module else [])]
            if not node.level:
                if module[0] != PACKAGE.name:
                    continue
                module = module[1:]
            for alias in node.names:
                whole = ".".join([*module, alias.name])
                wanted.append((whole if whole in NAMES else ".".join(module) or "__init__", inside))
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == PACKAGE.name:
                    wanted.append((alias.name.removeprefix(PACKAGE.name).lstrip(".") or "__init__", inside))
    return wanted


def room(name: str) -> str:
    return name.split(".")[0]


def test_the_scan_sees_imports() -> None:
    """Else the tests below would hold for nothing."""
    wanted = {name for name, _ in imports_of(PACKAGE / "denoise" / "decode.py")}
    assert {"languages", "model.model", "denoise.queue"} <= wanted
    assert ("train.run", True) in imports_of(PACKAGE / "app" / "train.py")
    assert sum(len(imports_of(path)) for path in MODULES) > 200


def test_every_import_is_of_something_that_is_there() -> None:
    for path in MODULES:
        missing = [name for name, _ in imports_of(path) if name not in NAMES]
        assert not missing, f"{name_of(path)} imports {missing}"


def test_rooms_import_only_those_before_them() -> None:
    assert {room(name) for name in NAMES} <= set(ORDER), "give the new room its place in ORDER"
    wrong = []
    for path in MODULES:
        own = room(name_of(path))
        for name, inside in imports_of(path):
            if ORDER.index(room(name)) > ORDER.index(own):
                wrong.append(f"{name_of(path)} imports {name}, which comes later")
            elif LAZY.get(own) == room(name) and not inside:
                wrong.append(f"{name_of(path)} imports {name} at once; only inside a function")
    assert not wrong, "\n".join(wrong)


def circles() -> list[list[str]]:
    """Groups of modules that reach each other by imports, also those inside functions (Tarjan's components)."""
    graph = {name_of(path): {name for name, _ in imports_of(path) if name != name_of(path)} for path in MODULES}
    for lazy, target in LAZY.items():
        graph = {
            name: {other for other in others if not (room(name) == lazy and room(other) == target)}
            for name, others in graph.items()
        }
    numbers: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(name: str) -> None:
        numbers[name] = lowest[name] = len(numbers)
        stack.append(name)
        for other in sorted(graph.get(name, ())):
            if other not in numbers:
                visit(other)
                lowest[name] = min(lowest[name], lowest[other])
            elif other in stack:
                lowest[name] = min(lowest[name], numbers[other])
        if lowest[name] == numbers[name]:
            at = stack.index(name)
            groups.append(stack[at:])
            del stack[at:]

    for name in sorted(graph):
        if name not in numbers:
            visit(name)
    return [group for group in groups if len(group) > 1]


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circles() == []


@pytest.mark.parametrize("folder", [PACKAGE, Path(__file__).parent])
def test_files_are_short(folder: Path) -> None:
    sizes = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in folder.rglob("*.py")}
    assert not {str(path.relative_to(folder)): n for path, n in sizes.items() if n > LINES}


def parameters(path: Path) -> Iterator[tuple[str, int]]:
    """Functions and methods, and how many values they take besides self and cls."""
    for node, _ in nodes(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            names += [a.arg for a in (node.args.vararg, node.args.kwarg) if a is not None]
            yield f"{name_of(path)}.{node.name}", len([name for name in names if name not in ("self", "cls")])


def test_functions_take_few_parameters() -> None:
    many = {name: n for path in MODULES for name, n in parameters(path) if n > PARAMETERS}
    assert many.keys() <= MANY_PARAMETERS, many


def test_few_names_at_the_top() -> None:
    names = {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert len(names - {"__init__", "__main__"}) <= TOP_NAMES, sorted(names)
