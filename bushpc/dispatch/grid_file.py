"""configs/grid/<name>.yaml → a grid: its rows, and its axes multiplied out."""

from __future__ import annotations

import dataclasses
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

from bushpc.config import YAML_FAILS, config_names, places
from bushpc.config.read import number
from bushpc.errors import ConfigError, unknown_name

GRID_KEYS = ("title", "base", "generators", "rows", "axes", "exclude", "baseline", "paper")
ROW_KEYS = ("label", "set", "paper", "quoted", "scans")
GENERATOR_KEYS = ("label", "set")
# More is a slip of the pen in an axis; the job arrays of a whole site end somewhere near it.
MOST_CELLS = 20_000
LONGEST_NAME = 120
# Settings that no row may set: a grid trains all folds of every row, in one folder, on one set of patients.
RUN_WIDE = (
    *("fold", "folds", "name", "runs_dir", "data", "data.name", "data.root", "resume_changes"),
    "evaluate.external",
)


@dataclass(frozen=True, kw_only=True)
class GridRow:
    """One condition. name: safe as a folder's name. label: for tables. settings: what sets it apart, key → value.

    printed_as: what the grid's paper calls it. scans: the generator of the same grid whose scans it trains on, too.
    """

    name: str
    label: str
    settings: dict[str, t.Any]
    printed_as: tuple[str, ...] = ()
    scans: str | None = None


@dataclass(frozen=True, kw_only=True)
class QuotedRow:
    """A row of a paper's table that is not run. reason: why. before: the run row below it; None: it is at the end."""

    label: str
    printed_as: tuple[str, ...]
    reason: str
    before: str | None


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A file of configs/grid. base: overrides of every cell. baseline: the row that the others are compared with.

    paper: whose table of rivals it is, as its files in `report/published` begin; quoted: the rows of that which are
    not run. generators: trained first; rows train on the scans that they generate, and they are no rows of the table.
    """

    name: str
    title: str
    base: tuple[str, ...]
    rows: tuple[GridRow, ...]
    baseline: str
    paper: str | None = None
    quoted: tuple[QuotedRow, ...] = ()
    generators: tuple[GridRow, ...] = ()


def load_grid(name: str) -> Grid:
    """Read a grid by its name in `configs/grid`, or the path of a yaml file, and multiply its axes out.

    Raises: ConfigError for whatever cannot be meant.
    """
    path = Path(name) if name.endswith(".yaml") else places.config_file(f"grid/{name}")
    if path is None:
        raise ConfigError(unknown_name("grid", name, config_names("grid"), "Or the path of a .yaml file."))
    try:
        content = yaml.load(path.read_text(), Loader=Unambiguous)
    except YAML_FAILS as error:
        raise ConfigError(f"grid={name}: {path} cannot be read ({error})") from error
    name = _safe(path.stem, f"grid={name}")
    where = f"grid={name}"
    content = _mapping(content, where, GRID_KEYS)
    axes = _axes(content.get("axes"), where)
    paper = _paper(content, where)
    stated = _stated_rows(content, paper, where)
    of_axes = _product(axes, _exclusions(content.get("exclude"), axes, where), where)
    rows = [*of_axes, *(row for row in stated if isinstance(row, GridRow))]
    generators = _generators(content.get("generators"), rows, where)
    names = [row.name for row in rows]
    if not rows:
        raise ConfigError(
            f"{where} has no cells: {'every combination of its axes is excluded' if axes else 'no rows, no axes'}. "
            f"Give it `rows` or `axes`, see configs/grid"
        )
    all_names = [*names, *(generator.name for generator in generators)]
    twice = (
        next((row for row in all_names if all_names.count(row) > 1), None)
        if len(set(all_names)) < len(all_names)
        else None
    )
    if twice:
        raise ConfigError(f"{where}: two rows are called {twice}; each needs a name of its own")
    baseline = content.get("baseline") or names[0]
    if baseline not in names:
        raise ConfigError(f"{where}: {unknown_name('baseline', str(baseline), names)}")
    base = content.get("base") or []
    if not isinstance(base, list) or not all(isinstance(word, str) for word in base):
        raise ConfigError(f"{where}: `base` is a list of overrides, for example [model=xbusnet, train.lr=1e-4]")
    title = content.get("title")
    return Grid(
        name=name,
        title=str(title or name),
        base=tuple(base),
        rows=tuple(rows),
        baseline=str(baseline),
        paper=paper,
        quoted=tuple(row for row in stated if isinstance(row, QuotedRow)),
        generators=generators,
    )


Settings = dict[str, t.Any]


def short_hash(*parts: str) -> str:
    """8 hex digits over the parts, for names of folders."""
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:8]


def _mapping(content: t.Any, where: str, keys: Sequence[str]) -> dict[str, t.Any]:
    if not isinstance(content, dict):
        raise ConfigError(f"{where}: a mapping with {', '.join(keys)} is needed")
    for key in content:
        if key not in keys:
            raise ConfigError(f"{where}: {unknown_name('key', str(key), keys)}")
    return content


def settings_of(content: t.Any, where: str) -> Settings:
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"{where}: a mapping from settings to values is needed, for example {{train.lr: 1.0e-4}}")
    for key in content:
        if key in RUN_WIDE:
            raise ConfigError(f"{where}: {key} is the same for all rows; put it into `base` or on the command line")
    return content


def _paper(content: Mapping[str, t.Any], where: str) -> str | None:
    paper = content.get("paper")
    if paper is None:
        return None
    from bushpc.report.published import PAPERS  # here: reports take a second to import

    if paper not in PAPERS:
        raise ConfigError(f"{where}: {unknown_name('paper', str(paper), PAPERS)}")
    return str(paper)


def _stated_rows(content: Mapping[str, t.Any], paper: str | None, where: str) -> list[GridRow | QuotedRow]:
    rows = content.get("rows") or {}
    if not isinstance(rows, dict):
        raise ConfigError(f"{where}: `rows` is a mapping from each row's name to its `label` and `set`")
    out: list[GridRow | QuotedRow] = []
    below: str | None = None  # from the end, so that a quoted row knows the run row below it
    for name, row in reversed(rows.items()):
        here = f"{where}, row {name}"
        row = _mapping(row, here, ROW_KEYS)
        label = str(row.get("label") or name)
        printed_as = _printed_as(row, label, paper, here)
        if "quoted" in row:
            out.append(_quoted_row(row, label, printed_as, below, here))
            continue
        below = _safe(str(name), where)
        settings = settings_of(row.get("set") or {}, here)
        scans = row.get("scans")
        row_of = GridRow(name=below, label=label, settings=settings, printed_as=printed_as)
        out.append(dataclasses.replace(row_of, scans=_safe(str(scans), here) if scans else None))
    return out[::-1]


def _generators(content: t.Any, rows: Sequence[GridRow], where: str) -> tuple[GridRow, ...]:
    """The grid's generators. Raises: ConfigError also for a row that names another one, and for one without a row."""
    if not isinstance(content or {}, dict):
        raise ConfigError(f"{where}: `generators` is a mapping from each generator's name to its `label` and `set`")
    found = []
    for name, row in (content or {}).items():
        here = f"{where}, generator {name}"
        row = _mapping(row, here, GENERATOR_KEYS)
        settings = settings_of(row.get("set") or {}, here)
        found.append(GridRow(name=_safe(str(name), where), label=str(row.get("label") or name), settings=settings))
    names = [generator.name for generator in found]
    for row in rows:
        if row.scans is not None and row.scans not in names:
            raise ConfigError(f"{where}, row {row.name}, scans: {unknown_name('generator', row.scans, names)}")
    if unused := set(names) - {row.scans for row in rows}:
        raise ConfigError(f"{where}: no row has `scans: {sorted(unused)[0]}`; leave that generator out")
    return tuple(found)


