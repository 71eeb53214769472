"""Promises about cluster.setup in a job's script, run by bash as a job would."""

from __future__ import annotations

import subprocess

import pytest

from bushpc.cluster.setup import failure_file, guarded


def run(folder, *lines: str) -> subprocess.CompletedProcess[str]:
    script = "\n".join(["bushpc_job=7", *guarded(lines, folder), "echo then $SAID"])
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "lines",
    [
        ("if true; then", "  export SAID=hello", "else", "  false", "fi"),
        ("say() {", "  export SAID=$1", "}", "say hello"),
        ("for word in hello; do", "  export SAID=$word; done"),
        ("read -r SAID <<END", "hello", "END"),
        ("export SAID=hel\\", "lo"),
        ("export SAID='hello", "'"),
        ("# nothing", "", "export SAID=hello  # a word"),
    ],
)
def test_a_command_may_take_several_lines(tmp_path, lines):
    done = run(tmp_path, *lines)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["then", "hello"], "")
    assert not list(tmp_path.iterdir())


def test_a_command_of_several_lines_that_fails_is_named_by_its_first(tmp_path):
    done = run(tmp_path, "export SAID=hello", "if true; then", "  echo why; (exit 4)", "fi", "echo never")
    assert done.returncode == 4
    assert failure_file(tmp_path, "7").read_text().splitlines()[0] == (
        "setup line 'if true; then …' ended with status 4: why"
    )
    assert "never" not in done.stdout + done.stderr


def test_a_command_that_never_ends_is_an_error_of_bash_and_not_of_the_next_lines(tmp_path):
    done = run(tmp_path, "if true; then", "export SAID=hello")
    assert done.returncode != 0
    assert "then hello" not in done.stdout


def test_a_trap_for_the_end_of_the_job_stays(tmp_path):
    done = run(tmp_path, "trap 'echo bye' EXIT", "SAID=hello")
    assert done.stdout.splitlines() == ["then hello", "bye"]
