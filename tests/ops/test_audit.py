"""Promises of the audit: an exact history passes, however often it was killed, and no single wrong sample does."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bushpc.cell import run_cell
from bushpc.cli import main
from bushpc.dist import World
from bushpc.ops.audit import CellAudit, audit_run
from bushpc.runs.goodput import goodput, read_attempts
from bushpc.train.ledger import Ledger

SAMPLES, BATCH = 10, 4
KEYS = [f"case{i:03d}" for i in range(SAMPLES)]
HELD_OUT = ["held0", "held1"]


class Simulated:
    """A run folder whose cell fold0 is trained by a loop of the test's own: 10 samples, batches of 4."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.cell_dir = run_dir, run_dir / "cells" / "fold0"
        (self.cell_dir / "checkpoints").mkdir(parents=True)
        rows = [f"{key},p,benign,1\n" for key in KEYS] + [f"{key},p,benign,0\n" for key in HELD_OUT]
        self.refold("key,patient,label,fold\n" + "".join(rows))
        (self.cell_dir / "config.yaml").write_text(f"train:\n  batch_size: {BATCH}\n")
        self.attempts = 0

    def refold(self, folds: str) -> None:
        (self.run_dir / "folds.csv").write_text(folds)
        run = {"folds": {"sha256": hashlib.sha256(folds.encode()).hexdigest()}, "cells": [{"name": "fold0", "fold": 0}]}
        (self.run_dir / "run.json").write_text(json.dumps(run))

    def order(self, epoch: int) -> list[str]:
        return random.Random(epoch).sample(KEYS, SAMPLES)

    def batch(self, step: int) -> list[tuple[int, str]]:
        places = range(step * BATCH, (step + 1) * BATCH)
        return [(place // SAMPLES, self.order(place // SAMPLES)[place % SAMPLES]) for place in places]

    def attempt(self, start: int, stop: int, ranks: int = 1, saved: int | None = None, flushed: int = 0) -> None:
        """Steps from `start` to before `stop`. saved: the last checkpoint; without one it ends cleanly with a save.

        flushed: after the checkpoint, rank r got r + `flushed` more steps to its disk before it was killed.
        """
        for rank in range(ranks):
            ledger = Ledger(self.cell_dir, World(rank=rank, size=ranks), self.attempts, start)
            last = stop if saved is None else min(stop, saved + flushed + rank)
            for step in range(start, last):
                mine = self.batch(step)[rank::ranks]
                ledger.note(step, [key for _, key in mine], [epoch for epoch, _ in mine])
            ledger.flush()
        self.seal(stop if saved is None else saved)
        self.attempts += 1

    def seal(self, step: int) -> None:
        if step:
            (self.cell_dir / "checkpoints" / f"step_{step:08d}").mkdir(exist_ok=True)

    def edit(self, change: Callable[[list[str]], None], rank: int = 0) -> None:
        """Change the lines of one rank's ledger."""
        path = self.cell_dir / "ledger" / f"rank{rank}.csv"
        lines = path.read_text().splitlines()
        change(lines)
        path.write_text("".join(f"{line}\n" for line in lines))

    def audit(self) -> CellAudit:
        [cell] = audit_run(self.run_dir).cells
        return cell


@pytest.fixture
def run(tmp_path) -> Simulated:
    return Simulated(tmp_path / "run")


def test_an_undisturbed_run_is_exact(run):
    run.attempt(0, 12, ranks=2)
    found = run.audit()
    assert (found.verdict, found.steps, found.samples, found.epochs) == ("exact", 12, 48, 4)
    assert (found.attempts, found.replayed, found.violations) == (1, 0, ())


def test_repeated_draws_are_held_against_the_settings(run):
    """Of 10 training scans 2 are malignant: with balance an epoch draws each of these 4 times, 16 samples in all."""
    text = (run.run_dir / "folds.csv").read_text()
    for key in KEYS[:2]:
        text = text.replace(f"{key},p,benign", f"{key},p,malignant")
    run.refold(text)
    (run.cell_dir / "config.yaml").write_text(f"train:\n  batch_size: {BATCH}\n  balance: true\n")
    drawn = KEYS + KEYS[:2] * 3

    def ledger(draws: list[str]) -> CellAudit:
        writer = Ledger(run.cell_dir, World(), 0, 0)
        for step in range(4):
            writer.note(step, draws[step * BATCH : (step + 1) * BATCH], [0] * BATCH)
        writer.flush()
        return run.audit()

    assert (ledger(drawn).verdict, run.audit().epochs) == ("exact", 1)
    (run.cell_dir / "ledger" / "rank0.csv").unlink()
    found = ledger([*drawn[:-1], KEYS[5]])
    assert found.violations == (
        "step 3: case005 is there for the second time in epoch 0",
        "epoch 0 lacks 1 of 16 samples: case001",
    )


def test_a_sample_that_was_held_out_of_training_is_named(run):
    run.refold("".join(["key,patient,label,fold\n", *(f"{key},{key},benign,1\n" for key in KEYS)]))
    config = f"seed: 3\ntrain:\n  batch_size: {BATCH}\n  holdout: 0.2\n  stop_patience: 2\n"
    (run.cell_dir / "config.yaml").write_text(config)
    run.attempt(0, 3)  # 12 draws of 10 samples, as if nothing was held out
    held_out = {text.split(": ")[1].split(" is ")[0] for text in run.audit().violations if "held out" in text}
    assert len(held_out) == 2


def test_a_kill_and_another_number_of_ranks_leave_it_exact(run):
    run.attempt(0, 7, ranks=2, saved=5, flushed=1)  # steps 5 on both ranks' disks, step 6 on rank 1's alone
    run.attempt(5, 9, ranks=4, saved=5)  # killed before anything was saved
    run.attempt(5, 12, ranks=1)
    found = run.audit()
    assert (found.verdict, found.steps, found.attempts) == ("exact", 12, 3)
    # Steps 5 and 6 of the first attempt and 5 to 7 of the second, of which rank 3 got furthest.
    assert found.replayed == 2 + 3


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_any_history_of_kills_saves_and_worlds_is_exact(data):
    with tempfile.TemporaryDirectory() as folder:
        run = Simulated(Path(folder) / "run")
        start = 0
        for _ in range(data.draw(st.integers(0, 5))):
            stop = start + data.draw(st.integers(0, 8))
            saved = data.draw(st.integers(start, stop))
            ranks, flushed = data.draw(st.sampled_from([1, 2, 4])), data.draw(st.integers(0, 3))
            run.attempt(start, stop, ranks, saved, flushed)
            start = saved
        run.attempt(start, start + 5, ranks=2)
        found = run.audit()
        assert (found.verdict, found.violations) == ("exact", ())
        assert (found.steps, found.samples) == (start + 5, BATCH * (start + 5))
        assert found.epochs == BATCH * (start + 5) // SAMPLES


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_no_single_wrong_sample_of_a_step_that_counts_goes_unseen(data):
    with tempfile.TemporaryDirectory() as folder:
        run = Simulated(Path(folder) / "run")
        run.attempt(0, 6, ranks=2)
        run.attempt(6, 12, ranks=1)
        step = data.draw(st.integers(0, 11))
        epoch = data.draw(st.integers(0, 6))
        key = data.draw(st.sampled_from([*KEYS, *HELD_OUT, "stranger"]))
        place = data.draw(st.integers(0, 1))

        def change(lines: list[str]) -> None:
            head, _, samples = lines[step + 1].rpartition(",")
            words = samples.split(" ")
            before = words[place]
            words[place] = f"{epoch}:{key}"
            lines[step + 1] = f"{head},{' '.join(words)}"
            changed.append(before != words[place])

        changed: list[bool] = []
        run.edit(change)
        # The last epoch is cut off, so which of the samples that it lacks was drawn last cannot be told from outside.
        consumed = {k for s in range(12) for e, k in run.batch(s) if e == 4}
        unknowable = epoch == 4 and key in set(KEYS) - consumed and 4 in dict(run.batch(step))
        if changed[0] and not unknowable:
            assert run.audit().violation_count


def drop(*numbers: int) -> Callable[[list[str]], None]:
    def change(lines: list[str]) -> None:
        for number in sorted(numbers, reverse=True):
            del lines[number]

    return change


def replace(number: int, old: str, new: str) -> Callable[[list[str]], None]:
    def change(lines: list[str]) -> None:
        assert old in lines[number]
        lines[number] = lines[number].replace(old, new, 1)

    return change


def double(number: int) -> Callable[[list[str]], None]:
    return lambda lines: lines.insert(number, lines[number])


FIRST = random.Random(0).sample(KEYS, SAMPLES)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop(4), "step 3 of attempt 0: rank 0 not there, but later steps are"),
        (drop(*range(1, 13)), "steps 0 to 11 are missing: 12 steps were done and saved"),
        (drop(12), "step 11 is missing: 12 steps were done and saved"),
        (drop(1, 2), "steps 0 to 11 are missing"),
        (double(5), "step 4 of attempt 0, rank 0: is there twice"),
        (replace(1, f"0:{FIRST[0]}", "0:held0"), "step 0: held0 is of the validation part"),
        (replace(1, f"0:{FIRST[0]}", "0:stranger"), "step 0: stranger is not of this dataset's folds"),
        (replace(1, f"0:{FIRST[0]}", f"0:{FIRST[1]}"), f"{FIRST[1]} is there for the second time in epoch 0"),
        (replace(1, f"0:{FIRST[0]}", f"0:{FIRST[1]}"), f"epoch 0 lacks 1 of 10 samples: {FIRST[0]}"),
        (replace(1, f"0:{FIRST[0]}", f"9:{FIRST[0]}"), "epoch 9 was begun before the ones before it were over"),
        (replace(2, " ", " 0:held1 "), "step 1 has 5 samples; the global batch is 4"),
        (replace(3, "0,2,2,0,", "0,2,3,0,"), "step 2 of attempt 0, rank 0: says 3 ranks, others of the attempt 2"),
        (replace(3, "0,2,2,0,", "0,2,"), "rank0.csv, line 4 cannot be read"),
    ],
)
def test_every_kind_of_violation_is_found_and_named(run, change, said):
    run.attempt(0, 12, ranks=2)
    run.edit(change)
    found = run.audit()
    assert any(said in violation for violation in found.violations), found.violations
    assert "violation" in found.verdict


