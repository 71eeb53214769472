"""Promises of `cluster.container`: the right words before the ranks' Python, all mounted, and refusals in time."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from bushpc.cluster import container
from bushpc.cluster.base import cluster_for
from bushpc.config import ClusterConfig, compose
from bushpc.config.cluster import ContainerConfig
from bushpc.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
SCRATCH = ("SLURM_TMPDIR", "TMPDIR")
SLURM = ("model=unet_small", "data=phantom", "cluster=slurm")


@pytest.fixture
def image(tmp_path) -> Path:
    image = tmp_path / "bushpc.sif"
    image.touch()
    return image


def profile(**settings) -> ClusterConfig:
    gpus = settings.pop("gpus", 0)
    staging = settings.pop("staging", None)
    return ClusterConfig(executor="slurm", gpus=gpus, staging=staging, container=ContainerConfig(**settings))


def started(profile: ClusterConfig, runs_dir: Path, tmp_path: Path, **environment: str) -> list[str]:
    """What the runtime is called with, by a shell that runs our lines; the runtime itself only tells."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    for name in ("apptainer", "singularity", "enroot", "srun", "site-run"):
        program = tmp_path / "bin" / name
        program.write_text(f'#!/bin/sh\nprintf "%s\\n" {name} "$@"\n')
        program.chmod(0o755)
    lines = [
        *container.setup_lines(profile, runs_dir, SCRATCH),
        f"{container.python_command(profile)} -u -m submitit FOLDER",
    ]
    if profile.container.runtime == "pyxis":
        lines[-1] = f"srun {lines[-1]}"
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", "\n".join(lines)],
        env={"PATH": path, "HOME": "/root", **environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_apptainer_mounts_the_runs_and_what_the_profile_names_at_their_own_paths(tmp_path, image):
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "data")
    asked = profile(image=str(image), binds=(str(tmp_path / "link"), "/scratch:/mnt:ro"))
    assert started(asked, tmp_path, tmp_path) == [
        *("apptainer", "exec", "--bind", f"{tmp_path}:{tmp_path},/scratch:/mnt:ro", str(image)),
        *("python", "-u", "-m", "submitit", "FOLDER"),
    ]


def test_a_folder_behind_a_link_is_mounted_where_the_link_is_and_where_it_leads(tmp_path, image):
    runs, real = tmp_path / "runs", tmp_path / "real"
    runs.mkdir()
    real.mkdir()
    (tmp_path / "data").symlink_to(real)
    said = started(profile(image=str(image), binds=(str(tmp_path / "data"),)), runs, tmp_path)
    mounted = [f"{folder}:{folder}" for folder in (tmp_path / "data", real, runs)]
    assert sorted(said[3].split(",")) == sorted(mounted)


def test_a_folder_that_is_not_there_yet_stands_for_the_nearest_one_above_it(tmp_path, image):
    runs = tmp_path / "runs"
    runs.mkdir()
    said = started(profile(image=str(image), binds=("/tmp/none/cache",)), runs, tmp_path)
    assert said[3] == f"/tmp:/tmp,{runs}:{runs}"


def test_the_nodes_own_disk_is_mounted_where_it_is(tmp_path, image):
    disk = tmp_path / "disk"
    disk.mkdir()
    runs = Path("/usr")
    for staging in ("auto", "$SLURM_TMPDIR"):
        asked = profile(image=str(image), staging=staging)
        assert started(asked, runs, tmp_path, SLURM_TMPDIR=str(disk))[3] == f"/usr:/usr,{disk}:{disk}"
        assert started(asked, runs, tmp_path)[3] == "/usr:/usr"


def test_gpus_reach_the_container_and_pythons_of_the_home_folder_do_not(tmp_path, image):
    said = started(profile(image=str(image), gpus=1), Path("/usr"), tmp_path)
    assert said[2] == ("--rocm" if Path("/dev/kfd").exists() else "--nv")
    assert "export BUSHPC_BINDS= PYTHONNOUSERSITE=1" in container.setup_lines(profile(image=str(image)), tmp_path)


