"""Tables of what was measured: overall, by switch, by prompt source, by fold, by lesion size, calibration."""

from __future__ import annotations

from bushpc.report.content.common import (
    FOLDS,
    METHOD,
    METRIC_COLUMNS,
    UNRANKED_METRIC_COLUMNS,
    Line,
    Summary,
    bold_note,
    bounds,
    figure,
    folds_count,
    folds_phrase,
    lines,
    ours,
    printed,
    published,
    same_folds,
    several,
)
from bushpc.report.published import PublishedTable
from bushpc.report.results import METRICS
from bushpc.report.tables import Column, Number, Row, Table, Value

_EN_DASH = "\u2013"


def headline_table(summary: Summary) -> Table | None:
    """Mean ± SD over fold means for each entry with its interval, p and effect size; the paper's table below."""
    entries = lines(summary)
    if not entries:
        return None
    counted = not same_folds(summary)
    tests = _tests(summary)
    rows = []
    for line in entries:
        figures = line.figures()
        test = tests.get(line.label, {})
        rows.append(
            Row(
                values=(
                    line.label,
                    *((folds_count(line.arm),) if counted else ()),
                    *(figure(figures[metric]) for metric in METRICS),
                    *bounds(figures["dice"]),
                    *((Number(test.get("effect"), decimals=2), Number(test.get("p_holm"), is_p=True)) if tests else ()),
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
    paper = published(summary, "overall")
    if paper:
        rows += [
            Row(
                values=(
                    name,
                    *(("—",) if counted else ()),
                    *printed(figures, paper.decimals),
                    *[Number(None)] * (empty - 5 - counted),
                ),
                group=paper.heading,
                quoted=True,
            )
            for name, figures in paper.rows.items()
        ]
    columns = [METHOD, *((FOLDS,) if counted else ()), *METRIC_COLUMNS]
    columns += [
        Column(key="dice_ci95_low", header="low", over="Dice, 95 % interval"),
        Column(key="dice_ci95_high", header="high", over="Dice, 95 % interval"),
    ]
    if tests:
        columns += [
            Column(key="dice_effect", header="r", over="Dice vs baseline"),
            Column(key="dice_p_holm", header="p (Holm)", over="Dice vs baseline"),
        ]
    return Table(
        name="headline",
        caption=f"Segmentation at {_threshold(summary)} on validation images",
        columns=tuple(columns),
        rows=tuple(rows),
        notes=tuple(_headline_notes(summary, paper)),
    )


def overview_table(summary: Summary) -> Table | None:
    """The same for a terminal, which has no room for every column; None for one arm, whose folds are shown there."""
    if not several(summary):
        return None
    tests = _tests(summary)
    rows = [
        Row(
            values=(
                line.label,
                folds_count(line.arm),
                *(figure(line.figures()[metric]) for metric in ("dice", "iou")),
                Number(tests.get(line.label, {}).get("p_holm"), is_p=True),
            ),
            ranked=line.ranked,
        )
        for line in lines(summary)
    ]
    return Table(
        name="overview",
        caption=f"{summary['title']}: mean ± SD over folds; p (Holm) of Dice against {_against(summary)}",
        columns=(METHOD, FOLDS, *METRIC_COLUMNS[:2], Column(key="p", header="p")),
        rows=tuple(rows),
    )


def _against(summary: Summary) -> str:
    found = summary["comparisons"]
    return found["against"] if found else "the baseline"


def _tests(summary: Summary) -> dict[str, Summary]:
    """Label of an entry → its Dice against the baseline, image by image."""
    found = summary["comparisons"]
    return {row["label"]: row["metrics"]["dice"]["images"] for row in found["rows"]} if found else {}


def _headline_group(summary: Summary) -> str:
    if not same_folds(summary):
        return f"{ours(summary)}, mean ± SD over folds"
    arm = summary["arms"][0]
    return f"{ours(summary)}, mean {'± SD ' if arm['complete'] else ''}over {folds_phrase(arm)}"


def _threshold(summary: Summary) -> str:
    found = {arm["threshold"] for arm in summary["arms"]}
    return f"threshold {found.pop():g}" if len(found) == 1 else "each arm's own threshold"


def _headline_notes(summary: Summary, paper: PublishedTable | None) -> list[str]:
    notes = ["FPR and FNR: lower is better."]
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
    notes.append("95 % interval: of the mean over images, percentile bootstrap over patients.")
    if summary["comparisons"]:
        notes.append(
            f"Baseline: {summary['comparisons']['against']}. Effect size r and p: paired Wilcoxon signed-rank test "
            "over images, see the comparisons."
        )
    if paper:
        notes.append(f"The paper's rows were not computed here: {paper.citation}.")
    return [*notes, bold_note(summary)]


def ablation_table(summary: Summary) -> Table | None:
    """A grid's rows by what they switch or set, in the shape of XBusNet's Table 4, the paper's figures beside."""
    settings = list(summary["arms"][0]["settings"])
    if summary["kind"] != "grid" or not settings:
        return None
    paper = published(summary, "ablation")
    theirs = _by_switches(paper, settings)
    paper = paper if theirs else None
    switches = all(isinstance(arm["settings"][key], bool) for arm in summary["arms"] for key in settings)
    own = {line.arm["arm"]: line for line in lines(summary)}
    rows = []
    for arm in summary["arms"]:
        line = own.get(arm["arm"])
        quoted = theirs.get(tuple(arm["settings"].values()))
        rows.append(
            Row(
                values=(
                    *(() if switches else (arm["label"],)),
                    *(_setting(arm["settings"][key]) for key in settings),
                    folds_count(arm),
                    *(figure(line.figures()[m]) if line else Number(None) for m in ("dice", "iou")),
                    *(_quoted(quoted, paper)),
                ),
                ranked=bool(line and line.ranked),
            )
        )
    rows += [
        Row(values=(*key, "—", Number(None), Number(None), *_quoted(figures, paper)), ranked=False, quoted=True)
        for key, figures in theirs.items()
        if switches and key not in {tuple(arm["settings"].values()) for arm in summary["arms"]}
    ]
    columns = [*(() if switches else (METHOD,))]
    columns += [Column(key=key, header=_short(key), numeric=False) for key in settings]
    columns += [
        FOLDS,
        *(Column(key=c.key, header=c.header, over=ours(summary), better="high") for c in METRIC_COLUMNS[:2]),
    ]
    notes = [
        "Mean ± SD over folds.",
        bold_note(summary),
    ]
    if paper:
        columns += [Column(key=f"paper_{c.key}", header=c.header, over=paper.name) for c in METRIC_COLUMNS[:2]]
        notes.append(f"{paper.name}: figures as printed there, not computed here: {paper.citation}.")
    return Table(
        name="ablation",
        caption=summary["title"],
        columns=tuple(columns),
        rows=tuple(rows),
        notes=tuple(notes),
    )


def _by_switches(paper: PublishedTable | None, settings: list[str]) -> dict[tuple[Value, ...], Summary]:
    """The paper's rows by their switches; none where it switches something else."""
    if paper is None or not all(key in figures for figures in paper.rows.values() for key in settings):
        return {}
    return {tuple(figures[key] for key in settings): figures for figures in paper.rows.values()}


def _quoted(figures: Summary | None, paper: PublishedTable | None) -> list[Value]:
    if paper is None:
        return []
    return [Number(figures[m] if figures else None, decimals=paper.decimals) for m in ("dice", "iou")]


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
                *(figure(arm["metrics"][name][metric]) for metric in METRICS),
                *_source_test(arm["source_tests"].get(name, {})),
            ),
            group=arm["label"],
            ranked=not source["uses_ground_truth"],
        )
        for arm in summary["arms"]
        for name, source in arm["sources"].items()
    ]
    over, tests = "Dice vs headline", {"difference": "difference", "effect": "r", "p_holm": "p (Holm)"}
    return Table(
        name="sources",
        caption="Every arm by prompt source",
        columns=(
            Column(key="source", header="Prompts", numeric=False),
            *((FOLDS,) if counted else ()),
            *METRIC_COLUMNS,
            *(Column(key=f"dice_{key}", header=header, over=over) for key, header in tests.items()),
        ),
        rows=tuple(rows),
        notes=(
            "Mean ± SD over folds; of one arm the same weights, only the sentence differs.",
            "Difference: of Dice from the source that the arm is judged by, mean over images; r and p: paired Wilcoxon "
            "signed-rank test over images, its rank-biserial correlation, adjusted for all tests of this table.",
            bold_note(summary, shown),
        ),
    )


