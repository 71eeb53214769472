"""Promises of progress: a bar on a terminal, a handful of plain lines in a log."""

from __future__ import annotations

import io

from rich.console import Console

from bushpc.shards.progress import progress


def test_a_log_gets_a_few_plain_lines_and_every_message():
    stream = io.StringIO()
    with progress("pack breast", Console(file=stream)) as show:
        for done in range(1, 1001):
            show(done, 1000, "lesion-000000.tar kept [from] an earlier attempt" if done == 3 else "")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "pack breast: 3/1000, lesion-000000.tar kept [from] an earlier attempt"
    assert lines[1] == "pack breast: 100/1000"
    assert lines[-1] == "pack breast: 1000/1000"
    assert len(lines) == 11
    assert "\x1b" not in stream.getvalue()


def test_a_terminal_gets_a_bar():
    stream = io.StringIO()
    with progress("pack breast", Console(file=stream, force_terminal=True, width=80)) as show:
        show(5, 10)
        show(10, 10, "a message")
    assert "10/10" in stream.getvalue()
    assert "a message" in stream.getvalue()