def test_pyxis_is_told_by_options_of_srun(tmp_path):
    said = started(profile(image="registry.example#team/pytorch:26.10-py3", runtime="pyxis"), Path("/usr"), tmp_path)
    assert said == [
        *("srun", "--container-image=registry.example#team/pytorch:26.10-py3", "--container-mounts=/usr:/usr"),
        *(f"--container-workdir={tmp_path}", "--no-container-entrypoint", "python", "-u", "-m", "submitit", "FOLDER"),
    ]


def test_enroot_gets_mounts_one_by_one_and_every_variable_of_the_rank(tmp_path):
    asked = profile(image="bushpc", runtime="enroot", binds=("/scratch:/mnt",), python="/opt/bin/python")
    said = started(asked, Path("/usr"), tmp_path, SLURM_PROCID="3", PYTHONPATH="/code")
    assert said[:6] == ["enroot", "start", "--mount", "/usr:/usr", "--mount", "/scratch:/mnt"]
    names = [said[i + 1] for i, word in enumerate(said) if word == "--env"]
    assert {"SLURM_PROCID", "PYTHONPATH", "BUSHPC_BINDS"} <= set(names)
    assert not {"PATH", "HOME", "LD_LIBRARY_PATH"} & set(names)
    assert said[-6:] == ["bushpc", "/opt/bin/python", "-u", "-m", "submitit", "FOLDER"]


def test_a_command_of_the_sites_own_gets_image_and_mounts_where_it_wants_them(tmp_path):
    asked = profile(image="my image", runtime="custom", command="site-run --root {image} -m {binds} --")
    assert started(asked, Path("/usr"), tmp_path) == [
        *("site-run", "--root", "my image", "-m", "/usr:/usr", "--", "python", "-u", "-m", "submitit", "FOLDER")
    ]


def test_without_a_container_nothing_changes():
    assert container.python_command(ClusterConfig(executor="slurm")) is None
    assert container.setup_lines(ClusterConfig(executor="slurm"), Path("/usr")) == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"image": "/no/such.sif"}, r"/no/such\.sif does not exist"),
        ({"image": "docker://python:3.11"}, r"apptainer pull image\.sif docker://python:3\.11"),
        ({"image": "/no/such.sqsh", "runtime": "pyxis"}, r"/no/such\.sqsh does not exist"),
        ({"image": "/some/image.sif", "runtime": "pyxis"}, "its images are squashfs files"),
        ({"image": "/some/image.sif", "runtime": "enroot"}, "take runtime=apptainer"),
        ({"binds": ("/scratch",)}, r"without cluster\.container\.image"),
        ({"image": "ubuntu", "runtime": "pyxis", "binds": ("/a b",)}, "write folder, from:to or from:to:ro"),
        ({"image": "ubuntu", "runtime": "pyxis", "binds": ("/a,/b",)}, "No runtime can mount a folder with a comma"),
        ({"image": "ubuntu", "runtime": "pyxis", "binds": ("/a:/b:rx",)}, "write folder, from:to or from:to:ro"),
    ],
)
def test_a_container_that_no_job_could_start_is_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        cluster_for("slurm").require(profile(**settings))


@pytest.mark.parametrize("image", ["ubuntu:24.04", "registry.example#team/pytorch:26.10-py3", "docker://python:3.11"])
def test_names_in_a_registry_are_taken_as_they_are_where_the_runtime_fetches_them_once(image):
    container.require(profile(image=image, runtime="pyxis"))


def test_two_containers_in_one_profile_are_refused():
    words = [*SLURM, "cluster.container.runtime=pyxis", "cluster.container.image=ubuntu"]
    cell = compose([*words, "cluster.srun={container-image: debian}"])
    with pytest.raises(ConfigError, match="set the container once"):
        cluster_for("slurm").require(cell.cluster)


def test_on_one_machine_a_container_is_refused(image):
    cell = compose(["model=unet_small", "data=phantom", "cluster=local", f"cluster.container.image={image}"])
    with pytest.raises(ConfigError, match="Start bushpc itself inside"):
        cluster_for("local").require(cell.cluster)


