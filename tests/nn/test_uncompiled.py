"""Promises of methods left out of compiled graphs: they run as they are, and no submission imports a compiler."""

from __future__ import annotations

import subprocess
import sys

import torch

from bushpc.nn.uncompiled import leave_out_of_graphs, not_compiled


class Model(torch.nn.Module):
    @not_compiled
    def seen(self, x: torch.Tensor) -> torch.Tensor:
        assert not torch.compiler.is_compiling()
        return x + (1.0 if torch.compiler.is_dynamo_compiling() else 2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.seen(x * 3) * 5


def test_a_method_left_out_of_graphs_runs_as_it_is_in_a_compiled_model():
    graphs = []

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    torch._dynamo.reset()
    model = Model()
    plain = model(torch.ones(2))
    leave_out_of_graphs()
    leave_out_of_graphs()
    model.compile(backend=backend)
    assert torch.equal(model(torch.ones(2)), plain)
    called = [name for graph in graphs for name in graph if "mul" in name or "add" in name]
    assert len(called) == 2, f"x * 3 and * 5 are compiled, x + 2 is not: {called}"
    assert not any("add" in name for name in called)


def test_importing_a_model_imports_no_compiler():
    code = (
        "import sys, bushpc.models.xbusnet, bushpc.models.sam_multitask, bushpc.models.tumor_generator;"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
