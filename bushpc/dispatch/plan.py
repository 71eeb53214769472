"""One composed config, or a grid of them → the cells of a run. Every cell is checked here, before anything is queued.

    configs/grid/<name>.yaml ─load_grid→ rows ─grid_plan→ cells: each row once per fold

A row is one condition of a comparison: a line of the table that the grid is for.
"""

from __future__ import annotations

import dataclasses
import functools
import typing as t
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bushpc import weights
from bushpc.cluster.base import cluster_for
from bushpc.config import CellConfig, Composer, DataConfig, ModelConfig, config_names
from bushpc.config.paper_splits import split_of
from bushpc.data.external import open_external
from bushpc.data.lineage import of_exported, refuse_seen
from bushpc.data.members import fold_members
from bushpc.data.mixture import Synthetic, open_synthetic
from bushpc.data.overlap import Tested
from bushpc.dispatch.chains import TO_COME, ScansToCome, ScanToCome, as_generator, following, generating
from bushpc.dispatch.grid_file import Grid, load_grid, short_hash
from bushpc.dispatch.grid_words import is_of_rows, of_rows
from bushpc.dispatch.starting import Starting
from bushpc.errors import BushpcError, ConfigError, DataError
from bushpc.files import sha256_of
from bushpc.sample import LABELS
from bushpc.shards.manifest import Manifest, Record, verify
from bushpc.shards.paper_split import ensure_split
from bushpc.shards.split import Folds, find_folds, load_folds
from bushpc.train.take_over import Donor

MOST_PROBLEMS = 10


