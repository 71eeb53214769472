"""Promises of a profile in Slurm's words: each request is said once and as the site wants it, and nothing else is."""

from __future__ import annotations

import typing as t
from pathlib import Path

import pytest

from bushpc.cluster.base import cluster_for
from bushpc.cluster.profile import report_profile
from bushpc.cluster.records import JobRequest
from bushpc.cluster.slurm_nodes import NodeKind, gpus_in, why_none_fits
from bushpc.config import ClusterConfig
from bushpc.config.cluster import CpuJobsConfig
from bushpc.config.fields import Options
from bushpc.errors import ConfigError


def profile_of(**settings: t.Any) -> ClusterConfig:
    return ClusterConfig(executor="slurm", **settings)


def said(profile: ClusterConfig, jobs: int = 1) -> tuple[set[str], str]:
    """The #SBATCH options and the srun line of a job's script."""
    work = [print] * jobs
    script = cluster_for("slurm").script(
        JobRequest(name="run", work=work, folder=Path("/run/jobs"), profile=profile, setup=[])
    )
    lines = script.splitlines()
    options = {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")}
    return options, next(line for line in lines if line.startswith("srun "))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"gpus": 1}, {"gpus-per-node=1"}),
        ({"gpus": "a100:1"}, {"gpus-per-node=a100:1"}),
        ({"gpus": "a100:1", "gpus_by": "gres", "gres": ("nvme:100",)}, {"gres=gpu:a100:1,nvme:100"}),
        ({"gpus": 1, "gres": ("nvme:100",)}, {"gpus-per-node=1", "gres=nvme:100"}),
        ({"gpus": "h100:1", "gpus_by": "gpus", "nodes": 2}, {"gpus=h100:2"}),
        ({"gpus": 1, "gpus_by": "none"}, set()),
        ({"mem_gb": 0}, {"mem=0"}),
        ({"mem_gb": 64}, {"mem=64GB"}),
        ({"mem_gb": 30, "mem_per": "gpu", "gpus": 1}, {"mem-per-gpu=30GB", "gpus-per-node=1"}),
        ({"mem_gb": 4, "mem_per": "cpu"}, {"mem-per-cpu=4GB"}),
        ({"exclusive": True}, {"exclusive"}),
        ({"account": "x@a100", "qos": "q", "constraint": "a|b"}, {"account=x@a100", "qos=q", "constraint='a|b'"}),
        ({"sbatch": Options({"hint": "nomultithread", "hold": True})}, {"hint=nomultithread", "hold"}),
    ],
)
def test_each_request_is_said_once_and_as_the_site_wants_it(settings, expected):
    asks = ("gpus", "gres", "mem", "exclusive", "account", "qos", "constraint", "hint", "hold", "wckey", "comment")
    options, _ = said(profile_of(**settings))
    assert {each for each in options if each.startswith(asks)} == expected


def test_what_every_job_asks_for_can_be_taken_away():
    options, srun = said(profile_of(cpus_per_rank=3))
    assert {"requeue", "propagate=NONE"} <= options
    assert "--cpus-per-task=3 --kill-on-bad-exit=1" in srun
    assert not any(option.startswith("wckey") for option in options)
    free = Options({"propagate": None, "wckey": "thesis"})
    options, srun = said(profile_of(sbatch=free, srun=Options({"gpu-bind": "none", "kill-on-bad-exit": "0"})))
    assert "wckey=thesis" in options
    assert not any(option.startswith("propagate") for option in options)
    assert "--kill-on-bad-exit=0 --gpu-bind=none" in srun


