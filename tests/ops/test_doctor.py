"""Promises of the doctor: it names what is broken and the way out, never raises, and reads logs as they were meant."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import yaml
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import JPEGLSLossless

from bushpc.cli import main
from bushpc.cluster import slurm_site
from bushpc.cluster.checks import Check, run_check
from bushpc.cluster.slurm_ask import minutes_of
from bushpc.config import compose
from bushpc.ops import doctor, doctor_folders, survey, survey_profile, survey_story
from bushpc.ops import doctor_installation as installation
from bushpc.ops.doctor import check_cluster, check_config, examine
from bushpc.ops.doctor_folders import expected_checkpoint_bytes
from bushpc.ops.gpu_build import Build
from tests.ops.fake_slurm import FAKE, SCONTROL

SMALL = ("model=unet_small", "data=phantom")


@pytest.fixture
def words(tmp_path, phantom_folder):
    """Overrides of a small configuration with folders of its own."""
    return [*SMALL, f"data.root={phantom_folder}", f"runs_dir={tmp_path / 'runs'}", f"loader.cache_dir={tmp_path}"]


@pytest.fixture
def no_deepspeed(monkeypatch):
    """Without the one check that takes seconds."""
    monkeypatch.setattr(doctor, "CONFIGURED", tuple(pair for pair in doctor.CONFIGURED if pair[0] != "DeepSpeed"))


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_a_machine_that_works_is_called_so_and_nothing_is_left_on_it(words, tmp_path, capsys):
    assert main(["doctor", *words, "cluster=local", "--json"]) == 0
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    wanted = {"Python", "packages", "torch", "DeepSpeed", "shards", "folds", "weights", "run folder", "file locks"}
    assert wanted | {"clock", "disk room", "image cache", "this machine"} <= set(checks)
    assert {checks[name]["verdict"] for name in wanted} == {"ok"}
    assert not (tmp_path / "runs").exists()
    assert not list(tmp_path.glob(".doctor-*"))


@pytest.mark.usefixtures("no_deepspeed")
def test_damaged_shards_and_missing_weights_are_named_beside_what_works(words, tmp_path, phantom_folder, capsys):
    folder = tmp_path / "shards"
    shutil.copytree(phantom_folder, folder)
    (folder / "lesion-000000.tar").unlink()
    words += [f"data.root={folder}", "model=xbusnet", f"weights_dir={tmp_path / 'weights'}", "cluster=local"]
    assert main(["doctor", *words]) == 1
    said = capsys.readouterr().out
    assert "broken  shards: 1 of 2 shards" in said
    assert "lesion-000000.tar: missing" in said
    assert "→ run: bushpc pack data=" in said
    assert "→ run: bushpc weights pull model=xbusnet" in said
    assert "ok      folds: 5 folds of 20 lesions" in said
    assert "Traceback" not in said


@pytest.mark.usefixtures("no_deepspeed")
def test_synthetic_and_other_datasets_are_looked_at_too(
    words, phantom_folder, synthetic_folder, tmp_path, no_deepspeed
):
    shutil.copytree(phantom_folder, tmp_path / "far")
    checks = by_name(check_config(compose([*words, f"data.synthetic={synthetic_folder}"])))
    assert (checks["synthetic shards"].verdict, checks["shards"].verdict) == ("ok", "ok")
    for wrong, said in (
        (f"data.synthetic={tmp_path / 'far'}", "not marked as synthetic"),
        (f"evaluate.external=[{tmp_path / 'far'}]", "scans they have seen"),
    ):
        found = [check for check in check_config(compose([*words, wrong])) if check.verdict == "broken"]
        assert any(said in check.found for check in found)


def test_leaking_folds_are_broken(words, tmp_path, phantom_folder):
    folder = tmp_path / "shards"
    shutil.copytree(phantom_folder, folder)
    lines = (folder / "folds.csv").read_text().splitlines()
    patients = [line.split(",")[1] for line in lines]
    twice = next(i for i in range(1, len(lines)) if patients.count(patients[i]) > 1)
    head, _, fold = lines[twice].rpartition(",")
    lines[twice] = f"{head},{(int(fold) + 1) % 5}"
    (folder / "folds.csv").write_text("\n".join(lines) + "\n")
    check = by_name(check_config(compose([*words, f"data.root={folder}", "cluster=local"])))["folds"]
    assert check.verdict == "broken"
    assert "patients in more than one fold" in check.found


def test_packages_outside_their_ranges_are_broken_with_the_range(monkeypatch):
    needs = ["torch>=99", "numpy>=1", "no-such-package>=1", 'pytest>=99; extra == "dev"']
    monkeypatch.setattr("importlib.metadata.requires", lambda name: needs)
    found = {check.name: check.found for check in run_check("packages", installation._packages)}
    assert set(found) == {"package torch", "package no-such-package"}
    assert "wanted is >=99" in found["package torch"]
    assert "not installed" in found["package no-such-package"]


def test_the_decoders_of_compressed_dicom_are_told(monkeypatch):
    [check] = run_check("DICOM decoders", installation._decoders)
    assert (check.verdict, check.found, check.advice) == ("ok", "every common compression", "")
    monkeypatch.setattr(get_decoder(JPEGLSLossless), "_available", {})
    [check] = run_check("DICOM decoders", installation._decoders)
    assert check.found == "compressed with JPEG-LS cannot be decoded"
    assert "pip install 'bushpc[dicom]'" in check.advice


def test_a_broken_installation_is_told_even_where_nothing_can_be_composed(monkeypatch):
    def boom():
        raise ImportError("libfoo.so: cannot open shared object file")
        yield

    monkeypatch.setattr(doctor, "INSTALLATION", (("torch", boom),))
    monkeypatch.setattr(doctor, "compose", lambda overrides: boom().__next__())
    checks = examine([])
    assert [(check.name, check.verdict) for check in checks] == [("torch", "broken"), ("configuration", "broken")]
    assert "the check itself failed: ImportError: libfoo.so" in checks[0].found


def test_a_wrong_override_is_refused_like_everywhere(capsys):
    assert main(["doctor", "model=unet_smal"]) == 2
    assert "did you mean 'unet_small'?" in capsys.readouterr().err


@pytest.mark.parametrize(("engine", "verdict"), [("cpu", "warning"), ("zero2", "broken")])
def test_a_deepspeed_that_does_not_import_is_broken_only_where_it_is_used(
    words, tmp_path, monkeypatch, engine, verdict
):
    (tmp_path / "deepspeed.py").write_text("raise RuntimeError('no CUDA_HOME')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    [check] = run_check("DeepSpeed", installation._deepspeed, compose([*words, f"engine={engine}", "cluster=local"]))
    assert check.verdict == verdict
    assert check.found.endswith("does not import: RuntimeError: no CUDA_HOME")


@pytest.mark.usefixtures("no_deepspeed")
def test_compile_without_a_compiler_and_a_folder_that_cannot_be_written_are_broken(words, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    config = compose([*words, "engine.compile=true", "runs_dir=/proc/runs", "cluster=local"])
    checks = by_name(check_config(config))
    assert checks["C++ compiler"].verdict == "broken"
    assert checks["run folder"].verdict == "broken"
    assert "runs_dir=FOLDER" in checks["run folder"].advice
    assert "flock" in checks["this machine"].found


def test_the_room_for_checkpoints_is_what_torch_really_keeps(words):
    import torch

    config = compose([*words, "cluster=local", "train.keep=2", "train.ema=0.9", "train.iterations=10"])
    expected, trained, total = expected_checkpoint_bytes(config, cells=3)
    model = config.model_class(config.model)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [x for state in optimizer.state.values() for x in state.values() if x.ndim]
    weights = sum(p.nbytes for p in model.parameters())
    # keep 2 and the one being written; weights twice, for their moving average
    assert expected == 3 * 3 * (2 * weights + sum(moment.nbytes for moment in moments))
    assert trained == total == sum(p.numel() for p in model.parameters())
    # every second step is kept besides: 5 more
    denser = compose([*words, "cluster=local", "train.keep=2", "train.keep_every=2", "train.iterations=10"])
    assert expected_checkpoint_bytes(denser, cells=1)[0] == 8 * 3 * weights


def test_too_small_a_disk_is_broken(words, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=10**9))
    [check] = run_check("disk room", doctor_folders._disk_room, compose([*words, "cluster=local"]))
    assert check.verdict == "broken"
    assert "1.00 GB free" in check.found


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("90:30", 90.5), ("1:30:00", 90), ("2-00:00:00", 2880), ("1-12", 2160), ("UNLIMITED", math.inf)],
)
def test_time_limits_are_read_as_sbatch_reads_them(text, minutes):
    assert minutes_of(text) == minutes


def test_the_types_of_gpus_that_a_job_may_get_are_read_from_the_site(fake_slurm, monkeypatch):
    """Nodes without the feature that the profile asks for do not count."""
    kinds = ("gpu:v100:4(S:0-1)|volta,big", "gpu:a100:8|ampere", "(null)|ampere")
    sinfo = "; ".join(f"echo 'gpu|8|9999|{kind}|1|mix'" for kind in kinds)
    fake_slurm(scontrol=SCONTROL, sinfo=sinfo)
    words = [*SMALL, "cluster=slurm", "cluster.gpus=1"]
    assert slurm_site.gpu_types(compose(words).cluster) == ["v100", "a100"]
    assert slurm_site.gpu_types(compose([*words, "cluster.constraint=ampere"]).cluster) == ["a100"]
    build = Build(torch="2.15.0", cuda="13.2", arches=("sm_75", "sm_80", "sm_90"))
    monkeypatch.setattr(Build, "installed", lambda: build)
    checks = by_name(list(installation._gpu_build(compose([*words, "cluster.constraint=volta"]))))
    assert "constraints-cuda126.txt" in checks["GPU and build"].advice
    assert checks["precision"].advice == "set engine.precision=fp16"


def slurm_checks(words, *more: str) -> dict[str, Check]:
    return by_name(check_cluster(compose([*words, "cluster=a100", *more])))


def test_a_job_that_fits_the_partition_is_ok_and_sacct_is_not_needed(words, fake_slurm):
    fake_slurm(**FAKE)
    checks = slurm_checks(words, "cluster.account=lab", "cluster.qos=long", "cluster.constraint=a100")
    assert {name for name, check in checks.items() if check.verdict == "broken"} == set()
    assert checks["sacct"].verdict == "warning"
    assert "3 of gpu's nodes" in checks["nodes"].found
    assert "comes back only if it asks for it, as the cells do" in checks["requeue"].found
    assert "KillWait=30 sec, GraceTime=60 sec" in checks["grace time"].found


@pytest.mark.parametrize(
    ("override", "name", "said"),
    [
        ("cluster.time_min=1441", "partition", "gpu allows jobs of 1440 minutes, cluster.time_min=1441"),
        ("cluster.partition=gpuu", "partition", "did you mean 'gpu'? Valid: gpu, long."),
        ("cluster.cpus_per_rank=65", "nodes", "0 of gpu's nodes have what a cell asks for: 1 node(s) with 65 cores"),
        ("cluster.mem_gb=600", "nodes", "0 of gpu's nodes"),
        ("cluster.constraint=h100", "nodes", "feature h100"),
        ("cluster.account=labb", "account", "did you mean 'lab'?"),
        ("cluster.qos=night", "qos", "Valid: long, normal."),
    ],
)
def test_what_slurm_would_refuse_or_never_start_is_broken(words, fake_slurm, override, name, said):
    fake_slurm(**FAKE)
    check = slurm_checks(words, override)[name]
    assert check.verdict == "broken"
    assert said in check.found


@pytest.mark.parametrize(
    ("states", "verdict", "said"),
    [
        (("idle", "drain"), "ok", "2 of gpu's nodes have what a cell asks for"),
        (("alloc", "drng"), "ok", "3 more are down or drained"),
        (("down*", "drain$"), "warning", "0 of gpu's nodes"),
        (("fail", "down"), "warning", "5 more are down or drained"),
    ],
)
def test_nodes_that_are_out_of_service_are_not_counted(words, fake_slurm, states, verdict, said):
    rows = "; ".join(
        f"echo 'gpu|64|512000|gpu:8|ib|{count}|{state}'" for count, state in zip((2, 3), states, strict=True)
    )
    fake_slurm(**{**FAKE, "sinfo": rows})
    check = slurm_checks(words)["nodes"]
    assert check.verdict == verdict
    assert said in check.found


def test_each_of_several_partitions_is_judged_and_one_that_fits_is_enough(words, fake_slurm):
    fake_slurm(**FAKE)
    checks = check_cluster(compose([*words, "cluster=a100", "cluster.partition=gpu,long", "cluster.time_min=60"]))
    told = [(check.verdict, check.found.split()[0]) for check in checks if check.name == "partition"]
    assert told == [("ok", "gpu:"), ("warning", "long")]
    [wrong] = run_check(
        "partition", slurm_site._partition, compose([*words, "cluster=a100", "cluster.partition=gpu,lng"]).cluster
    )
    assert "unknown cluster.partition 'lng'; did you mean 'long'?" in wrong.found


def test_more_nodes_than_the_partition_allows_are_broken(words, fake_slurm):
    fake_slurm(**FAKE)
    [wide] = run_check("partition", slurm_site._partition, compose([*words, "cluster=a100", "cluster.nodes=4"]).cluster)
    assert wide.verdict == "broken"
    assert "jobs of 2 nodes, cluster.nodes=4" in wide.found


def test_no_slurm_at_all_is_a_finding_and_nothing_is_submitted(words, fake_slurm, tmp_path, capsys):
    fake_slurm(true="")
    assert main(["doctor", "--slurm", *words, "cluster=slurm"]) == 1
    said = capsys.readouterr().out
    assert "broken  sbatch: " in said
    assert "cluster=local" in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--write", "mine", "cluster=slurm"], "belong to `bushpc doctor --slurm`"),
        (["--slurm", "cluster=local"], "choose a Slurm cluster"),
        (["--slurm", "--write", "slurm", "cluster=slurm"], "exists; choose another name, or overwrite it with --force"),
        (["--slurm", "--write", "../x", "cluster=slurm"], "a name of letters"),
    ],
)
def test_options_that_cannot_work_are_refused_before_anything_is_asked(words, fake_slurm, capsys, options, said):
    fake_slurm()
    assert main(["doctor", *options, *words]) == 2
    assert said in capsys.readouterr().err


def events(*rows: tuple[float, str]) -> list[dict]:
    """(time, "beat" | "left" | a signal's name), in order."""
    kinds = ("start", "ready", "beat", "left")
    return [
        {"time": at, "kind": what} if what in kinds else {"time": at, "kind": "signal", "name": what}
        for at, what in rows
    ]


def test_a_story_tells_who_heard_what_when_and_how_long_the_grace_was():
    # Two nodes whose clocks are 100 s apart: each one's seconds count from its own first signal.
    logs = {
        "batch": events((60.0, "TERM")),
        "rank0": events((0.0, "start"), (50.0, "USR2"), (50.01, "CONT"), (60.0, "TERM"), (64.9, "beat")),
        "child0": events((0.0, "ready"), (50.0, "USR2"), (68.0, "beat")),
        "rank1": events((100.0, "start"), (150.0, "USR2"), (160.0, "TERM"), (166.0, "beat")),
        "child1": events((150.0, "USR2"), (166.0, "beat")),
    }
    story = survey_story.story_of("preempt", logs)
    assert story.reached_ranks
    assert story.kill_s == pytest.approx(14.9)
    assert story.outlived_s == pytest.approx(3.1)
    assert story.told("batch") == "TERM at 10.0 s"
    assert story.told("child") == "USR2 at 0.0 s"
    assert story.told("rank") == "rank0: CONT+USR2 at 0.0 s, TERM at 10.0 s; rank1: USR2 at 0.0 s, TERM at 10.0 s"
    [signals, orphans] = survey_story.judge(story)
    assert signals.verdict == "ok"
    assert "KILL after 14.9 s" in signals.found
    assert "lived on for 3.1 s" in orphans.found


def test_ranks_that_are_killed_without_a_word_are_broken():
    logs = {"batch": [], "rank0": events((0.0, "start"), (50.0, "CONT"), (55.0, "beat")), "child0": []}
    story = survey_story.story_of("requeue", logs)
    assert story.kill_s is None
    [check] = survey_story.judge(story)
    assert check.verdict == "broken"
    assert "train.save_every" in check.advice


def test_a_line_that_is_still_being_written_is_left_for_the_next_time(tmp_path):
    log = tmp_path / "0-rank0.jsonl"
    log.write_text('{"time": 1.0, "kind": "start"}\n{"time": 2.0, "ki')
    assert list(survey_story.read_events(log)) == [{"time": 1.0, "kind": "start"}]


def test_the_profile_is_a_cluster_that_composes_with_what_was_measured(words, tmp_path, monkeypatch):
    configs = tmp_path / "configs"
    configs.mkdir()
    monkeypatch.setenv("BUSHPC_CONFIGS", str(configs))
    more = ["cluster.cpu_jobs.partition=cpu", "cluster.sbatch.hint=nomultithread", "cluster.gres=[nvme:100]"]
    config = compose([*words, "cluster=slurm", "cluster.partition=night", "cluster.setup=[module load cuda]", *more])
    found = survey.Survey(
        folder=Path("unused"),
        stories=[],
        facts={},
        checks=[Check(name="requeue", verdict="ok", found="rank: TERM at 0.0 s " + "and so on " * 20)],
        grace_s=14.9,
        time_limit_min=720.0,
    )
    path = survey_profile.profile_path("mysite", force=False)
    survey_profile.write_profile(path, survey_profile.profile_text(config, found, datetime.date(2026, 11, 20)))
    cluster = compose([*words, "cluster=mysite"]).cluster
    assert (cluster.grace_s, cluster.time_min, cluster.partition) == (14.9, 720, "night")
    assert cluster.setup == ("module load cuda",)
    assert (cluster.cpu_jobs, cluster.sbatch, cluster.gres) == (
        config.cluster.cpu_jobs,
        config.cluster.sbatch,
        ("nvme:100",),
    )
    text = path.read_text()
    assert "# Measured 2026-11-20 by `bushpc doctor --slurm`, from cluster=slurm:\n# - requeue: rank: TERM" in text
    # No grace at all is the shortest, not an unknown one.
    none = survey_profile.profile_text(config, dataclasses.replace(found, grace_s=0.0), datetime.date(2026, 11, 20))
    assert "\ngrace_s: 0.1\n" in none
    # Only what differs from the defaults is set, and each field has its sentence.
    stated = {"executor", "grace_s", "time_min", "partition", "setup", "cpu_jobs", "sbatch", "gres"}
    assert set(yaml.safe_load(text)) == stated
    assert "# Slurm partition; null uses the cluster's default.\npartition: night\n" in text
    # Measured again, from the profile itself: the old findings go.
    later = survey_profile.profile_text(compose([*words, "cluster=mysite"]), found, datetime.date(2027, 1, 2))
    assert "2026-11-20" not in later
