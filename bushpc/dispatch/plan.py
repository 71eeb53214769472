"""One composed config, or a grid of them → the cells of a run. Every cell is checked here, before anything is queued.

    configs/grid/<name>.yaml ─load_grid→ rows ─grid_plan→ cells: each row once per fold

A row is one condition of a comparison: a line of the table that the grid is for.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import re
import typing as t
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from bushpc import weights
from bushpc.cluster.base import cluster_for
from bushpc.config import YAML_FAILS, CellConfig, Composer, DataConfig, ModelConfig, config_names, places
from bushpc.config.read import number
from bushpc.data.external import open_external
from bushpc.data.lineage import of_exported, refuse_seen
from bushpc.data.members import fold_members
from bushpc.data.mixture import Synthetic, open_synthetic
from bushpc.data.overlap import Tested
from bushpc.dispatch.starting import Starting
from bushpc.errors import BushpcError, ConfigError, DataError, unknown_name
from bushpc.files import sha256_of
from bushpc.sample import LABELS
from bushpc.shards.manifest import Manifest, Record, verify
from bushpc.shards.split import Folds, find_folds, load_folds
from bushpc.train.take_over import Donor

if t.TYPE_CHECKING:
    from rich.table import Table


GRID_KEYS = ("title", "base", "rows", "axes", "exclude", "baseline")
ROW_KEYS = ("label", "set")
# More is a slip of the pen in an axis; the job arrays of a whole site end somewhere near it.
MOST_CELLS = 20_000
MOST_PROBLEMS = 10
LONGEST_NAME = 120
# Settings that no row may set: a grid trains all folds of every row, in one folder, on one set of patients.
RUN_WIDE = (
    *("fold", "folds", "name", "runs_dir", "data", "data.name", "data.root", "resume_changes"),
    "evaluate.external",
)


@dataclass(frozen=True, kw_only=True)
class GridRow:
    """One condition. name: safe as a folder's name. label: for tables. settings: what sets it apart, key → value."""

    name: str
    label: str
    settings: dict[str, t.Any]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A file of configs/grid. base: overrides of every cell. baseline: the row that the others are compared with."""

    name: str
    title: str
    base: tuple[str, ...]
    rows: tuple[GridRow, ...]
    baseline: str


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
        folds_file = find_folds(manifest, cell.data.folder, cell.folds)
        return cls(manifest=manifest, folds_file=folds_file, facts=data_facts(manifest, cell.folds, folds_file))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run is to be made of.

    cells: name → config; every row once per fold, in that order. row_of: cell → row; empty for a cross-validation.
    wanted: the cells to submit now; the run is complete when all of `cells` are done. checked: manifest, folds and
    facts, if they were read to make the plan.
    """

    kind: str
    cells: dict[str, CellConfig]
    wanted: list[str]
    grid: Grid | None = None
    row_of: dict[str, str] = dataclasses.field(default_factory=dict)
    checked: PlanData | None = None

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
    data = _Data(config)
    weights.require(config.model_class, config.model.for_fold(config.fold or 0), config.weights_folder)
    whole = dataclasses.replace(config, fold=None)
    digest = _digest(whole.hash, data.hash, *data.synthetic_hashes(config), *_start(config))
    # The same settings on the same data always land in the same run folder.
    name = config.name or f"cv-{config.choices['model']}-{config.data.name}-{digest}"
    named = dataclasses.replace(config, name=name)
    cells = {f"fold{k}": data.cell(named, k) for k in range(data.count)}
    wanted = list(cells) if config.fold is None else [f"fold{config.fold}"]
    return Plan(kind="cv", cells=cells, wanted=wanted, checked=data.shared)


