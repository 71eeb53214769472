"""Images → masks and one CSV row each: `bushpc predict`. Whatever stops it, the same command does what is missing.

    OUT/predictions.csv    one row per image or frame, in rising order once all is done
    OUT/masks/…            0 and 255, at original size, in the input's own folder structure
    OUT/probabilities/…    with prob: 8 bits, 255 = certain lesion, as in a run's predictions/
    OUT/overlays/…         with overlay: the mask's contour on the image
    OUT/…                  with --as: the masks as DICOM SEG, NIfTI or COCO (`bushpc.evaluate.predict_output`)
    OUT/predict.json       what it was asked for: nothing else may go on in this folder

The pictures of `a.png` are called `a.png`, those of `a.jpg` are called `a.jpg.png`, those of a file with several frames
lie in a folder of its name.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import itertools
import json
import typing as t
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from bushpc.conditions import COLUMNS as CONDITION_COLUMNS
from bushpc.conditions import Known, kinds_for, read_table
from bushpc.errors import ConfigError, DataError
from bushpc.evaluate import dicom_seg, predict_output
from bushpc.evaluate.predict_output import MASKS, OVERLAYS, PROBABILITIES, UNCERTAINTY, Frame, Writer, picture
from bushpc.evaluate.predictor import Predictor, Result
from bushpc.files import exclusive, read_json, write_atomically
from bushpc.runs.chosen import PLAIN
from bushpc.sample import LABELS, pixel_size
from bushpc.shards.images import FORMATS, find_images, open_picture
from bushpc.shards.pictures import Ranges, survey

CSV_FILE, SETTINGS_FILE, LOCK_FILE = "predictions.csv", "predict.json", ".lock"
COLUMNS = (
    *("file", "frame", "frames", "status", "reason", "height", "width", "pixel_mm_x", "pixel_mm_y", "components"),
    *("area_px", "area_mm2", "long_axis_px", "long_axis_mm", "short_axis_px", "short_axis_mm"),
    *("centroid_x_px", "centroid_y_px", "centroid_x_mm", "centroid_y_mm", "mean_prob", "max_prob"),
    *("class", *(f"prob_{label}" for label in LABELS), *CONDITION_COLUMNS, "sha256"),
)
OK, REJECTED = "ok", "rejected"

LONGEST_NAME = 200  # bytes; what is written aside has a longer one, and 255 is the end

Row = dict[str, str]
# Told how many of how many files are done, and in words what else is worth saying.
Show = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What to write besides masks and CSV, and what is known about the images.

    prompts: a CSV, see `bushpc.conditions.known`. pixel_mm: of images that neither the CSV nor the file itself knows.
    batch_size: images per forward pass; None takes the model's own.
    formats: of the masks, besides PNG.
    grey_max: value of white in 16-bit and float pictures; None finds it (`bushpc.shards.pictures`).
    """

    prob: bool = False
    uncertainty: bool = False
    overlay: bool = False
    prompts: Path | None = None
    pixel_mm: float | None = None
    batch_size: int | None = None
    grey_max: float | None = None
    formats: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises: ConfigError for a number that cannot be."""
        if self.batch_size is not None and self.batch_size < 1:
            raise ConfigError(f"--batch {self.batch_size}: allowed is 1 or more")
        if self.pixel_mm is not None and not 0 < self.pixel_mm < np.inf:
            raise ConfigError(f"--pixel-mm {self.pixel_mm}: allowed is a number of millimetres above 0")

    @property
    def kinds(self) -> list[str]:
        """The folders of pictures."""
        return [MASKS, *[PROBABILITIES] * self.prob, *[UNCERTAINTY] * self.uncertainty, *[OVERLAYS] * self.overlay]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """How a call ended: images (frames) predicted now, files that had been done before, (file, reason) rejected."""

    predicted: int
    kept: int
    rejected: list[tuple[str, str]]


class _Job(t.NamedTuple):
    of: Frame
    sha256: str
    image_HWC: np.ndarray
    known: Known
    notes: tuple[str, ...] = ()


def predict_files(predictor: Predictor, source: Path, out: Path, wanted: Wanted, show: Show) -> Summary:
    """Predict an image file, or every image below a folder, into `out`.

    A file that cannot be read is noted in the CSV, told to `show`, and tried again by the next call.
    Raises: DataError without any image, and for a prompt table that does not fit; ConfigError if `out` holds the
    predictions of another model, of other images or with other settings, if another process is at it, or if
    uncertainty is wanted of a model that predicts an image but once.
    """
    files = _find(source, out)
    _refuse_collisions(files)
    predict_output.require(wanted.formats, files.values())
    kinds = kinds_for(predictor.members[0].conditions)
    table = read_table(wanted.prompts, files, kinds) if wanted.prompts else {}
    for kind in kinds:
        if any(kind.name in known.conditions for known in table.values()) and not predictor.reads(kind.name):
            spoken = kind.name.replace("_", " ")
            show(0, len(files), f"this model reads no {spoken}: those in the table have no effect")
    ranges, dark = survey(files.values(), wanted.grey_max)
    for warning in dark:
        show(0, len(files), f"warning: {warning}; --grey-max N sets another white")
    if wanted.uncertainty and not _has_uncertainty(predictor):
        raise ConfigError(
            "--uncertainty is the standard deviation over several predictions of an image, and this is one sample of "
            "one fold. Leave --fold out to take all folds, add --tta for the mirror image, or choose a model that was "
            "trained with model.samples above 1"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        with exclusive(out / LOCK_FILE) as alone:
            if not alone:
                raise ConfigError(f"another process predicts into {out}: wait for it, or choose another folder")
            _hold_to_settings(out, _settings(predictor, source, wanted, table, ranges))
            return _predict(predictor, files, table, ranges, out, wanted, show)
    except OSError as error:  # of the output: trouble with an image is a reject
        raise DataError(f"{out} cannot be written ({error}). Mend that; the same command then goes on") from error


def _has_uncertainty(predictor: Predictor) -> bool:
    """Whether there are several predictions of an image. Only a prediction tells whether the model samples, so it is
    asked for one of nothing where one fold is alone.
    """
    if len(predictor.members) * len(predictor.views) > 1:
        return True
    return predictor.predict([np.zeros((8, 8, 3), np.uint8)], [Known()])[0].uncertainty_HW is not None


class _Done:
    """What is done in an output folder: (file, frame) → row, in the file as soon as it is noted.

    A kill may tear the last line; it is dropped, and so are rejects, which are tried again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: dict[str, dict[int, Row]] = defaultdict(dict)
        for row in _read_rows(path):
            if row["status"] == OK:
                self._rows[row["file"]][int(row["frame"])] = row
        self.save()

    def frames(self, file: PurePosixPath, sha256: str) -> set[int]:
        """The frames of a file that are done. What is known of another content of it is forgotten."""
        rows = self._rows[str(file)]
        if any(row["sha256"] != sha256 for row in rows.values()):
            rows.clear()
        return set(rows)

    def note(self, row: Row) -> None:
        self._rows[row["file"]][int(row["frame"])] = row
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(row)

    def rows(self) -> Iterator[Row]:
        """In rising order."""
        for _, rows in sorted(self._rows.items()):
            yield from (row for _, row in sorted(rows.items()))

    def save(self) -> None:
        """The file anew, in rising order."""
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows())
        write_atomically(self.path, text.getvalue())


