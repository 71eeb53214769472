"""Numbers on the structure of a source tree: lengths, import circles, who reads run.json, who names Slurm, README.

    python tools/structure.py TREE [TREE …]        a table with one column per tree

Files are those of bushpc/. A function's length includes its signature and docstring; nested functions count too.
Circles are groups of modules that import each other at module level, imports for type checkers included; imports
inside functions are left out of them and counted by the second line. Text in comments and docstrings is not counted
as naming Slurm or run.json.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import networkx
import numpy as np

SLURM = re.compile(r"\b(sbatch|squeue|scancel|scontrol|sinfo|sacct|srun)\b|SLURM_")


@dataclass(frozen=True)
class Module:
    name: str
    path: Path
    lines: int
    tree: ast.Module
    is_package: bool


def modules(root: Path) -> dict[str, Module]:
    found = {}
    for path in sorted((root / "bushpc").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        text = path.read_text()
        found[name] = Module(name, path, len(text.splitlines()), ast.parse(text), is_package)
    return found


def functions(module: Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.end_lineno - node.lineno + 1, f"{module.name}.{node.name}"


def imports(module: Module, known: dict[str, Module], *, in_functions: bool) -> set[str]:
    """Modules of the package that this one imports at module level (also under TYPE_CHECKING and try)."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not in_functions:
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            for alias in node.names:
                if (inner := f"{node.module}.{alias.name}") in known:
                    found.add(inner)
                elif node.module in known:
                    found.add(node.module)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(module.tree)
    return found - {module.name}


def circles(found: dict[str, Module], *, in_functions: bool) -> list[list[str]]:
    graph = networkx.DiGraph(
        (module.name, target)
        for module in found.values()
        for target in imports(module, found, in_functions=in_functions)
    )
    return sorted(sorted(group) for group in networkx.strongly_connected_components(graph) if len(group) > 1)


def texts(module: Module) -> Iterator[str]:
    """Every string of the module's code except docstrings."""
    docs = {
        id(node.body[0].value)
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.value


def readers_of_run_json(found: dict[str, Module]) -> list[str]:
    """Modules that join the file's name, or read it through a function or a raw dict of it."""
    return [name for name, module in found.items() if any(text == "run.json" for text in texts(module))]


def modules_that_name_slurm(found: dict[str, Module]) -> list[str]:
    return [name for name, module in found.items() if any(SLURM.search(text) for text in texts(module))]


def measure(root: Path) -> dict[str, str]:
    found = modules(root)
    files = sorted(((module.lines, module.name) for module in found.values()), reverse=True)
    lengths = sorted((function for module in found.values() for function in functions(module)), reverse=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
    code_circles, all_circles = circles(found, in_functions=False), circles(found, in_functions=True)
    slurm, readers = modules_that_name_slurm(found), readers_of_run_json(found)
    return {
        "commit": commit.stdout.strip(),
        "files": str(len(files)),
        "lines": f"{sum(lines for lines, _ in files):,}",
        "lines of a file, median / p90": spread([lines for lines, _ in files]),
        "functions": f"{len(lengths):,}",
        "lines of a function, median / p90": spread([lines for lines, _ in lengths]),
        "ten longest files": listed(files[:10]),
        "ten longest functions": listed(lengths[:10]),
        "circles, type imports included": circled(code_circles),
        "circles, imports inside functions included": circled(all_circles),
        "modules that join the name run.json": f"{len(readers)}: {short(readers)}",
        "modules that name Slurm commands or variables": f"{len(slurm)}: {short(slurm)}",
        "words of the README": f"{len((root / 'README.md').read_text().split()):,}",
    }


def spread(lengths: list[int]) -> str:
    return f"{np.median(lengths):g} / {np.percentile(lengths, 90):g}"


def listed(items: list[tuple[int, str]]) -> str:
    return ", ".join(f"{name.removeprefix('bushpc.')} {lines}" for lines, name in items)


def circled(groups: list[list[str]]) -> str:
    return "; ".join(f"{len(group)}: {short(group)}" for group in groups) or "none"


def short(names: list[str]) -> str:
    return ", ".join(name.removeprefix("bushpc.") for name in names)


def main(roots: list[Path]) -> str:
    columns = [measure(root) for root in roots]
    lines = [
        "| | " + " | ".join(column.pop("commit") for column in columns) + " |",
        "| --- |" + " --- |" * len(columns),
    ]
    lines += [f"| {name} | " + " | ".join(column[name] for column in columns) + " |" for name in columns[0]]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(main([Path(word) for word in sys.argv[1:]]), end="")