def _source_test(test: Summary) -> tuple[Number, Number, Number]:
    effect = Number(test.get("effect"), decimals=2)
    return Number(test.get("mean")), effect, Number(test.get("p_holm"), is_p=True)


def folds_table(summary: Summary, with_paper: bool = True) -> Table:
    """One row a fold of each entry, missing folds named, then their mean; the paper's fold-wise table below."""
    rows: list[Row] = []
    seen = []
    for line in lines(summary):
        seen.append(line.arm["arm"])
        rows += _fold_rows(line.arm, line, f"{ours(summary)}, {line.label}")
    for arm in summary["arms"]:
        if arm["arm"] not in seen:  # without a complete fold, yet the missing ones must be listed
            rows += _fold_rows(arm, None, f"{ours(summary)}, {arm['label']}" if several(summary) else ours(summary))
    notes = ["Every figure is the mean over the validation images of that fold."]
    if any(arm["complete"] and arm["folds"]["expected"] > 1 for arm in summary["arms"]):
        notes.append("SD is the sample SD over folds (ddof=1).")
    paper = published(summary, "fold_wise") if with_paper else None
    if paper:
        rows += [
            Row(
                values=(name, "—", *printed(figures, paper.decimals)),
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
            *UNRANKED_METRIC_COLUMNS,
        ),
        rows=tuple(rows),
        notes=tuple(notes),
    )


