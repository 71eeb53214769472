"""`cluster.setup` in a job's script: bash on every backend, stopped at the first line that fails.

    lines ─guarded→ job script ─a line fails→ jobs/setup-<job>.txt: the line, its status, its output → `bushpc status`

The lines run in the shell of the script, because what they load and export is for the ranks. Of a line with several
commands the last one decides, as in a shell. `set -e` would stop inside the scripts of modules and conda, where
commands may fail and mean no harm.
"""

from __future__ import annotations

import functools
import shlex
import shutil
import subprocess
import typing as t
from collections.abc import Iterator, Sequence
from pathlib import Path

from bushpc import environment
from bushpc.cluster.checks import BROKEN, OK, WARNING, Check

if t.TYPE_CHECKING:
    from bushpc.config import ClusterConfig

ANSWERS_S = 60


def bash() -> str:
    """The shell of jobs. `module` and `source` exist in no plain sh."""
    return shutil.which("bash") or "/bin/bash"


def failure_file(jobs: Path, job_id: str) -> Path:
    """What a job writes when a setup line fails; the first line says which."""
    return jobs / f"setup-{job_id}.txt"


def guarded(lines: Sequence[str], jobs: Path) -> list[str]:
    """Shell lines that run these, and end the job at the first one that fails. jobs: the folder of `failure_file`.

    The backend's script has put the job's number into the shell variable bushpc_job.
    """
    if not lines:
        return []
    stem = f"{shlex.quote(str(jobs))}/setup-"
    return [
        'bushpc_job="${bushpc_job:-$$}"',
        f'mkdir -p {shlex.quote(str(jobs))}; bushpc_out={stem}"$bushpc_job".out; rm -f {stem}"$bushpc_job".txt',
        _ENDED.format(stem=stem),
        "trap bushpc_setup_ended EXIT",
        *(_one(command) for command in commands(tuple(lines))),
        # A line may have set a trap of its own, for the end of the job.
        '[[ "$(trap -p EXIT)" != *bushpc_setup_ended* ]] || trap - EXIT; rm -f "$bushpc_out"',
    ]


# A trap, as a line may also leave the shell itself.
_ENDED = """bushpc_setup_ended() {{
  local status=$?
  trap - EXIT
  local last; last="$(tail -n 1 "$bushpc_out")"
  {{ printf "setup line '%s' ended with status %s: %s\\n" "$bushpc_line" "$status" "${{last:-no output}}"
    cat "$bushpc_out"; }} | tee {stem}"$bushpc_job".txt
  rm -f "$bushpc_out"
  [ "$status" != 0 ] || status=1
  exit "$status"
}}"""


@functools.cache
def commands(lines: tuple[str, ...]) -> list[str]:
    """The lines, those of one command together: a function, an `if`, a here-document may take several."""
    found: list[str] = []
    begun: list[str] = []
    for line in lines:
        if begun or line.strip():
            begun.append(line)
        if begun and _is_whole("\n".join(begun)):
            found.append("\n".join(begun))
            begun = []
    return found + begun


def _is_whole(text: str) -> bool:
    if text.endswith("\\"):
        return False
    env = environment.for_process(environment.COMMAND)
    parsed = subprocess.run([bash(), "-n", "-c", text], env=env, capture_output=True, check=False)
    return parsed.returncode == 0 and not parsed.stderr  # of a here-document without its end bash only warns


def _one(line: str) -> str:
    # The line break ends a comment at the line's end.
    return f'{{ bushpc_line={_name(line)}; {{ :; {line}\n}} >"$bushpc_out" 2>&1 || exit; cat "$bushpc_out"; }}'


def _name(command: str) -> str:
    """What messages call it, quoted for the shell: one line."""
    first, *more = command.strip().splitlines()
    return shlex.quote(f"{first} …" if more else command)


def check(profile: ClusterConfig) -> Iterator[Check]:
    """Run the lines here, one after the other, as a job would."""
    if not profile.setup:
        return
    lines = commands(tuple(profile.setup))
    script = "\n".join(f"bushpc_line={_name(line)}\n{{ :; {line}\n}} || exit" for line in lines)
    ended = f"trap 'ended=$?; echo; echo \"$ended|$bushpc_line\"' EXIT\n{script}\nbushpc_line="
    env = environment.for_process(environment.JOB)
    try:
        done = subprocess.run(
            [bash(), "-c", ended], env=env, capture_output=True, text=True, timeout=ANSWERS_S, check=False
        )
        status, _, line = done.stdout.splitlines()[-1].partition("|")
    except (OSError, subprocess.TimeoutExpired, IndexError) as error:
        yield Check(name="setup lines", verdict=WARNING, found=f"not tried: {error}", advice="")
        return
    if not line:
        yield Check(name="setup lines", verdict=OK, found=f"{len(profile.setup)} line(s) run here", advice="")
        return
    words = [text for text in (*done.stdout.splitlines()[:-2], *done.stderr.splitlines()) if text.strip()]
    yield Check(
        name="setup lines",
        verdict=BROKEN if profile.executor == "local" else WARNING,
        found=f"'{line}' ends with status {status} here: {words[-1] if words else 'no output'}",
        advice="mend cluster.setup"
        + ("" if profile.executor == "local" else "; `bushpc doctor --slurm` runs it there"),
    )
