"""Promises of status: it reads what is there, shows where the time went, and no damaged heartbeat stops it."""

from __future__ import annotations

import io
import json
import os
import re
import socket
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console

from bushpc.cli import main
from bushpc.dispatch.control import cancel
from bushpc.dispatch.status import read_status
from bushpc.dispatch.status_page import write_status_page
from bushpc.dispatch.status_table import status_table
from bushpc.errors import DispatchError
from bushpc.process import process_start
from bushpc.runs.goodput import SPENDINGS, Attempt
from bushpc.runs.layout import RunDir


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """A run of two cells: fold0 was preempted once and is done, ended early, fold1 never started."""
    cell_dir = tmp_path / "cells" / "fold0"
    cell_dir.mkdir(parents=True)
    cells = [{"name": f"fold{k}", "fold": k, "iterations": steps} for k, steps in enumerate((120, 110))]
    (tmp_path / "run.json").write_text(json.dumps({"cells": cells}))
    none = dict.fromkeys(SPENDINGS, 0.0)
    facts = {"job": "7", "host": "n1", "pid": 1, "ranks": 1, "gpus": 1, "submitted": 1000.0}
    first = {"number": 0, "restart": 0, "began": 1100.0, "from_step": 0, "step": 50, "seconds": none | {"step": 100.0}}
    second = {
        "number": 1,
        "restart": 1,
        "began": 1300.0,
        "from_step": 40,
        "step": 90,
        "seconds": none | {"step": 100.0},
    }
    first, second = Attempt(**facts, **first, end=""), Attempt(**facts, **second, end="done")
    (cell_dir / "attempts.jsonl").write_text(first.to_json() + "\n")
    state = {"phase": "done", "step": 90, "total": 120, "restarts": 1, "attempt": asdict(second)}
    (cell_dir / "state.json").write_text(json.dumps(state))
    (cell_dir / "DONE").write_text("{}")
    return tmp_path


def test_status_shows_goodput_and_restarts(run_dir, capsys):
    assert main(["status", str(run_dir)]) == 1  # fold1 is missing
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line.split()}
    assert rows["cell"] == ["cell", "state", "step", "restarts", "goodput"]
    assert rows["fold0"] == ["fold0", "done", "90/90", "1", "45", "%"]  # 180 of 400 s
    assert rows["fold1"] == ["fold1", "missing", "0/110"]
    assert rows["2"] == ["2", "cells:", "1", "done,", "1", "missing;", "90/200", "steps;", "0.1", "GPU", "hours"]


def test_status_gives_machines_the_whole_account(run_dir, capsys):
    main(["status", str(run_dir), "--json"])
    fold0, fold1 = json.loads(capsys.readouterr().out)["cells"]
    account = fold0["goodput"]
    assert account["share"] == pytest.approx(0.45)
    assert (account["wall_s"], account["attempts"], account["replayed_steps"]) == (400, 2, 10)
    assert account["seconds"] | {"productive": 180, "replay": 20, "queue": 100, "requeue": 100} == account["seconds"]
    assert account["gpu_hours"] == pytest.approx(200 / 3600)
    assert fold1["goodput"] is None


GARBAGE = [
    *(b"", b"{", b"[]", b"\xff\x00", b'{"attempt": 3}', b'{"metric": 3}', b'{"metric": {"a": null}}'),
    *(b'{"time": "noon"}', b'{"step": "1"}', b'{"total": [1]}', b'{"phase": {}}', b'{"restarts": null}'),
    *(b'{"phase": "training", "total": 9, "rate": %s}' % rate for rate in (b"NaN", b"1e-300", b'"fast"', b"-1")),
]


def make_running(cell_dir: Path) -> None:
    """By this process."""
    (cell_dir / "DONE").unlink()
    me = {"job_id": str(os.getpid()), "process_start": process_start(os.getpid()), "host": socket.gethostname()}
    (cell_dir / "job.json").write_text(json.dumps({"executor": "local", "submitted": 0.0, "log": "", **me}))


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("state", ["done", "running"])
def test_a_damaged_heartbeat_does_not_stop_status(run_dir, capsys, garbage, state):
    cell_dir = run_dir / "cells" / "fold0"
    for name in ("state.json", "attempts.jsonl"):
        (cell_dir / name).write_bytes(garbage)
    if state == "running":
        make_running(cell_dir)
    assert main(["status", str(run_dir)]) == (1 if state == "done" else 0)
    assert "fold0" in capsys.readouterr().out
    assert main(["status", str(run_dir), "--json"]) == (1 if state == "done" else 0)


def test_what_is_left_may_be_more_than_a_day(run_dir, capsys):
    make_running(run_dir / "cells" / "fold0")
    (run_dir / "cells" / "fold0" / "state.json").write_text('{"phase": "training", "total": 108000, "rate": 1.0}')
    main(["status", str(run_dir)])
    assert "30:00:00" in capsys.readouterr().out