def test_a_rank_whose_ledger_is_gone_is_named(run):
    run.attempt(0, 12, ranks=2)
    (run.cell_dir / "ledger" / "rank1.csv").unlink()
    assert "steps 0 to 11 are missing: 12 steps were done and saved" in run.audit().violations


def test_a_gap_between_attempts_is_found(run):
    run.attempt(0, 5)
    run.attempt(7, 12)
    [violation] = [v for v in run.audit().violations if "missing" in v]
    assert violation.startswith("steps 5 to 6 are missing: attempt 0 got to step 4")


def test_a_ledger_that_begins_late_is_found(run):
    run.attempt(3, 12)
    assert "steps 0 to 2 are missing: the ledger begins at step 3" in run.audit().violations


def test_steps_that_were_done_again_with_other_samples_are_found(run):
    run.attempt(0, 8, saved=5, flushed=3)
    taken = run.order(2)[4]  # of step 6
    run.edit(replace(7, f"2:{taken}", "2:case-other"))
    run.attempt(5, 12)
    found = run.audit()
    assert found.violations == (
        f"step 6 was done again with other samples: attempt 0 had 2:case-other, attempt 1 has 2:{taken} instead",
    )


def test_done_without_a_ledger_proves_nothing(run):
    (run.cell_dir / "DONE").write_text(json.dumps({"step": 12}))
    assert "there is no ledger of them" in run.audit().violations[0]


