"""Job request → submitit's executor for Slurm, with the lines that a batch script has before its srun."""

from __future__ import annotations

import re
import shlex
import typing as t
from collections.abc import Sequence

from bushpc.cluster import container, slurm_variables
from bushpc.cluster.profile import stop_lead_s
from bushpc.cluster.records import JobRequest
from bushpc.cluster.slurm_options import parameters

# Set for ranks that are not the first of their job's start: what came before was not theirs.
LATER_TURN = "BUSHPC_LATER_TURN"
# For the lines of cluster.setup; as submitit calls jobs, so an array's task by its array and number.
_JOB_NUMBER = (
    'bushpc_job="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}"; : "${bushpc_job:=$SLURM_JOB_ID}"'
)


def executor_of(request: JobRequest, scratch: Sequence[str]) -> t.Any:
    """submitit's executor with the profile's resources. scratch: variables that name a node's own disk."""
    import submitit

    class Anywhere(submitit.SlurmExecutor):
        """Also writes scripts where Slurm's commands are not installed."""

        @classmethod
        def affinity(cls) -> int:
            return 1

    profile = slurm_variables.in_force(request.profile)
    executor = Anywhere(folder=request.folder / "%j", python=container.python_command(profile))
    executor.update_parameters(
        **parameters(profile),
        job_name=request.name,
        setup=[
            # Set where sbatch was given --export=NONE; srun would then give its tasks nothing of this script's.
            "unset SLURM_EXPORT_ENV",
            *([_JOB_NUMBER] if profile.setup else []),
            *request.setup,
            *_container_lines(request, scratch),
            *(trap_lines(request.at_end) if request.at_end else []),
            *(turn_lines(request.turns) if request.turns else []),
        ],
        array_parallelism=profile.parallel or len(request.work),
        # Slurm itself tells the ranks, to the minute.
        signal_delay_s=stop_lead_s(profile) if request.lead_s is None else request.lead_s,
    )
    if request.after:
        # Jobs and whole arrays: a dependency on a thousand tasks one by one is more than sbatch takes.
        # In a dry run a job's name stands for its id.
        ids = dict.fromkeys(re.sub(r"(?<=\d)_\d+$", "", job_id) for job_id in request.after)
        executor.update_parameters(dependency="afterany:" + ":".join(ids))
    return executor


def trap_lines(at_end: Sequence[str]) -> list[str]:
    """Lines of a batch script before its srun: `at_end` runs when that has ended; `{status}` becomes its status."""
    command = " ".join('"$?"' if word == "{status}" else shlex.quote(word) for word in at_end)
    return [
        "# A shell that has a handler waits for srun to end before it minds the signal.",
        "trap : TERM USR2",
        f"trap {shlex.quote(command)} EXIT",
    ]


def _container_lines(request: JobRequest, scratch: Sequence[str]) -> list[str]:
    """Before ranks in a container: what it mounts, and what they could not ask Slurm for themselves."""
    if not request.profile.container.used:
        return []
    asked = 'SLURM_TIME_FORMAT=standard squeue --noheader --jobs="$SLURM_JOB_ID" --format="%A %e"'
    return [
        *container.setup_lines(request.profile, request.folder.parent.parent, scratch),
        'if [ -z "${SLURM_JOB_END_TIME:-}" ]; then',
        # The last task of an array has the array's number, so asking for it may name its neighbours, too.
        f"""  ends=$({asked} | awk -v id="$SLURM_JOB_ID" '$1 == id {{ print $2 }}')""",
        '  [ -n "$ends" ] && ends=$(date -d "$ends" +%s) && export SLURM_JOB_END_TIME="$ends"',
        "fi",
    ]


def turn_lines(turns: Sequence[str]) -> list[str]:
    """Lines of a batch script that make its srun start once for each turn that the command prints."""
    return [
        "trap : TERM USR2",
        "srun() {",
        "  local ended=none status=0 turn",
        # Signals that reach the shell's children, too, must not end the question.
        f"""  while turn=$(trap '' TERM USR2; exec {shlex.join(turns)} "$ended"); do""",
        '    BUSHPC_TURN=$turn command srun "$@" && ended=0 || { ended=$?; status=$ended; }',
        f"    export {LATER_TURN}=1",
        "  done",
        "  return $status",
        "}",
    ]
