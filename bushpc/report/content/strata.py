"""The table of results by lesion length."""

from __future__ import annotations

from dataclasses import replace

from bushpc.report.content.common import (
    METHOD,
    Summary,
    bold_note,
    figures_of,
    folds_phrase,
    lines,
    metric_columns,
    ours,
    printed,
    published,
    several,
)
from bushpc.report.tables import Row, Table

_EN_DASH = "\u2013"


def strata_table(summary: Summary) -> Table | None:
    """Dice and IoU by lesion length for each entry, the paper's table below."""
    entries = lines(summary)
    if not entries:
        return None
    counts = [{name: stratum["n"] for name, stratum in line.arm["strata"][line.source].items()} for line in entries]
    alike = all(count == counts[0] for count in counts)
    columns = [METHOD]
    metrics = [name for name in next(iter(entries[0].arm["strata"][entries[0].source].values())) if name != "n"]
    if not metrics:  # of masks, where models give labels alone
        return None
    for name, n in counts[0].items():
        over = f"{name.replace('-', _EN_DASH)} px" + (f" (n = {n})" if alike else "")
        columns += [replace(c, key=f"{name}_{c.key}") for c in metric_columns(summary, metrics, over=over)]
    if several(summary):
        group = f"{ours(summary)}, images of all complete folds together"
    else:
        group = f"{ours(summary)}, images of {folds_phrase(summary['arms'][0])} together"
    rows = [
        Row(
            values=(
                line.label,
                *(
                    value
                    for name in counts[0]
                    for value in figures_of(line.arm["strata"][line.source][name], metrics).values()
                ),
            ),
            group=group,
            ranked=line.ranked,
        )
        for line in entries
    ]
    notes = [
        "Length is the longest side of the lesion's bounding box in pixels of the original image"
        + ("; n counts the lesions here." if alike else "; arms that miss folds have fewer lesions.")
        + " Figures are means over images.",
        bold_note(summary),
    ]
    paper = published(summary, "strata")
    if paper:
        rows += [
            Row(
                values=(
                    method,
                    *(value for name in counts[0] for value in printed(paper, strata.get(name, {}), metrics).values()),
                ),
                group=paper.heading,
                quoted=True,
            )
            for method, strata in paper.rows.items()
        ]
        notes.append("The paper does not define its length nor print its n; its rows were not computed here.")
    return Table(
        name="strata",
        caption="Results by lesion length",
        columns=tuple(columns),
        rows=tuple(rows),
        notes=tuple(notes),
    )