@dataclass(frozen=True, kw_only=True)
class PlanData:
    """What all cells of a run share. facts: of manifest and folds, as in run.json: what makes results comparable."""

    manifest: Manifest
    folds_file: Path
    facts: dict[str, t.Any]

    @classmethod
    def of(cls, cell: CellConfig) -> PlanData:
        """As they are now. Raises: DataError."""
        manifest = Manifest.load(cell.data.folder)
        ensure_split(manifest, cell.data.folder, cell.folds, normals=cell.data.normals)
        folds_file = find_folds(manifest, cell.data.folder, cell.folds)
        return cls(manifest=manifest, folds_file=folds_file, facts=data_facts(manifest, cell.folds, folds_file))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run is to be made of.

    cells: name → config; every row once per fold, in that order. row_of: cell → row; empty for a cross-validation.
    wanted: the cells to submit now; the run is complete when all of `cells` are done. checked: manifest, folds and
    facts, if they were read to make the plan. warnings: what could not be checked.
    """

    kind: str
    cells: dict[str, CellConfig]
    wanted: list[str]
    grid: Grid | None = None
    row_of: dict[str, str] = dataclasses.field(default_factory=dict)
    checked: PlanData | None = None
    warnings: list[str] = dataclasses.field(default_factory=list)

    @functools.cached_property
    def data(self) -> PlanData:
        """Manifest, folds and facts; read only if no one has yet. Raises: DataError."""
        return self.checked or PlanData.of(self.first)

    @property
    def first(self) -> CellConfig:
        """Any cell, for what all of them share: folder, data and folds."""
        return next(iter(self.cells.values()))


def cv_plan(config: CellConfig) -> Plan:
    """One cell per fold, in fold order; `fold=` only chooses which of them to submit.

    Raises: DataError (shards or folds missing, damaged or leaking), WeightsError (not staged), ConfigError.
    """
    config.check_prompts(in_grid=False)
    data = _Data(config)
    weights.require(config.model_class, config.model.for_fold(config.fold or 0), config.weights_folder)
    whole = dataclasses.replace(config, fold=None)
    digest = short_hash(whole.hash, data.hash, *data.synthetic_hashes(config), *_start(config))
    # The same settings on the same data always land in the same run folder.
    name = config.name or f"cv-{config.choices['model']}-{config.data.name}-{digest}"
    named = dataclasses.replace(config, name=name)
    cells = {f"fold{k}": data.cell(named, k) for k in range(data.count)}
    cells |= {name: cell for first in list(cells) for name, cell in following(first, cells[first]).items()}
    wanted = [name for name, cell in cells.items() if config.fold in (None, cell.fold)]
    return Plan(kind="cv", cells=cells, wanted=wanted, checked=data.shared, warnings=data.warnings)


def grid_plan(overrides: Sequence[str]) -> Plan:
    """The cells of `grid=<name>`, with the other overrides on top of the grid's own; see `grid_words` for its rows.

    Raises: ConfigError with every row that cannot be composed; DataError, WeightsError as for a cross-validation.
    """
    given = _grid_name(overrides)
    whole_grid, about_rows = load_grid(given), [word for word in overrides if is_of_rows(word)]
    grid = of_rows(whole_grid, about_rows)
    words = [word for word in overrides if not is_of_rows(word) and word.partition("=")[0] != "grid"]
    _refuse_overridden_axes(grid, words, given)
    composer = Composer([*grid.base, *words])
    base = composer({})
    data = _Data(base)
    whole = dataclasses.replace(base, fold=None)
    part = [row.name for row in grid.rows] if len(grid.rows) < len(whole_grid.rows) else []
    part += [word for word in about_rows if "." in word.partition("=")[0]]
    digest = short_hash(whole.hash, data.hash, *data.synthetic_hashes(base), *_start(base), *part)
    name = base.name or f"{grid.name}-{base.data.name}-{digest}"
    cells, row_of = _cells_of(grid, composer, name, data)
    wanted = [cell_name for cell_name, cell in cells.items() if base.fold in (None, cell.fold)]
    return Plan(
        kind="grid",
        cells=cells,
        wanted=wanted,
        grid=grid,
        row_of=row_of,
        checked=data.shared,
        warnings=data.warnings,
    )


def _cells_of(grid: Grid, composer: Composer, name: str, data: _Data) -> tuple[dict[str, CellConfig], dict[str, str]]:
    """Every cell of a grid, those first that others follow, and cell → row. Raises: ConfigError, see `grid_plan`."""
    cells: dict[str, CellConfig] = {}
    row_of: dict[str, str] = {}
    ran, problems, staged = [], [], set()
    for row in (*grid.generators, *grid.rows):
        try:
            to_come = {"data.synthetic": TO_COME} if row.scans else {}
            cell = dataclasses.replace(composer({**row.settings, **to_come}), name=name)
            cell = as_generator(cell) if row in grid.generators else cell
            for k in range(data.count):
                scans = _scans(cells, f"{row.scans}-fold{k}") if row.scans else None
                first = f"{row.name}-fold{k}"
                of_fold = data.cell(cell, k, scans)
                for cell_name, each in {first: of_fold, **following(first, of_fold)}.items():
                    cells[cell_name], row_of[cell_name] = each, row.name
            model = cell.model.for_fold(cell.fold or 0)
            needed = (cell.weights_folder, *model.weight_files())
            if needed not in staged:  # they are hashed, and may be gigabytes
                weights.require(cell.model_class, model, cell.weights_folder)
            staged.add(needed)
            ran += [row.name] if row in grid.rows else []
        except BushpcError as error:
            problems.append((f"row {row.name}: {error}", error))
    if problems:
        shown = [text for text, _ in problems[:MOST_PROBLEMS]]
        more = [f"… and {len(problems) - MOST_PROBLEMS} more rows"] if len(problems) > MOST_PROBLEMS else []
        count = len(grid.rows) + len(grid.generators)
        head = f"grid={grid.name}: {len(problems)} of {count} rows cannot be run; nothing was queued"
        rest = [f"The other rows can be run: add rows=[{','.join(ran)}]"] if ran else []
        raise type(problems[0][1])("\n  ".join([head, *shown, *more, *rest]))
    return cells, row_of


def _scans(cells: Mapping[str, CellConfig], generator: str) -> ScansToCome:
    """What a generator will make in a fold. Raises: ConfigError if it was refused, which has been said by then."""
    made = generating(generator)
    if made not in cells:
        raise ConfigError(f"{generator} cannot be run, see above, so there are no scans to train on")
    return ScansToCome(name=made, cell=cells[made])


def _grid_name(overrides: Sequence[str]) -> str:
    given = [word.partition("=")[2] for word in overrides if word.partition("=")[0] == "grid"]
    if not given:
        raise ConfigError(f"which grid? Say grid=<name>. Valid: {', '.join(config_names('grid'))}")
    return given[-1]


def _refuse_overridden_axes(grid: Grid, words: Sequence[str], given: str) -> None:
    """What a row sets wins over the command line, so a word that every one of them hides is a mistake."""
    for word in words:
        key = word.partition("=")[0]
        if all(key in row.settings for row in grid.rows):
            raise ConfigError(
                f"{word}: the rows of grid={given} set {key} themselves. Leave the word out, or edit the grid's yaml"
            )


class _Data:
    """The packed dataset that all cells of a run share, checked. Reads and hashes every shard that is here.

    count: of folds. facts: as in run.json. hash: over samples and folds. Raises: DataError, ConfigError.
    """

    def __init__(self, config: CellConfig) -> None:
        folder = config.data.folder
        self.shared = PlanData.of(config)
        self.manifest, self.facts = self.shared.manifest, self.shared.facts
        if config.data.stream:  # its tars are not here, and may be too many to read
            from bushpc.data.stream import require_reachable  # here: webdataset takes a second to import

            require_reachable(config.data.stream, self.manifest)
        else:
            verify(folder, self.manifest, deep=True)
        self._folds_sha256 = self.facts["folds"]["sha256"]
        self.hash = self.facts["manifest_sha256"] + self._folds_sha256
        self._folds: dict[bool, Folds] = {}
        self._sources: dict[str, Donor] = {}
        self._synthetic: dict[Path, Synthetic] = {}
        folds = self._with(config.data.normals)
        if config.fold is not None:
            folds.validation(config.fold)  # refuses a fold that does not exist
        self.count = folds.count
        self._folder, self._starting = folder, Starting()
        self._external = []
        for other in map(Path, config.evaluate.external):
            manifest = open_external(other, self.manifest)
            verify(other, manifest, deep=True)
            title = f"the external test on {other.name}"
            self._external.append(Tested(title=title, manifest=manifest, folder=other, records=manifest.records))

    def cell(self, config: CellConfig, fold: int, to_come: ScansToCome | None = None) -> CellConfig:
        """`config` for one fold: as many steps long as its epochs come to there, with its own synthetic scans, and with
        a model that starts from its own weights. to_come: the synthetic scans, where a cell of this run makes them.

        Raises: ConfigError, for a fold that is to be submitted also where weights to take over are not there; DataError
        for what is no test of the model, or nothing to learn from.
        """
        cluster_for(config.cluster.executor).require(config.cluster)
        config.model.check_data(self.manifest.mask_classes, self.manifest.channels)
        config.check_prompts(in_grid=True)
        config.model.check_run(config)
        synthetic: Sequence[Record | ScanToCome] = []
        config = to_come.read_by(config) if to_come else config
        of_fold = config.data
        model, now = config.model.for_fold(fold), config.fold in (None, fold)  # others are planned, not trained now
        if now:
            self._refuse_base(model, fold)
        if to_come:
            synthetic = to_come.records() if config.data.mixed else []
        elif config.data.mixed:
            added = self._added(config.data, fold)
            if now:
                added.refuse_seen(self.manifest, self._folds_sha256, fold)
            synthetic = added.records(config.data.normals)
            of_fold = dataclasses.replace(
                config.data, synthetic=str(added.folder), synthetic_sha256=added.manifest.hash
            )
        members = fold_members(self.manifest.records, self._with(config.data.normals), fold, config, synthetic)
        labels = {record.label for record in members.train if record.label in LABELS}
        if config.model_class.makes == {"class_prob_BL"} and len(labels) < 2:
            raise DataError(
                f"model={config.choices['model']} tells labels apart, and what trains in fold {fold} of "
                f"{self.manifest.dataset} has {'only ' + labels.pop() if labels else 'none'}. Take a dataset with "
                f"labels ({', '.join(LABELS)}), see `bushpc shards list`"
            )
        unlabelled = sum(record.label not in LABELS for record in members.train)
        if config.model.needs_every_label and unlabelled:
            raise DataError(
                f"model={config.choices['model']} reads the label of every scan, and {unlabelled} of the "
                f"{len(members.train)} that train in fold {fold} of {self.manifest.dataset} have none. Take a dataset "
                f"with labels ({', '.join(LABELS)}), see `bushpc shards list`, or another model"
            )
        cell = dataclasses.replace(
            config,
            fold=fold,
            data=of_fold,
            model=model,
            train=dataclasses.replace(config.train, iterations=members.steps(config.train)),
        )
        if not now:
            return self._starting.planned(cell)
        validation = t.cast("list[Record]", members.validation)  # always real
        return self._taking_over(self._starting.checked(cell, self._tested(validation, fold)))

    @property
    def warnings(self) -> list[str]:
        """What could not be checked of the cells so far."""
        return self._starting.warnings

    def _tested(self, validation: list[Record], fold: int) -> list[Tested]:
        """What models of a fold are tested on: its validation part, and the external datasets."""
        own = Tested(
            title=f"the validation part of fold {fold}",
            manifest=self.manifest,
            folder=self._folder,
            records=validation,
        )
        return [own, *self._external]

    def _refuse_base(self, model: ModelConfig, fold: int) -> None:
        """Raises: ConfigError for what a model cannot start from; DataError where that has seen the validation part."""
        model.weight_files()
        if base := model.starts_from:
            way_on = "Give the whole export as model.base, of which each fold takes its own folder"
            refuse_seen(f"model.base={base}", of_exported(base), self.manifest, self._folds_sha256, fold, way_on)

    def _taking_over(self, cell: CellConfig) -> CellConfig:
        """The cell, where it is to take weights over that are there, or trains."""
        run = cell.train.weights_from
        if run is None:
            return cell
        if run not in self._sources:
            self._sources[run] = Donor(Path(run), self.facts)
        trained = self._sources[run].cell_for(cell).config
        # What its weights went on with other settings is no clean twin of anything, and neither is what takes them.
        changes = dict.fromkeys((*trained.resume_changes, *cell.resume_changes))
        return dataclasses.replace(cell, resume_changes=tuple(changes))

    def synthetic_hashes(self, config: CellConfig) -> list[str]:
        """Of the synthetic scans of each fold; none where none train."""
        if not config.data.mixed:
            return []
        return [self._added(config.data, fold).manifest.hash for fold in range(self.count)]

    def _added(self, data: DataConfig, fold: int) -> Synthetic:
        """The synthetic scans of a fold, checked as the real ones are."""
        found = open_synthetic(t.cast(str, data.synthetic), fold, data.synthetic_sha256)
        if found.folder not in self._synthetic:
            found.added_to(self.manifest)  # refuses what cannot train together
            verify(found.folder, found.manifest, deep=True)
            self._synthetic[found.folder] = found
        return self._synthetic[found.folder]

    def _with(self, normals: bool) -> Folds:
        if normals not in self._folds:
            self._folds[normals] = load_folds(
                self.shared.folds_file, self.manifest.records, self.manifest.excerpt, normals=normals
            )
        return self._folds[normals]


def data_facts(manifest: Manifest, source: str, folds_file: Path) -> dict[str, t.Any]:
    """What makes results comparable: the same samples, and the same folds. source: where these are from."""
    split = split_of(source, manifest.dataset)
    folds = {"source": source, "sha256": sha256_of(folds_file), "note": split.sentence if split else ""}
    return {"manifest_sha256": manifest.hash, "folds": folds}


def _start(config: CellConfig) -> list[str]:
    """What tells runs apart by what they start from; the hashes of the folds are not known before their cells are."""
    return [f"{config.train.start_from} {config.train.start_row}"] if config.train.start_from else []
