"""Words and questions that the tests on sandboxes like real sites share. Trainings are tests/stand_in's."""

from __future__ import annotations

import json
import typing as t
from pathlib import Path

if t.TYPE_CHECKING:
    from tests.slurm.conftest import Sandbox

ROOT = Path(__file__).resolve().parents[2]


def home(sandbox: Sandbox) -> Path:
    """A folder that belongs to whom the jobs belong to."""
    return sandbox.root.parent / "home"


def words(sandbox: Sandbox, command: str, name: str, *more: str) -> list[str]:
    """`bushpc cv` or `grid` of cells that train for a second, into <home>/runs/<name>."""
    settings = ["data=phantom", "model=xbusnet_small", "cluster=slurm", "cluster.time_min=30", f"name={name}"]
    settings += [f"data.root={home(sandbox) / 'phantom'}", f"runs_dir={home(sandbox) / 'runs'}", "train.save_every=5"]
    settings += ["train.iterations=20", f"cluster.setup=['export PYTHONPATH={ROOT}/tests/stand_in']"]
    return [command, *settings, *more]


def run_folder(sandbox: Sandbox, name: str) -> Path:
    return home(sandbox) / "runs" / name


def until_reported(sandbox: Sandbox, name: str) -> dict[str, t.Any]:
    """Wait for the report of a run. Returns its summary."""
    summary = run_folder(sandbox, name) / "report" / "summary.json"
    sandbox.until(summary.exists, what=lambda: f"{sandbox.squeue()}\n{logs(run_folder(sandbox, name))}")
    return dict(json.loads(summary.read_text()))


def logs(run_dir: Path) -> str:
    """The ends of all logs, for the message of a test that failed."""
    paths = sorted((run_dir / "jobs").rglob("*.out"))
    return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-600:]}" for path in paths)


def shares(run_dir: Path) -> dict[str, dict[str, t.Any]]:
    """Cell → what its last start had of its node: job, node, cores, gpus."""
    files = sorted(run_dir.glob("cells/*/share.jsonl"))
    return {path.parent.name: json.loads(path.read_text().splitlines()[-1]) for path in files}
