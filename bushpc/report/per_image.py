"""`per_image.csv` and `calibration.csv` of one cell → checked frames; values that cannot be are errors."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from bushpc.errors import DataError
from bushpc.metrics.registry import ALWAYS, IMAGE_METRICS, metric_of_counts
from bushpc.sample import LABELS

_TEXT_COLUMNS = ("key", "patient", "label", "prompts", "spatial_prompt", "attribute_prompt")
_COUNT_COLUMNS = ("fold", "tp", "fp", "fn", "tn", "length_px")
_COLUMNS = (*_TEXT_COLUMNS, *ALWAYS, *_COUNT_COLUMNS)
PROB_COLUMNS = tuple(f"prob_{label}" for label in LABELS)  # of models that tell labels apart
_CALIBRATION_COLUMNS = ("prompts", "bin", "low", "high", "pixels", "prob_sum", "lesion_pixels")
_EVALUATE_AGAIN = "Delete the file and its cell's DONE, then run the same command again: only the evaluation is redone."


def of_class(metric: str, mask_class: str) -> str:
    """The column of an image metric that holds it for one mask class alone."""
    return f"{metric}:{mask_class}"


def read_per_image(path: Path, fold: int, variants: Iterable[str]) -> pd.DataFrame:
    """The per-image results of one cell, evaluated under some of `variants`.

    Raises: DataError with file, row and key on the first thing wrong.
    """
    # All as text first: pandas would turn key "001" into 1, and an empty prompt or a lesion called "NA" into NaN.
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a readable CSV file ({error}). {_EVALUATE_AGAIN}") from error
    missing = [column for column in _COLUMNS if column not in frame.columns]
    if missing:
        raise DataError(f"{path}: no column {', '.join(missing)}; it needs {', '.join(_COLUMNS)}. {_EVALUATE_AGAIN}")
    if frame.empty:
        raise DataError(f"{path} has a header but no rows. {_EVALUATE_AGAIN}")
    for column in _COUNT_COLUMNS:
        numbers = pd.to_numeric(frame[column], errors="coerce")
        _refuse(path, frame, ~((numbers >= 0) & (numbers % 1 == 0)), f"{column} is not a count")
        frame[column] = numbers.astype(int)
    _add_metrics_of_counts(frame)
    no_lesion, no_background = frame["tp"] + frame["fn"] == 0, frame["fp"] + frame["tn"] == 0
    for column, metric in IMAGE_METRICS.items():
        undefined = {"dice": no_lesion, "iou": no_lesion, "fnr": no_lesion, "fpr": no_background}.get(column)
        _read_numbers(path, frame, column, metric.low, metric.high, undefined)
    for column in frame.columns:
        name, of_one_class, _ = column.partition(":")
        if of_one_class and name in IMAGE_METRICS:
            _read_numbers(path, frame, column, IMAGE_METRICS[name].low, IMAGE_METRICS[name].high, None)
    for column in PROB_COLUMNS:
        _read_numbers(path, frame, column, 0, 1, None)
    _refuse(path, frame, frame["fold"] != fold, f"the row is not of fold {fold}, whose cell this is")
    _refuse(path, frame, ~frame["prompts"].isin(list(variants)), f"prompts is none of {', '.join(variants)}")
    _refuse(path, frame, frame.duplicated(["key", "prompts"]), "the same key and prompts stand in an earlier row")
    _refuse_uneven_sources(path, frame)
    return frame


def _add_metrics_of_counts(frame: pd.DataFrame) -> None:
    """What follows from the counts of pixels, where the evaluation did not write it. Of several mask classes the counts
    are sums, which say nothing of each.
    """
    if any(":" in column for column in frame.columns):
        return
    made = frame["fpr"].str.lower() != "nan"  # else no mask was predicted
    for name, metric in IMAGE_METRICS.items():
        if metric.from_counts and name not in frame.columns:
            values = metric_of_counts(name, *(frame[count].to_numpy() for count in ("tp", "fp", "fn", "tn")))
            frame[name] = pd.Series(values, frame.index).where(made).map(repr)


def _read_numbers(
    path: Path, frame: pd.DataFrame, column: str, low: float, high: float, may_be_nan: pd.Series | None
) -> None:
    """Turn a column into floats from low to high; one that the file lacks into NaN. may_be_nan: None for all rows."""
    if column not in frame.columns:
        frame[column] = math.nan
        return
    numbers = pd.to_numeric(frame[column], errors="coerce")
    finite = numbers.between(low, high) & (numbers < math.inf)
    is_nan = frame[column].str.lower() == "nan"
    if may_be_nan is not None:
        is_nan &= may_be_nan
    allowed = "a number from 0 to 1" if high == 1 else "a number of 0 or more"
    _refuse(path, frame, ~(finite | is_nan), f"{column} is not {allowed}")
    frame[column] = numbers.astype(float)


def read_calibration(path: Path) -> pd.DataFrame | None:
    """Bins of the predicted probability with their pixels; None where the evaluation wrote none."""
    if not path.is_file():
        return None
    try:
        frame = pd.read_csv(path)
        missing = [column for column in _CALIBRATION_COLUMNS if column not in frame.columns]
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a readable CSV file ({error}). {_EVALUATE_AGAIN}") from error
    if missing:
        raise DataError(f"{path}: no column {', '.join(missing)}. {_EVALUATE_AGAIN}")
    numbers = frame[["low", "high", "pixels", "prob_sum", "lesion_pixels"]].apply(pd.to_numeric, errors="coerce")
    _refuse_bins(path, ~(numbers >= 0).all(axis=1))
    _refuse_bins(path, numbers[["prob_sum", "lesion_pixels"]].max(axis=1) > numbers["pixels"] * (1 + 1e-6))
    return frame.assign(**numbers)


def _refuse_bins(path: Path, wrong: pd.Series) -> None:
    if wrong.any():
        raise DataError(
            f"{path}, row {int(wrong.to_numpy().argmax()) + 2}: pixels, prob_sum and lesion_pixels are no counts of "
            f"one bin. {_EVALUATE_AGAIN}"
        )


def _refuse(path: Path, frame: pd.DataFrame, wrong: pd.Series, what: str) -> None:
    """Raise with the line of the file (the header is line 1) if any row is wrong."""
    if wrong.any():
        at = int(wrong.to_numpy().argmax())
        row = ", ".join(f"{name}={frame[name].iloc[at]!r}" for name in ("key", "prompts", "fold", *ALWAYS))
        raise DataError(f"{path}, row {at + 2}: {what} ({row}). {_EVALUATE_AGAIN}")


def _refuse_uneven_sources(path: Path, frame: pd.DataFrame) -> None:
    """Sources are compared image by image, so each must hold the same images."""
    counts = frame.groupby("key")["prompts"].nunique()
    uneven = counts.index[counts < frame["prompts"].nunique()]
    if len(uneven):
        raise DataError(f"{path}: key {uneven[0]!r} lacks a row of some prompt source. {_EVALUATE_AGAIN}")