def _predict(
    predictor: Predictor,
    files: dict[PurePosixPath, Path],
    table: dict[PurePosixPath, Known],
    ranges: Ranges,
    out: Path,
    wanted: Wanted,
    show: Show,
) -> Summary:
    done = _Done(out / CSV_FILE)
    writer = Writer(out, wanted.kinds, wanted.formats, predictor)
    rejected: list[tuple[str, str]] = []
    predicted = kept = 0

    def jobs() -> Iterator[_Job]:
        nonlocal kept
        for number, (name, path) in enumerate(files.items()):
            show(number, len(files), "")
            try:
                opened = open_picture(path, ranges)
                if predict_output.DICOM_SEG in wanted.formats:
                    dicom_seg.check_source(path)
                there = done.frames(name, opened.sha256)
                missing = [
                    frame
                    for frame in range(opened.frames)
                    if frame not in there or not all(p.exists() for p in writer.places(name, frame, opened.frames))
                ]
                kept += not missing
                known = table.get(name, Known())
                known = dataclasses.replace(known, pixel_mm=known.pixel_mm or opened.scale or of_all)
            except DataError as error:
                reject(number, name, 0, error)
                continue
            for note in opened.notes if missing else ():
                show(number, len(files), f"{name} {note}")
            for frame in missing:
                try:
                    image_HWC = opened.read(frame)
                except DataError as error:  # the other frames of a clip may be whole
                    reject(number, name, frame, error)
                    continue
                of = Frame(file=name, path=path, frame=frame, frames=opened.frames)
                yield _Job(of, opened.sha256, image_HWC, known, opened.notes)

    def reject(number: int, name: PurePosixPath, frame: int, error: DataError) -> None:
        rejected.append((str(name), str(error)))
        done.note(_row_of_reject(name, frame, str(error)))
        show(number, len(files), f"{name} rejected: {error}")

    of_all = pixel_size(wanted.pixel_mm) if wanted.pixel_mm is not None else None
    for batch in _batches(jobs(), wanted.batch_size or predictor.recipe.batch_size):
        results = predictor.predict([job.image_HWC for job in batch], [job.known for job in batch])
        for job, result in zip(batch, results, strict=True):
            try:
                writer.write(job.of, job.image_HWC, result)
            except DataError as error:  # no DICOM SEG for this one
                reject(predicted, job.of.file, job.of.frame, error)
                continue
            done.note(_row(job, result))
            predicted += 1
    done.save()
    writer.finish(done.rows())
    show(len(files), len(files), "")
    return Summary(predicted=predicted, kept=kept, rejected=rejected)