def _quoted_row(
    row: Mapping[str, t.Any], label: str, printed_as: tuple[str, ...], below: str | None, here: str
) -> QuotedRow:
    reason = row["quoted"]
    if "set" in row or not isinstance(reason, str) or not reason.strip():
        raise ConfigError(f"{here}: `quoted` is the reason why the row is not run, as text, in place of `set`")
    if not printed_as:
        raise ConfigError(
            f"{here} is only quoted, but the grid's paper has no row '{label}'. Give the grid its `paper`, and the "
            "row the name that is printed there as `paper`"
        )
    return QuotedRow(label=label, printed_as=printed_as, reason=" ".join(reason.split()), before=below)


def _printed_as(row: Mapping[str, t.Any], label: str, paper: str | None, here: str) -> tuple[str, ...]:
    """What the paper calls a row: what it states, else its label if the paper has such a row."""
    known: tuple[str, ...] = ()
    if paper:
        from bushpc.report.published import names_in

        known = names_in(paper)
    stated = row.get("paper", [])
    names = [stated] if isinstance(stated, str) else stated
    if not isinstance(names, list):
        raise ConfigError(f"{here}: `paper` is the name of the row in the paper's tables, or a list of its names")
    for name in names:
        if name not in known:
            raise ConfigError(f"{here}: {unknown_name('row of the paper', str(name), known)}")
    return tuple(names) or ((label,) if label in known else ())


def _axes(content: t.Any, where: str) -> dict[str, dict[str, Settings]]:
    """Axis → name of each of its values → settings. `train.lr: [1e-4, 3e-4]` is short for the names and settings."""
    axes: dict[str, dict[str, Settings]] = {}
    for axis, values in settings_of(content or {}, f"{where}, axes").items():
        if isinstance(values, dict):
            axes[axis] = {str(k): settings_of(v, f"{where}, axis {axis}, {k}") for k, v in values.items()}
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


class Unambiguous(yaml.SafeLoader):
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


def _spoken(value: t.Any) -> str:
    """A value in a row's name."""
    return value if isinstance(value, str) else json.dumps(value)


def _safe(name: str, where: str) -> str:
    """A row's name as part of a folder's name. Raises: ConfigError where nothing of it is left."""
    safe = re.sub(r"[^A-Za-z0-9._]+", "_", name.replace("-", "_")).strip("._")
    if not safe:
        raise ConfigError(f"{where}: '{name}' cannot name a row; letters or digits are needed")
    # A folder's name ends at 255 bytes, and a fold and a hash are still to come.
    return safe if len(safe) <= LONGEST_NAME else f"{safe[:LONGEST_NAME]}_{short_hash(safe)}"


Unambiguous.add_constructor("tag:yaml.org,2002:timestamp", Unambiguous.construct_date)
for kind in ("int", "float"):  # 010 and 2026_11 are numbers to yaml, and text where the setting is text
    Unambiguous.add_constructor(f"tag:yaml.org,2002:{kind}", lambda _, node: number(node.value))
