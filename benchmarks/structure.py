"""How large the package is and how it hangs together, counted from its source.

    python benchmarks/structure.py                 prints the table
    python benchmarks/structure.py --write         and puts it into docs/architecture.md

Circles are counted over relative imports, those inside functions included: between files, and between folders.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from pages import ROOT, fill, markdown

PAGE = Path("docs/architecture.md")
FLOW = ("audio", "model", "denoise", "transcribe", "errors.py", "files.py", "languages.py", "memory.py", "strict.py")
BEFORE = ("63", "18 / 3,981", "1", "15, of a command 34", "15,511 / 12,069")  # at commit f4dd62f

Graph = dict[str, set[str]]


def sources(folder: Path) -> list[Path]:
    """All Python files below a folder."""
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def lines(paths: list[Path]) -> int:
    """Lines of these files, empty ones included."""
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def names_at_the_top(package: Path) -> int:
    """Files and folders directly in the package; `recipes`, a link to the repository's, does not count."""
    folders = [path for path in package.iterdir() if path.is_dir() and not path.is_symlink() and path.name != "__pycache__"]
    return len(list(package.glob("*.py"))) + len(folders)


def imports(package: Path) -> Graph:
    """The files that each file imports by relative imports, at any depth of its code, by their paths in the package."""
    known = {path.relative_to(package).with_suffix("").as_posix() for path in sources(package)}
    graph: Graph = {}
    for path in sources(package):
        name = path.relative_to(package).with_suffix("").as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
        graph[name] = {target for node in nodes for target in _targets(name, node, known)} - {name}
    return graph


def _targets(name: str, node: ast.ImportFrom, known: set[str]) -> Iterator[str]:
    """The files that one import reads: modules where it names modules, else the module or package that holds the names."""
    folder = name.split("/")[: -node.level]
    base = "/".join([*folder, *(node.module or "").split(".")]).strip("/")
    if base in known:
        yield base
        return
    for alias in node.names:
        module = f"{base}/{alias.name}".strip("/")
        for candidate in (module, f"{module}/__init__", f"{base}/__init__".strip("/")):
            if candidate in known:
                yield candidate
                break


def folders(graph: Graph) -> Graph:
    """The same between folders: those at the package's top, and its single files."""
    result: Graph = {}
    for name, targets in graph.items():
        result.setdefault(name.split("/")[0], set()).update(target.split("/")[0] for target in targets)
    return {name: targets - {name} for name, targets in result.items()}


def circles(graph: Graph) -> list[list[str]]:
    """Groups of more than one node in which each reaches each other: strongly connected components (Tarjan 1972)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(node: str) -> None:
        order[node] = lowest[node] = len(order)
        stack.append(node)
        for target in sorted(graph.get(node, ())):
            if target not in order:
                visit(target)
            if target in stack:
                lowest[node] = min(lowest[node], lowest[target])
        if lowest[node] == order[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                groups.append(sorted(group))

    for node in sorted(graph):
        if node not in order:
            visit(node)
    return groups


def most_parameters(package: Path) -> tuple[int, str]:
    """The most parameters that a function takes, `self` included, and which function that is."""
    most = (0, "")
    for path in sources(package):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                given = node.args
                count = len([*given.posonlyargs, *given.args, *given.kwonlyargs])
                most = max(most, (count, f"{path.relative_to(package).as_posix()}: {node.name}"), key=lambda pair: pair[0])
    return most


def table(root: Path) -> str:
    """What is counted, before and now, as Markdown.

    Args:
        root: of the repository.
    """
    package = root / "src" / "diffusion_gemma_asr"
    flow = [path for name in FLOW for path in (sources(package / name) if (package / name).is_dir() else [package / name])]
    flow = [path for path in flow if path.exists() and lines([path])]
    graph = imports(package)
    between_files, between_folders = circles(graph), circles(folders(graph))
    count, where = most_parameters(package)
    counts = {
        "names at the package's top": str(names_at_the_top(package)),
        "files / lines on the way sound → text": f"{len(flow)} / {lines(flow):,}",
        "import circles, of files + of folders": f"{len(between_files)} + {len(between_folders)}",
        "most parameters of a function": f"{count} (`{where}`)",
        "lines of src / tests": f"{lines(sources(root / 'src')):,} / {lines(sources(root / 'tests')):,}",
    }
    rows = [[name, before, now] for (name, now), before in zip(counts.items(), BEFORE, strict=True)]
    text = markdown(["", "at f4dd62f", "now"], rows)
    for group in [*between_files, *between_folders]:
        text += f"\n\nCircle: {', '.join(group)}."
    return text


def main(arguments: list[str] | None = None) -> None:
    """Prints the table, and writes it if asked."""
    parser = argparse.ArgumentParser(description="Counts the package.")
    parser.add_argument("--root", type=Path, default=ROOT, help="of the repository")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE}")
    args = parser.parse_args(arguments)
    text = table(args.root)
    print(text)
    if args.write:
        fill(args.root / PAGE, {"structure": text})


if __name__ == "__main__":
    main(sys.argv[1:])
