"""Promise 9 from the other side: a field more in every config class changes no run and no export, and what a newer
version wrote is refused with the version that reads it."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bushpc.cli import main
from tests.clone import ROOT, bushpc_each, clone, grow, python
from tests.clone import bushpc as command_of

HASHES = """
import json, sys
from pathlib import Path
from bushpc.config import CellConfig
for run_dir in map(Path, sys.argv[1:]):
    for cell in json.loads((run_dir / "run.json").read_text())["cells"]:
        config = CellConfig.load(run_dir / "cells" / cell["name"] / "config.yaml")
        assert config.added == config.train.added == config.augment.strength.added == config.model.added == 7
        assert config.hash == cell["hash"], config.settings
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_field_more_in_every_config_class_changes_no_run_and_no_export(old, tmp_path_factory):
    later = clone(tmp_path_factory.mktemp("later"))
    grown = grow(later)
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "bushpc").rglob("*.py"))
    assert sorted(grown) == sorted(re.findall(r"^@config_class\nclass (\w+)", source, flags=re.MULTILINE))
    assert {"CellConfig", "StrengthConfig", "GenerateConfig", "PriorsConfig", "XBusNetConfig"} <= set(grown)

    python(later, "-c", HASHES, *(str(old / "runs" / run) for run in ("sam", "text")))
    cells = json.loads(command_of(later, "status", str(old / "runs" / "sam"), "--json", status=1))["cells"]
    assert [cell["state"] for cell in cells] == ["done", "missing"]
    outs = {source: old / f"predicted-{source.name}" for source in (old / "runs" / "sam", old / "export")}
    bushpc_each(
        later,
        ["report", str(old / "runs" / "text")],
        *(["predict", str(source), str(old / "images"), str(out), "--prob"] for source, out in outs.items()),
        ["export", str(old / "runs" / "sam"), str(old / "again")],
    )
    for out in outs.values():
        for theirs in (old / "expected" / "predict" / "probabilities").iterdir():
            ours = Image.open(out / "probabilities" / theirs.name)
            assert abs(np.asarray(ours).astype(int) - np.asarray(Image.open(theirs))).max() <= 1
    assert json.loads((old / "again" / "export.json").read_text())["model"]["added"] == 7


def _edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _newer_config(old: Path) -> list[str]:
    path = old / "runs" / "sam" / "cells" / "fold1" / "config.yaml"
    path.write_text(f"format: 99\nbushpc: '7.0'\n{path.read_text()}")
    return ["resume", str(old / "runs" / "sam")]


def _newer_run(old: Path) -> list[str]:
    _edit(old / "runs" / "sam" / "run.json", format=99, versions={"bushpc": "7.0"})
    return ["status", str(old / "runs" / "sam")]


def _newer_checkpoint(old: Path) -> list[str]:
    [folder] = (old / "runs" / "sam" / "cells" / "fold0" / "checkpoints").glob("step_*")
    _edit(folder / "meta.json", format=99, bushpc="7.0")
    sha256 = hashlib.sha256((folder / "meta.json").read_bytes()).hexdigest()
    _edit(folder / "seal.json", **{"meta.json": sha256})
    return ["predict", str(old / "runs" / "sam"), str(old / "images"), str(old / "predicted")]


def _newer_export(old: Path) -> list[str]:
    _edit(old / "export" / "export.json", format=99, bushpc="7.0")
    return ["predict", str(old / "export"), str(old / "images"), str(old / "predicted")]


def _newer_manifest(old: Path) -> list[str]:
    _edit(old / "data" / "manifest.json", format=99, bushpc="7.0")
    return ["cv", "model=unet_small", "data=phantom", f"data.root={old / 'data'}", f"runs_dir={old / 'new'}", "name=x"]


@pytest.mark.parametrize(
    "newer", [_newer_config, _newer_run, _newer_checkpoint, _newer_export, _newer_manifest], ids=lambda f: f.__name__
)
def test_what_a_newer_version_wrote_is_refused_with_the_version_that_reads_it(old, newer, capsys):
    command = newer(old)
    shutil.rmtree(old / "expected")
    before = contents(old)
    assert main(command) != 0
    said = capsys.readouterr().err
    assert "format 99" in said
    assert "7.0" in said
    assert contents(old) == before
