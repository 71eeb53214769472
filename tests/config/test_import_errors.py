"""An import that fails is called an import error, not a wrong setting; a class that is no whole model says why."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bushpc.config.model import ModelConfig, model_class_of
from bushpc.errors import ConfigError
from bushpc.models import base

ROOT = Path(__file__).resolve().parents[2]


def test_a_library_that_cannot_be_loaded_is_an_import_error(tmp_path):
    """As under `ulimit -v`: the linker finds no room for torch."""
    (tmp_path / "torch").mkdir()
    text = "raise ImportError('libtorch_cpu.so: failed to map segment from shared object')\n"
    (tmp_path / "torch" / "__init__.py").write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "bushpc.cli", "config", "model=unet_small", "data=phantom", "cluster=local"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "import error while bushpc.models.baselines was loaded" in done.stderr
    assert "failed to map segment" in done.stderr
    assert "_target_" not in done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_that_does_not_exist_is_still_a_wrong_setting():
    with pytest.raises(ConfigError, match=r"_target_=bushpc\.models\.nothing\.Net cannot be imported"):
        model_class_of("bushpc.models.nothing.Net")


def test_a_model_that_does_not_state_its_predictions_is_told_what_to_add(monkeypatch):
    class Net(base.Model):
        Config = ModelConfig

    monkeypatch.setattr(base, "Net", Net, raising=False)
    with pytest.raises(ConfigError, match=r'add `makes`.* to class Net; .*frozenset\({"prob_BKHW"}\)'):
        model_class_of("bushpc.models.base.Net")
