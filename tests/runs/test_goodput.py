"""Promises of the time account: every second has one cause, and nothing that a dying run leaves can upset it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bushpc.runs.goodput import CAUSES, SPENDINGS, Attempt, goodput, read_attempts


def make_attempt(number: int = 0, **changes) -> Attempt:
    seconds = dict.fromkeys(SPENDINGS, 0.0) | changes.pop("seconds", {})
    filled = {
        "number": number, "job": "", "restart": 0, "host": "n1", "pid": 1, "ranks": 1, "gpus": 0, "submitted": 0.0,
        "began": 0.0, "from_step": 0, "step": 0, "seconds": seconds, "end": "",
    }  # fmt: skip
    return Attempt(**(filled | changes))


def test_a_preempted_and_resubmitted_cell_adds_up_as_worked_by_hand():
    first = make_attempt(
        0, job="7", gpus=2, submitted=100, began=130, step=50, seconds={"start": 10, "step": 100, "load": 5, "save": 2}
    )  # queued for 30 s, last heard of at 247
    requeued = make_attempt(
        1,
        job="7",
        restart=1,
        gpus=2,
        submitted=100,
        began=260,
        from_step=40,
        step=60,
        seconds={"start": 10, "step": 30},
    )  # 13 s later; 10 of its 20 steps, 15 of its 30 s, were done before; last heard of at 300
    later = make_attempt(
        2, job="9", gpus=1, submitted=1000, began=1020, from_step=60, step=60, seconds={"start": 4, "evaluate": 6}
    )
    account = goodput([first, requeued, later])
    assert account is not None
    assert account.seconds == {
        "productive": 115, "load": 5, "save": 2, "evaluate": 6, "other": 0, "replay": 15, "lost": 0, "start": 24,
        "queue": 50, "requeue": 13, "idle": 700,
    }  # fmt: skip
    assert account.wall_s == 1030 - 100
    assert account.replayed_steps == 10
    assert account.share == pytest.approx(115 / 230)
    assert account.gpu_hours == pytest.approx((117 * 2 + 40 * 2 + 10) / 3600)


def test_energy_is_the_sum_over_attempts_with_gpus_and_unknown_where_one_of_them_is():
    on_cpus = make_attempt(0)
    told = [make_attempt(number, gpus=2, energy_j=1e6 * number) for number in (1, 2)]
    untold = make_attempt(3, gpus=2)
    for attempts, joules in (([on_cpus], None), ([on_cpus, *told], 3e6), ([*told, untold], None)):
        account = goodput(attempts)
        assert account is not None
        assert account.energy_j == joules


def test_a_line_of_before_energy_was_counted_is_still_read():
    old = dataclasses.asdict(make_attempt(0))
    del old["energy_j"]
    assert Attempt.parse(old) == make_attempt(0)
    for joules in (-1.0, float("nan"), "12", True):
        assert Attempt.parse(old | {"energy_j": joules}) is None


def test_steps_after_the_last_checkpoint_of_a_dead_cell_are_lost_until_it_goes_on():
    died = make_attempt(0, submitted=100, began=100, step=50, seconds={"step": 100})
    account = goodput([died], saved=40)
    assert account is not None
    assert (account.seconds["productive"], account.seconds["lost"]) == (80, 20)
    again = make_attempt(1, submitted=300, began=300, from_step=40, step=60, seconds={"step": 40}, end="stopped")
    account = goodput([died, again], saved=60)
    assert account is not None
    assert (account.seconds["productive"], account.seconds["replay"], account.seconds["lost"]) == (120, 20, 0)


def test_a_cell_that_never_started_has_no_account(tmp_path):
    assert goodput(read_attempts(tmp_path)) is None


@st.composite
def histories(draw) -> tuple[list[Attempt], dict[str, float]]:
    """Attempts of a simulated cell, and the cause of each of its seconds by the simulator's own clock."""
    clock, reached, saved, job, restart = 1000.0, 0, 0, 0, 0
    truth = dict.fromkeys(CAUSES, 0.0)
    attempts: list[Attempt] = []
    seconds = st.floats(0, 1e4)

    def wait(cause: str) -> None:
        nonlocal clock
        waited = draw(seconds)
        truth[cause] += waited
        clock += waited

    submitted = clock
    for number in range(draw(st.integers(1, 6))):
        if number == 0 or draw(st.booleans()):  # submitted by the user
            if number:
                wait("idle")
            submitted, job, restart = clock, job + 1, 0
            wait("queue")
        else:
            restart += 1
            wait("requeue")
        began, spent = clock, {cause: draw(seconds) for cause in SPENDINGS}
        from_step, steps = saved, draw(st.integers(0, 40))
        again = len(set(range(from_step, from_step + steps)) & set(range(reached)))
        if not steps:
            spent["step"] = 0.0
        for cause in ("start", "load", "save", "other"):
            truth[cause] += spent[cause]
        truth["evaluate"] += spent["validate"] + spent["evaluate"]
        truth["replay"] += again * (spent["step"] / max(1, steps))
        truth["productive"] += (steps - again) * (spent["step"] / max(1, steps))
        clock += sum(spent.values())
        reached = max(reached, from_step + steps)
        saved = draw(st.integers(0, from_step + steps))
        facts = {"job": str(job), "restart": restart, "submitted": submitted, "began": began, "seconds": spent}
        attempts.append(make_attempt(number, from_step=from_step, step=from_step + steps, **facts))
    return attempts, truth