@pytest.fixture
def squeue(run_dir, tmp_path, monkeypatch):
    """squeue("id|STATE|reason", name=…, user=…): fold1 is job 9 of Slurm. Returns what was asked."""
    note = {"executor": "slurm", "job_id": "9", "submitted": 1000.0, "log": ""}
    (run_dir / "cells" / "fold1").mkdir()
    (run_dir / "cells" / "fold1" / "job.json").write_text(json.dumps(note))
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)

    def make(said: str, name: str = "run", user: int | None = None) -> Path:
        job_id, state, reason = said.split("|")
        line = f"{job_id}|{state}|{os.getuid() if user is None else user}|{reason}||{name}"
        (folder / "squeue").write_text(f"#!/bin/sh\necho \"$@\" >'{folder}/asked'\necho '{line}'\n")
        (folder / "squeue").chmod(0o755)
        return folder / "asked"

    return make


@pytest.mark.parametrize("reason", ["None", "Priority", "Resources", "BeginTime", "Dependency"])
def test_a_job_that_waits_for_its_turn_gives_no_reason(run_dir, squeue, reason):
    squeue(f"9|PENDING|{reason}")
    assert [(cell.state, cell.reason) for cell in read_status(run_dir).cells] == [("done", ""), ("queued", "")]


@pytest.mark.parametrize(
    ("reason", "then"),
    [
        ("JobHeldUser", "scontrol release 9"),
        ("launch failed requeued held", "scontrol release 9"),
        ("AssocGrpCpuLimit", "scontrol show job 9"),
        ("DependencyNeverSatisfied", "scontrol show job 9"),
    ],
)
def test_a_job_that_will_not_start_by_itself_says_why(run_dir, squeue, capsys, reason, then):
    squeue(f"9|PENDING|{reason}")
    fold1 = read_status(run_dir).cells[1]
    assert (fold1.state, fold1.live) == ("queued", True)
    assert f"({reason})" in fold1.reason
    assert then in fold1.reason
    main(["status", str(run_dir)])
    assert f"fold1 queued: {fold1.reason[:30]}" in capsys.readouterr().out


def test_the_queue_is_asked_for_the_jobs_of_the_runs_owner(run_dir, squeue, monkeypatch):
    asked = squeue("9|RUNNING|None")
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)  # a colleague looks
    assert read_status(run_dir).cells[1].live
    assert f"--user={owner} " in asked.read_text()


def test_a_job_of_the_same_number_that_is_not_ours_does_not_count(run_dir, squeue):
    """Job numbers begin again, and two clusters may have equal ones: name and user tell."""
    note = run_dir / "cells" / "fold1" / "job.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | {"name": "run-1a2b3c4d", "user": 1234}))
    for name, user, state in (
        ("run-1a2b3c4d", 1234, "queued"),
        ("run-ffffffff", 1234, "stopped"),
        ("run-1a2b3c4d", 4321, "stopped"),
    ):
        squeue("9|PENDING|Priority", name=name, user=user)
        assert read_status(run_dir).cells[1].state == state, (name, user)


def test_another_clusters_queue_is_not_asked(run_dir, squeue, tmp_path, monkeypatch):
    asked = squeue("9|PENDING|Priority")
    note = run_dir / "cells" / "fold1" / "job.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | {"cluster": "alpha"}))
    (tmp_path / "bin" / "scontrol").write_text("#!/bin/sh\necho 'ClusterName             = beta'\n")
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "beta.conf"))
    for command in (read_status, cancel):
        with pytest.raises(DispatchError, match=r"on the cluster .alpha., .* talks to .beta. .*beta.conf"):
            command(run_dir)
    assert not asked.exists()


def test_a_report_job_that_ended_without_a_report_is_told(run_dir, capsys):
    note = RunDir(run_dir).report_job
    note.parent.mkdir()
    gone = {
        "executor": "local",
        "job_id": "1",
        "submitted": 1000.0,
        "log": "/logs/report.out",
        "process_start": "never",
    }
    note.write_text(json.dumps(gone | {"host": socket.gethostname()}))
    assert main(["status", str(run_dir)]) == 1
    assert "job 1 ended without writing the report of these cells" in capsys.readouterr().out
    main(["status", str(run_dir), "--json"])
    assert "log: /logs/report.out" in json.loads(capsys.readouterr().out)["report_failed"]
    note.write_text(json.dumps(gone | {"host": socket.gethostname(), "cancelled": 2000.0}))
    assert read_status(run_dir).report_failed == ""


def test_following_a_run_and_json_exclude_each_other(run_dir, capsys):
    assert main(["status", str(run_dir), "--watch", "--json"]) == 2
    assert "--watch with --json" in capsys.readouterr().err


