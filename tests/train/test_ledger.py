"""Promises of the ledger: a human can read it, a kill or a full disk costs no whole line and doubles none."""

from __future__ import annotations

import multiprocessing
import resource
from pathlib import Path

import pytest

from bushpc.dist import World
from bushpc.errors import BushpcWarning
from bushpc.train.ledger import BUFFERED, Ledger, LedgerLine, read_ledger

ALONE = World()


def test_a_line_says_what_a_rank_consumed(tmp_path):
    with Ledger(tmp_path, World(rank=1, size=2), attempt=3, start=12) as ledger:
        ledger.note(12, ["case044", "a,b:c"], [0, 1])
    text = (tmp_path / "ledger" / "rank1.csv").read_text()
    assert text == "attempt,step,world,rank,samples\n3,12,2,1,0:case044 1:a,b:c\n"
    assert list(read_ledger(tmp_path)) == [LedgerLine(3, 12, 2, 1, "0:case044 1:a,b:c")]


def test_attempts_follow_each_other_in_one_file_under_one_header(tmp_path):
    for attempt, start in ((0, 0), (1, 2)):
        with Ledger(tmp_path, ALONE, attempt, start) as ledger:
            for step in range(start, start + 3):
                ledger.note(step, ["k"], [step])
    lines = list(read_ledger(tmp_path))
    assert [(line.attempt, line.step) for line in lines] == [(0, 0), (0, 1), (0, 2), (1, 2), (1, 3), (1, 4)]
    assert (tmp_path / "ledger" / "rank0.csv").read_text().count("attempt") == 1


def note_and_die(cell_dir: Path) -> None:
    import os
    import signal

    ledger = Ledger(cell_dir, ALONE, attempt=0, start=0)
    for step in range(10):
        ledger.note(step, ["k"], [step])
    ledger.flush()
    ledger.note(10, ["k"], [10])
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_was_flushed_survives_a_kill(tmp_path):
    child = multiprocessing.get_context("spawn").Process(target=note_and_die, args=(tmp_path,))
    child.start()
    child.join()
    assert [line.step for line in read_ledger(tmp_path)] == list(range(10))


def test_a_long_stretch_without_a_save_does_not_pile_up_in_memory(tmp_path):
    ledger = Ledger(tmp_path, ALONE, attempt=0, start=0)
    for step in range(BUFFERED + 1):
        ledger.note(step, ["k"], [0])
    assert len(list(read_ledger(tmp_path))) == BUFFERED


@pytest.mark.parametrize("cut_off", ["1", "0,2,1,0,0:ca", "0,2,1,0,0:case" + "x" * 200_000])
def test_half_a_line_is_passed_over_and_the_next_attempt_starts_on_a_fresh_one(tmp_path, cut_off):
    with Ledger(tmp_path, ALONE, attempt=0, start=0) as ledger:
        ledger.note(0, ["case1"], [0])
    path = tmp_path / "ledger" / "rank0.csv"
    with path.open("a") as file:
        file.write(cut_off)
    assert [line.step for line in read_ledger(tmp_path)] == [0]
    with Ledger(tmp_path, ALONE, attempt=1, start=1) as ledger:
        ledger.note(1, ["case2"], [0])
    assert list(read_ledger(tmp_path)) == [LedgerLine(0, 0, 1, 0, "0:case1"), LedgerLine(1, 1, 1, 0, "0:case2")]
    assert "xx" not in path.read_text()


def test_a_file_of_half_a_header_is_begun_again(tmp_path):
    (tmp_path / "ledger").mkdir()
    (tmp_path / "ledger" / "rank0.csv").write_text("attempt,st")
    with Ledger(tmp_path, ALONE, attempt=0, start=0) as ledger:
        ledger.note(0, ["case1"], [0])
    assert list(read_ledger(tmp_path)) == [LedgerLine(0, 0, 1, 0, "0:case1")]


def test_a_full_disk_ends_nothing_and_its_lines_are_written_once_there_is_room(tmp_path):
    ledger = Ledger(tmp_path, ALONE, attempt=0, start=0)
    ledger.note(0, ["before"], [0])
    ledger.flush()
    path = tmp_path / "ledger" / "rank0.csv"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A write fails in the middle of a line, as it does on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, limits[1]))
    try:
        ledger.note(1, ["while"], [0])
        with pytest.warns(BushpcWarning, match="cannot be written"):
            ledger.flush()
        assert [line.step for line in read_ledger(tmp_path)] == [0]
        ledger.note(2, ["while"], [0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    ledger.flush()
    ledger.close()
    assert [line.step for line in read_ledger(tmp_path)] == [0, 1, 2]


@pytest.mark.parametrize("line", ["", "0,1,1,0", "0,1,1,0,", "a,1,1,0,0:k", "0,-1,1,0,0:k", "0,1,1,0,k", "0,1,1,0,0:"])
def test_a_damaged_line_is_named_and_not_guessed(tmp_path, line):
    (tmp_path / "ledger").mkdir()
    (tmp_path / "ledger" / "rank0.csv").write_text(f"attempt,step,world,rank,samples\n{line}\n0,1,1,0,0:k\n")
    assert list(read_ledger(tmp_path)) == ["rank0.csv, line 2", LedgerLine(0, 1, 1, 0, "0:k")]