def test_an_array_has_as_many_jobs_as_there_is_work():
    assert "array=0-999%1000" in said(profile_of(), jobs=1000)[0]
    assert "array=0-999%5" in said(profile_of(parallel=5), jobs=1000)[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sbatch": Options({"mem": "3"})}, r"cluster.sbatch.mem=3: --mem follows from cluster.mem_gb; set that"),
        ({"sbatch": Options({"gres": "gpu:1"})}, r"--gres follows from cluster.gres"),
        ({"sbatch": Options({"gpus-per-task": "1"})}, r"--gpus-per-task follows from cluster.gpus"),
        ({"sbatch": Options({"time": None})}, r"cluster.sbatch.time=null: --time follows from cluster.time_min"),
        ({"sbatch": Options({"output": "x"})}, r"bushpc sets --output itself; leave it out"),
        ({"sbatch": Options({"no-requeue": True})}, r"a stopped job would not come back"),
        ({"srun": Options({"cpus-per-task": "3"})}, r"cluster.srun.cpus-per-task=3: .* cluster.cpus_per_rank"),
        ({"cpu_jobs": CpuJobsConfig(sbatch=Options({"qos": "x"}))}, r"cluster.cpu_jobs.sbatch.qos=x"),
    ],
)
def test_an_option_that_a_setting_or_bushpc_owns_is_refused_by_its_name(settings, message):
    with pytest.raises(ConfigError, match=message):
        cluster_for("slurm").require(profile_of(**settings))


def test_the_report_goes_where_jobs_without_a_gpu_go():
    cells = profile_of(
        gpus="a100:4",
        ranks_per_node=4,
        nodes=2,
        mem_gb=0,
        exclusive=True,
        gres=("nvme:100",),
        partition="gpu",
        account="x@a100",
        qos="gpu_week",
        constraint="a100",
        sbatch=Options({"gpu-bind": "none", "hint": "nomultithread", "licenses": "sps"}),
        cpu_jobs=CpuJobsConfig(
            partition="cpu", account="x@cpu", qos="", constraint="", sbatch=Options({"licenses": None, "nice": "10"})
        ),
    )
    options, srun = said(report_profile(cells))
    expected = {"partition=cpu", "account=x@cpu", "hint=nomultithread", "nice=10", "mem=8GB", "nodes=1", "time=60"}
    assert expected | {"ntasks-per-node=1", "cpus-per-task=1"} <= options
    refused = ("gpu", "gres", "exclusive", "qos", "constraint", "licenses")
    assert not [option for option in options if option.startswith(refused)]
    assert "gpu" not in srun
    assert "mem=4GB" in said(report_profile(profile_of(mem_gb=4)))[0]
    assert not any(each.startswith("mem") for each in said(report_profile(profile_of()))[0])


@pytest.mark.parametrize(
    ("text", "gpus"),
    [
        ("(null)", {}),
        ("gpu:8(S:0-1)", {"": 8}),
        ("gpu:a100:4(S:0,2),nvme:no_consume:1", {"a100": 4}),
        ("gpu:a100_1g.5gb:7(S:0),gpu:v100:2", {"a100_1g.5gb": 7, "v100": 2}),
        ("gpu", {"": 1}),
        ("craynetwork:4,gpu:nvidia_h100_80gb_hbm3:4(IDX:0-3)", {"nvidia_h100_80gb_hbm3": 4}),
    ],
)
def test_gpus_are_read_from_what_sinfo_writes(text, gpus):
    assert gpus_in(text) == gpus


def test_no_fit_is_told_in_the_sites_own_numbers():
    nodes = [NodeKind(partition="p", count=n, cores=64, memory_mb=2**19, gpus={kind: 4}) for n, kind in ((9, "a100"),)]
    nodes += [NodeKind(partition="q", count=3, cores=128, memory_mb=2**20, features=frozenset({"big"}))]

    def why(**settings: t.Any) -> str:
        return why_none_fits(profile_of(**settings), nodes)

    assert why(gpus="a100:4", cells_per_job=4) == "" == why(nodes=9, gpus=1) == why(constraint="big")
    assert "no node of this cluster has GPUs of type h100; unknown type of GPU 'h100'" in why(gpus="h100:1")
    assert "9 x 64 cores, 512 GB, 4 GPUs of type a100" in why(gpus="h100:1")
    assert "has more than 4 GPUs; set cluster.gpus to at most 4" in why(gpus=8, cells_per_job=8)
    assert "this cluster has 9 nodes with what a cell asks for" in why(nodes=10, gpus=1)
    assert "no node of this cluster has 1 cores, 2000 GB" in why(mem_gb=2000)
    assert "Ask for less: cluster.constraint, cluster.gpus" in why(gpus=1, constraint="big")
    assert "did you mean 'big'" in why(constraint="bg")
    assert why(gpus=8, cells_per_job=8, gpus_by="none") == "", "Slurm is not asked for these"
