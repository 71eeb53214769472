"""Summary → tables: which rows and columns the report shows, and how each is labelled. Figures come from the
summary alone, so page, CSV, LaTeX and `summary.json` cannot disagree.
"""

from __future__ import annotations

import typing as t

from bushpc.goodput import CAUSES
from bushpc.report.published import PublishedTable, find_published
from bushpc.report.results import METRICS, RunResults
from bushpc.report.tables import Column, Number, Row, Table

Summary = dict[str, t.Any]

_EN_DASH = "\u2013"

_METRIC_COLUMNS = (
    Column(key="dice", header="Dice", better="high"),
    Column(key="iou", header="IoU", better="high"),
    Column(key="fpr", header="FPR", better="low"),
    Column(key="fnr", header="FNR", better="low"),
)
_UNRANKED_METRIC_COLUMNS = tuple(Column(key=c.key, header=c.header) for c in _METRIC_COLUMNS)


def all_tables(results: RunResults, summary: Summary) -> list[Table]:
    """Every table of the report, in its order; those that need a complete fold are left out without one."""
    tables = [headline_table(summary), folds_table(summary), strata_table(summary), difference_table(summary)]
    tables += [time_table(results), cells_table(results)]
    return [table for table in tables if table is not None]


def folds_phrase(summary: Summary) -> str:
    """ "5 folds" or "4 of 5 folds": what every mean in the report is a mean over."""
    expected, complete = summary["folds"]["expected"], len(summary["folds"]["complete"])
    folds = "fold" if expected == 1 else "folds"
    return f"{expected} {folds}" if summary["complete"] else f"{complete} of {expected} {folds}"


def headline_table(summary: Summary) -> Table | None:
    """Mean ± SD over fold means for each prompt source, the paper's overall table below."""
    if not summary["metrics"]:
        return None
    ours = f"this run, mean {'± SD ' if summary['complete'] else ''}over {folds_phrase(summary)}"
    rows = [
        Row(
            values=(_who(summary, source), *(_figure(summary["metrics"][source][metric]) for metric in METRICS)),
            group=ours,
            ranked=not summary["sources"][source]["uses_ground_truth"],
        )
        for source in summary["metrics"]
    ]
    notes = ["FPR and FNR: lower is better."]
    if summary["complete"] and summary["folds"]["expected"] > 1:
        notes.append("Each image counts once within its fold, each fold once; SD is the sample SD over folds (ddof=1).")
    elif summary["complete"]:
        notes.append("One fold has no standard deviation.")
    else:
        notes.append("Folds are missing: these are means over the complete ones only, without SD, and no final result.")
    paper = find_published(summary["data"], summary["model"], "overall")
    if paper:
        rows += [
            Row(
                values=(name, *(_printed(figures[metric], paper.decimals) for metric in METRICS)),
                group=paper.heading,
                quoted=True,
            )
            for name, figures in paper.rows.items()
        ]
        notes.append(f"The paper's rows were not computed here: {paper.citation}.")
    notes.append(_bold_note(summary))
    return Table(
        name="headline",
        caption=f"Segmentation at threshold {summary['threshold']:g} on validation images",
        columns=(Column(key="method", header="Method", numeric=False), *_METRIC_COLUMNS),
        rows=tuple(rows),
        notes=tuple(notes),
    )


def _who(summary: Summary, source: str) -> str:
    return f"{summary['model']}, {summary['sources'][source]['label']}"


def _figure(metric: dict[str, t.Any]) -> Number:
    return Number(metric["mean"] if metric["partial_mean"] is None else metric["partial_mean"], metric.get("sd"))


def _printed(mean_and_sd: list[float], decimals: int) -> Number:
    mean, sd = mean_and_sd
    return Number(mean, sd, decimals)


def _bold_note(summary: Summary) -> str:
    unranked = [source["label"] for source in summary["sources"].values() if source["uses_ground_truth"]]
    return "Bold: the best of its group" + "".join(f"; {label} does not compete" for label in unranked) + "."


