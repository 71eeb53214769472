"""`bushpc shards import` as users run it, and what came of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bushpc.cli import main
from bushpc.shards.manifest import Manifest, read_image, read_mask

from .cohorts import LABELS, PACKED, PATIENTS, image_of, mask_of


class Import:
    """The command, in a folder of its own. `src` is the raw folder, `out` the shards."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.src, self.out, self.configs, self.capsys = folder / "raw", folder / "mine", folder / "configs", capsys
        self.src.mkdir()
        self.configs.mkdir()

    def __call__(self, *words: str) -> str:
        """Run it; returns its output. The import must work."""
        text, status = self.run(*words)
        assert status == 0, text
        return text

    def run(self, *words: str) -> tuple[str, int]:
        given = [f"data=mine src={self.src}", f"out={self.out}", "workers=1"]
        status = main(["shards", "import", *" ".join(given).split(), *words])
        printed = self.capsys.readouterr()
        return printed.out + printed.err, status

    def refused(self, *words: str) -> str:
        """Run it; returns the error. Nothing may be written."""
        text, status = self.run(*words)
        assert status == 2, text
        assert not self.out.exists(), sorted(self.out.iterdir())
        assert "Traceback" not in text
        return text

    @property
    def manifest(self) -> Manifest:
        return Manifest.load(self.out)

    def check_all(self, key: str = "{}", *, grey: bool = False) -> None:
        """Every scan of the cohort is packed with its pixels, label and patient."""
        records = {record.key: record for record in self.manifest.records}
        assert set(records) == {key.format(name) for name in LABELS}
        for name in LABELS:
            record = records[key.format(name)]
            assert (record.label, record.patient) == (PACKED[LABELS[name]], PATIENTS[name])
            assert np.array_equal(read_mask(self.out, record), mask_of(name))
            expected = np.repeat(image_of(name)[..., :1], 3, axis=2) if grey else image_of(name)
            assert np.array_equal(read_image(self.out, record), expected)


@pytest.fixture
def importing(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Import:
    made = Import(tmp_path, capsys)
    monkeypatch.setenv("BUSHPC_CONFIGS", str(made.configs))
    return made
