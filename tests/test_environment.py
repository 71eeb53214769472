"""Promises of the environment: one function makes it, the docs list its rules, no variable of a shell is in the way."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bushpc
from bushpc import environment
from bushpc.cluster.base import all_clusters, cluster_for
from bushpc.config import compose

PACKAGE = Path(bushpc.__file__).parent
PAGE = PACKAGE.parent / "docs" / "reference" / "environment.md"
STARTS = ("run", "Popen", "check_output", "check_call", "call")


def test_the_docs_list_every_rule_in_order():
    all_clusters()
    rows = re.findall(r"^\| (`.+?) \| (.+?) \| (.+?) \| (.+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    told = [
        (
            ", ".join(f"`{name}`" for name in rule.names)
            + (f", but not {', '.join(f'`{name}`' for name in rule.but)}" if rule.but else ""),
            f"set to `{rule.sets}`" if rule.sets is not None else "removed, and said" if rule.said else "removed",
            "all" if rule.kinds == environment.EVERY else ", ".join(rule.kinds),
            rule.why,
        )
        for rule in environment.rules()
    ]
    assert rows == told


def test_every_process_that_bushpc_starts_gets_its_environment_from_there():
    bare = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            call = re.match(r"subprocess\.(\w+)\(", ast.unparse(node)) if isinstance(node, ast.Call) else None
            if call and call[1] in STARTS and "env" not in {keyword.arg for keyword in node.keywords}:
                bare.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert bare == []


@pytest.mark.parametrize(
    ("kind", "name", "value", "gets"),
    [
        ("cluster command", "SQUEUE_STATES", "RUNNING", None),
        ("cluster command", "SLURM_CLUSTERS", "other", None),
        ("cluster command", "SCANCEL_INTERACTIVE", "yes", None),
        ("cluster command", "SLURM_CONF", "/etc/x", "/etc/x"),
        ("cluster command", "SLURM_JWT", "token", "token"),
        ("cluster command", "SLURM_TIME_FORMAT", "%s", "standard"),
        ("job", "SBATCH_TIMELIMIT", "1", None),
        ("job", "SBATCH_EXPORT", "NONE", None),
        ("job", "SLURM_EXPORT_ENV", "NONE", None),
        ("job", "SLURM_MEM_PER_CPU", "1", None),
        ("job", "WORLD_SIZE", "4", None),
        ("job", "MPLBACKEND", "module://matplotlib_inline.backend_inline", None),
        ("job", "PYTHONIOENCODING", "latin-1", "utf-8:backslashreplace"),
        ("job", "PYTHONUTF8", "0", "1"),
        ("job", "HF_HOME", "/weights", "/weights"),
        ("worker", "SLURM_JOB_ID", "7", "7"),
        ("worker", "RANK", "1", "1"),
        ("worker", "GIT_DIR", "/elsewhere", None),
    ],
)
def test_what_a_process_gets(monkeypatch, kind, name, value, gets):
    all_clusters()
    monkeypatch.setenv(name, value)
    assert environment.for_process(kind).get(name) == gets
    with environment.applied(kind):
        assert os.environ.get(name) == gets
    assert os.environ[name] == value


def test_a_login_profiles_account_counts_where_the_cluster_profile_has_none_and_is_told(monkeypatch, phantom_folder):
    for name, value in {"ACCOUNT": "mine", "PARTITION": "gpu", "TIMELIMIT": "1", "EXPORT": "NONE"}.items():
        monkeypatch.setenv(f"SBATCH_{name}", value)
    words = ["model=unet_small", "data=phantom", f"data.root={phantom_folder}", "cluster=slurm"]
    profile = compose([*words, "cluster.partition=long"]).cluster
    assert cluster_for("slurm").environment_notes(profile) == [
        "your environment counts where the cluster profile says nothing: SBATCH_ACCOUNT=mine (cluster.account is null)",
        "not used from your environment: SBATCH_EXPORT=NONE, SBATCH_PARTITION=gpu, SBATCH_TIMELIMIT=1; jobs get what "
        "the cluster profile says",
    ]


def test_a_shell_that_allows_too_few_addresses_is_refused_before_ranks_hang(phantom_folder, tmp_path):
    words = ["cv", "model=unet_small", "data=phantom", f"data.root={phantom_folder}", f"runs_dir={tmp_path}", "name=x"]
    command = f'ulimit -v 5000000; exec "{sys.executable}" -m bushpc.cli "$@"'
    env = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(
        ["bash", "-c", command, "bash", *words, "cluster=local"], env=env, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert "`ulimit -v` allows a process 4.8 GB" in done.stderr
    assert "ulimit -v unlimited" in done.stderr
    assert not (tmp_path / "x").exists()


LOCALES = {
    "LC_ALL=C": {"LC_ALL": "C"},
    "LC_ALL=POSIX": {"LC_ALL": "POSIX"},
    "C and no UTF-8 mode": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "latin-1 output": {"PYTHONIOENCODING": "latin-1"},
    "ascii output": {"PYTHONIOENCODING": "ascii"},
}


def cli(*words: str, **variables: str) -> subprocess.CompletedProcess[bytes]:
    base = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHON"))}
    base |= {"PYTHONPATH": str(PACKAGE.parent), **variables}
    return subprocess.run([sys.executable, "-m", "bushpc.cli", *words], env=base, capture_output=True)


@pytest.mark.parametrize("variables", LOCALES.values(), ids=LOCALES.keys())
def test_no_locale_ends_a_command(tmp_path, variables):
    """The message names a folder that no such locale can write."""
    done = cli("status", str(tmp_path / "Läufe→±"), **variables)
    assert done.returncode == 2, done.stderr
    assert b"is not a run folder" in done.stderr
    assert b"Traceback" not in done.stderr


def test_files_are_utf8_in_every_locale(tmp_path):
    """A command starts again in UTF-8 mode; what it reads is the same, and so is its exit status."""
    yaml = tmp_path / "mine.yaml"
    yaml.write_text("title: Läufe → ±\nbase: [model=unet_small]\nrows: {a: {train.lr: 0.1}}\n", encoding="utf-8")
    words = ("grid", f"grid={yaml}", "data=phantom", "cluster=local", "--list")
    plain, ascii_only = cli(*words), cli(*words, **LOCALES["C and no UTF-8 mode"])
    assert (plain.returncode, ascii_only.returncode) == (plain.returncode,) * 2
    assert "Läufe → ±" in plain.stdout.decode() or plain.returncode, plain.stdout
    assert b"UnicodeDecodeError" not in ascii_only.stderr