def _batches(jobs: Iterator[_Job], size: int) -> Iterator[list[_Job]]:
    while batch := list(itertools.islice(jobs, size)):
        yield batch


# --- input ------------------------------------------------------------------------------------------------------


def _find(source: Path, out: Path) -> dict[PurePosixPath, Path]:
    """Name → path of every input, names relative to the folder. Raises: DataError without any."""
    if not source.exists():
        raise DataError(f"{source} does not exist: give an image, or a folder of images")
    if source.is_file():
        return {PurePosixPath(source.name): source}
    if source.resolve().is_relative_to(out.resolve()):
        raise ConfigError(f"{out} holds the input {source}: choose another folder for the predictions")

    def is_output(folder: Path) -> bool:  # this one, or that of another model
        return (folder / SETTINGS_FILE).exists() or folder.resolve() == out.resolve()

    paths = find_images(source, skip=is_output)
    if not paths:
        raise DataError(f"no image in {source}: allowed are {', '.join(FORMATS)}, and DICOM of any name")
    return {PurePosixPath(path.relative_to(source).as_posix()): path for path in paths}


def _refuse_collisions(files: Iterable[PurePosixPath]) -> None:
    pictures: dict[PurePosixPath, PurePosixPath] = {}
    for file in files:
        if not str(file).isprintable() or len(file.name.encode(errors="replace")) > LONGEST_NAME:
            raise DataError(
                f"{str(file)!a}: no output can be called after it; rename it (allowed are {LONGEST_NAME} bytes, "
                "without control characters)"
            )
        other = pictures.setdefault(picture(file), file)
        if other != file:
            raise DataError(f"the mask of both {other} and {file} would be {picture(file)}: rename one of them")


