"""Tables of what was measured: overall, by switch, by mask class, by prompt source, by fold, by lesion size,
calibration.
"""

from __future__ import annotations

import typing as t
from collections.abc import Sequence
from dataclasses import replace

from bushpc.metrics.registry import IMAGE_METRICS, LABEL_METRICS, METRICS, Metric
from bushpc.report.content.common import (
    FOLDS,
    METHOD,
    Line,
    Summary,
    bold_note,
    bounds,
    figure,
    figures_of,
    folds_count,
    folds_phrase,
    lines,
    listed,
    lower_is_better,
    metric_columns,
    ours,
    printed,
    published,
    same_folds,
    several,
    titled,
    turned,
)
from bushpc.report.published import PARAMETERS, PublishedTable, tables_of
from bushpc.report.tables import Column, Number, Row, Table, Value

_EN_DASH = "\u2013"
_MOST_BESIDE = 3  # metrics of a paper that fit beside as many of ours


def headline_table(summary: Summary) -> Table | None:
    """Mean ± SD over fold means for each entry with its interval, p and effect size; the paper's table below."""
    entries = lines(summary)
    if not entries:
        return None
    paper = published(summary, "overall")
    if turned(summary):
        return turned_table(
            summary,
            name="headline",
            caption=f"Results at {_threshold(summary)} on validation images",
            metrics=summary["shown_metrics"],
            paper=paper,
            notes=_headline_notes(summary, paper),
        )
    counted = not same_folds(summary)
    tests, ranks = _tests(summary), summary["comparisons"] is not None
    metrics, headline = summary["shown_metrics"], summary["headline_metric"]
    rows = []
    for line in entries:
        figures = line.figures()
        test = tests.get(line.label, {})
        rows.append(
            Row(
                values=(
                    line.label,
                    *((folds_count(line.arm),) if counted else ()),
                    *figures_of(figures, metrics),
                    *_interval_of(line, headline),
                    *((Number(test.get("effect"), decimals=2),) if ranks else ()),
                    *((Number(test.get("p_holm"), is_p=True),) if tests else ()),
                ),
                group=_headline_group(summary),
                ranked=line.ranked,
            )
        )
    empty = len(rows[0].values)
    rows += [
        Row(
            values=(arm["label"], folds_count(arm), *[Number(None)] * (empty - 2)),
            group=_headline_group(summary),
            ranked=False,
        )
        for arm in summary["arms"]
        if several(summary) and not arm["sources"]
    ]
    if paper:
        rows += [
            Row(
                values=(
                    name,
                    *(("—",) if counted else ()),
                    *printed(paper, figures, metrics),
                    *[Number(None)] * (empty - 1 - counted - len(metrics)),
                ),
                group=paper.heading,
                quoted=True,
            )
            for name, figures in paper.rows.items()
        ]
    columns = [METHOD, *((FOLDS,) if counted else ()), *metric_columns(summary)]
    said = titled(headline)
    columns += [
        Column(key=f"{headline}_ci95_low", header="low", over=f"{said}, 95 % interval"),
        Column(key=f"{headline}_ci95_high", header="high", over=f"{said}, 95 % interval"),
    ]
    over = f"{said} vs baseline"
    columns += [Column(key=f"{headline}_effect", header="r", over=over)] if ranks else []
    columns += [Column(key=f"{headline}_p_holm", header="p (Holm)", over=over)] if tests else []
    return Table(
        name="headline",
        caption=_task(summary),
        columns=tuple(columns),
        rows=tuple(rows),
        notes=tuple(_headline_notes(summary, paper)),
    )


def _task(summary: Summary) -> str:
    tested = set(summary["tested_metrics"])
    if not tested:
        return "Classification of validation images"
    if all(METRICS[metric].of == "pixels" for metric in tested):
        return "Validation images as the model itself scores them"
    return f"Segmentation at {_threshold(summary)} on validation images"


