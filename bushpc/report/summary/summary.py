"""The content of `summary.json`: every figure of a report, from which tables and page take theirs."""

from __future__ import annotations

import json
import typing as t
from pathlib import Path

import msgspec

from bushpc.errors import DataError
from bushpc.report.summary.comparison_records import (
    Against,
    Comparison,
    ExternalComparison,
    FriedmanTest,
    LabelComparison,
)
from bushpc.report.summary.records import (
    ArmSummary,
    Cost,
    Figure,
    PooledLabels,
    Record,
    Rivals,
    SourceDifference,
    Stratum,
)


class EntryRecord(Record, kw_only=True):
    """A line of the tables: an arm, by position, under one prompt source."""

    arm: int
    source: str
    label: str
    uses_ground_truth: bool


class Result(t.NamedTuple):
    """A line of the tables: an arm under one prompt source.

    ranked: it competes for bold. Results that use the ground truth don't, nor do incomplete arms beside complete ones.
    """

    arm: ArmSummary
    source: str
    label: str
    ranked: bool

    @property
    def figures(self) -> dict[str, Figure]:
        """By metric."""
        return self.arm.metrics[self.source]


class Summary(Record, kw_only=True):
    """All figures of a report. grids: shown metric → grid that its pixels are counted on, see `metrics.registry`.

    rivals: of a grid that is a paper's table of methods.
    """

    title: str
    kind: str
    data: str
    folds_source: str
    complete: bool
    baseline: str
    shown_metrics: list[str]
    undefined_metrics: list[str]
    tested_metrics: list[str]
    headline_metric: str
    cost: Cost | None
    entries: list[EntryRecord]
    comparisons: Against[Comparison] | None
    label_comparisons: Against[LabelComparison] | None
    external: list[str]
    external_comparisons: Against[ExternalComparison] | None
    friedman: FriedmanTest | None
    arms: list[ArmSummary]
    grids: dict[str, str] = msgspec.field(default_factory=dict)
    folds_note: str = ""
    rivals: Rivals | None = None

    @property
    def several(self) -> bool:
        """Whether arms are shown side by side."""
        return len(self.arms) > 1

    @property
    def results(self) -> list[Result]:
        """The lines of the tables, in order."""
        found = []
        for entry in self.entries:
            arm = self.arms[entry.arm]
            ranked = (arm.complete or not self.several) and not entry.uses_ground_truth
            found.append(Result(arm, entry.source, entry.label, ranked))
        return found

    def plain(self) -> dict[str, t.Any]:
        """The content of summary.json, of JSON types only. A single arm's figures are at the top level too."""
        content = msgspec.to_builtins(self)
        for place, key in _with_metrics(content):
            place[key] = {
                name: value
                for field, content_of in place[key].items()
                for name, value in (content_of if field == "metrics" else {field: content_of}).items()
            }
        return {**(content["arms"][0] if len(self.arms) == 1 else {}), **content}

    def to_json(self) -> str:
        return json.dumps(self.plain(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read_summary(path: Path) -> Summary:
    """A summary.json of this or an older version. Raises: DataError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for place, key in _with_metrics(content):
            fields = place[key]
            place[key] = {name: value for name, value in fields.items() if name in _FIXED} | {
                "metrics": {name: value for name, value in fields.items() if name not in _FIXED}
            }
        return msgspec.convert(content, Summary)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # msgspec's are ValueErrors
        raise DataError(f"{path} is not a readable summary ({error}). Write it again: bushpc report RUN") from error


# Fields of the records that have their metrics beside them; no metric has such a name.
_FIXED = {
    field.name
    for record in (Stratum, PooledLabels, SourceDifference, LabelComparison)
    for field in msgspec.structs.fields(record)
}


def _with_metrics(content: dict[str, t.Any]) -> list[tuple[t.Any, t.Any]]:
    """(container, key) of every record whose metrics are written beside its other fields, not one level below."""
    places: list[tuple[t.Any, t.Any]] = []
    for arm in content["arms"]:
        places += [(strata, name) for strata in arm["strata"].values() for name in strata]
        places += [(arm["labels"], source) for source, labels in arm["labels"].items() if labels]
        places += [(arm, "difference")] if arm["difference"] else []
    rows = (content["label_comparisons"] or {"rows": []})["rows"]
    return [*places, *((rows, i) for i in range(len(rows)))]
