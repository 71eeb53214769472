"""What is known of GPUs by their names: compute capability and bf16. Settings and doctor ask here; no torch.

Sites name GPUs in many ways: `a100`, `v100-32g`, `nvidia_a100_3g.20gb` (a MIG slice), `NVIDIA GH200 480GB`.
"""

from __future__ import annotations

import re
import typing as t
from collections.abc import Iterable


class Capability(t.NamedTuple):
    """A GPU's compute capability, such as 8.0: which machine code it runs."""

    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


# NVIDIA, "CUDA GPU Compute Capability" and its list of legacy GPUs, read in November 2026.
CAPABILITIES: tuple[tuple[str, Capability], ...] = (
    (r"rtx_?pro_?\d+|(?:rtx_?)?50[5-9]0", Capability(12, 0)),
    (r"gb300|b300", Capability(10, 3)),
    (r"gb200|b200|b100", Capability(10, 0)),
    (r"gh200|h[128]00|h20", Capability(9, 0)),
    (r"l40|l4|l20|(?:rtx_?)?40[5-9]0|rtx_?[456]\d00_?ada", Capability(8, 9)),
    (r"a40|a10|a16|a2|(?:rtx_?)?a[2456][05]00|(?:rtx_?)?30[5-9]0", Capability(8, 6)),
    (r"a100|a800|a30", Capability(8, 0)),
    (r"t4|(?:rtx_?)?20[678]0|titan_?rtx|(?:quadro_?)?rtx_?[34568]000", Capability(7, 5)),
    (r"v100|gv100|titan_?v", Capability(7, 0)),
    (r"p40|p4|p6|(?:gtx_?)?10[5678]0|titan_?x(?:p|_pascal)", Capability(6, 1)),
    (r"p100|gp100", Capability(6, 0)),
    (r"m40|m60|m6|gtx_?9[678]0|titan_?x", Capability(5, 2)),
    (r"k80", Capability(3, 7)),
    (r"k40|k20", Capability(3, 5)),
)
# Memory in GB by name, of the smallest model that is sold under it where the name does not say: data sheets of NVIDIA,
# read in November 2026.
MEMORY_GB: tuple[tuple[str, float], ...] = (
    (r"gh200", 96),
    (r"gb300|b300", 288),
    (r"gb200|b200", 186),
    (r"h200", 141),
    (r"h100|h800|a800", 80),
    (r"h20", 96),
    (r"a100", 40),
    (r"a30|l4|a10", 24),
    (r"l40|a40|rtx_?a6000|a6000", 48),
    (r"v100|t4|p100", 16),
)
# PyTorch's own rule (torch.cuda.is_bf16_supported without emulation); older GPUs emulate bf16 more slowly than fp32.
BF16_SINCE = Capability(8, 0)


def capability_of(name: str) -> Capability | None:
    """The compute capability of a GPU by what a site or the driver calls it; None for a name that is not known.

    >>> [str(capability_of(name)) for name in ("v100-32g", "nvidia_a100_3g.20gb", "Tesla T4", "mi250")]
    ['7.0', '8.0', '7.5', 'None']
    """
    words = re.sub(r"[^a-z0-9]+", "_", name.lower())
    for pattern, capability in CAPABILITIES:
        if re.search(rf"(?:^|_|(?<=tesla)|(?<=nvidia))(?:{pattern})(?!\d)", words):
            return capability
    return None


def memory_gb(name: str) -> float | None:
    """Memory of a GPU by its name: what the name says, else the smallest of that kind; None if it is not known.

    >>> [memory_gb(name) for name in ("a100", "NVIDIA A100-SXM4-80GB", "nvidia_a100_3g.20gb", "GH200 480GB", "mi250")]
    [40, 80.0, 20.0, 96, None]
    """
    words = re.sub(r"[^a-z0-9]+", "_", name.lower())
    found = next((gb for kind, gb in MEMORY_GB if re.search(rf"(?:^|_|tesla|nvidia)(?:{kind})(?!\d)", words)), None)
    told = re.findall(r"_(\d+)gb?(?=_|$)", words)  # the last one: a MIG slice 3g.20gb has 20 GB
    # What follows GH200 is the memory of its processor.
    return float(told[-1]) if told and "gh200" not in words and found is not None else found


def has_bf16(capability: Capability) -> bool:
    """Whether the GPU computes in bf16."""
    return capability >= BF16_SINCE


def without_bf16(names: Iterable[str | None]) -> str | None:
    """The first of these texts that names a GPU without bf16. A text may offer several GPUs: `v100|a100`."""
    for text in names:
        for name in re.split(r"[|&,\[\]]", text or ""):
            capability = capability_of(name)
            if capability is not None and not has_bf16(capability):
                return name
    return None