def overview_table(summary: Summary) -> Table | None:
    """The same for a terminal, which has no room for every column; None for one arm, whose folds are shown there."""
    if not several(summary):
        return None
    tests = _tests(summary)
    tested = bool(tests or summary["tested_metrics"])
    metrics = _few(summary)
    rows = [
        Row(
            values=(
                line.label,
                folds_count(line.arm),
                *figures_of(line.figures(), metrics),
                *([Number(tests.get(line.label, {}).get("p_holm"), is_p=True)] if tested else []),
            ),
            ranked=line.ranked,
        )
        for line in lines(summary)
    ]
    return Table(
        name="overview",
        caption=f"{summary['title']}: mean ± SD over folds"
        + (f"; p (Holm) of {titled(summary['headline_metric'])} against {_against(summary)}" if tested else ""),
        columns=(
            *(METHOD, FOLDS, *metric_columns(summary, metrics, over="")),
            *([Column(key="p", header="p")] if tested else []),
        ),
        rows=tuple(rows),
    )


def _few(summary: Summary) -> list[str]:
    """Metrics for where there is room for few: one a task, then more of what is tested."""
    label = [metric for metric in summary["shown_metrics"] if metric in LABEL_METRICS]
    tested = [metric for metric in summary["tested_metrics"] if metric in summary["shown_metrics"]]
    tested.sort(key=lambda metric: metric != summary["headline_metric"])
    return [*label[: 1 if tested else 2], *tested[: 1 if label else 2]]


def _against(summary: Summary) -> str:
    found = summary["comparisons"] or summary["label_comparisons"]
    return found["against"] if found else "the baseline"


def _tests(summary: Summary) -> dict[str, Summary]:
    """Label of an entry → its headline metric against the baseline: image by image, AUC of all images together."""
    found, metric = summary["comparisons"], summary["headline_metric"]
    if found:
        return {row["label"]: row["metrics"][metric]["images"] for row in found["rows"]}
    found = summary["label_comparisons"] if metric == "label_auc" else None
    return {row["label"]: row[metric] for row in found["rows"] if row[metric]} if found else {}


def _headline_group(summary: Summary) -> str:
    if not same_folds(summary):
        return f"{ours(summary)}, mean ± SD over folds"
    arm = summary["arms"][0]
    return f"{ours(summary)}, mean {'± SD ' if arm['complete'] else ''}over {folds_phrase(arm)}"


def _threshold(summary: Summary) -> str:
    found = {arm["threshold"] for arm in summary["arms"] if arm["sources"]}
    return f"threshold {found.pop():g}" if len(found) == 1 else "each arm's own threshold"


def _headline_notes(summary: Summary, paper: PublishedTable | None) -> list[str]:
    notes = [*lower_is_better(summary["shown_metrics"]), *_definition_notes(summary)]
    if made := [(arm["label"], found) for arm in summary["arms"] if (found := arm["synthetic"])]:
        said = [
            f"{label} ({found['ratio']:g} for each real one{'' if found['real'] else ', which do not train'})"
            for label, found in made
        ]
        notes.append(f"Trained on synthetic scans: {listed(said)}. All are validated on real scans alone.")
    most_folds = max(arm["folds"]["expected"] for arm in summary["arms"])
    if summary["complete"] and most_folds > 1:
        notes.append("Each image counts once within its fold, each fold once; SD is the sample SD over folds (ddof=1).")
    elif summary["complete"]:
        notes.append("One fold has no standard deviation.")
    elif several(summary):
        notes.append(
            "Arms that miss folds show the mean over their complete ones, without SD, which is no final result."
        )
    else:
        notes.append("Folds are missing: these are means over the complete ones only, without SD, and no final result.")
    if turned(summary) and len(summary["entries"]) == 1:
        notes.append(
            "95 % interval: of the mean over images, of classification of all images together; percentile bootstrap "
            "over patients."
        )
    elif not turned(summary):
        of = "the mean over images" if summary["tested_metrics"] else "all images together"
        notes.append(f"95 % interval: of {of}, percentile bootstrap over patients.")
    if summary["comparisons"] and not turned(summary):
        notes.append(
            f"Baseline: {summary['comparisons']['against']}. Effect size r and p: paired Wilcoxon signed-rank test "
            "over images, see the comparisons."
        )
    elif not turned(summary) and _tests(summary):
        notes.append(
            f"Baseline: {_against(summary)}. p: DeLong's test of the AUC of all images together, with patients as the "
            "unit, see the labels."
        )
    if paper:
        notes.append(f"The paper's rows were not computed here: {paper.citation}.")
    return [*notes, bold_note(summary, across=turned(summary))]


