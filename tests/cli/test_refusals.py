"""Promises of the command line: early, typed, and nothing is touched by a command that cannot work."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from bushpc.cli import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def say(tmp_path, phantom_folder, capsys):
    """say("cv", …) → (exit status, what it said), with runs in a folder that must stay empty."""

    def run(*words: str, root: Path | None = None) -> tuple[int, str]:
        rest = [f"data.root={root or phantom_folder}", f"runs_dir={tmp_path / 'runs'}"] if words[0] == "cv" else []
        status = main([*words, *rest])
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return run


CV = ("cv", "model=unet_small", "data=phantom")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("cv", "model=unet_smal"), "did you mean 'unet_small'? Valid: aau_net, aau_net_small, anatosegnet, "),
        ((*CV, "fold=7"), "fold=7 does not exist: there are 5 folds, 0 to 4"),
        ((*CV, "folds=published"), "no folds_published.csv"),
        ((*CV, "train.iteration=5"), "did you mean 'train.iterations'"),
        ((*CV, "model.image_size=abc"), "model.image_size='abc' is a str; allowed: int"),
        (("cv", "model=xbusnet_small", "data=phantom", "model.image_size=100"), "image_size=100 is not a multiple of"),
        ((*CV, "cluster=slurm", "engine.device=cuda"), "gives a cell no GPU"),
        (("pack", "data=brest"), "did you mean 'breast'"),
        (("pack", "data=breast"), "needs src=FOLDER"),
        (("pack", "data=breast", "src=/nowhere/at/all"), "/nowhere/at/all"),
        (("pack", "data=phantom", "out=x", "coutn=3"), "did you mean 'count'"),
        (("pack", "data=phantom", "count=three"), "count=three: a number is needed"),
        (("status", "/nowhere"), "not a run folder"),
        (("report", "/nowhere"), "/nowhere"),
        (("status", "/nowhere", "train.lr=3"), "takes no 'train.lr=3': it is a setting of a training"),
        (("pack", "data=phantom", "train.lr=3"), "unknown word 'train.lr': it is a setting of a training"),
        (("cv", "data.rot=x"), "did you mean 'data.root'? Nearest: data.root, "),
    ],
)
def test_what_cannot_work_is_refused_with_the_way_out(say, tmp_path, words, said):
    status, text = say(*words)
    assert status == 2, text
    assert said in text
    assert "Traceback" not in text
    assert not (tmp_path / "runs").exists()


def test_missing_weights_stop_the_submit_with_the_command_to_run(say, tmp_path):
    status, text = say("cv", "model=xbusnet", "data=phantom", f"weights_dir={tmp_path / 'weights'}")
    assert status == 2
    assert "bushpc weights pull model=xbusnet" in text
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("damage", ["truncated tar", "flipped bit", "missing tar", "torn manifest", "leaking folds"])
def test_damaged_shards_stop_the_submit(say, tmp_path, phantom_folder, damage):
    folder = tmp_path / "shards"
    shutil.copytree(phantom_folder, folder)
    tar = folder / "lesion-000000.tar"
    if damage == "truncated tar":
        tar.write_bytes(tar.read_bytes()[:-1000])
    elif damage == "flipped bit":
        content = bytearray(tar.read_bytes())
        content[len(content) // 2] ^= 1
        tar.write_bytes(content)
    elif damage == "missing tar":
        tar.unlink()
    elif damage == "torn manifest":
        (folder / "manifest.json").write_text((folder / "manifest.json").read_text()[:500])
    else:
        lines = (folder / "folds.csv").read_text().splitlines()
        patients = [line.split(",")[1] for line in lines]
        twice = next(i for i in range(1, len(lines)) if patients.count(patients[i]) > 1)
        fold = int(lines[twice].rsplit(",", 1)[1])
        lines[twice] = lines[twice].rsplit(",", 1)[0] + f",{(fold + 1) % 5}"
        (folder / "folds.csv").write_text("\n".join(lines) + "\n")
    status, text = say(*CV, root=folder)
    assert status == 2, text
    named = {"torn manifest": "manifest.json", "leaking folds": "patient"}.get(damage, "lesion-000000.tar")
    assert named in text
    assert not (tmp_path / "runs").exists()


def test_override_text_is_never_run(say, tmp_path):
    trap = tmp_path / "trap"
    refused = [f"name=$(touch {trap})", f"name=`touch {trap}`", f"name=x;touch {trap}", f"folds=$(touch {trap})"]
    refused += [f'cluster.{key}="a\ntouch {trap}"' for key in ("partition", "account", "qos", "constraint")]
    for word in (*refused, f'weights_dir="{tmp_path}/a\ntouch {trap}"'):
        assert say(*CV, word)[0] == 2, word
    assert not trap.exists()


def test_a_folder_given_to_make_is_never_run(tmp_path):
    trap = tmp_path / "trap"
    for text in (f"`touch {trap}`", f"$(shell touch {trap})", f"$$(touch {trap})", f"'; touch {trap}; '"):
        (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
        (tmp_path / "tools").mkdir(exist_ok=True)
        (tmp_path / "tools" / "demo.sh").write_text('printf "%s" "$DATA" > told\n')
        (tmp_path / ".venv").mkdir(exist_ok=True)
        for name in ("pyproject.toml", "constraints.txt", "constraints-common.txt", ".venv/.installed"):
            (tmp_path / name).touch()
        subprocess.run(["make", "demo", f"DATA={text}"], cwd=tmp_path, check=True, capture_output=True)
        assert (tmp_path / "told").read_text() == text
        assert not trap.exists()
