"""A clone of bushpc to add files to, or to turn into a later version as far as settings go."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FIELD = "added: int = _setting(7, 'Added in a later version.', ge=1, since=99)"

# Runs commands of bushpc one after another in one process, as starting Python for each takes seconds.
ONE_AFTER_ANOTHER = """
import contextlib, io, json, sys
from bushpc.cli import main
answers = []
for words in json.load(sys.stdin):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            status = main(words)
        except SystemExit as end:
            status = end.code
    answers.append((status, said.getvalue()))
print(json.dumps(answers))
"""


def clone(folder: Path) -> Path:
    """The package, the configs, cards and folds, and the helpers of tests, in `folder`."""
    unpacked = shutil.ignore_patterns("*.tar", "manifest.json", ".*", "__pycache__")
    for name in ("bushpc", "configs", "shards"):
        shutil.copytree(ROOT / name, folder / name, ignore=unpacked, dirs_exist_ok=True)
    for name in ("conftest.py", "__init__.py", "shards/conftest.py", "shards/sources/conftest.py"):
        copy = folder / "tests" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "tests" / name, copy)
    return folder


def grow(folder: Path) -> list[str]:
    """Give every config class of a clone a field more; returns the names of the classes."""
    grown = []
    for path in sorted((folder / "bushpc").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        classes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef) and _is_config(node)]
        lines = text.splitlines(keepends=True)
        for node in sorted(classes, key=lambda node: -node.lineno):  # from the end, so that line numbers stay right
            assert ast.get_docstring(node), f"{node.name} has no docstring to put a field below"
            lines.insert(node.body[0].end_lineno, f"\n    {FIELD}\n")
        if classes:
            at = next(i for i, line in enumerate(lines) if line.startswith("from __future__"))
            lines.insert(at + 1, "\nfrom bushpc.config.fields import setting as _setting\n")
            path.write_text("".join(lines), encoding="utf-8")
        grown += [node.name for node in classes]
    return grown


def _is_config(node: ast.ClassDef) -> bool:
    return any(isinstance(each, ast.Name) and each.id == "config_class" for each in node.decorator_list)


def python(clone: Path, *words: str, status: int = 0, given: str | None = None) -> str:
    """What `python …` prints where the clone's bushpc is the one that is imported.

    status: what it ends with. given: its standard input.
    """
    environment = {**os.environ, "PYTHONPATH": str(clone), "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
    command = [sys.executable, *words]
    done = subprocess.run(command, env=environment, cwd=clone, capture_output=True, text=True, input=given)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


def bushpc(clone: Path, *words: str, status: int = 0) -> str:
    """What a command of the clone prints."""
    return python(clone, "-m", "bushpc.cli", *words, status=status)


def bushpc_each(clone: Path, *commands: list[str]) -> list[str]:
    """What commands of the clone print, all in one process; each must succeed."""
    answers = json.loads(python(clone, "-c", ONE_AFTER_ANOTHER, given=json.dumps(commands)).splitlines()[-1])
    assert all(status == 0 for status, _ in answers), answers
    return [said for _, said in answers]