def _definition_notes(summary: Summary) -> list[str]:
    """What a figure does not cover, and what cannot be read from its name."""
    shown, notes = summary["shown_metrics"], []
    classes = classes_of(summary)
    if classes:
        notes.append(f"Of an image the mean over the mask classes {listed(classes)}; see the results by mask class.")
    of_images = [metric for metric in shown if metric in IMAGE_METRICS]
    notes += _coverage(of_images, [(line.arm, line.figures()) for line in lines(summary)], "lesion")
    by_reason: dict[str, list[str]] = {}
    for metric in summary["undefined_metrics"]:
        by_reason.setdefault(METRICS[metric].undefined, []).append(titled(metric))
    notes += [f"Not shown: {listed(names)}, as {reason}." for reason, names in by_reason.items()]
    return [*notes, *_metric_notes(shown, summary["arms"][0]["tolerance"])]


def _metric_notes(shown: list[str], tolerance: dict[str, float]) -> list[str]:
    """What the shown metrics say of themselves, classification first. Metrics with the same note share it."""
    by_note: dict[str, list[Metric]] = {}
    for metric in (METRICS[name] for name in shown):
        by_note.setdefault(metric.note, []).append(metric)
    order = list(METRICS.values())
    notes = []
    for note, metrics in sorted(
        by_note.items(), key=lambda item: (item[1][0].of != "labels", min(map(order.index, item[1])))
    ):
        said = [f"{tolerance[metric.name]:g} {metric.spacing}" for metric in metrics if metric.name in tolerance]
        if note and ("{tolerance}" not in note or said):
            notes.append(note.format(tolerance=listed(said)))
    return notes


def _coverage(metrics: list[str], of_arms: list[tuple[Summary, Summary]], what: str) -> list[str]:
    """Of how many images a metric is, where it is not of all.

    of_arms: each arm with its figures by metric. what: is to be found in an image, and missing in the others.
    """
    by_count: dict[str, list[str]] = {}
    for metric in metrics:
        found = [
            (figures[metric]["images"], sum(arm["images"].values())) for arm, figures in of_arms if metric in figures
        ]
        if any(images < all_images for images, all_images in found):
            images, all_images = ({pair[i] for pair in found} for i in (0, 1))
            said = f"{_range(images)} of {_range(all_images)} images; the others have no {what}"
            said += " or no known pixel size" if METRICS[metric].spacing == "mm" else ""
            by_count.setdefault(said, []).append(titled(metric))
    return [f"{listed(names)}: of {said}." for said, names in by_count.items()]