def grid_plan(overrides: Sequence[str]) -> Plan:
    """The cells of `grid=<name>`, with the other overrides on top of the grid's own.

    Raises: ConfigError with every row that cannot be composed; DataError, WeightsError as for a cross-validation.
    """
    given = _grid_name(overrides)
    grid = load_grid(given)
    words = [word for word in overrides if word.partition("=")[0] != "grid"]
    _refuse_overridden_axes(grid, words, given)
    composer = Composer([*grid.base, *words])
    base = composer({})
    data = _Data(base)
    whole = dataclasses.replace(base, fold=None)
    digest = _digest(whole.hash, data.hash, *data.synthetic_hashes(base), *_start(base))
    name = base.name or f"{grid.name}-{base.data.name}-{digest}"
    rows, problems, staged = {}, [], set()
    for row in grid.rows:
        try:
            cell = dataclasses.replace(composer(row.settings), name=name)
            of_row = [data.cell(cell, k) for k in range(data.count)]
            model = cell.model.for_fold(base.fold or 0)
            needed = (cell.weights_folder, *model.weight_files())
            if needed not in staged:  # they are hashed, and may be gigabytes
                weights.require(cell.model_class, model, cell.weights_folder)
            staged.add(needed)
            rows[row.name] = of_row
        except BushpcError as error:
            problems.append((f"row {row.name}: {error}", error))
    if problems:
        shown = [text for text, _ in problems[:MOST_PROBLEMS]]
        more = [f"… and {len(problems) - MOST_PROBLEMS} more rows"] if len(problems) > MOST_PROBLEMS else []
        head = f"grid={grid.name}: {len(problems)} of {len(grid.rows)} rows cannot be run; nothing was queued"
        raise type(problems[0][1])("\n  ".join([head, *shown, *more]))
    cells, row_of, wanted = {}, {}, []
    for row_name, of_row in rows.items():
        for k, cell in enumerate(of_row):
            cells[f"{row_name}-fold{k}"] = cell
            row_of[f"{row_name}-fold{k}"] = row_name
            if base.fold in (None, k):
                wanted.append(f"{row_name}-fold{k}")
    return Plan(kind="grid", cells=cells, wanted=wanted, grid=grid, row_of=row_of, checked=data.shared)


def load_grid(name: str) -> Grid:
    """Read a grid by its name in `configs/grid`, or the path of a yaml file, and multiply its axes out.

    Raises: ConfigError for whatever cannot be meant.
    """
    path = Path(name) if name.endswith(".yaml") else places.config_file(f"grid/{name}")
    if path is None:
        raise ConfigError(unknown_name("grid", name, config_names("grid"), "Or the path of a .yaml file."))
    try:
        content = yaml.load(path.read_text(), Loader=_Unambiguous)
    except YAML_FAILS as error:
        raise ConfigError(f"grid={name}: {path} cannot be read ({error})") from error
    name = _safe(path.stem, f"grid={name}")
    where = f"grid={name}"
    content = _mapping(content, where, GRID_KEYS)
    axes = _axes(content.get("axes"), where)
    rows = [*_product(axes, _exclusions(content.get("exclude"), axes, where), where), *_rows(content, where)]
    names = [row.name for row in rows]
    if not rows:
        raise ConfigError(
            f"{where} has no cells: {'every combination of its axes is excluded' if axes else 'no rows, no axes'}. "
            f"Give it `rows` or `axes`, see configs/grid"
        )
    twice = next((row for row in names if names.count(row) > 1), None) if len(set(names)) < len(names) else None
    if twice:
        raise ConfigError(f"{where}: two rows are called {twice}; each needs a name of its own")
    baseline = content.get("baseline") or names[0]
    if baseline not in names:
        raise ConfigError(f"{where}: {unknown_name('baseline', str(baseline), names)}")
    base = content.get("base") or []
    if not isinstance(base, list) or not all(isinstance(word, str) for word in base):
        raise ConfigError(f"{where}: `base` is a list of overrides, for example [model=xbusnet, train.lr=1e-4]")
    title = content.get("title")
    return Grid(name=name, title=str(title or name), base=tuple(base), rows=tuple(rows), baseline=str(baseline))


