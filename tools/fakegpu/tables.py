"""rows.jsonl → tables for people (README's), and the table of memory that `bushpc doctor` reads."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from bushpc.config.gpu_memory import TABLE, Estimate
from tools.fakegpu.cases import CASES
from tools.fakegpu.record import A100_40
from tools.fakegpu.trial import Row

# Of the ideal: what well-tuned eager training reaches of it is not known here; a stated guess, to be measured.
EFFICIENCY = 0.5
HEAD = (
    "| case | precision | edge | batch | training | prediction | generation | host reads | attention | "
    "no CUDA kernel | raises | s |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)
GB_HEAD = (
    "| case | edge | peak at batch | floor GB | base GB | GB an image | most on 40 GB | most on 80 GB | "
    "checkpoint GB |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)
ROOF_HEAD = (
    "| case | precision | batch | GFLOP a step | GB a step | FLOP/byte | ideal ms | kernels | images/s at "
    f"{EFFICIENCY:.0%} |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def read(folder: Path) -> list[Row]:
    """The rows, in the order of the cases."""
    order = {case.name: number for number, case in enumerate(CASES)}
    rows = [Row(**json.loads(text)) for text in (folder / "rows.jsonl").read_text().splitlines()]
    return sorted((row for row in rows if row.name in order), key=lambda row: (order[row.name], row.precision))


def line(row: Row) -> str:
    """Does it run?"""
    kernels = ", ".join(f"{count} {name}" for name, count in row.kernels.items())
    cells = (
        *(row.name, row.precision, row.image_size, row.batch, row.training, row.prediction, row.generation or "-"),
        *(row.host_reads, kernels or "-", ", ".join(row.without_kernel) or "-", ", ".join(row.raises) or "-"),
        f"{row.wall_s:.0f}",
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def memory_line(row: Row) -> str:
    """How much memory?"""
    known = Estimate(name=row.name, floor_gb=row.floor_gb, base_gb=row.base_gb, image_gb=row.image_gb)
    return (
        f"| {row.name} | {row.image_size} | {row.peak_gb:.2f} at {row.batch} | {row.floor_gb:.2f} | "
        f"{row.base_gb:.2f} | "
        f"{row.image_gb:.3f} | {known.fits(40)} | {known.fits(80)} | {row.checkpoint_gb:.2f} |"
    )


def roofline(row: Row) -> str:
    """How fast at best?"""
    per_s = EFFICIENCY * row.batch / row.ideal_s
    return (
        f"| {row.name} | {row.precision} | {row.batch} | {row.gflop:.0f} | {row.gbyte:.1f} | "
        f"{row.gflop / row.gbyte:.0f} | {1000 * row.ideal_s:.1f} | {row.operators} | {per_s:.0f} |"
    )


def write_tables(folder: Path) -> None:
    """tables.md beside the rows."""
    rows = read(folder)
    full = {case.name for case in CASES if case.full}
    trained = [row for row in rows if row.name in full and row.ideal_s]
    measured = [row for row in rows if row.image_gb]
    operators = sorted({name for row in rows for name in row.differs})
    documented = sorted({name for row in rows for name in row.documented})
    parts = [
        "# Does it run?",
        "\n".join([HEAD, *map(line, rows)]),
        "# Deterministic mode",
        f"Operators that run by another algorithm: {', '.join(operators) or 'none'}.",
        f"Documented as raising, without an alert in the kernel: {', '.join(documented) or 'none'}.",
        "# Memory",
        "\n".join([GB_HEAD, *map(memory_line, measured)]),
        f"# Roofline on an {A100_40.name}",
        "\n".join([ROOF_HEAD, *map(roofline, trained)]),
    ]
    (folder / "tables.md").write_text("\n\n".join(parts) + "\n")


def write_memory(folder: Path) -> None:
    """The package's table."""
    rows = [
        {
            "name": row.name,
            "floor_gb": round(row.floor_gb, 3),
            "base_gb": round(row.base_gb, 3),
            "image_gb": round(row.image_gb, 4),
            "image_s": float(f"{row.ideal_s / row.batch / EFFICIENCY:.3g}"),
            "settings": row.settings,
        }
        for row in read(folder)
        if row.image_gb
    ]
    comment = (
        "# Estimated peak of a training step on one GPU: base_gb + image_gb for each image at a time, in 10^9 bytes;\n"
        "# image_s: seconds for an image of a step, at half of what the peaks of an A100 allow.\n"
        f"# Written by `tools/fake_gpu --tables {folder}`; how it was estimated stands there.\n"
    )
    TABLE.write_text(comment + yaml.safe_dump({"rows": rows}, sort_keys=False, default_flow_style=None, width=1000))
