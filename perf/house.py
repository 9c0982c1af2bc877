"""The shape of the library in numbers: ``python perf/house.py`` (standard library only).

Prints the import graph's offences, the longest functions and lines, and as its last line a JSON object: lines of the
library and of its core, circles and upward arrows among packages (late imports and type hints counted), the longest
function, the longest line of README and docs.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "src/mmpipe"
CORE = ("stages", "models", "losses", "training")
# lowest first; packages of one line may import each other, but not in a circle
LAYERS = (
    ("errors", "escapes", "registry", "settings", "pretrained", "slurm", "gpu_locks", "plotting"),
    ("artifacts", "losses"),
    ("data", "sources"),
    ("models",),
    ("stages",),
    ("checkpoints", "demo"),
    ("inference", "training"),
    ("benchmarks", "analysis"),
    ("plan",),
    ("estimate", "report", "doctor", "provenance"),
    ("chat", "cli", "jobs", "lmms_eval"),
)
RANK = {package: rank for rank, layer in enumerate(LAYERS) for package in layer}


def modules() -> dict[str, ast.Module]:
    """Every module of the library by its path below it."""
    files = sorted(LIBRARY.rglob("*.py"))
    return {file.relative_to(LIBRARY).as_posix(): ast.parse(file.read_text(encoding="utf-8")) for file in files}


def package(name: str) -> str:
    """The package, or the single module, that ``name`` (a path or a dotted name below mmpipe) belongs to."""
    return name.removesuffix(".py").replace("/", ".").split(".")[0]


def imported(tree: ast.Module) -> Iterator[str]:
    """What a module imports from the library, below ``mmpipe.``; late imports and those for type hints too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("mmpipe.") for alias in node.names if alias.name.startswith("mmpipe."))
        elif isinstance(node, ast.ImportFrom) and node.module == "mmpipe":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mmpipe."):
            yield str(node.module).removeprefix("mmpipe.")


def arrows(trees: dict[str, ast.Module]) -> dict[tuple[str, str], list[str]]:
    """The imports from one package to another, with the modules they stand in."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, tree in trees.items():
        for target in imported(tree):
            pair = package(name), package(target)
            if pair[0] != pair[1] and pair[1] in RANK:
                found.setdefault(pair, []).append(f"{name} -> {target}")
    return found


def circles(pairs: set[tuple[str, str]]) -> list[list[str]]:
    """The strongly connected components of more than one package."""
    reach = {start: _reachable(start, pairs) for start in RANK}
    groups = {tuple(sorted(b for b in reach[a] if a in reach[b])) for a in RANK if a in reach[a]}
    return [list(group) for group in sorted(groups)]


def _reachable(start: str, pairs: set[tuple[str, str]]) -> set[str]:
    found: set[str] = set()
    waiting = [start]
    while waiting:
        here = waiting.pop()
        fresh = {b for a, b in pairs if a == here} - found
        found |= fresh
        waiting.extend(fresh)
    return found


def functions(trees: dict[str, ast.Module]) -> list[tuple[int, str]]:
    """Lines of every function, longest first."""
    sizes = [
        (int(node.end_lineno or 0) - node.lineno + 1, f"{name}:{node.lineno} {node.name}")
        for name, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    return sorted(sizes, reverse=True)


def document_lines() -> list[tuple[int, str]]:
    """Length of every line of README and docs, longest first."""
    files = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    lengths = [
        (len(line), f"{file.relative_to(ROOT)}:{number}")
        for file in files
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
    ]
    return sorted(lengths, reverse=True)


def main() -> None:
    trees = modules()
    missing = sorted({package(name) for name in trees} - set(RANK) - {"__init__"})
    if missing:
        sys.exit(f"perf/house.py: these packages have no layer: {', '.join(missing)}")
    lines = {name: (LIBRARY / name).read_text(encoding="utf-8").count("\n") for name in trees}
    graph = arrows(trees)
    upward = {pair: where for pair, where in graph.items() if RANK[pair[1]] > RANK[pair[0]]}
    rings = circles(set(graph))
    for pair, where in sorted(upward.items()):
        print(f"upward: {pair[0]} -> {pair[1]}: {'; '.join(where[:4])}")
    for ring in rings:
        print(f"circle: {', '.join(ring)}")
    longest, wide = functions(trees), document_lines()
    for size, where in longest[:5]:
        print(f"function of {size} lines: {where}")
    for size, where in wide[:3]:
        print(f"line of {size} characters: {where}")
    figures = {
        "library": sum(lines.values()),
        "core": sum(count for name, count in lines.items() if package(name) in CORE),
        "circles": len(rings),
        "upward": len(upward),
        "longest_function": longest[0][0],
        "longest_line_docs": wide[0][0],
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
