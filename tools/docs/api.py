"""The Python API from docstrings, which griffe reads without importing a module."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import griffe

# What users of the package build on: page → title, and the objects by module.
PAGES: dict[str, tuple[str, dict[str, str]]] = {
    "start": ("The entry points", {"api": "Shards pack open_shards train_cell read_results"}),
    "use": (
        "Use a trained model",
        {"evaluate.predictor": "load Predictor Result", "evaluate.export": "export", "evaluate.measure": "Measures"},
    ),
    "data": ("Read packed data", {"shards.manifest": "Manifest Record read_image read_mask verify"}),
    "results": (
        "Read runs and write reports",
        {"report.page": "build_report build_comparison", "runs.layout": "RunDir CellDir"},
    ),
    "models": ("Write a model", {"models.base": "Model", "sample": "Sample Batch Losses Prediction"}),
    "extend": (
        "Write a setting, metric or cluster backend",
        {"config.fields": "setting", "metrics.registry": "Metric", "cluster.base": "Cluster"},
    ),
}
Found = griffe.Object | griffe.Alias


def pages() -> dict[str, str]:
    """Path on the site → text."""
    package = griffe.load("bushpc", submodules=True, allow_inspection=False)
    found, lines = {}, []
    for name, (title, modules) in PAGES.items():
        objects = [package[f"{module}.{each}"] for module, names in modules.items() for each in names.split()]
        found[f"reference/python/{name}.md"] = f"# {title}\n\n" + "\n".join(map(_object, objects))
        lines.append(f"- [{title}]({name}.md): " + ", ".join(f"`{each.name}`" for each in objects))
    intro = "From the docstrings. Objects that are not listed may change between versions."
    return {**found, "reference/python/index.md": f"# Python\n\n{intro}\n\n" + "\n".join(lines) + "\n"}


def _object(each: Found) -> str:
    parts = [f"## {each.name}", f"`{each.path}`", _code(each), *_says(each)]
    if each.is_class:
        for member in _public(each):
            parts += [f"### {each.name}.{member.name}", _code(member), *_says(member)]
    return "\n\n".join(parts) + "\n"


def _public(each: Found) -> Iterator[Found]:
    for member in each.members.values():
        if member.docstring and not member.name.startswith("_") and (member.is_function or "property" in member.labels):
            yield member


def _says(each: Found) -> list[str]:
    """The docstring as it stands in the source: its indents mean lists, which Markdown would take for code."""
    text = inspect.cleandoc(each.docstring.value) if each.docstring else ""
    first, _, rest = text.partition("\n\n")
    return [f"```text\n{first}\n\n{rest}\n```" if rest else f"```text\n{first}\n```"] if text else []


def _code(each: Found) -> str:
    """The signature of a function; the fields of a data class."""
    target = each.final_target if isinstance(each, griffe.Alias) else each
    if isinstance(target, griffe.Function):
        return f"```python\n{target.signature()}\n```"
    if isinstance(target, griffe.Attribute):
        return f"```python\n{target.name}: {target.annotation}\n```"
    fields = [
        f"    {name}: {member.annotation}" + (f" = {member.value}" if member.value else "")
        for name, member in target.members.items()
        if isinstance(member, griffe.Attribute) and member.annotation and not name.startswith("_")
        if "property" not in member.labels
    ]
    return f"```python\nclass {target.name}" + "".join([":\n" * bool(fields), "\n".join(fields)]) + "\n```"
