"""What the cells of a plan start from, checked on the login node: does it fit, may it, and what becomes of it.

    train.start_from, model.weights, train.freeze, train.layer_decay ─Starting→ hash of each fold's start, or an error

The network is only built, without weights, for cells that use one of these settings.
"""

from __future__ import annotations

import dataclasses
import typing as t
from collections.abc import Sequence
from pathlib import Path

from bushpc import weight_file
from bushpc.config import CellConfig, target_of
from bushpc.data.lineage import Training
from bushpc.data.overlap import Tested, refuse_overlap
from bushpc.data.starts import Start, Starts
from bushpc.errors import ConfigError, WeightsError, first_of

Shapes = dict[str, weight_file.Shape]
MOST_SHOWN = 4


class Behind(t.NamedTuple):
    """note: what run.json records of a start. trainings: those behind it."""

    note: dict[str, t.Any] | None = None
    trainings: tuple[Training, ...] = ()


def behind(cell: CellConfig) -> Behind:
    """What a cell starts from besides staged weights. Raises: ConfigError, WeightsError."""
    if cell.train.start_from:
        start = _open(cell).for_fold(cell.fold)
        return Behind(start.note(), tuple(start.trained_on))
    if cell.model.weights:
        origin = weight_file.require(Path(cell.model.weights), cell.model.weights_sha256, target_of(cell.model_class))
        note = {
            "kind": origin.kind,
            "name": origin.name,
            "version": origin.version,
            "sha256": origin.sha256,
            "licence": origin.licence,
            "where": origin.where,
            "imported_sha256": cell.model.weights_sha256,
            "licences": origin.licences,
        }
        return Behind(note, tuple(origin.trained_on))
    return Behind()


class Starting:
    """Checks the cells of one plan; a source is opened, and a network built, once for all that share it.

    warnings: what could not be checked, each line once.
    """

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self._starts: dict[tuple[str, str | None], Starts] = {}
        self._shapes: dict[t.Any, Shapes] = {}

    def checked(self, cell: CellConfig, tested: Sequence[Tested]) -> CellConfig:
        """The cell with the hash of what its fold starts from. tested: the scans that its models are tested on.

        Raises: ConfigError, WeightsError for what cannot start; DataError for what trained on scans to be tested.
        """
        train, model = cell.train, cell.model
        if not (train.start_from or model.weights or train.freeze or train.layer_decay != 1):
            return cell
        shapes = self._own_shapes(cell)
        if model.weights:
            origin = weight_file.require(Path(model.weights), model.weights_sha256, target_of(cell.model_class))
            _require_fit(f"model.weights={model.weights}", weight_file.read_header(Path(model.weights)).shapes, shapes)
            self._refuse_overlap(f"model.weights={model.weights}", origin.trained_on, tested)
        if train.start_from is None:
            return cell
        start = self._of(cell).for_fold(cell.fold)
        if train.start_sha256 not in (None, start.sha256):
            raise ConfigError(
                f"{start.title} in train.start_from={train.start_from} has sha256 {start.sha256}, not "
                f"train.start_sha256={train.start_sha256}: bring those weights back, or leave train.start_sha256 out"
            )
        _require_start(cell, start, shapes)
        folders = [start.shards] if start.shards else []
        title = f"{start.title} (train.start_from)"
        self._refuse_overlap(title, start.trained_on, tested, folders, start.folds)
        return _with_hash(cell, start)

    def planned(self, cell: CellConfig) -> CellConfig:
        """The same for a cell that is not to be submitted now, and whose start need not be there yet."""
        if cell.train.start_from is None:
            return cell
        try:
            return _with_hash(cell, self._of(cell).for_fold(cell.fold))
        except ConfigError:
            return cell

    def _refuse_overlap(
        self,
        what: str,
        trainings: Sequence[Training],
        tested: Sequence[Tested],
        folders: Sequence[Path] = (),
        folds: Sequence[Path] = (),
    ) -> None:
        warnings = refuse_overlap(what, trainings, tested, folders, folds)
        self.warnings += [line for line in warnings if line not in self.warnings]

    def _of(self, cell: CellConfig) -> Starts:
        key = str(cell.train.start_from), cell.train.start_row
        if key not in self._starts:
            self._starts[key] = _open(cell)
        return self._starts[key]

    def _own_shapes(self, cell: CellConfig) -> Shapes:
        """Names and shapes of the model's tensors. Raises: ConfigError for train.freeze and train.layer_decay."""
        key = repr(cell.model.standalone()), cell.train.freeze, cell.train.layer_decay
        if key not in self._shapes:
            from bushpc.models.base import all_tensors  # here: it imports torch, and most plans need none
            from bushpc.train.fine_tune import freeze, lr_scales

            model = cell.model_class(cell.model.standalone())
            self._shapes[key] = {name: tuple(tensor.shape) for name, tensor in all_tensors(model).items()}
            freeze(model, cell.train.freeze)
            if cell.train.layer_decay != 1:
                lr_scales(model, cell.train.layer_decay)
        return self._shapes[key]


def _open(cell: CellConfig) -> Starts:
    given = str(cell.train.start_from)
    return Starts.open(Path(given), cell.train.start_row, f"train.start_from={given}")


def _with_hash(cell: CellConfig, start: Start) -> CellConfig:
    return dataclasses.replace(cell, train=dataclasses.replace(cell.train, start_sha256=start.sha256))


def _require_start(cell: CellConfig, start: Start, shapes: Shapes) -> None:
    from bushpc.models.base import OUTSIDE  # here: see Starting._own_shapes

    said = f"train.start_from={cell.train.start_from}"
    if start.target != target_of(cell.model_class):
        raise ConfigError(
            f"{said}: {start.title} is a {start.target.rpartition('.')[2]}, and this run trains a "
            f"{cell.model_class.__name__}: choose the same model, or take its encoder alone by `bushpc weights import`"
        )
    given = start.shapes()
    own = {name for name in shapes if not name.startswith(OUTSIDE)}
    if missing := sorted(own - given.keys()):
        raise ConfigError(f"{said}: {start.title} lacks {first_of(missing, MOST_SHOWN)}; {_differing(cell, start)}")
    try:
        _require_fit(said, given, shapes)
    except WeightsError as error:
        raise ConfigError(f"{error}; {_differing(cell, start)}") from error


def _require_fit(said: str, given: Shapes, own: Shapes) -> None:
    wrong = [
        f"{name} {list(shape)} instead of {list(own[name]) if name in own else 'nothing'}"
        for name, shape in given.items()
        if own.get(name) != shape
    ]
    if wrong:
        raise WeightsError(
            f"{said} does not fit this model: {first_of(wrong, MOST_SHOWN)}. Choose the settings that it was made for"
        )


def _differing(cell: CellConfig, start: Start) -> str:
    """The model's settings that differ, as the reason."""
    own = cell.to_dict()["model"]
    ignored = ("pretrained", "weights", "weights_sha256")
    differ = [
        f"model.{name}: {value} there, {own[name]} here"
        for name, value in start.settings.items()
        if name in own and name not in ignored and own[name] != value
    ]
    return f"its settings differ: {'; '.join(differ)}" if differ else "its settings are the same, so its code changed"