def _range(counts: set[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low}" if low == high else f"{low} to {high}"


def ablation_table(summary: Summary) -> Table | None:
    """A grid's rows by what they switch or set, in the shape of the paper's table, with its figures: beside ours where
    there are few (XBusNet's Table 4), below them where there are many (hybrid attention's Table 2).
    """
    settings = list(summary["arms"][0]["settings"])
    if summary["kind"] != "grid" or not settings:
        return None
    paper = published(summary, "ablation")
    theirs = _by_row(summary, paper, settings)
    paper = paper if theirs else None
    metrics = _ablation_metrics(summary, settings)
    if turned(summary):
        return turned_table(
            summary,
            name="ablation",
            caption=summary["title"],
            metrics=metrics,
            paper=paper,
            notes=_ablation_notes(summary, paper, beside=False),
            settings=settings,
        )
    beside = paper is not None and len(metrics) <= _MOST_BESIDE
    switches = all(isinstance(arm["settings"][key], bool) for arm in summary["arms"] for key in settings)
    said_folds = len(metrics) <= _MOST_BESIDE or not same_folds(summary)
    named = not switches or (paper is not None and not beside)  # rows of switches need no name, others' rows do
    they_count = paper is not None and PARAMETERS in paper.metrics
    counted = any(arm["parameters"] for arm in summary["arms"]) or (they_count and not beside)
    own = {line.arm["arm"]: line for line in lines(summary)}

    def values(name: str, of: Summary, folds: str, parameters: Value, figures: list[Value]) -> tuple[Value, ...]:
        return (
            *((name,) if named else ()),
            *(_setting(of.get(key)) for key in settings),
            *((folds,) if said_folds else ()),
            *((parameters,) if counted else ()),
            *figures,
        )

    def quoted_values(quoted: Summary) -> list[Value]:
        assert paper is not None, "there is nothing to quote"
        return [*([_count(quoted)] if beside and they_count else []), *printed(paper, quoted, metrics)]

    none = [Number(None)] * len(metrics)
    rows = []
    for arm in summary["arms"]:
        line = own.get(arm["arm"])
        figures: list[Value] = [*(figures_of(line.figures(), metrics) if line else none)]
        if paper and beside:
            figures = [*figures, *quoted_values(paper.rows.get(theirs.get(arm["arm"], ""), {}))]
        rows.append(
            Row(
                values=values(arm["label"], arm["settings"], folds_count(arm), _count(arm), figures),
                group="" if beside or not paper else ours(summary),
                ranked=bool(line and line.ranked),
            )
        )
    if paper:
        matched = {theirs[arm["arm"]]: arm["settings"] for arm in summary["arms"] if arm["arm"] in theirs}
        rows += [
            Row(
                values=values(
                    name,
                    {**matched.get(name, {}), **quoted},
                    "—",
                    "—" if beside else _count(quoted),
                    [*(none if beside else ()), *quoted_values(quoted)],
                ),
                group="" if beside else paper.heading,
                ranked=False,
                quoted=True,
            )
            for name, quoted in paper.rows.items()
            if not beside or (switches and name not in matched)
        ]
    columns = [METHOD] if named else []
    columns += [Column(key=key, header=_short(key), numeric=False) for key in settings]
    columns += [FOLDS] if said_folds else []
    columns += [Column(key=PARAMETERS, header="Parameters")] if counted else []
    columns += metric_columns(summary, metrics, over=ours(summary) if beside or not paper else None)
    if paper and beside:
        columns += [Column(key=f"paper_{PARAMETERS}", header="Parameters", over=paper.name)] if they_count else []
        columns += [
            Column(key=f"paper_{column.key}", header=column.header, over=paper.name)
            for column in metric_columns(summary, metrics)
        ]
    return Table(
        name="ablation",
        caption=summary["title"],
        columns=tuple(columns),
        rows=tuple(rows),
        notes=tuple(_ablation_notes(summary, paper, beside)),
    )


def _ablation_notes(summary: Summary, paper: PublishedTable | None, beside: bool) -> list[str]:
    notes = ["Mean ± SD over folds.", bold_note(summary, across=turned(summary))]
    if paper and beside:
        notes.append(f"{paper.name}: {paper.printed}, not computed here: {paper.citation}.")
    elif paper:
        notes.append(f"The paper's figures were not computed here: {paper.citation}.")
    return notes


def turned_table(
    summary: Summary,
    *,
    name: str,
    caption: str,
    metrics: list[str],
    paper: PublishedTable | None,
    notes: list[str],
    settings: Sequence[str] = (),
) -> Table:
    """A row a metric by task, a column an entry, then the paper's. settings: that stand above the metrics."""
    entries: list[tuple[str, Summary, Line | None]] = [(line.label, line.arm, line) for line in lines(summary)]
    evaluated = {arm["arm"] for _, arm, _ in entries}
    # Without a complete fold, yet a column that is not there would not be missed.
    entries += [(arm["label"], arm, None) for arm in summary["arms"] if arm["arm"] not in evaluated]
    alone = entries[0][2] if len(entries) == 1 else None
    own = f"{ours(summary)}, mean{' ± SD' if summary['complete'] else ''} over folds"
    columns = [Column(key="metric", header="Metric", numeric=False)]
    columns += [
        Column(key=label, header=label, over=own, ranked=line is not None and line.ranked) for label, _, line in entries
    ]
    if alone:
        columns += [
            Column(key=f"ci95_{end}", header=end, over="95 % interval", ranked=False) for end in ("low", "high")
        ]
    quoted = paper.rows if paper else {}
    columns += [
        Column(key=f"paper_{said}", header=said, over=paper.heading, quoted=True)
        for said in quoted
        if paper is not None
    ]

    empty: list[Value] = ["", ""] if alone else []
    rows = [
        Row(
            values=(
                _short(key),
                *(_setting(arm["settings"][key]) for _, arm, _ in entries),
                *empty,
                *(_setting(figures[key]) if key in figures else "" for figures in quoted.values()),
            ),
            group="Settings",
        )
        for key in settings
    ]
    if not same_folds(summary):
        counts = (folds_count(arm) for _, arm, _ in entries)
        rows.append(Row(values=("Folds", *counts, *empty, *[""] * len(quoted))))
    for column in sorted(metric_columns(summary, metrics), key=lambda column: column.over):
        rows.append(
            Row(
                values=(
                    column.header,
                    *(figure(line.figures()[column.key]) if line else Number(None) for _, _, line in entries),
                    *(_interval_of(alone, column.key) if alone else ()),
                    *(printed(paper, figures, [column.key])[0] for figures in quoted.values() if paper),
                ),
                group=column.over,
                better=column.better,
            )
        )
    return Table(name=name, caption=caption, columns=tuple(columns), rows=tuple(rows), notes=tuple(notes))


def _interval_of(line: Line, metric: str) -> tuple[Number, Number]:
    """Of a label metric of all images together, and of the mean over images of another."""
    labels = line.arm["labels"][line.source] or {}
    found = labels.get(metric) if metric in LABEL_METRICS else line.figures()[metric]
    return bounds(found or {})


def _ablation_metrics(summary: Summary, settings: list[str]) -> list[str]:
    """What the paper's table of these rows prints, whatever its dataset; else what is tested, and of labels all."""
    shown = summary["shown_metrics"]
    tables = [table for arm in summary["arms"] for table in tables_of(arm["model"], "ablation")]
    shapes = [table for table in tables if _by_row(summary, table, settings)]
    shape = [metric for metric in (shapes[0].metrics if shapes else ()) if metric in shown]
    return shape or [metric for metric in shown if metric in LABEL_METRICS or metric in summary["tested_metrics"]]


def _by_row(summary: Summary, paper: PublishedTable | None, settings: list[str]) -> dict[str, str]:
    """Our arm → the paper's row that names it, or else has the same settings; one that neither states is the same."""
    found = {}
    for name, figures in paper.rows.items() if paper else ():
        for arm in summary["arms"]:
            stated = [key for key in settings if key in figures]
            alike = stated and all(figures.get(key) == arm["settings"][key] for key in settings)
            if figures.get("row") == arm["arm"] or alike:
                found[arm["arm"]] = name
    return found


def _count(of: Summary) -> str:
    """Its parameters."""
    return f"{of[PARAMETERS]:,}" if of.get(PARAMETERS) else "—"


def _setting(value: object) -> Value:
    return value if isinstance(value, bool) else "—" if value is None else str(value)


def _short(key: str) -> str:
    """`model.lfe` → LFE: papers name their parts in capitals; a longer name is left as it is written."""
    name = key.rpartition(".")[2]
    return name.upper() if len(name) <= 4 else name


def sources_table(summary: Summary) -> Table | None:
    """Every arm under every prompt source, where arms were evaluated under more than the one they are judged by."""
    if not several(summary) or all(len(arm["sources"]) < 2 for arm in summary["arms"]):
        return None
    counted = not same_folds(summary)
    shown = [source for arm in summary["arms"] for source in arm["sources"].values()]
    rows = [
        Row(
            values=(
                source["label"],
                *((folds_count(arm),) if counted else ()),
                *figures_of(arm["metrics"][name], summary["shown_metrics"]),
                *_source_test(arm["source_tests"].get(name, {})),
            ),
            group=arm["label"],
            ranked=not source["uses_ground_truth"],
        )
        for arm in summary["arms"]
        for name, source in arm["sources"].items()
    ]
    metric, tests = summary["headline_metric"], {"difference": "difference", "effect": "r", "p_holm": "p (Holm)"}
    over = f"{titled(metric)} vs headline"
    return Table(
        name="sources",
        caption="Every arm by prompt source",
        columns=(
            Column(key="source", header="Prompts", numeric=False),
            *((FOLDS,) if counted else ()),
            *metric_columns(summary),
            *(Column(key=f"{metric}_{key}", header=header, over=over) for key, header in tests.items()),
        ),
        rows=tuple(rows),
        notes=(
            "Mean ± SD over folds; of one arm the same weights, only the sentence differs.",
            f"Difference: of {titled(metric)} from the source that the arm is judged by, mean over images; r and p: "
            "paired Wilcoxon signed-rank test over images, its rank-biserial correlation, adjusted for all tests of "
            "this table.",
            bold_note(summary, shown),
        ),
    )


def _source_test(test: Summary) -> tuple[Number, Number, Number]:
    effect = Number(test.get("effect"), decimals=2)
    return Number(test.get("mean")), effect, Number(test.get("p_holm"), is_p=True)


def classes_of(summary: Summary) -> list[str]:
    """Mask classes that some arm was measured by, in their order; none where there is but one."""
    return list(dict.fromkeys(name for arm in summary["arms"] for name in arm["mask_classes"]))


def classes_table(summary: Summary) -> Table | None:
    """Mean ± SD over fold means of each entry for each mask class by itself; the paper's table below each."""
    entries, classes = lines(summary), classes_of(summary)
    metrics = [metric for metric in summary["shown_metrics"] if metric in IMAGE_METRICS]
    if not classes or not metrics:
        return None
    paper = published(summary, "by_class")
    counted = not same_folds(summary)
    rows = []
    for name in classes:
        rows += [
            Row(
                values=(
                    line.label,
                    *((folds_count(line.arm),) if counted else ()),
                    *(figure(found[metric]) if metric in found else Number(None) for metric in metrics),
                ),
                group=f"{name}: {_headline_group(summary)}",
                ranked=line.ranked,
            )
            for line in entries
            for found in [line.arm["by_class"][line.source].get(name, {})]
        ]
        if paper:
            rows += [
                Row(
                    values=(method, *(("—",) if counted else ()), *printed(paper, figures.get(name, {}), metrics)),
                    group=f"{name}: {paper.heading}",
                    quoted=True,
                )
                for method, figures in paper.rows.items()
            ]
    return Table(
        name="classes",
        caption=f"Results by mask class at {_threshold(summary)} on validation images",
        columns=(METHOD, *((FOLDS,) if counted else ()), *metric_columns(summary, metrics, over="")),
        rows=tuple(rows),
        notes=tuple(_class_notes(summary, classes, metrics, paper)),
    )


def _class_notes(
    summary: Summary, classes: list[str], metrics: list[str], paper: PublishedTable | None
) -> t.Iterator[str]:
    yield from lower_is_better(metrics)
    for name in classes:
        of_class = [(line.arm, line.arm["by_class"][line.source].get(name, {})) for line in lines(summary)]
        yield from (f"{name}: {said}" for said in _coverage(metrics, of_class, name))
    if not summary["complete"]:
        yield "Folds are missing: there these are means over the complete ones only, without SD, and no final result."
    if paper:
        yield f"The paper's rows were not computed here: {paper.citation}."
    yield bold_note(summary)


def folds_table(summary: Summary, with_paper: bool = True) -> Table:
    """One row a fold of each entry, missing folds named, then their mean; the paper's fold-wise table below."""
    rows: list[Row] = []
    seen = []
    for line in lines(summary):
        seen.append(line.arm["arm"])
        rows += _fold_rows(summary, line.arm, line, f"{ours(summary)}, {line.label}")
    for arm in summary["arms"]:
        if arm["arm"] not in seen:  # without a complete fold, yet the missing ones must be listed
            group = f"{ours(summary)}, {arm['label']}" if several(summary) else ours(summary)
            rows += _fold_rows(summary, arm, None, group)
    notes = ["Every figure is the mean over the validation images of that fold."]
    if any(arm["complete"] and arm["folds"]["expected"] > 1 for arm in summary["arms"]):
        notes.append("SD is the sample SD over folds (ddof=1).")
    paper = published(summary, "fold_wise") if with_paper else None
    if paper:
        rows += [
            Row(
                values=(name, "—", *printed(paper, figures, summary["shown_metrics"])),
                group=paper.heading,
                strong=name == "Mean",
                quoted=True,
            )
            for name, figures in paper.rows.items()
        ]
        notes.append(f"The paper's mean row is its own. {_same_folds(summary)}")
    if not summary["complete"]:
        notes.append("Missing folds are named and not averaged in.")
    phrases = {folds_phrase(arm) for arm in summary["arms"]}
    return Table(
        name="folds",
        caption=f"Results by fold ({phrases.pop()})" if len(phrases) == 1 else "Results by fold",
        columns=(
            Column(key="fold", header="Fold", numeric=False),
            Column(key="images", header="Images"),
            *metric_columns(summary, ranked=False),
        ),
        rows=tuple(rows),
        notes=tuple(notes),
    )


def _fold_rows(summary: Summary, arm: Summary, line: Line | None, group: str) -> list[Row]:
    folds, metrics = arm["folds"], summary["shown_metrics"]
    missing = {entry["fold"] for entry in folds["missing"]}
    figures = line.figures() if line else {}
    rows = []
    for fold in sorted({*folds["complete"], *missing}):
        if fold in missing:
            rows.append(Row(values=(f"{fold} (missing)", "—", *(Number(None) for _ in metrics)), group=group))
        else:
            values = (Number(figures[metric]["per_fold"][str(fold)]) for metric in metrics)
            rows.append(Row(values=(str(fold), arm["images"][str(fold)], *values), group=group))
    if line is not None:
        mean = "Mean" if arm["complete"] else f"Mean over {folds_phrase(arm)}"
        means = (Number(figure(figures[metric]).value) for metric in metrics)
        rows.append(Row(values=(mean, sum(arm["images"].values()), *means), group=group, strong=True))
        if any(figures[metric]["sd"] is not None for metric in metrics):
            sds = (Number(figures[metric]["sd"]) for metric in metrics)
            rows.append(Row(values=("SD", "—", *sds), group=group))
    return rows


def _same_folds(summary: Summary) -> str:
    if summary["folds_source"] == "published":
        return "This run used the folds that the paper's authors published, so rows can be compared one by one."
    return "This run used folds of its own, so only the means can be compared, not fold with fold."


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
                *(value for name in counts[0] for value in figures_of(line.arm["strata"][line.source][name], metrics)),
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
                    *(value for name in counts[0] for value in printed(paper, strata.get(name, {}), metrics)),
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


def calibration_table(summary: Summary) -> Table | None:
    """Expected calibration error of each entry whose folds were all evaluated with bins."""
    entries = [(line, line.arm["calibration"][line.source]) for line in lines(summary) if is_calibrated(line)]
    if not entries:
        return None
    rows = [
        Row(
            values=(
                line.label,
                folds_count(line.arm),
                figure(found["ece"]),
                Number(found["mean_probability"]),
                Number(found["lesion_share"]),
                found["pixels"],
            ),
            ranked=line.ranked,
        )
        for line, found in entries
    ]
    return Table(
        name="calibration",
        caption="Calibration of the predicted probabilities, over pixels",
        columns=(
            METHOD,
            FOLDS,
            Column(key="ece", header="ECE", better="low"),
            Column(key="mean_probability", header="Mean probability"),
            Column(key="lesion_share", header="Share of lesion pixels"),
            Column(key="pixels", header="Pixels"),
        ),
        rows=tuple(rows),
        notes=(
            "ECE: expected calibration error over 15 equal bins of the predicted probability, mean ± SD over folds. "
            "Most pixels are background, on which every model is sure and right, so it is small; compare arms with it.",
            "A mean probability above the share of lesion pixels means that too much is called lesion.",
            bold_note(summary),
        ),
    )


def is_calibrated(line: Line) -> bool:
    """Whether the bins of this entry are there."""
    return bool(line.arm["calibration"]) and line.source in line.arm["calibration"]


def difference_table(summary: Summary) -> Table | None:
    """Oracle minus first pass, paired by image, of a run of one arm."""
    arm = summary["arms"][0]
    found = arm["difference"]
    if found is None or several(summary):
        return None
    metrics = [metric for metric in summary["shown_metrics"] if metric in found]
    rows = [
        Row(values=(titled(metric), Number(figure(found[metric]).value), *bounds(found[metric]))) for metric in metrics
    ]
    helped = [
        f"{said} {listed(names)}"
        for said, names in (
            ("Positive", [titled(metric) for metric in metrics if METRICS[metric].more_is_better]),
            ("negative", [titled(metric) for metric in metrics if not METRICS[metric].more_is_better]),
        )
        if names
    ]
    return Table(
        name="difference",
        caption=f"{arm['sources']['oracle']['label']} minus first_pass, paired by image ({folds_phrase(arm)})",
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
            f"{', '.join(helped)}: the ground-truth prompt helped. An interval that contains "
            "zero leaves open whether it did.",
        ),
    )
