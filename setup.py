"""Configs, cards and folds go into the package when a wheel is built; everything else is in pyproject.toml.

In the repository they lie where users look for them, in configs/ and shards/. Tars never go into a wheel.
"""

import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

PACKAGED = ("configs/**/*.yaml", "shards/*/card.yaml", "shards/*/folds*.csv")


class BuildWithConfigs(build_py):
    def run(self):
        super().run()
        if self.editable_mode:
            return
        for pattern in PACKAGED:
            for path in sorted(Path().glob(pattern)):
                target = Path(self.build_lib, "bushpc", "packaged", path)
                self.mkpath(str(target.parent))
                self.copy_file(str(path), str(target))
        if commit := _commit():
            Path(self.build_lib, "bushpc", "packaged", "COMMIT").write_text(f"{commit}\n")


def _commit():
    """Of this checkout, for `bushpc --version`; none where the sources are no checkout."""
    if not Path(".git").exists():
        return ""
    return subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()


setup(cmdclass={"build_py": BuildWithConfigs})