def test_a_runtime_that_only_compute_nodes_may_have_is_a_warning(image, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    [warning] = container.warnings(profile(image=str(image)))
    assert "apptainer is not found here" in warning
    [check] = container.check(profile(image=str(image)))
    assert check.verdict == "warning"
    assert container.warnings(profile(image="ubuntu", runtime="pyxis")) == []
    lines = container.setup_lines(profile(image=str(image)), Path("/usr"))
    told = subprocess.run(
        ["/bin/bash", "-c", "\n".join(lines)], env={"PATH": ""}, capture_output=True, text=True
    ).stdout
    assert "apptainer: not found on this node" in told


def test_data_weights_and_caches_of_a_run_are_mounted_by_themselves(tmp_path, image, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [*SLURM, "cluster.container.image=./bushpc.sif", f"data.root={tmp_path / 'shards'}"]
    words += [f"weights_dir={tmp_path / 'weights'}", "cluster.container.binds=[/scratch]"]
    cell = compose([*words, f"loader.cache_dir={tmp_path / 'cache'}", f"loader.features_dir={tmp_path / 'features'}"])
    assert cell.cluster.container.image == str(image)
    own = [str(tmp_path / name) for name in ("shards", "weights", "cache", "features")]
    assert cell.cluster.container.binds == ("/scratch", *own)
    assert compose([*SLURM]).cluster.container.binds == ()


# --- the images that we describe ---------------------------------------------------------------------------------


def sections(text: str) -> dict[str, list[str]]:
    """An Apptainer definition: its header under "", and each section's lines."""
    found: dict[str, list[str]] = {"": []}
    name = ""
    for line in text.splitlines():
        if line.startswith("%"):
            name = line.split()[0]
            found[name] = []
        elif line.strip() and not line.lstrip().startswith("#"):
            found[name].append(line.strip())
    return found


def instructions(text: str) -> list[tuple[str, str]]:
    """A Dockerfile's instructions, continued lines joined."""
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#")).replace("\\\n", " ")
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines.splitlines() if line)]


def test_the_apptainer_definition_installs_the_wheel_with_our_constraints():
    found = sections((ROOT / "containers" / "bushpc.def").read_text())
    assert found[""] == ["Bootstrap: docker", "From: python:3.11-slim"]
    arguments = dict(line.split("=", 1) for line in found["%arguments"])
    assert (ROOT / arguments["CONSTRAINTS"]).is_file()
    copied = [line.split()[0] for line in found["%files"]]
    assert {path.name for path in ROOT.glob("constraints*.txt")} == set(copied) - {"dist"}
    [install] = [line for line in found["%post"] if "pip install" in line]
    assert install.endswith("-c {{ CONSTRAINTS }} dist/bushpc-*.whl")
    used = set(re.findall(r"\{\{ (\w+) \}\}", "\n".join(found["%post"])))
    assert used == set(arguments)
    script = "\n".join(found["%post"]).replace("{{ ", "").replace(" }}", "")
    subprocess.run(["sh", "-n"], input=script, text=True, check=True)


def test_the_dockerfile_installs_the_wheel_with_our_constraints():
    found = instructions((ROOT / "containers" / "Dockerfile").read_text())
    assert found[0] == ("FROM", "python:3.11-slim")
    known = {"FROM", "ARG", "RUN", "WORKDIR", "COPY", "ENV", "CMD"}
    assert {word for word, _ in found} <= known
    arguments = dict(rest.split("=", 1) for word, rest in found if word == "ARG")
    assert (ROOT / arguments["CONSTRAINTS"]).is_file()
    copied = {name for word, rest in found if word == "COPY" for name in rest.split()[:-1]}
    assert {path.name for path in ROOT.glob("constraints*.txt")} == copied - {"dist/"}
    runs = [rest for word, rest in found if word == "RUN"]
    assert any("pip install" in run and "-c ${CONSTRAINTS} dist/bushpc-*.whl" in run for run in runs)
    assert set(re.findall(r"\$\{(\w+)\}", " ".join(runs))) == set(arguments)
    for run in runs:
        subprocess.run(["sh", "-n"], input=run, text=True, check=True)


@pytest.mark.parametrize("name", ["bushpc.def", "Dockerfile"])
def test_no_path_of_a_machine_and_no_address_stands_in_an_image(name):
    text = (ROOT / "containers" / name).read_text()
    assert "://" not in text
    assert not re.search(r"(?<![\w.])/(?:home|root|work|scratch|users|mnt)\b", text)