def _fold_rows(arm: Summary, line: Line | None, group: str) -> list[Row]:
    folds = arm["folds"]
    missing = {entry["fold"] for entry in folds["missing"]}
    figures = line.figures() if line else {}
    rows = []
    for fold in sorted({*folds["complete"], *missing}):
        if fold in missing:
            rows.append(Row(values=(f"{fold} (missing)", "—", *(Number(None) for _ in METRICS)), group=group))
        else:
            values = (Number(figures[metric]["per_fold"][str(fold)]) for metric in METRICS)
            rows.append(Row(values=(str(fold), arm["images"][str(fold)], *values), group=group))
    if line is not None:
        mean = "Mean" if arm["complete"] else f"Mean over {folds_phrase(arm)}"
        means = (Number(figure(figures[metric]).value) for metric in METRICS)
        rows.append(Row(values=(mean, sum(arm["images"].values()), *means), group=group, strong=True))
        if figures["dice"]["sd"] is not None:
            sds = (Number(figures[metric]["sd"]) for metric in METRICS)
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
    for name, n in counts[0].items():
        over = f"{name.replace('-', _EN_DASH)} px" + (f" (n = {n})" if alike else "")
        columns += [
            Column(key=f"{name}_dice", header="Dice", over=over, better="high"),
            Column(key=f"{name}_iou", header="IoU", over=over, better="high"),
        ]
    if several(summary):
        group = f"{ours(summary)}, images of all complete folds together"
    else:
        group = f"{ours(summary)}, images of {folds_phrase(summary['arms'][0])} together"
    rows = [
        Row(
            values=(
                line.label,
                *(figure(line.arm["strata"][line.source][name][m]) for name in counts[0] for m in ("dice", "iou")),
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
                    *(Number(strata[name][m], decimals=paper.decimals) for name in counts[0] for m in ("dice", "iou")),
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
    rows = [
        Row(values=(column.header, Number(figure(found[column.key]).value), *bounds(found[column.key])))
        for column in METRIC_COLUMNS
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
            "Positive Dice and IoU, negative FPR and FNR: the ground-truth prompt helped. An interval that contains "
            "zero leaves open whether it did.",
        ),
    )
