"""Tables of what differs and how surely: per image, per fold, and all arms at once."""

from __future__ import annotations

import typing as t

from bushpc.report.content.common import FOLDS, METHOD, Summary, titled
from bushpc.report.tables import Column, Number, Row, Table, Value

_MOST_AGAINST = 10  # arms that a matrix of all pairs can be read for
_INTERVAL = (
    Column(key="ci95_low", header="low", over="95 % interval"),
    Column(key="ci95_high", header="high", over="95 % interval"),
)
_P = (Column(key="p", header="p"), Column(key="p_holm", header="p (Holm)"))


def comparison_table(summary: Summary) -> Table | None:
    """Paired Wilcoxon test of each entry against the baseline, over images (XBusNet 3.1)."""
    return _table(
        summary,
        name="comparisons",
        caption="Per image, against {against}",
        test="images",
        columns=(
            METHOD,
            FOLDS,
            Column(key="images", header="Images"),
            Column(key="mean_difference", header="Mean difference"),
            *_INTERVAL,
            Column(key="effect", header="effect r"),
            *_P,
        ),
        values=lambda found: (found["images"], *_mean(found), Number(found["effect"], decimals=2), *_ps(found)),
        notes=(
            "Two-sided paired Wilcoxon signed-rank test on the images that both have, of folds complete in both. "
            "Images without any difference are dropped, as Wilcoxon did. Effect: matched-pairs rank-biserial "
            "correlation of the others, from \u22121 to 1; positive means better than the baseline.",
            "Interval of the mean difference: percentile bootstrap over patients. p (Holm): adjusted for all tests of "
            "this table.",
        ),
    )


def fold_comparison_table(summary: Summary) -> Table | None:
    """Nadeau and Bengio's corrected resampled t-test of each entry against the baseline, over fold means."""
    return _table(
        summary,
        name="fold_comparisons",
        caption="Per fold, against {against}",
        test="folds",
        columns=(
            METHOD,
            FOLDS,
            Column(key="mean_difference", header="Mean difference"),
            *_INTERVAL,
            Column(key="t", header="t"),
            *_P,
        ),
        values=lambda found: (*_mean(found), Number(found["t"], decimals=2), *_ps(found)),
        notes=(
            "Corrected resampled t-test (Nadeau and Bengio 2003): folds share training data, so their variance is "
            "taken times 1/k + n_test/n_train. It asks whether another training on other folds would differ too, which "
            "a test over images does not. p (Holm): adjusted for all tests of this table.",
        ),
    )


def _table(
    summary: Summary,
    *,
    name: str,
    caption: str,
    test: str,
    columns: tuple[Column, ...],
    values: t.Callable[[Summary], tuple[Value, ...]],
    notes: tuple[str, ...],
) -> Table | None:
    found = summary["comparisons"]
    if found is None:
        return None
    names = {metric: titled(metric) for metric in summary["tested_metrics"]}
    rows = [
        Row(
            values=(row["label"], common_folds(row), *values(row["metrics"][metric][test])),
            group=said,
        )
        for metric, said in names.items()
        for row in found["rows"]
    ]
    reasons = {
        f"{row['label']}: no {said} test, {reason}."
        for metric, said in names.items()
        for row in found["rows"]
        if (reason := row["metrics"][metric][test]["reason"])
    }
    return Table(
        name=name,
        caption=caption.format(against=found["against"]),
        columns=columns,
        rows=tuple(rows),
        notes=(*notes, *sorted(reasons)),
    )


def common_folds(row: Summary) -> str:
    common, expected = len(row["folds"]), row["expected"]
    return str(expected) if common == expected else f"{common} of {expected}"


def _mean(found: Summary) -> tuple[Number, Number, Number]:
    low, high = found["ci95"] or (None, None)
    return Number(found["mean"]), Number(low), Number(high)


def _ps(found: Summary) -> tuple[Number, Number]:
    return Number(found["p"], is_p=True), Number(found["p_holm"], is_p=True)


def nemenyi_table(summary: Summary) -> Table | None:
    """Friedman's test over all entries with Nemenyi's post hoc (hybrid-attention paper, 5.1.1)."""
    found = summary["friedman"]
    if found is None or not found["ranks"]:
        return None
    labels = found["labels"]
    against = range(len(labels)) if len(labels) <= _MOST_AGAINST else [0]
    rows = []
    for i, label in enumerate(labels):
        ps = (found["nemenyi"][i][j] if found["nemenyi"] and i != j else None for j in against)
        rows.append(Row(values=(label, Number(found["ranks"][i], decimals=2), *(Number(p, is_p=True) for p in ps))))
    said = f"Friedman's test of {len(labels)} rankings on the {titled(found['metric'])} of {found['images']} images: "
    if found["reason"]:
        said += f"not possible, {found['reason']}."
    else:
        said += f"χ² = {found['chi2']:.2f}, df = {len(labels) - 1}, p {_relation(Number(found['p'], is_p=True))}."
    notes = [said, "Mean rank: 1 is the best of every image. p: Nemenyi's post hoc test, which allows for all pairs."]
    if len(against) < len(labels):
        notes.append(
            f"With more than {_MOST_AGAINST} arms only the first is compared with; summary.json has all pairs."
        )
    return Table(
        name="nemenyi",
        caption=f"All at once: mean ranks over {found['images']} images, and p of each pair",
        columns=(
            METHOD,
            Column(key="mean_rank", header="Mean rank"),
            *(Column(key=f"p_{labels[j]}", header=labels[j], over="Nemenyi p against") for j in against),
        ),
        rows=tuple(rows),
        notes=tuple(notes),
    )


def _relation(p: Number) -> str:
    return str(p) if str(p).startswith("<") else f"= {p}"
