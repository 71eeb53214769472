"""Shared fixtures: where the real data is, what may not be skipped, and a small packed phantom dataset."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
REQUIRE_REAL = os.environ.get("BUSHPC_REQUIRE_REAL") == "1"

# For the tests and all that they start, before torch is imported. Where more threads run than there are cores, and that
# is so in most of a run, OpenMP's threads otherwise wait for each other in a loop: one short training took 53 s of the
# processor for 14 s of work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="leave out tests that start processes, train or take long")
    parser.addoption("--times", metavar="FILE", type=Path, help="write each test's processor seconds (tests/times.py)")
    parser.addoption("--rehearse", action="store_true", help="run tests/gpu on the CPU, with small networks")


@pytest.fixture(scope="session", autouse=True)
def quick(request):
    """With --quick, tests that start processes or train are left out (tests/quick.py)."""
    if not request.config.getoption("--quick"):
        yield
        return
    from tests.quick import leave_out_slow_tests

    with pytest.MonkeyPatch.context() as patch:
        leave_out_slow_tests(patch)
        yield


# With several workers and --dist=loadfile, each takes the next of these files: the longest first, so that none is left
# for the end, and by turns one that waits for Slurm and one that computes.
LONGEST = (
    *("slurm/test_matrix.py", "train/test_engine_resume.py", "slurm/test_cv.py", "train/test_zero.py"),
    *("slurm/test_limits.py", "test_cell.py", "slurm/test_drill.py", "dispatch/test_submit.py"),
    *("slurm/test_container.py", "config/test_config.py", "slurm/test_requeue.py", "generate/test_generate.py"),
    *("slurm/test_multinode.py", "test_real_data.py", "slurm/test_doctor.py", "models/test_tumor_generator.py"),
    *("slurm/test_generate.py", "ops/test_drill.py", "slurm/test_grid.py", "data/test_staging.py"),
    *("slurm/test_sandbox.py", "compat/test_later.py", "slurm/test_sites_strict.py", "models/test_vit_diffusion.py"),
    *(
        "slurm/test_sites_environment.py",
        "train/test_nnunet.py",
        "slurm/test_environment.py",
        "evaluate/test_export.py",
    ),
)


def pytest_collection_modifyitems(config, items):
    """The order of files with several workers; tests of a file keep theirs. --quick leaves out what takes long."""
    if config.getoption("--quick"):
        models = ROOT / "tests" / "models"
        slow = {item for item in items if item.get_closest_marker("slow") or models in item.path.parents}
        config.hook.pytest_deselected(items=list(slow))
        items[:] = [item for item in items if item not in slow]
    elif "PYTEST_XDIST_WORKER" in os.environ:
        rank = {ROOT / "tests" / name: number for number, name in enumerate(LONGEST)}
        items.sort(key=lambda item: rank.get(item.path, len(rank)))


# Kernels of torch's own that ATEN_CPU_CAPABILITY chooses, and the same for oneDNN, which torch asks for some products.
ONEDNN_OF_ATEN = {"default": "SSE41", "avx2": "AVX2"}


def pytest_configure(config):
    """A worker of several (`pytest -n 2`) takes one core: more threads than cores make every test slower.

    Kernels of an older processor are those of oneDNN, too. On a processor with AVX512 that only ATEN_CPU_CAPABILITY
    lowers, torch 2.15 packs bf16 for oneDNN's newer kernels with its own older ones, which raise. And torch.compile
    would take programs from its cache that were made for the newer kernels, so each kind has a cache of its own.
    """
    capability = os.environ.get("ATEN_CPU_CAPABILITY", "")
    if lowered := ONEDNN_OF_ATEN.get(capability):
        os.environ.setdefault("ONEDNN_MAX_CPU_ISA", lowered)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor-{capability}")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell's `pytest … &` ignores Ctrl-C, and so would every command that a test interrupts.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if "PYTEST_XDIST_WORKER" in os.environ:
        import torch

        torch.set_num_threads(1)
    if file := config.getoption("--times"):
        from tests.times import Times

        config.pluginmanager.register(Times(file))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Where BUSHPC_REQUIRE_REAL=1 (CI), a skipped test that is marked `real` is a failure."""
    outcome = yield
    report = outcome.get_result()
    if item.config.getoption("--quick"):
        from tests.quick import reasons

        if report.failed and reasons:
            report.outcome, report.longrepr = "skipped", (str(item.path), None, reasons[0])
        if report.when == "teardown":
            reasons.clear()
    required = REQUIRE_REAL and not item.config.getoption("--quick")
    if required and report.skipped and item.get_closest_marker("real"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped, but BUSHPC_REQUIRE_REAL=1: {report.longrepr}"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with real datasets; without it the tests that use it are skipped, and say so."""
    folder = os.environ.get("BUSHPC_DATA")
    if not folder:
        pytest.skip("BUSHPC_DATA is not set: no real data here")
    return Path(folder)


@pytest.fixture(scope="session")
def phantom_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 synthetic scans, packed, with folds."""
    from bushpc.cli import main

    folder = tmp_path_factory.mktemp("phantom")
    assert main(["pack", "data=phantom", f"out={folder}", "count=20", "workers=1"]) == 0
    return folder


@pytest.fixture(scope="session")
def two_folds_folder(tmp_path_factory: pytest.TempPathFactory, phantom_folder: Path) -> Path:
    """The same scans in two folds: a whole cross-validation of two cells, for tests that aren't about their number."""
    import shutil

    from bushpc.shards.manifest import Manifest
    from bushpc.shards.split import make_folds, write_folds

    folder = tmp_path_factory.mktemp("two") / "folds"
    shutil.copytree(phantom_folder, folder)
    records = Manifest.load(folder).records
    write_folds(folder / "folds.csv", records, make_folds(records, k=2))
    return folder


@pytest.fixture(scope="session")
def synthetic_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 other synthetic scans, packed with the mark of a trained generator's images."""
    from bushpc.cli import main
    from bushpc.shards.card import PROJECT_SHARDS

    folder = tmp_path_factory.mktemp("synthetic")
    (folder / "card.yaml").write_text((PROJECT_SHARDS / "phantom" / "card.yaml").read_text() + "synthetic: true\n")
    assert main(["pack", "data=phantom", f"out={folder}", "count=20", "seed=1", "workers=1"]) == 0
    other = {"data": "busi", "manifest_sha256": "b" * 64, "folds_sha256": "f" * 64, "fold": 0}
    (folder / "generate.json").write_text(json.dumps({"trained_on": [other]}))
    return folder


TINY = (
    *("model=xbusnet_small", "data=phantom", "cluster=local", "model.image_size=64"),
    *("train.iterations=6", "train.batch_size=4", "train.save_every=2", "train.log_every=1", "prompts=first_pass"),
)


def cell_maker(folder: Path, shards: Path) -> Callable[..., Path]:
    """make("name", "train.lr=1e-3", …) → the folder of one tiny cell (fold 0) below `folder`, ready for `run_cell`."""
    import dataclasses
    import shutil

    from bushpc.config import compose

    def make(name: str, *overrides: str, fold: int = 0) -> Path:
        where = (f"data.root={shards}", f"runs_dir={folder}", f"loader.cache_dir={folder / 'cache'}")
        config = compose([*TINY, *where, *overrides])
        cell_dir = folder / name / "cells" / f"fold{fold}"
        cell_dir.mkdir(parents=True)
        (cell_dir / "config.yaml").write_text(dataclasses.replace(config, fold=fold, name=name).to_yaml())
        shutil.copy(shards / "folds.csv", folder / name / "folds.csv")
        return cell_dir

    return make


def write_run_record(cell_dir: Path, model: str, data: str = "phantom") -> None:
    """A run.json beside a cell of `make_cell`, as a cross-validation of this one fold would have written it."""
    import hashlib

    from bushpc.runs.run_record import CellRecord, FoldsRecord, RunRecord

    run_dir = cell_dir.parents[1]
    folds = FoldsRecord(source="frozen", sha256=hashlib.sha256((run_dir / "folds.csv").read_bytes()).hexdigest())
    record = RunRecord(
        name=run_dir.name, created="2026-11-20T10:00:00+00:00", command=["bushpc", "cv"], model=model, data=data,
        prompts="none", shards=str(run_dir), manifest_sha256="0" * 64, folds=folds, versions={"bushpc": "0.1.0"},
        cells=[CellRecord(name=cell_dir.name, fold=0)],
    )  # fmt: skip
    (run_dir / "run.json").write_text(record.to_json())


@pytest.fixture
def make_cell(tmp_path: Path, phantom_folder: Path) -> Callable[..., Path]:
    """See `cell_maker`."""
    return cell_maker(tmp_path, phantom_folder)


TINY_GENERATOR = (
    *("model=tumor_generator_small", "data=phantom", "cluster=local", "model.image_size=32", "model.steps=2"),
    *("model.unet_channels=[16,16,32]", "model.text_layers=1", "train.iterations=2", "train.batch_size=4"),
    *("train.warmup=0", "train.ema=0.5", "loader.features=false", "train.track=[]"),
)


@pytest.fixture(scope="session")
def train_generator(tmp_path_factory: pytest.TempPathFactory, phantom_folder: Path) -> Callable[..., Path]:
    """train_generator("name", "seed=1", …) → the folder of a run whose fold 0 is trained, for two steps.

    Its images mean nothing, and everything around them is real.
    """
    from bushpc.cell import run_cell
    from bushpc.config import compose
    from bushpc.dispatch.plan import cv_plan
    from bushpc.dispatch.run_folder import write_run
    from bushpc.dist import World

    folder = tmp_path_factory.mktemp("generators")

    def train(name: str, *overrides: str) -> Path:
        where = (f"data.root={phantom_folder}", f"runs_dir={folder}", f"loader.cache_dir={folder / 'cache'}")
        plan = cv_plan(compose([*TINY_GENERATOR, *where, f"name={name}", "fold=0", *overrides]))
        write_run(folder / name, plan, ["bushpc", "cv"])
        assert run_cell(folder / name / "cells" / "fold0", World()) is None
        return folder / name

    return train


@pytest.fixture(scope="session")
def generator_run(train_generator: Callable[..., Path]) -> Path:
    """Ready for `bushpc generate`."""
    return train_generator("generator")