def folds_table(summary: Summary, with_paper: bool = True) -> Table:
    """One row a fold and prompt source, missing folds named, then their mean; the paper's fold-wise table below."""
    rows: list[Row] = []
    for source, label in _sources_or_headline(summary):
        rows += _fold_rows(summary, source, label)
    notes = ["Every figure is the mean over the validation images of that fold."]
    if summary["complete"] and summary["folds"]["expected"] > 1:
        notes.append("SD is the sample SD over folds (ddof=1).")
    paper = find_published(summary["data"], summary["model"], "fold_wise") if with_paper else None
    if paper:
        rows += _published_fold_rows(paper)
        notes.append(f"The paper's mean row is its own. {_same_folds(summary)}")
    if not summary["complete"]:
        notes.append("Missing folds are named and not averaged in.")
    return Table(
        name="folds",
        caption=f"Results by fold ({folds_phrase(summary)})",
        columns=(
            Column(key="fold", header="Fold", numeric=False),
            Column(key="images", header="Images"),
            *_UNRANKED_METRIC_COLUMNS,
        ),
        rows=tuple(rows),
        notes=tuple(notes),
    )


def _sources_or_headline(summary: Summary) -> list[tuple[str | None, str]]:
    """Without a complete fold there is no source to group by, yet the missing folds must be listed."""
    sources = [(source, f"this run, {_who(summary, source)}") for source in summary["metrics"]]
    return list(sources) or [(None, "this run")]


def _fold_rows(summary: Summary, source: str | None, group: str) -> list[Row]:
    folds = summary["folds"]
    missing = {entry["fold"] for entry in folds["missing"]}
    rows = []
    for fold in sorted({*folds["complete"], *missing}):
        if fold in missing:
            rows.append(Row(values=(f"{fold} (missing)", "—", *(Number(None) for _ in METRICS)), group=group))
        else:
            values = (Number(summary["metrics"][source][metric]["per_fold"][str(fold)]) for metric in METRICS)
            rows.append(Row(values=(str(fold), summary["images"][str(fold)], *values), group=group))
    if source is not None:
        figures = summary["metrics"][source]
        images = sum(summary["images"].values())
        mean = "Mean" if summary["complete"] else f"Mean over {folds_phrase(summary)}"
        means = (Number(_figure(figures[metric]).value) for metric in METRICS)
        rows.append(Row(values=(mean, images, *means), group=group, strong=True))
        if figures["dice"]["sd"] is not None:
            sds = (Number(figures[metric]["sd"]) for metric in METRICS)
            rows.append(Row(values=("SD", "—", *sds), group=group))
    return rows


def _published_fold_rows(paper: PublishedTable) -> list[Row]:
    return [
        Row(
            values=(name, "—", *(Number(figures[metric], decimals=paper.decimals) for metric in METRICS)),
            group=paper.heading,
            strong=name == "Mean",
            quoted=True,
        )
        for name, figures in paper.rows.items()
    ]


def _same_folds(summary: Summary) -> str:
    if summary["folds"]["source"] == "published":
        return "This run used the folds that the paper's authors published, so rows can be compared one by one."
    return "This run used folds of its own, so only the means can be compared, not fold with fold."


