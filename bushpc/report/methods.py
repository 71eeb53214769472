"""A run → text for the paper about it: a paragraph on methods, and the CLAIM checklist as far as the run knows it."""

from __future__ import annotations

import typing as t
from dataclasses import dataclass

from bushpc.config import AugmentConfig, as_word
from bushpc.config.fields import Settings, fields_of
from bushpc.report.references import datasets
from bushpc.report.scope import ReportScope
from bushpc.report.summary import Summary
from bushpc.report.table import Column, RowData, Table
from bushpc.report.tables.common import listed, titled

OPEN = "for you to state"


def methods(scope: ReportScope, summary: Summary) -> str:
    """A paragraph in plain text. Settings are those of the baseline; the report has a table of what differs."""
    settings = _settings(scope)
    versions = scope.runs[0].record.versions
    sentences = [
        _data(scope, summary),
        _training(scope, settings),
        _evaluation(summary, settings),
        _tests(summary),
        f"We used bushpc {versions.get('bushpc', '(version unknown)')}"
        + (f" at commit {scope.runs[0].record.commit}" if scope.runs[0].record.commit else "")
        + (f", torch {versions['torch']}" if "torch" in versions else "")
        + (f" and Python {versions['python']}" if "python" in versions else "")
        + ".",
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def _settings(scope: ReportScope) -> dict[str, t.Any]:
    return next((cell.settings for cell in scope.baseline.cells if cell.settings), {})


def _data(scope: ReportScope, summary: Summary) -> str:
    card = datasets(scope).get(scope.runs[0].record.data)
    title = card.title if card else scope.runs[0].record.data
    arm = summary.arms[0]
    images = sum(arm.images.values())
    split = f"{arm.folds.expected}-fold cross-validation" if arm.folds.expected > 1 else "a single split"
    counted = f", {images} scans validated" if images else ""
    return f"Data: {title}, {split} with folds “{summary.folds_source}” ({_disjoint(summary)}){counted}."


def _disjoint(summary: Summary) -> str:
    own = summary.folds_source in ("frozen", "grouped")
    return "all scans of a patient in one fold" if own else "as published"


def _training(scope: ReportScope, settings: t.Mapping[str, t.Any]) -> str:
    if not settings:
        return ""
    models = listed(list(dict.fromkeys(arm.model for arm in scope.arms)))
    if scope.baseline.model.startswith("nnunet"):
        return f"Models: {models}; nnU-Net planned and trained by itself."
    length = (
        f"{settings['train.epochs']} epochs"
        if settings.get("train.epochs")
        else f"{settings.get('train.iterations')} steps"
    )
    changes = [
        name for name in fields_of(AugmentConfig) if settings.get(f"augment.{name}") and _is_off(AugmentConfig, name)
    ]
    parts = [
        f"{length} of {settings.get('train.batch_size')} scans",
        f"AdamW with a peak learning rate of {as_word(settings.get('train.lr'))}, weight decay "
        f"{as_word(settings.get('train.weight_decay'))} and a {settings.get('train.schedule')} schedule",
        f"{settings.get('engine.precision')} precision, seed {settings.get('seed')}",
        f"augmentation: {listed(changes)}" if changes else "no augmentation",
        "from pretrained weights" if settings.get("model.pretrained") else "from random weights",
    ]
    size = settings.get("model.image_size")
    start = f"Models: {models}" + (f", on squares of {size} pixels" if size else "")
    return f"{start}. Each fold of the baseline trained {'; '.join(parts)}."


def _is_off(cls: type[Settings], name: str) -> bool:
    """Whether a setting of augmentation does nothing by default, as probabilities and largest changes do."""
    default = cls.default(name)
    return isinstance(default, float) and default == 0.0


def _evaluation(summary: Summary, settings: t.Mapping[str, t.Any]) -> str:
    shown = listed([titled(name) for name in summary.shown_metrics])
    way = settings.get("evaluate.tta", "none")
    tta = "no test-time augmentation" if way == "none" else f"test-time augmentation ({way})"
    threshold = settings.get("evaluate.threshold")
    cut = f" at a threshold of {threshold:g}" if isinstance(threshold, float) and summary.tested_metrics else ""
    return (
        f"Each scan was judged by the model of the fold that did not train on it{cut}, with {tta}: {shown}."
        if shown
        else ""
    )


def _tests(summary: Summary) -> str:
    intervals = "Intervals of means are 95 % percentile bootstraps over patients."
    if summary.comparisons:
        intervals += (
            f" Arms were compared with {summary.comparisons.against} by two-sided paired Wilcoxon signed-rank tests "
            "over scans and by Nadeau and Bengio's corrected resampled t-test over folds, p values Holm-corrected."
        )
    if summary.label_comparisons:
        intervals += " AUCs were compared by DeLong's test with patients as the unit, labels by McNemar's test."
    if summary.friedman:
        intervals += " All arms together were compared by Friedman's test with Nemenyi's post-hoc test."
    return intervals


@dataclass(frozen=True, kw_only=True)
class ClaimItem(RowData):
    number: int
    topic: str
    answer: str


def claim_table(scope: ReportScope, summary: Summary) -> Table:
    """The items of CLAIM (Mongan, Moy and Kahn 2020) by number: what is known, and what only the authors can."""
    known = _known(scope, summary)
    topics = {number: topic for topic, numbers in _TOPICS.items() for number in numbers}
    rows = [ClaimItem(number=n, topic=topics[n], answer=known.get(n) or OPEN) for n in sorted(topics)]
    columns = (
        Column(key="item", header="Item", of=lambda row: row.number),
        Column(key="topic", header="Subject", numeric=False, of=lambda row: row.topic),
        Column(key="answer", header="What is known", numeric=False, of=lambda row: row.answer),
    )
    note = "Numbers of the items are those of CLAIM 2020 (doi 10.1148/ryai.2020200029), which has their wording."
    return Table.of("claim", "CLAIM checklist, filled in as far as the files tell", columns, rows, [note])


_TOPICS: dict[str, tuple[int, ...]] = {
    "title and abstract": (1, 2),
    "background and aims": (3, 4),
    "study design and goal": (5, 6),
    "where the data are from": (7,),
    "who was included": (8,),
    "preprocessing": (9,),
    "chosen subset of the data": (10,),
    "meaning of the variables": (11,),
    "de-identification": (12,),
    "missing data": (13,),
    "what the reference standard is, and why": (14, 15),
    "who annotated, and with which tools": (16, 17),
    "how much annotators differ": (18,),
    "sample size and its reason": (19,),
    "how data were split": (20,),
    "at which level the parts are disjoint": (21,),
    "the model": (22,),
    "software": (23,),
    "initial weights": (24,),
    "training": (25,),
    "how the final model was chosen": (26,),
    "ensembles": (27,),
    "metrics": (28,),
    "tests and uncertainty": (29,),
    "robustness": (30,),
    "explanation of predictions": (31,),
    "test on external data": (32,),
    "numbers of patients and scans": (33,),
    "demographics": (34,),
    "results of the best model": (35,),
    "accuracy with its precision": (36,),
    "analysis of failures": (37,),
    "limitations and use in practice": (38, 39),
    "registration, protocol, funding": (40, 41, 42),
}


def _known(scope: ReportScope, summary: Summary) -> dict[int, str]:
    settings, run = _settings(scope), scope.runs[0].record
    cards, arm = datasets(scope), summary.arms[0]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(run.versions.items()))
    size = settings.get("model.image_size")
    weights = settings.get("model.weights") or ("published weights" if settings.get("model.pretrained") else "random")
    return {
        7: "; ".join(f"{card.title}: {' '.join(card.citation.split())}" for card in cards.values()),
        9: f"resized to squares of {size} pixels" if size else "",
        19: f"{sum(arm.images.values())} scans validated; {OPEN}: the reason" if arm.images else "",
        20: f"{arm.folds.expected} folds, “{summary.folds_source}”; SHA-256 in the provenance",
        21: _disjoint(summary),
        22: f"{listed(list(dict.fromkeys(each.model for each in summary.arms)))}"
        + (f"; {arm.parameters:,} parameters of {arm.label}" if arm.parameters else ""),
        23: versions,
        24: f"baseline: {weights}" if settings else "",
        25: _training(scope, settings),
        26: "the last step's weights; no fold was chosen on its own validation part"
        if settings and not settings.get("train.keep_best")
        else "",
        27: "none in cross-validation: each scan has one model",
        28: listed([titled(name) for name in summary.shown_metrics]),
        29: _tests(summary),
        31: "Grad-CAM maps of a few scans" if settings.get("evaluate.explain") else "",
        32: listed(summary.external) if summary.external else "none",
        33: f"{sum(arm.images.values())} scans" if arm.images else "",
        35: "the table “Overall”",
        36: "the intervals of that table",
        37: "best, median and worst scans; strata by lesion size" if scope.segments else "",
    }
