"""Promises of the records: what is written is read again, damage is named field by field, a newer format says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from bushpc.errors import DataError
from bushpc.runs.layout import CellDir, RunDir
from bushpc.runs.records import (
    UNSET,
    AttemptNote,
    DoneRecord,
    Heartbeat,
    JobNote,
    SubmittingNote,
    TakenOver,
    read_config_hash,
)
from bushpc.runs.run_record import (
    RUN_FORMAT,
    CellRecord,
    FoldsRecord,
    GridRecord,
    RowRecord,
    RunRecord,
    SubmissionRecord,
)

JOB = JobNote(executor="local", job_id="12", submitted=3.5, log="", host="n1", process_start=None, code="abc")
RUN = RunRecord(
    name="mine",
    kind="grid",
    created="2026-11-30T08:00:00+0000",
    commit=None,
    command=["bushpc", "grid"],
    model="unet",
    data="phantom",
    prompts="none",
    shards="/data",
    manifest_sha256="12",
    folds=FoldsRecord(source="frozen", sha256="34"),
    versions={"bushpc": "0.1.0"},
    submissions=[SubmissionRecord(time="now", commit=None, code="abc", command=["bushpc"], versions={})],
    grid=GridRecord(
        name="g",
        title="G",
        baseline="a",
        rows=[RowRecord(name="a", label="A", settings={"train.lr": 1e-3, "model.blocks": [1, 2]}, model="unet")],
    ),
    cells=[CellRecord(name="a-fold0", fold=0, hash="56", iterations=4, row="a", trained_on=[{"fold": 0}])],
)
RECORDS = [
    *(RUN, JOB, Heartbeat(phase="training", step=3, metric={"loss": 0.5}, rate=1.5, attempt={"number": 0})),
    *(DoneRecord(finished="now", step=4, config="56", rows=7, parameters=8), TakenOver(trained_in="/there", step=4)),
    SubmittingNote(job_name="x", packs=[["a"], ["b"]], packed=False, executor="slurm", submitted=1.0, code="abc"),
    AttemptNote(cells=["a"], restart=1, from_step=2, stands_since=1, outcome="stopped", signal="SIGTERM"),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_what_is_written_is_read_again(tmp_path, record):
    path = tmp_path / "note.json"
    record.write(path)
    owner = {"owner": os.getuid()} if isinstance(record, JobNote) else {}
    for read in (type(record).read, type(record).read_whole):
        assert vars_of(read(path)) == vars_of(record) | owner


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_a_note_that_is_not_there_is_none(tmp_path, record):
    assert type(record).read(tmp_path / "none.json") is None


def vars_of(record) -> dict:
    return {name: getattr(record, name) for name in record.__struct_fields__}


# A run's file


def test_a_missing_run_file_says_what_the_folder_is_not(tmp_path):
    with pytest.raises(DataError, match=r"is not a run folder: it has no run\.json"):
        RunRecord.open(RunDir(tmp_path))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "Expecting value"),
        ("{", "line 1"),
        ("[]", "holds a list where an object is needed"),
        ("{}", "cells is missing"),
        ('{"cells": []}', "does not name the run's cells"),
        ('{"cells": [{"name": "../x", "fold": 0}]}', "'../x' is no name of a cell"),
        ('{"cells": [{"name": "a", "fold": "0"}], "kind": 3}', r"kind: .*; cells: .*fold"),
        ('{"cells": [{"name": "a", "fold": 0}], "format": "x"}', "format"),
        ('{"cells": [{"name": "a", "fold": 0}], "format": -1}', "its format is -1"),
        ("[" * 100_000, "damaged"),
    ],
)
def test_a_damaged_run_file_is_named_and_left_alone(tmp_path, text, said):
    run = RunDir(tmp_path)
    run.file.write_text(text)
    with pytest.raises(DataError, match=said) as refused:
        RunRecord.open(run)
    assert str(run.file) in str(refused.value)
    assert "Nothing was changed" in str(refused.value)
    assert run.file.read_text() == text


def test_a_run_of_a_newer_format_says_which_version_reads_it(tmp_path):
    run = RunDir(tmp_path)
    run.snapshot("abc").mkdir(parents=True)
    newer = {"format": RUN_FORMAT + 1, "versions": {"bushpc": "9.9"}, "cells": "something else by then"}
    run.file.write_text(json.dumps(newer))
    with pytest.raises(DataError) as refused:
        RunRecord.open(run)
    said = str(refused.value)
    assert f"format {RUN_FORMAT + 1}" in said
    assert f"reads up to {RUN_FORMAT}" in said
    assert "bushpc 9.9 wrote it" in said
    assert f"cd {run.snapshot('abc')}" in said


def test_a_run_file_without_a_format_is_read_as_the_first(tmp_path):
    run = RunDir(tmp_path)
    run.file.write_text('{"cells": [{"name": "fold0", "fold": 0}]}')
    assert RunRecord.open(run).format == RUN_FORMAT


def test_what_a_later_version_adds_to_the_same_format_is_passed_over(tmp_path):
    RUN.write(tmp_path / "run.json")
    content = json.loads((tmp_path / "run.json").read_text())
    content |= {"new": 1, "cells": [{**content["cells"][0], "new": [2]}]}
    (tmp_path / "run.json").write_text(json.dumps(content))
    assert RunRecord.read(tmp_path / "run.json") == RUN


# Notes of cells


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"job_id": None}, "job_id"),
        ({"job_id": "x"}, "job_id"),
        ({"job_id": "1" * 11}, "job_id"),
        ({"submitted": "then"}, "submitted"),
        ({"submitted": 1e300}, "submitted"),
        ({"log": 3, "executor": []}, r"executor: .*; log: "),
        ({"log": "a\0b"}, "log"),
        ({"heartbeat": "a\0b"}, "heartbeat"),
        ({"host": ...}, "host"),
        ({"process_start": ...}, "process_start"),
    ],
)
def test_a_damaged_job_note_names_the_fields_and_what_to_do(tmp_path, changes, said):
    content = json.loads(JOB.to_json()) | {"process_start": None} | changes
    path = tmp_path / "job.json"
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
    with pytest.raises(DataError, match=said) as refused:
        JobNote.read(path).require_process(path)
    assert str(path) in str(refused.value)
    assert "delete the file and submit again" in str(refused.value)


def test_a_job_of_a_queue_needs_no_host_and_gets_none(tmp_path):
    note = JobNote(executor="slurm", job_id="7_1", submitted=1.0, log="/log")
    note.write(tmp_path / "job.json")
    assert json.loads((tmp_path / "job.json").read_text()).keys() == {"executor", "job_id", "submitted", "log"}
    read = JobNote.read(tmp_path / "job.json")
    assert (read.host, read.process_start) == (UNSET, UNSET)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("phase", [3, None, {}]),
        ("step", [-1, "1", 1.5, True, 10**30]),
        ("total", [[1]]),
        ("metric", [3, {"a": None}, {"a": float("nan")}, {"a": "1"}]),
        ("rate", [float("nan"), 1e-300, -1, "fast", 0]),
        ("restarts", [None]),
        ("time", ["noon", 1e13]),
        ("node", [1]),
    ],
)
def test_a_damaged_field_of_a_heartbeat_is_left_out_and_the_rest_counts(tmp_path, field, values):
    whole = {"phase": "training", "step": 3, "total": 9, "metric": {"loss": 1}, "rate": 2, "restarts": 1, "time": 8}
    whole |= {"node": "n1"}
    for value in values:
        (tmp_path / "state.json").write_text(json.dumps(whole | {field: value}))
        found = vars_of(Heartbeat.read_valid(tmp_path / "state.json"))
        assert found | whole | {field: found[field]} == found
        assert found[field] == vars_of(Heartbeat())[field]


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\xff", "[" * 100_000])
def test_a_damaged_heartbeat_is_an_empty_one(tmp_path, text):
    (tmp_path / "state.json").write_text(text)
    assert Heartbeat.read_valid(tmp_path / "state.json") == Heartbeat()
    assert Heartbeat.read_valid(tmp_path / "none.json") == Heartbeat()


def test_the_hash_of_a_cell_is_read_without_its_settings(tmp_path):
    cell = CellDir(tmp_path)
    cell.config.write_text("# hash abc\nname: [not yaml\n")
    assert read_config_hash(cell) == "abc"
    cell.config.write_text("name: x\n")
    assert read_config_hash(cell) is None


def test_records_are_read_without_torch_and_pydantic():
    code = "import bushpc.runs.records, bushpc.runs.goodput, sys; print({'torch', 'pydantic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