def strata_table(summary: Summary) -> Table | None:
    """Dice and IoU by lesion length for each prompt source, the paper's table below."""
    if not summary["strata"]:
        return None
    counts = {name: stratum["n"] for name, stratum in summary["strata"][summary["headline"]].items()}
    columns = [Column(key="method", header="Method", numeric=False)]
    for name, n in counts.items():
        over = f"{name.replace('-', _EN_DASH)} px (n = {n})"
        columns += [
            Column(key=f"{name}_dice", header="Dice", over=over, better="high"),
            Column(key=f"{name}_iou", header="IoU", over=over, better="high"),
        ]
    rows = [
        Row(
            values=(_who(summary, source), *(_figure(strata[name][m]) for name in counts for m in ("dice", "iou"))),
            group=f"this run, images of {folds_phrase(summary)} together",
            ranked=not summary["sources"][source]["uses_ground_truth"],
        )
        for source, strata in summary["strata"].items()
    ]
    notes = [
        "Length is the longest side of the lesion's bounding box in pixels of the original image; n counts this "
        "run's lesions. Figures are means over images.",
        _bold_note(summary),
    ]
    paper = find_published(summary["data"], summary["model"], "strata")
    if paper:
        rows += [
            Row(
                values=(
                    method,
                    *(Number(strata[name][m], decimals=paper.decimals) for name in counts for m in ("dice", "iou")),
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


def difference_table(summary: Summary) -> Table | None:
    """Oracle minus first pass, paired by image."""
    found = summary["difference"]
    if found is None:
        return None
    oracle = summary["sources"]["oracle"]["label"]
    rows = []
    for column in _METRIC_COLUMNS:
        entry = found[column.key]
        partial = "" if summary["complete"] else "partial_"
        low, high = entry[f"{partial}ci95"]
        rows.append(Row(values=(column.header, Number(entry[f"{partial}mean"]), Number(low), Number(high))))
    return Table(
        name="difference",
        caption=f"{oracle} minus first_pass, paired by image ({folds_phrase(summary)})",
        columns=(
            Column(key="metric", header="Metric", numeric=False),
            Column(key="mean_difference", header="Mean difference"),
            Column(key="ci95_low", header="low", over="95 % interval"),
            Column(key="ci95_high", header="high", over="95 % interval"),
        ),
        rows=tuple(rows),
        notes=(
            f"{found['images']} images of {found['patients']} patients. Percentile bootstrap over patients, "
            f"{found['resamples']} resamples, seed {found['seed']}.",
            "Positive Dice and IoU, negative FPR and FNR: the ground-truth prompt helped. An interval that contains "
            "zero leaves open whether it did.",
        ),
    )


def time_table(results: RunResults) -> Table | None:
    """Where the time of every cell went; None before one has started."""
    started = [(cell, cell.goodput) for cell in results.cells if cell.goodput]
    if not started:
        return None
    rows = [
        Row(
            values=(
                cell.name,
                account.attempts,
                account.replayed_steps,
                Number(account.share, decimals=3),
                Number(account.gpu_hours, decimals=2),
                Number(account.wall_s, decimals=0),
                *(Number(account.seconds[cause], decimals=0) for cause in CAUSES),
            )
        )
        for cell, account in started
    ]
    seconds = "Seconds"
    return Table(
        name="time",
        caption="Where the time of every cell went",
        columns=(
            Column(key="cell", header="Cell", numeric=False),
            Column(key="attempts", header="Attempts"),
            Column(key="replayed_steps", header="Steps done again"),
            Column(key="goodput", header="Goodput"),
            Column(key="gpu_hours", header="GPU hours"),
            Column(key="wall_seconds", header="in all", over=seconds),
            *(Column(key=f"{cause}_seconds", header=said, over=seconds) for cause, said in CAUSES.items()),
        ),
        rows=tuple(rows),
        notes=(
            "Goodput is the share of training steps that were not done again, of all time in which the cell was "
            "submitted. All causes sum to the time from the first submission to the last sign of life.",
            "Requeue is the time from an attempt's last sign of life to the next one's begin; what a killed attempt "
            "did after its last sign of life is in it.",
        ),
    )


def cells_table(results: RunResults) -> Table:
    """State of every cell: complete, or why not."""
    rows = [
        Row(
            values=(
                cell.name,
                str(cell.fold),
                "complete" if cell.complete else f"missing: {cell.reason}",
                "—" if cell.step is None else cell.step,
                cell.hash,
            )
        )
        for cell in results.cells
    ]
    return Table(
        name="cells",
        caption="Cells of this run",
        columns=(
            Column(key="cell", header="Cell", numeric=False),
            Column(key="fold", header="Fold", numeric=False),
            Column(key="state", header="State", numeric=False),
            Column(key="step", header="Step"),
            Column(key="config_hash", header="Config hash", numeric=False),
        ),
        rows=tuple(rows),
    )
