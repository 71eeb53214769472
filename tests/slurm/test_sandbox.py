"""What the other Slurm tests stand on: the sandbox is a real Slurm, is up fast, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import typing as t
from collections.abc import Callable
from pathlib import Path

import pytest

if t.TYPE_CHECKING:
    from tests.slurm.conftest import Sandbox

pytestmark = pytest.mark.real

FOREVER = "while :; do sleep 0.1; done"
# A task that writes down the first signal that reaches it.
TELL = f"""cat > tell.sh <<'END'
trap 'echo TERM >> told; exit' TERM
trap 'echo USR2 >> told; exit' USR2
echo start >> told
{FOREVER}
END
srun sh tell.sh"""


def words(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


def test_one_step_runs_its_two_tasks_on_two_nodes(slurm: Sandbox) -> None:
    tasks = slurm.run(["srun", "-N2", "-n2", "sh", "-c", "echo $SLURM_JOB_ID.$SLURM_STEP_ID $SLURMD_NODENAME"])
    steps, nodes = zip(*(line.split() for line in tasks.splitlines()), strict=True)
    assert len(set(steps)) == 1
    assert sorted(nodes) == ["n1", "n2"]


def test_sacct_knows_how_finished_jobs_ended(slurm: Sandbox) -> None:
    good, bad = slurm.sbatch("true"), slurm.sbatch("exit 3")
    slurm.wait(good, {"COMPLETED"})
    slurm.wait(bad, {"FAILED"})

    def rows() -> list[tuple[str, str]]:
        return [(row["State"], row["ExitCode"]) for row in slurm.sacct(f"{good},{bad}")]

    slurm.until(lambda: rows() == [("COMPLETED", "0:0"), ("FAILED", "3:0")], what=lambda: str(rows()))


def test_high_preempts_low_which_is_requeued_and_runs_again(slurm: Sandbox) -> None:
    low = slurm.sbatch("echo ${SLURM_RESTART_COUNT:-0} >> runs\nexec sleep 99", "-N2", "--exclusive")
    slurm.until(lambda: words(slurm.root / "runs") == ["0"])
    high = slurm.sbatch("true", "-p", "high", "-N2", "--exclusive")
    slurm.wait(high, {"COMPLETED"})
    slurm.until(lambda: words(slurm.root / "runs") == ["0", "1"], what=lambda: str(slurm.squeue()))
    assert slurm.squeue()[low] == "RUNNING"
    slurm.run(["scancel", low])


def test_preemption_sends_term_to_steps_by_default_and_no_user_signal(make_sandbox: Callable[..., Sandbox]) -> None:
    assert first_signal_of_a_preemption(make_sandbox("--nodes", "1", "--no-accounting", "--grace", "60")) == "TERM"


def test_preemption_sends_usr2_first_if_asked_to(make_sandbox: Callable[..., Sandbox]) -> None:
    asked = make_sandbox("--nodes", "1", "--no-accounting", "--grace", "60", "--user-signal")
    assert first_signal_of_a_preemption(asked) == "USR2"


def first_signal_of_a_preemption(sandbox: Sandbox) -> str:
    """What a step is told while it still has its time of grace."""
    sandbox.sbatch(TELL, "--exclusive", "--time=10", "--signal=USR2@30")
    sandbox.until(lambda: words(sandbox.root / "told") == ["start"])
    sandbox.sbatch("true", "-p", "high", "--exclusive")
    return sandbox.until(lambda: words(sandbox.root / "told")[1:])[0]


def test_an_array_runs_no_more_tasks_at_once_than_its_limit(slurm: Sandbox) -> None:
    # mkdir fails while another task is in there; without the limit, four of them start together.
    script = "mkdir inside || exit 1\nsleep 0.3\nrmdir inside"
    array = slurm.sbatch(script, "--array=0-3%1")
    assert slurm.wait(array) == ["COMPLETED"] * 4


def test_a_job_that_depends_on_afterany_runs_after_a_failed_one(slurm: Sandbox) -> None:
    failing = slurm.sbatch("sleep 0.5; echo failing >> order; exit 1")
    after = slurm.sbatch("echo after >> order", f"--dependency=afterany:{failing}")
    slurm.wait(after, {"COMPLETED"})
    assert slurm.squeue()[failing] == "FAILED"
    assert words(slurm.root / "order") == ["failing", "after"]


def test_work_on_a_killed_node_is_requeued_and_the_node_comes_back(slurm: Sandbox) -> None:
    job = slurm.sbatch("echo ${SLURM_RESTART_COUNT:-0} $SLURMD_NODENAME >> moved\nexec sleep 99", "-w", "n2")
    slurm.until(lambda: words(slurm.root / "moved") == ["0", "n2"])
    killed = slurm.tool("kill-node", "n2")
    assert killed.returncode == 0, killed.stderr
    assert not [command for command in slurm.processes().values() if "sleep 99" in command]
    slurm.run(["scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=killed"])
    slurm.wait(job, {"PENDING"})
    started = slurm.tool("start-node", "n2")
    assert started.returncode == 0, started.stderr
    slurm.until(lambda: words(slurm.root / "moved") == ["0", "n2", "1", "n2"], what=lambda: str(slurm.squeue()))
    slurm.run(["scancel", job])
    slurm.wait(job)


def test_a_sandbox_is_ready_within_30_seconds_and_up_again_is_a_no_op(slurm: Sandbox) -> None:
    before = slurm.status()
    again = slurm.tool("up")
    assert again.returncode == 0
    assert "already up" in again.stderr
    assert slurm.status() == before
    assert before["nodes"] == {"n1": "idle", "n2": "idle"}


def test_two_sandboxes_do_not_disturb_each_other(slurm: Sandbox, make_sandbox: Callable[..., Sandbox]) -> None:
    etc_slurm = listing(Path("/etc/slurm"))
    other = make_sandbox("--nodes", "2")
    here, there = slurm.sbatch(FOREVER), other.sbatch(FOREVER)
    slurm.wait(here, {"RUNNING"})
    other.wait(there, {"RUNNING"})
    assert not set(slurm.status()["ports"].values()) & set(other.status()["ports"].values())
    other.down()
    assert not other.root.exists()
    assert slurm.squeue()[here] == "RUNNING"
    slurm.run(["scancel", here])
    assert listing(Path("/etc/slurm")) == etc_slurm


def listing(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(p), p.stat().st_mtime_ns) for p in [folder, *folder.rglob("*")] if p.exists())


def test_down_ends_even_what_a_job_put_into_the_background(make_sandbox: Callable[..., Sandbox]) -> None:
    sandbox = make_sandbox("--nodes", "1", "--no-accounting")
    sandbox.sbatch(f"trap '' TERM\nsetsid sh -c \"trap '' TERM; touch away; {FOREVER}\" &\n{FOREVER}")
    sandbox.until(lambda: (sandbox.root / "away").exists())
    sandbox.down()  # asserts that no process and no port is left


def test_up_after_a_crash_clears_the_remains_and_starts_anew(make_sandbox: Callable[..., Sandbox]) -> None:
    sandbox = make_sandbox("--nodes", "1", "--no-accounting")
    sandbox.wait(sandbox.sbatch(FOREVER), {"RUNNING"})
    before = sandbox.status()["daemons"]
    os.kill(before["slurmctld"], signal.SIGKILL)
    sandbox.until(lambda: not sandbox.status()["up"])
    sandbox.up()
    after = sandbox.status()["daemons"]
    assert set(after) == set(before)
    assert not set(after.values()) & set(before.values())
    assert sandbox.squeue() == {}
    assert not set(before.values()) & set(sandbox.processes())


def test_down_spares_a_stranger_that_has_a_recorded_pid(make_sandbox: Callable[..., Sandbox]) -> None:
    sandbox = make_sandbox("--nodes", "1", "--no-accounting")
    stranger = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    path = sandbox.root / "sandbox.json"
    record = json.loads(path.read_text())
    record["daemons"]["stranger"] = {"pid": stranger.pid, "started": 1}
    path.write_text(json.dumps(record))
    sandbox.down()
    assert stranger.poll() is None
    stranger.communicate(b"\n")


def test_up_interrupted_halfway_leaves_nothing(tmp_path: Path, slurm: Sandbox) -> None:
    sandbox = slurm.beside(tmp_path / "s")
    up = subprocess.Popen(sandbox.command("up"), stderr=subprocess.PIPE)
    sandbox.until(lambda: sandbox.status().get("daemons", {}).get("mariadbd"))
    up.terminate()
    up.communicate(timeout=300)
    assert up.returncode == 128 + signal.SIGTERM
    assert sandbox.processes() == {}
    assert not sandbox.root.exists()


def test_up_refuses_a_directory_with_files_of_others(tmp_path: Path, slurm: Sandbox) -> None:
    (tmp_path / "thesis.tex").write_text("three years of work")
    sandbox = slurm.beside(tmp_path)
    refused = sandbox.tool("up")
    assert refused.returncode == 1
    assert "no sandbox made" in refused.stderr
    sandbox.tool("down")
    assert (tmp_path / "thesis.tex").exists()


def test_every_listening_port_is_on_loopback(slurm: Sandbox) -> None:
    if socket.gethostbyname(socket.gethostname()) != "127.0.0.1":
        pytest.skip("this host's name is not 127.0.0.1, and Slurm binds either to that name or to every address")
    table = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening = {int(row[1].split(":")[1], 16): row[1].split(":")[0] for row in table if row[3] == "0A"}
    loopback = f"{int.from_bytes(socket.inet_aton('127.0.0.1'), sys.byteorder):08X}"
    assert {listening[port] for port in slurm.status()["ports"].values()} == {loopback}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--like", "typed"), "Valid: gpus, typed-gpus"),
        (("--like", "gpus", "--like", "typed-gpus"), "contradict each other"),
        (("--like", "submit-limit=0"), "1 or more"),
        (("--like", "wckeys", "--no-accounting"), "needs accounting"),
    ],
)
def test_kinds_of_site_that_cannot_be_are_refused(
    tmp_path: Path, slurm: Sandbox, options: tuple[str, ...], told: str
) -> None:
    refused = slurm.beside(tmp_path / "s").tool("up", *options)
    assert refused.returncode == 1
    assert told in refused.stderr


def test_a_sandbox_whose_controller_was_replaced_is_still_known_and_taken_down_whole(
    make_sandbox: Callable[..., Sandbox],
) -> None:
    sandbox = make_sandbox("--nodes", "1", "--no-accounting")
    stopped = sandbox.tool("stop-daemon", "slurmctld")
    assert stopped.returncode == 0, stopped.stderr
    assert sandbox.tool("env").returncode == 1
    # As its user would: a daemon without the tool's mark.
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    subprocess.run(["slurmctld"], env={"PATH": path, "SLURM_CONF": sandbox.env["SLURM_CONF"]}, check=True)
    known = sandbox.until(lambda: sandbox.tool("env").stdout)
    assert known.strip() == f"export SLURM_CONF={sandbox.env['SLURM_CONF']}"
    assert sandbox.status()["up"]
    for command in ("stop-daemon", "start-daemon"):
        done = sandbox.tool(command, "slurmctld")
        assert done.returncode == 0, done.stderr
    sandbox.run(["sinfo"])
    assert "no slurmdbd" in sandbox.tool("stop-daemon", "slurmdbd").stderr