@given(histories())
@settings(max_examples=100, deadline=None)
def test_causes_sum_to_the_wall_time_whatever_happened(history):
    attempts, truth = history
    account = goodput(attempts)
    assert account is not None
    # Wall times near 1e5 s carry the clock's own rounding.
    assert account.seconds == pytest.approx(truth, abs=1e-6)
    assert account.wall_s == pytest.approx(attempts[-1].last_sign - attempts[0].submitted, abs=1e-6)
    assert sum(account.seconds.values()) == pytest.approx(account.wall_s, abs=1e-9)


def test_a_node_whose_clock_is_behind_makes_no_negative_time():
    ahead = make_attempt(0, submitted=0, began=10, seconds={"step": 100}, step=5)
    behind = make_attempt(1, submitted=0, began=90, seconds={"step": 10}, from_step=5, step=6)
    account = goodput([ahead, behind])
    assert account is not None
    assert min(account.seconds.values()) == 0.0
    assert account.wall_s == 120


def test_the_running_attempt_is_read_from_the_heartbeat(tmp_path):
    ended, running = make_attempt(0, end="stopped"), make_attempt(1, step=7)
    (tmp_path / "attempts.jsonl").write_text(ended.to_json() + "\n")
    (tmp_path / "state.json").write_text(json.dumps({"attempt": dataclasses.asdict(running)}))
    assert read_attempts(tmp_path) == [ended, running]
    # A heartbeat of an attempt that is in the file already says nothing new.
    (tmp_path / "state.json").write_text(json.dumps({"attempt": dataclasses.asdict(ended)}))
    assert read_attempts(tmp_path) == [ended]


def read_with(folder: Path, attempts: bytes, state: bytes) -> list[Attempt]:
    (folder / "attempts.jsonl").write_bytes(attempts)
    (folder / "state.json").write_bytes(state)
    return read_attempts(folder)


@given(st.binary(max_size=60), st.binary(max_size=60))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_garbage_around_whole_lines_loses_nothing_but_itself(tmp_path, garbage, state):
    whole = [make_attempt(number) for number in range(2)]
    lines = b"\n".join([whole[0].to_json().encode(), garbage, whole[1].to_json().encode(), garbage])
    assert read_with(tmp_path, lines, state) == whole


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(SPENDINGS), inner, max_size=2),
    max_leaves=5,
)


@given(st.sampled_from([field.name for field in dataclasses.fields(Attempt)]), JSON)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_attempt_with_a_field_of_nonsense_is_passed_over_or_still_adds_up(tmp_path, field, value):
    line = json.dumps(dataclasses.asdict(make_attempt(0)) | {field: value})
    account = goodput(read_with(tmp_path, line.encode(), b"{}"))
    assert account is None or sum(account.seconds.values()) == account.wall_s >= 0
