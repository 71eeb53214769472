"""Promises of the doctor about drivers, GPUs and builds of torch: each known misfit is named with its way out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bushpc.config.gpus import Capability, capability_of, has_bf16, without_bf16
from bushpc.ops.gpu_build import Build, amd_gpus, judge, judge_trial, names_and_driver, try_gpu

# As PyTorch's release matrix lists them for 2.14 and 2.15.
CUDA126 = Build(
    torch="2.14.0+cu126",
    cuda="12.6",
    arches=("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"),
)
CUDA13 = Build(
    torch="2.15.0+cu132",
    cuda="13.2",
    arches=("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"),
)
ROCM = Build(torch="2.13.0+rocm7.2", rocm="7.2", arches=("gfx90a", "gfx942"))
CPU = Build(torch="2.15.0+cpu")


@pytest.mark.parametrize(
    ("build", "gpu", "driver", "said", "advice"),
    [
        (CUDA13, "a100", "580.65.06", None, ""),
        (CUDA13, "a100", "580.65.05", "needs driver 580.65.6 or later", "constraints-cuda126.txt"),
        (CUDA13, "NVIDIA A100-SXM4-40GB", "535.129.03", "the node has 535.129.03", "constraints-cuda126.txt"),
        (CUDA13, "h100", "525.60.13", "needs driver", "constraints-cuda126.txt"),
        (CUDA13, "h100", "470.57.02", "needs driver", "ask the site for a newer driver"),
        (CUDA13, "v100", "580.95.05", "no code for v100 (compute capability 7.0)", "constraints-cuda126.txt"),
        (CUDA13, "Tesla P100-PCIE-16GB", None, "(compute capability 6.0)", "constraints-cuda126.txt"),
        (CUDA13, "b200", "570.86.10", "needs driver", "ask the site for driver 580"),
        (CUDA13, "t4", None, None, ""),
        (CUDA13, "l40s", None, None, ""),  # 8.9 runs the code of 8.6
        (CUDA13, "gb300", None, None, ""),  # 10.3 runs the code of 10.0
        (CUDA13, "mi250", None, "AMD GPU", "constraints-rocm.txt"),
        (CUDA13, "something_new", None, None, ""),
        (CUDA126, "v100-32g", "535.129.03", None, ""),
        (CUDA126, "p100", "525.60.13", None, ""),
        (CUDA126, "gtx_1080_ti", None, None, ""),  # 6.1 runs the code of 6.0
        (CUDA126, "a100", "525.60.12", "needs driver 525.60.13", "ask the site for a newer driver"),
        (CUDA126, "a100", "580.65.06", None, ""),  # a newer driver runs older code
        (CUDA126, "k80", None, "(compute capability 3.7)", "constraints-cuda126.txt"),
        (CUDA126, "b200", None, "no code for b200", "ask the site for driver 580"),
        (ROCM, "mi300a", None, None, ""),
        (ROCM, "a100", None, "GPU of NVIDIA's", "install a build for CUDA"),
        (CPU, "a100", None, "for the CPU only", "install a build for the GPUs"),
    ],
)
def test_a_misfit_of_driver_gpu_and_build_is_named_with_what_to_install(build, gpu, driver, said, advice):
    checks = list(judge(build, [gpu], driver))
    if said is None:
        assert [check.verdict for check in checks] == ["ok"]
        return
    assert {check.verdict for check in checks} == {"broken"}
    assert said in checks[0].found
    assert advice in checks[0].advice


def test_what_nobody_knows_is_said_and_no_misfit():
    [check] = judge(CUDA13, [], None)
    assert (check.verdict, check.found) == (
        "ok",
        "torch 2.15.0+cu132 for CUDA 13.2; GPUs: not known here; driver not known here",
    )


def test_code_that_the_driver_translates_runs_on_later_gpus_and_special_code_on_one_alone():
    assert Build(torch="2", cuda="13", arches=("compute_80",)).runs_on(Capability(12, 0))
    assert not Build(torch="2", cuda="13", arches=("compute_90",)).runs_on(Capability(8, 6))
    assert not Build(torch="2", cuda="13", arches=("sm_86",)).runs_on(Capability(8, 0))
    assert not Build(torch="2", cuda="13", arches=("sm_90a",)).runs_on(Capability(9, 9))


def test_bf16_on_a_gpu_without_it_is_broken():
    names = {check.name: check for check in judge(CUDA126, ["v100"], None, precision="bf16")}
    assert names["precision"].verdict == "broken"
    assert names["precision"].advice == "set engine.precision=fp16"
    assert "precision" not in {check.name for check in judge(CUDA126, ["v100"], None, precision="fp16")}


LINES = ["NVIDIA A100-SXM4-40GB, 535.129.03", "NVIDIA A100-SXM4-40GB, 535.129.03"]


def test_what_a_product_on_the_gpu_shows_counts_more_than_tables():
    """A site may have NVIDIA's compatibility package, with which an old driver runs new code."""
    [works] = judge_trial(LINES, "", CUDA13)
    assert works.verdict == "ok"
    [old] = judge_trial(LINES, "RuntimeError: The NVIDIA driver on your system is too old", CUDA13)
    assert (old.verdict, "constraints-cuda126.txt" in old.advice) == ("broken", True)
    [other] = judge_trial(LINES, "RuntimeError: CUDA error: device busy", CUDA126)
    assert (other.verdict, "device busy" in other.found) == ("broken", True)