def plan_table(plan: Plan) -> Table:
    """What `bushpc grid --list` shows: a row per row of the grid."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    assert plan.grid is not None
    table = Table(title=f"{plan.first.run_dir}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("row", "label", "sets", "folds", "ranks", "GPUs"):
        table.add_column(column, justify="right" if column in ("folds", "ranks", "GPUs") else "left")
    for row in plan.grid.rows:
        cells = [plan.cells[name] for name in plan.wanted if plan.row_of[name] == row.name]
        cluster = plan.cells[f"{row.name}-fold0"].cluster
        sets = ", ".join(f"{key}={json.dumps(value)}" for key, value in row.settings.items())
        gpus = str(cluster.nodes * cluster.gpu_count)
        name = f"{row.name} (baseline)" if row.name == plan.grid.baseline else row.name
        table.add_row(*map(escape, (name, row.label, sets, str(len(cells)), str(cluster.world_size), gpus)))
    return table


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

    def cell(self, config: CellConfig, fold: int) -> CellConfig:
        """`config` for one fold: as many steps long as its epochs come to there, with its own synthetic scans, and with
        a model that starts from its own weights.

        Raises: ConfigError, for a fold that is to be submitted also where weights to take over are not there; DataError
        for what is no test of the model, or nothing to learn from.
        """
        cluster_for(config.cluster.executor).require(config.cluster)
        config.model.check_data(self.manifest.mask_classes, self.manifest.channels)
        config.model.check_run(config)
        synthetic, of_fold = [], config.data
        model, now = config.model.for_fold(fold), config.fold in (None, fold)  # others are planned, not trained now
        if now:
            self._refuse_base(model, fold)
        if config.data.mixed:
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
        cell = dataclasses.replace(
            config,
            fold=fold,
            data=of_fold,
            model=model,
            train=dataclasses.replace(config.train, iterations=members.steps(config.train)),
        )
        if not now:
            return self._starting.planned(cell)
        return self._taking_over(self._starting.checked(cell, self._tested(members.validation, fold)))

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
    return {"manifest_sha256": manifest.hash, "folds": {"source": source, "sha256": sha256_of(folds_file)}}


def _start(config: CellConfig) -> list[str]:
    """What tells runs apart by what they start from; the hashes of the folds are not known before their cells are."""
    return [f"{config.train.start_from} {config.train.start_row}"] if config.train.start_from else []


def _digest(*parts: str) -> str:
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:8]


# --- configs/grid/<name>.yaml, piece by piece -----------------------------------------------------------------------

Settings = dict[str, t.Any]


def _mapping(content: t.Any, where: str, keys: Sequence[str]) -> dict[str, t.Any]:
    if not isinstance(content, dict):
        raise ConfigError(f"{where}: a mapping with {', '.join(keys)} is needed")
    for key in content:
        if key not in keys:
            raise ConfigError(f"{where}: {unknown_name('key', str(key), keys)}")
    return content


def _settings(content: t.Any, where: str) -> Settings:
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"{where}: a mapping from settings to values is needed, for example {{train.lr: 1.0e-4}}")
    for key in content:
        if key in RUN_WIDE:
            raise ConfigError(f"{where}: {key} is the same for all rows; put it into `base` or on the command line")
    return content


def _rows(content: Mapping[str, t.Any], where: str) -> list[GridRow]:
    rows = content.get("rows") or {}
    if not isinstance(rows, dict):
        raise ConfigError(f"{where}: `rows` is a mapping from each row's name to its `label` and `set`")
    out = []
    for name, row in rows.items():
        row = _mapping(row, f"{where}, row {name}", ROW_KEYS)
        settings = _settings(row.get("set") or {}, f"{where}, row {name}")
        out.append(GridRow(name=_safe(str(name), where), label=str(row.get("label") or name), settings=settings))
    return out


def _axes(content: t.Any, where: str) -> dict[str, dict[str, Settings]]:
    """Axis → name of each of its values → settings. `train.lr: [1e-4, 3e-4]` is short for the names and settings."""
    axes: dict[str, dict[str, Settings]] = {}
    for axis, values in _settings(content or {}, f"{where}, axes").items():
        if isinstance(values, dict):
            axes[axis] = {str(k): _settings(v, f"{where}, axis {axis}, {k}") for k, v in values.items()}
        elif isinstance(values, list):
            short = axis.rpartition(".")[2]
            axes[axis] = {f"{short}={_spoken(value)}": {axis: value} for value in values}
            if len(axes[axis]) < len(values):
                raise ConfigError(f"{where}, axis {axis}: a value stands there twice")
        if not axes.get(axis):
            raise ConfigError(f"{where}, axis {axis}: a list of values, or a mapping from names to settings, is needed")
    setters = [(key, axis) for axis, values in axes.items() for key in {key for v in values.values() for key in v}]
    for key, axis in setters:
        if others := [other for same, other in setters if same == key and other != axis]:
            raise ConfigError(f"{where}: the axes {axis} and {others[0]} both set {key}; one would hide the other")
    cells = math.prod(len(values) for values in axes.values())
    if cells > MOST_CELLS:
        raise ConfigError(f"{where}: its axes make {cells} combinations; allowed are {MOST_CELLS}")
    return axes


def _exclusions(content: t.Any, axes: Mapping[str, Mapping[str, Settings]], where: str) -> list[Settings]:
    known = {key for values in axes.values() for settings in values.values() for key in settings}
    rules = content or []
    if not isinstance(rules, list) or not all(isinstance(rule, dict) and rule for rule in rules):
        raise ConfigError(f"{where}: `exclude` is a list of mappings from settings to values")
    for key in (key for rule in rules for key in rule):
        if key not in known:
            raise ConfigError(f"{where}, exclude: {unknown_name('setting of an axis', str(key), known)}")
    return rules


def _product(axes: Mapping[str, Mapping[str, Settings]], exclude: Sequence[Settings], where: str) -> list[GridRow]:
    if not axes:
        return []
    rows, used = [], [False] * len(exclude)
    for choice in itertools.product(*(values.items() for values in axes.values())):
        settings: Settings = {}
        for _, chosen in choice:
            settings |= chosen
        hits = [all(settings.get(key, ...) == value for key, value in rule.items()) for rule in exclude]
        used = [was or hit for was, hit in zip(used, hits, strict=True)]
        if not any(hits):
            names = [name for name, _ in choice]
            row = _safe("-".join(name.replace("=", "_") for name in names), where)
            rows.append(GridRow(name=row, label=", ".join(names), settings=settings))
    for rule, hit in zip(exclude, used, strict=True):
        if not hit:
            raise ConfigError(f"{where}: the exclusion {json.dumps(rule)} fits no combination of the axes")
    return rows


class _Unambiguous(yaml.SafeLoader):
    """Refuses what yaml would pass over: of two equal keys the first is dropped, and `on` and `no` are no texts."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[t.Any, t.Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if not isinstance(key, str):
                raise ValueError(f"line {node.start_mark.line + 1}: {key!r} is no text, put it into quotes")
            if keys.count(key) > 1:
                raise ValueError(f"line {node.start_mark.line + 1}: {key} stands twice in one mapping")
        return super().construct_mapping(node, deep)

    def construct_date(self, node: yaml.ScalarNode) -> t.NoReturn:
        raise ValueError(f"{node.value} would be read as a date: put it into quotes")


_Unambiguous.add_constructor("tag:yaml.org,2002:timestamp", _Unambiguous.construct_date)
for kind in ("int", "float"):  # 010 and 2026_11 are numbers to yaml, and text where the setting is text
    _Unambiguous.add_constructor(f"tag:yaml.org,2002:{kind}", lambda _, node: number(node.value))


def _spoken(value: t.Any) -> str:
    """A value in a row's name."""
    return value if isinstance(value, str) else json.dumps(value)


def _safe(name: str, where: str) -> str:
    """A row's name as part of a folder's name. Raises: ConfigError where nothing of it is left."""
    safe = re.sub(r"[^A-Za-z0-9._]+", "_", name.replace("-", "_")).strip("._")
    if not safe:
        raise ConfigError(f"{where}: '{name}' cannot name a row; letters or digits are needed")
    # A folder's name ends at 255 bytes, and a fold and a hash are still to come.
    return safe if len(safe) <= LONGEST_NAME else f"{safe[:LONGEST_NAME]}_{_digest(safe)}"