def test_a_cell_that_has_not_begun_is_no_violation(run):
    assert run.audit().verdict == "no steps yet"
    assert audit_run(run.run_dir).ok


def test_a_run_that_goes_on_is_audited_as_far_as_it_got(run):
    run.attempt(0, 9, ranks=2, saved=6, flushed=1)
    with (run.cell_dir / "ledger" / "rank0.csv").open("a") as file:
        file.write("0,7,2,0,2:ca")  # being written at this moment
    found = run.audit()
    assert (found.verdict, found.steps) == ("exact", 7)


def test_the_command_prints_a_table_and_says_by_its_exit_status_what_it_found(run, capsys):
    run.attempt(0, 12, ranks=2)
    assert main(["audit", str(run.run_dir)]) == 0
    said = capsys.readouterr().out
    assert "exact" in said
    assert "48" in said
    run.edit(drop(4))
    assert main(["audit", str(run.run_dir)]) == 1
    assert "fold0: step 3 of attempt 0: rank 0 not there" in " ".join(capsys.readouterr().out.split())
    assert main(["audit", str(run.run_dir), "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert (said["ok"], said["cells"][0]["name"]) == (False, "fold0")


@pytest.mark.parametrize("name", ["folds.csv", "cells/fold0/config.yaml"])
@pytest.mark.parametrize("content", [None, b"\xff\x00garbage", b"key,fold\ncase000,1\n"])
def test_what_the_proof_rests_on_must_be_there(run, capsys, name, content):
    run.attempt(0, 4)
    (run.run_dir / name).unlink()
    if content is not None:
        (run.run_dir / name).write_bytes(content)
    assert main(["audit", str(run.run_dir)]) == 2
    assert Path(name).name in capsys.readouterr().err


def test_a_real_cell_that_was_preempted_and_lost_its_last_checkpoint_is_exact(make_cell, monkeypatch):
    cell_dir = make_cell("real", "model=unet_small", "model.image_size=32", "train.iterations=8")
    run_dir = cell_dir.parents[1]
    sha256 = hashlib.sha256((run_dir / "folds.csv").read_bytes()).hexdigest()
    run = {"folds": {"sha256": sha256}, "cells": [{"name": "fold0", "fold": 0}]}
    (run_dir / "run.json").write_text(json.dumps(run))
    note = Ledger.note

    def note_and_be_preempted(self, step, *samples) -> None:
        note(self, step, *samples)
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "note", note_and_be_preempted)
        assert run_cell(cell_dir, World()) is not None
    # The last checkpoint is lost with its disk, so the steps since the one before are done again.
    newest = sorted((cell_dir / "checkpoints").glob("step_*"))[-1]
    (newest / "model.safetensors").write_bytes(b"lost")
    assert run_cell(cell_dir, World()) is None

    audit = audit_run(run_dir)
    [cell] = audit.cells
    assert (cell.verdict, cell.steps, cell.samples, cell.attempts) == ("exact", 8, 32, 2), cell.violations
    account = goodput(read_attempts(cell_dir))
    assert account is not None
    assert (account.attempts, account.replayed_steps) == (2, cell.replayed)
    assert cell.replayed > 0
    assert min(account.seconds[cause] for cause in ("start", "load", "productive", "save", "evaluate", "replay")) > 0


def test_no_run_is_no_run(tmp_path, capsys):
    assert main(["audit", str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err


def test_the_audit_needs_no_torch():
    script = "import sys, bushpc.ops.audit; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