AWAY = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"


@pytest.fixture
def away(squeue, tmp_path):
    """away(n): the first n questions to squeue fail, as while slurmctld is restarted; the job is RUNNING."""

    def make(times: int) -> Path:
        squeue("9|RUNNING|None")
        real, count = tmp_path / "bin" / "squeue", tmp_path / "count"
        real.rename(tmp_path / "bin" / "answers")
        real.write_text(
            f"#!/bin/sh\necho >>'{count}'\n"
            f"[ $(wc -l <'{count}') -gt {times} ] || {{ echo '{AWAY}' >&2; exit 1; }}\n"
            f"exec '{tmp_path}/bin/answers' \"$@\"\n"
        )
        real.chmod(0o755)
        return count

    return make


def test_while_the_controller_is_away_status_shows_the_heartbeats_and_says_so(run_dir, away, capsys):
    away(99)
    heartbeat = {"time": 2000.0, "step": 7, "total": 10, "phase": "training", "node": "node3"}
    (run_dir / "cells" / "fold1" / "state.json").write_text(json.dumps(heartbeat))
    found = read_status(run_dir, only_show=True)
    assert [(cell.state, cell.step) for cell in found.cells][1] == ("running", 7)
    assert "Unable to contact slurm controller" in found.silent
    assert main(["status", str(run_dir)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "States are from the cells' own heartbeats" in said
    assert "7/10" in said


def test_what_acts_on_the_queue_waits_for_the_controller(run_dir, away, monkeypatch, capsys):
    monkeypatch.setattr("bushpc.cluster.base.PAUSE_S", 0.01)
    count = away(3)
    assert read_status(run_dir).cells[1].state == "queued"
    assert len(count.read_text().splitlines()) == 4
    assert capsys.readouterr().err.count("asking again for 120 s") == 1


def test_it_gives_up_after_the_stated_time(run_dir, away, monkeypatch):
    monkeypatch.setattr("bushpc.cluster.base.PAUSE_S", 0.01)
    monkeypatch.setattr("bushpc.cluster.base.PATIENCE_S", 0.1)
    away(10_000)
    with pytest.raises(DispatchError, match="Unable to contact"):
        read_status(run_dir)


def test_the_page_says_what_the_table_says_and_needs_nothing_else(run_dir, tmp_path, capsys):
    """A second cell has failed with a reason full of signs that HTML knows."""
    (run_dir / "cells/fold1").mkdir()
    (run_dir / "cells/fold1/FAILED").write_text("<b>loss</b> & more\n")
    lines = [json.dumps({"kind": "train", "step": step, "loss": 2 / step}) for step in range(1, 9)]
    (run_dir / "cells/fold0/metrics.jsonl").write_text("\n".join(lines))
    page = tmp_path / "elsewhere" / "status.html"
    assert main(["status", str(run_dir), "--html", str(page)]) == 1
    text = page.read_text()
    assert "&lt;b&gt;loss&lt;/b&gt; &amp; more" in text
    assert "training loss: 2.000 → 0.250, best 0.250" in text
    assert "Goodput 45 %" in text
    assert not re.search(r"(?:src|href)=|https?:", text)
    assert 'http-equiv="refresh"' not in text, "nobody writes it again"
    assert [path.name for path in page.parent.iterdir()] == ["status.html"]
    assert main(["status", str(run_dir), "--html", str(run_dir)]) == 2
    assert "it is a folder; name a file" in capsys.readouterr().err


def test_a_page_of_a_running_run_that_is_watched_reloads_itself(run_dir, tmp_path):
    make_running(run_dir / "cells/fold0")
    path = write_status_page(read_status(run_dir), tmp_path / "status.html", ["bushpc"], watched=True)
    assert 'http-equiv="refresh"' in path.read_text()


@pytest.mark.parametrize(("width", "height"), [(80, 24), (40, 24), (40, 10)])
def test_a_screen_of_a_large_run_keeps_its_totals_in_sight(run_dir, width, height):
    cells = [{"name": f"a_row_of_a_grid_{k}-fold0", "fold": 0, "iterations": 9} for k in range(1000)]
    (run_dir / "run.json").write_text(json.dumps({"cells": cells}))
    for cell in cells[:100]:
        (run_dir / "cells" / cell["name"]).mkdir()
        (run_dir / "cells" / cell["name"] / "FAILED").write_text("a reason that is longer than the screen is wide " * 3)
    console = Console(width=width, height=height, file=io.StringIO(), color_system=None)
    status = read_status(run_dir)
    console.print(status_table(status, width, height=height))
    lines = console.file.getvalue().splitlines()
    assert len(lines) <= max(height, 16 + len(str(status.run_dir)) // width)
    assert max(map(len, lines)) <= width
    assert any(line.startswith("1000 cells: 100 failed, 900") for line in lines)
