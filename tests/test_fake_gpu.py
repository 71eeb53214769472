"""Promises of tools/fake_gpu: its backward pass is torch's, its peak a hand count; planted CUDA faults are found."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from bushpc.losses.topology import topological_loss
from bushpc.models.baselines import UNet
from tools.fakegpu.attention import kernel_for
from tools.fakegpu.backward import backward, saved_tensors
from tools.fakegpu.cases import CASES, Case
from tools.fakegpu.deterministic import judge, lists
from tools.fakegpu.device import CUDA, fake_cuda
from tools.fakegpu.main import main
from tools.fakegpu.memory import PeakMemory
from tools.fakegpu.record import Record
from tools.fakegpu.trial import try_case

SMALLEST = dataclasses.replace(CASES[0], words=("model=unet_small", "model.image_size=64", "train.batch_size=2"))


def block(x, weight):
    return F.gelu(x @ weight) * x.mean(dim=0)  # broadcasts, so that gradients are summed


@pytest.mark.parametrize("recomputed", [False, True])
def test_the_backward_pass_from_python_gives_the_gradients_of_torchs_engine(recomputed):
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*size, requires_grad=True) for size in ((5, 4), (4, 4), (1, 4)))

    def loss():
        hidden = checkpoint(block, x, weight, use_reentrant=False) if recomputed else block(x, weight)
        maps = (hidden + bias).sigmoid()[None, None]
        return topological_loss(maps, maps.detach() * 0.5).sum() + (maps.half().float() ** 2).sum()

    expected = torch.autograd.grad(loss(), [x, weight, bias])
    with saved_tensors():
        backward(loss())
    for leaf, gradient in zip((x, weight, bias), expected, strict=True):
        torch.testing.assert_close(leaf.grad, gradient, rtol=1e-6, atol=1e-7)


def test_the_peak_of_a_chain_is_what_one_counts_by_hand():
    mib = 1 << 18  # float32 numbers
    with fake_cuda(), PeakMemory() as memory:
        x = torch.zeros(mib, device=CUDA, requires_grad=True)  # 1 MiB
        y = x.exp().exp().exp()  # each is kept for its backward pass: 3
        loss = y.sum()
        del y
        assert memory.live(CUDA) == 4 * 2**20 + 512
        loss.backward()
    # 4 and two gradients, of input and output of a step; the sum's gradient is expanded and takes no room.
    assert memory.peak(CUDA) == pytest.approx(5 * 2**20, abs=2 * 2**20)
    assert x.grad.device == CUDA


def test_the_peak_on_cuda_is_that_of_torchs_own_engine_on_a_fake_cpu():
    def peak(device, mode):
        with mode, PeakMemory() as memory, torch.device(device):
            net = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 512), nn.LayerNorm(512))
            net(torch.zeros(256, 512, device=device)).square().sum().backward()
            return memory.peak(torch.device(device))

    # The GPU's allocator gives out blocks of 512 bytes.
    assert peak("cuda:0", fake_cuda()) == pytest.approx(peak("cpu", FakeTensorMode()), rel=0.01)


def test_operations_are_those_of_torchs_counter():
    with fake_cuda():
        conv, x = nn.Conv2d(3, 8, 3, device=CUDA), torch.zeros(2, 3, 16, 16, device=CUDA)
        with Record() as record:
            conv(x)
        with FlopCounterMode(display=False) as counter:
            conv(x)
    assert record.flops == counter.get_total_flops() == 2 * 2 * 8 * 14 * 14 * 3 * 9
    assert record.bytes == 4 * (2 * 3 * 16 * 16 + 8 * 3 * 9 + 8 + 2 * 8 * 14 * 14)


@pytest.mark.parametrize(
    ("dtype", "widths", "mask", "kernel"),
    [
        (torch.bfloat16, (64, 64), False, "flash"),
        (torch.float32, (64, 64), False, "efficient"),
        (torch.bfloat16, (64, 64), True, "efficient"),
        (torch.bfloat16, (64, 128), False, "efficient"),
        (torch.bfloat16, (512, 512), False, "efficient"),
        (torch.float32, (66, 66), False, "math"),
    ],
)
def test_attention_takes_the_kernel_that_an_a100_would(dtype, widths, mask, kernel):
    qk, v = torch.zeros(1, 2, 4, widths[0], dtype=dtype), torch.zeros(1, 2, 4, widths[1], dtype=dtype)
    assert kernel_for(qk, qk, v, torch.zeros(4, 4) if mask else None) == kernel


def test_a_model_trains_predicts_and_saves_on_a_gpu_that_is_not_there():
    row = try_case(SMALLEST, "fp16")
    assert (row.training, row.prediction) == ("ok", "ok")
    # Of fp16's loss scale; with bf16 the loop reads nothing of the step it has just made.
    assert row.host_reads == 2
    assert not row.raises
    assert not row.without_kernel
    assert row.peak_gb * 1e9 > 4 * 4 * 3.5e6  # weights, gradients and AdamW's two moments of 3.5 million parameters


def test_stored_features_are_no_work_of_the_step():
    words = ("model=sam_multitask_small", "model.image_size=64", "model.encoder=frozen", "train.batch_size=2")
    computed, stored = (
        try_case(Case(name="sam", words=(*words, f"loader.features={each}")), "bf16") for each in ("false", "true")
    )
    assert not computed.failed
    assert not stored.failed
    assert stored.gflop < computed.gflop
    assert stored.operators < computed.operators


PLANTED = {
    "a tensor that stayed on the CPU": lambda logits: logits + torch.zeros(logits.shape),
    "a picture asked for on the GPU": lambda logits: logits + float(logits.detach().numpy().max()),
    "types that do not mix": lambda logits: logits @ torch.zeros(64, 64, dtype=torch.float64, device=logits.device),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_fault_that_only_a_gpu_shows_is_found_with_its_line(fault, monkeypatch):
    plain = UNet.logits
    # In float32, as autocast would make types alike.
    monkeypatch.setattr(UNet, "logits", lambda self, batch: PLANTED[fault](plain(self, batch)))
    row = try_case(SMALLEST, "fp32")
    assert row.failed
    assert row.training.startswith("bushpc/models/one_mask.py:")


def test_an_operator_that_raises_in_deterministic_mode_is_named(monkeypatch):
    plain = UNet.logits

    def pooled(self, batch):
        logits = plain(self, batch)
        return logits + F.adaptive_avg_pool2d(logits, 3).mean()

    monkeypatch.setattr(UNet, "logits", pooled)
    assert try_case(SMALLEST, "bf16").raises == ["aten::_adaptive_avg_pool2d_backward"]


def test_torchs_lists_name_operators_that_exist_and_judge_by_version():
    for name in lists():
        assert hasattr(torch.ops.aten, name.removeprefix("aten::")), name
    assert judge(["aten::cumsum", "aten::max_pool3d_with_indices_backward"], "2.11").raises == [
        "aten::max_pool3d_with_indices_backward"
    ]
    assert judge(["aten::cumsum", "aten::max_pool3d_with_indices_backward"], "2.15").raises == []


def test_the_command_writes_each_row_and_makes_none_twice(tmp_path, capsys):
    words = ["--only", "efficientnet_small", "--precision", "bf16", "--out", str(tmp_path)]
    assert main(words) == 0
    first = (tmp_path / "rows.jsonl").read_text()
    assert main(words) == 0
    assert (tmp_path / "rows.jsonl").read_text() == first
    assert "| efficientnet_small | bf16 | 96 |" in capsys.readouterr().out