def _settings(
    predictor: Predictor, source: Path, wanted: Wanted, table: dict[PurePosixPath, Known], ranges: Ranges
) -> dict[str, t.Any]:
    """Everything that the predictions depend on, and what is written of them."""
    known = {str(file): each.as_list() for file, each in sorted(table.items())}
    return {
        "input": str(source.resolve()),
        "model": {member.name: member.sha256[:16] for member in predictor.members},
        "threshold": predictor.recipe.threshold,
        # As bool what older folders have as bool.
        "tta": {"none": False, "mirror": True}.get(predictor.tta, predictor.tta),
        "postprocess": None if predictor.rule == PLAIN else predictor.rule.words,
        "prob": wanted.prob,
        "uncertainty": wanted.uncertainty,
        "overlay": wanted.overlay,
        "pixel_mm": wanted.pixel_mm,
        "as": " ".join(wanted.formats) or None,
        "grey range": "; ".join(f"{kind} {range_}" for kind, range_ in sorted(ranges.items())) or None,
        "prompts": hashlib.sha256(json.dumps(known).encode()).hexdigest() if table else None,
    }


def _hold_to_settings(out: Path, now: dict[str, t.Any]) -> None:
    then = read_json(out / SETTINGS_FILE)
    if then is None:
        write_atomically(out / SETTINGS_FILE, json.dumps(now, indent=1))
        return
    differ = [key for key in now if then.get(key) != now[key]]
    if differ:
        changes = "; ".join(f"{key} was {then.get(key)}, now {now[key]}" for key in differ)
        raise ConfigError(f"{out} holds other predictions: {changes}. Choose another folder, or delete this one")


# --- output -----------------------------------------------------------------------------------------------------


def _row(job: _Job, result: Result) -> Row:
    x, y = result.centroid_px or (None, None)
    x_mm, y_mm = result.centroid_mm or (None, None)
    mm_x, mm_y = result.pixel_mm or (None, None)
    numbers = {
        **{"pixel_mm_x": mm_x, "pixel_mm_y": mm_y, "area_mm2": result.area_mm2},
        **{"long_axis_px": result.long_axis_px, "long_axis_mm": result.long_axis_mm},
        **{"short_axis_px": result.short_axis_px, "short_axis_mm": result.short_axis_mm},
        **{"centroid_x_px": x, "centroid_y_px": y, "centroid_x_mm": x_mm, "centroid_y_mm": y_mm},
        **{"mean_prob": result.mean_prob, "max_prob": result.max_prob},
        **{f"prob_{label}": prob for label, prob in (result.class_prob or {}).items()},
    }
    height, width = result.mask_HW.shape
    return {
        **dict.fromkeys(COLUMNS, ""),
        **{"file": str(job.of.file), "frame": str(job.of.frame), "frames": str(job.of.frames), "status": OK},
        **{"reason": "; ".join(job.notes)},
        **{"height": str(height), "width": str(width)},
        **{"components": str(result.components), "area_px": str(result.area_px)},
        **{name: f"{value:.6g}" for name, value in numbers.items() if value is not None},
        **{"class": result.label or "", "sha256": job.sha256},
        **{column: _joined(result.conditions.get(column, [])) for column in CONDITION_COLUMNS},
    }


def _joined(values: list[str]) -> str:
    """The distinct values of several passes in one cell."""
    return " | ".join(value or "none" for value in values) if len(values) > 1 else "".join(values)


def _row_of_reject(file: PurePosixPath, frame: int, reason: str) -> Row:
    facts = {"file": str(file), "frame": str(frame), "status": REJECTED, "reason": reason}
    return {**dict.fromkeys(COLUMNS, ""), **facts}


def _read_rows(path: Path) -> list[Row]:
    """The whole rows of a CSV that may end in the middle of one. Raises: DataError for a file that is none of ours."""
    if not path.exists():
        return []
    text = path.read_bytes().decode("utf-8", errors="replace")  # a kill may tear a character
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    if rows and (not text.endswith("\n") or None in rows[-1].values()):
        rows.pop()
    if any(None in row or None in row.values() or tuple(row) != COLUMNS for row in rows):
        raise DataError(f"{path} was changed, or written by another version of bushpc: move it away, and run again")
    return rows
