"""Every reader of files from others, fed with changed files: a typed error or a valid result, and nothing half-written.

`INPUTS` changed files a reader and run, the same ones each time; their seeds are reader and number. More of them:
`BUSHPC_FUZZ=2000 pytest tests/test_fuzz_readers.py`. `KEPT` has the numbers that found a fault once. What is read back
from a run, shards and checkpoints is in test_fuzz.py, too.
"""

from __future__ import annotations

import os
import signal
import traceback
import typing as t
from pathlib import Path

import pytest

from bushpc.errors import BushpcError

from .fuzzing import cohorts, runs, shards
from .fuzzing.mutations import mutant

READERS = {**shards.READERS, **cohorts.READERS, **runs.READERS}
INPUTS = int(os.environ.get("BUSHPC_FUZZ", "8"))
KEPT: dict[str, tuple[int, ...]] = {}
LONGEST_S = 30


def listed(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def too_long(*_: t.Any) -> None:
    raise TimeoutError(f"longer than {LONGEST_S} s")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READERS)
def test_any_changed_file_is_refused_with_a_typed_error_or_read(name, tmp_path, phantom_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reader = READERS[name]
    place = reader.write(tmp_path, phantom_folder)
    whole, before = place.read_bytes(), listed(tmp_path)
    reader.read(tmp_path)  # as it is, it is valid
    reader.clean(tmp_path)
    signal.signal(signal.SIGALRM, too_long)
    faults = []
    for number in dict.fromkeys([*range(-(-INPUTS // reader.slow)), *KEPT.get(name, ())]):
        place.write_bytes(reader.covered(tmp_path, mutant(whole, f"{name} {number}")))
        signal.alarm(LONGEST_S)
        try:
            reader.read(tmp_path)
        except BushpcError as error:
            str(error)
            if listed(tmp_path) != before:
                faults.append(f"{number}: left {sorted(listed(tmp_path) ^ before)[:3]} behind")
        except BaseException as error:
            frames = traceback.extract_tb(error.__traceback__)
            at = next((f"{f.filename}:{f.lineno}" for f in reversed(frames) if "/bushpc/" in f.filename), "")
            faults.append(f"{number}: {type(error).__name__}: {str(error)[:100]} ({at})")
            if isinstance(error, KeyboardInterrupt):
                raise
        finally:
            signal.alarm(0)
            reader.clean(tmp_path)
    assert not faults, "\n".join(faults[:40])
