"""Would this site take such a job? Its own answer, by `sbatch --test-only`, which submits nothing.

script ─sbatch --test-only→ job_submit plugins, accounts, wckeys, QOS → the site's words, or ""
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import typing as t
from collections.abc import Iterator
from pathlib import Path

from bushpc.cluster.base import NoAnswer, ask, cluster_for
from bushpc.cluster.checks import BROKEN, OK, Check
from bushpc.cluster.profile import report_profile
from bushpc.cluster.records import JobRequest
from bushpc.cluster.slurm_ask import is_away
from bushpc.cluster.slurm_limits import explain_refusal
from bushpc.errors import DispatchError

if t.TYPE_CHECKING:
    from bushpc.config import ClusterConfig

# Slurm tries to start the job at once: for nodes that are drained, say, a job that sbatch takes gets such an answer.
ONLY_NOW = re.compile(r"not available|busy|unavailable", re.IGNORECASE)
# What sbatch puts before and after a plugin's own words.
AROUND = re.compile(r"sbatch: (?:error: )?|allocation failure: (?:Unspecified error)?")
ANSWERS_S = 30
CPU_JOBS_ADVICE = (
    "say in cluster.cpu_jobs (partition, account, qos, constraint) what jobs without a GPU need, or set "
    "cluster.report=last_cell"
)


def refusal(script: str) -> str:
    """The site's words where it would never take this script; "" where it would, or where it does not say.

    Raises: NoAnswer where the controller is away.
    """
    with tempfile.TemporaryDirectory(prefix="bushpc-trial-") as folder:
        path = Path(folder) / "job.sh"
        path.write_text(script, encoding="utf-8")
        try:
            ask("sbatch", "--test-only", str(path), timeout=ANSWERS_S)
        except DispatchError as error:
            if not isinstance(error.__cause__, subprocess.CalledProcessError):
                return ""  # no answer in time; the submission itself will tell
            if is_away(error):
                raise NoAnswer(str(error)) from error
            said = " ".join(AROUND.sub("", error.__cause__.stderr).split())
            # Limits on the number of jobs are looked at by whoever deals cells over jobs.
            return "" if ONLY_NOW.search(said) or explain_refusal(said) else said
    return ""


def check(profile: ClusterConfig) -> Iterator[Check]:
    """Whether the site would take a job of a cell, and the one that writes the report."""
    jobs = {"job of a cell": profile}
    if profile.report == "job":
        jobs["job of the report"] = report_profile(profile)
    for name, asked in jobs.items():
        request = JobRequest(name="bushpc-doctor", work=[_nothing], folder=Path.cwd(), profile=asked, setup=[])
        said = cluster_for(profile.executor).refusal(request)
        advice = CPU_JOBS_ADVICE if asked is not profile else "change cluster.* as the site says"
        if said:
            yield Check(name=name, verdict=BROKEN, found=f"the site refuses it: {said}", advice=advice)
        else:
            yield Check(name=name, verdict=OK, found="the site would take it (sbatch --test-only)")


def _nothing() -> None:
    """The work of a job that is never submitted."""