def test_the_drivers_lines_are_read_with_commas_in_names():
    assert names_and_driver(LINES) == (["NVIDIA A100-SXM4-40GB"], "535.129.03")
    assert names_and_driver([]) == ([], None)


def test_the_installed_build_is_known_without_a_gpu():
    build = Build.installed()
    assert build.torch == torch.__version__
    assert build.cuda == torch.version.cuda
    if build.cuda:
        assert any(arch.startswith("sm_") for arch in build.arches)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it works")
def test_a_gpu_that_does_not_work_is_told_in_torchs_words():
    trial = try_gpu()
    assert "Error" in trial.failed
    assert trial.build == Build.installed()


def test_amds_gpus_are_named_by_the_kernels_own_list(tmp_path):
    """The list of a node with a processor, an MI250X (gfx90a), an MI300A (gfx942) and a GPU of another job."""
    assert amd_gpus(tmp_path) == []
    nodes = tmp_path / "class" / "kfd" / "kfd" / "topology" / "nodes"
    told = ("simd_count 0\ngfx_target_version 0\n", "simd_count 440\ngfx_target_version 90010\n")
    for number, text in enumerate((*told, "simd_count 912\ngfx_target_version 90402\n", "")):
        (nodes / str(number)).mkdir(parents=True)
        (nodes / str(number) / "properties").write_text(text)
    (tmp_path / "module" / "amdgpu").mkdir(parents=True)
    (tmp_path / "module" / "amdgpu" / "version").write_text("6.12.12\n")
    assert amd_gpus(tmp_path) == ["AMD gfx90a, 6.12.12", "AMD gfx942, 6.12.12"]
    [check] = judge(ROCM, names_and_driver(amd_gpus(tmp_path))[0], None)
    assert check.verdict == "ok"
    [wrong] = judge(CUDA13, ["AMD gfx90a"], None)
    assert "constraints-rocm.txt" in wrong.advice


@pytest.mark.parametrize(
    ("name", "capability"),
    [
        ("a100", "8.0"),
        ("nvidia_a100_3g.20gb", "8.0"),
        ("A100-SXM4-40GB", "8.0"),
        ("v100-32g", "7.0"),
        ("Tesla V100-SXM2-32GB", "7.0"),
        ("NVIDIA GH200 480GB", "9.0"),
        ("rtx_2080_ti", "7.5"),
        ("2080ti", "7.5"),
        ("GeForce GTX 1080 Ti", "6.1"),
        ("RTX A6000", "8.6"),
        ("Quadro RTX 6000", "7.5"),
        ("NVIDIA RTX 6000 Ada Generation", "8.9"),
        ("NVIDIA RTX PRO 6000 Blackwell", "12.0"),
        ("TITAN Xp", "6.1"),
        ("p4", "6.1"),
        ("p40", "6.1"),
        ("t4000", None),
        ("gpu", None),
    ],
)
def test_gpus_are_known_by_the_names_that_sites_and_drivers_give_them(name, capability):
    found = capability_of(name)
    assert (str(found) if found else None) == capability


def test_only_gpus_since_ampere_have_bf16_and_any_that_may_be_given_counts():
    assert [has_bf16(Capability(*c)) for c in ((7, 5), (8, 0), (9, 0))] == [False, True, True]
    assert without_bf16(["a100|v100"]) == "v100"
    assert without_bf16(["a100", None, "gpu"]) is None


def test_every_constraints_file_names_a_pair_of_torch_and_torchvision_that_fit():
    """By torchvision's own metadata 0.29.0 needs torch 2.14.0, and 0.28.0 needs 2.13.0."""
    root = Path(__file__).parents[2]
    pairs = {"constraints-cuda126.txt": ("2.14.0", "0.29.0"), "constraints-rocm.txt": ("2.13.0", "0.28.0")}
    for name, pair in pairs.items():
        lines = (root / name).read_text().splitlines()
        assert "-c constraints-common.txt" in lines
        assert (f"torch=={pair[0]}" in lines, f"torchvision=={pair[1]}" in lines) == (True, True)
    common = (root / "constraints-common.txt").read_text().splitlines()
    of_a_build = ("torch==", "torchvision==", "triton==", "nvidia-c", "nvidia-nc", "nvidia-nv", "cuda-")
    assert [line for line in common if line.startswith(of_a_build)] == []
