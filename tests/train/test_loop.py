"""Promises of the loop's pace: a stop is measured, and saves come as often as a short grace time needs."""

from __future__ import annotations

from bushpc.train.loop import Pace


def test_saves_come_as_often_as_they_can_be_written_where_the_grace_time_is_too_short():
    said: list[str] = []
    pace = Pace(100, 30.0, said.append)
    for _ in range(5):
        pace.stepped(1.0)
    pace.saved(0.5, [60.0])
    assert pace.save_every == 60  # a write takes 60 steps; its copy, half a second, is less than 5 % of that
    assert "stopping may take 121.5 s (a step, a pending write and a save), but the site allows 30 s" in said[0]
    pace.saved(0.5, [60.0, 60.0])
    assert len(said) == 1
    pace.saved(5.0, [60.0])
    assert pace.save_every == 100  # 5 s of every 100 are as much waiting as may be


def test_saves_stay_as_configured_where_the_grace_time_is_long_enough_or_unknown():
    for grace_s in (122.0, None):
        said: list[str] = []
        pace = Pace(100, grace_s, said.append)
        pace.stepped(1.0)
        pace.saved(0.5, [60.0])
        assert (pace.save_every, said) == (100, [])
        assert pace.measured == {"step_s": 1.0, "save_s": 60.5, "stop_s": 121.5}


def test_one_slow_step_does_not_count_as_the_pace():
    pace = Pace(100, None, print)
    for seconds in (120.0, 1.0, 1.1, 0.9, 1.0):
        pace.stepped(seconds)
    assert pace.step_s == 1.0
