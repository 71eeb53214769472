"""`bushpc reproduce PAPER`: a paper's tables as steps, each of them one of bushpc's commands.

    configs/reproduce/<paper>.yaml ─load_paper→ steps ─look_at→ data, weights, GPU hours, what is missing
                                                      ─run_steps→ runs, one after another where they depend ─→ one page

A step's run has a name of its own, so the same command again does what is left.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import typing as t
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bushpc import environment, weights
from bushpc.config import YAML_FAILS, CellConfig, Composer, config_names, places
from bushpc.config.paper_splits import SOURCES, split_of
from bushpc.config.read import load_yaml
from bushpc.data.members import steps_of
from bushpc.dispatch.chains import TO_COME
from bushpc.dispatch.grid_file import load_grid
from bushpc.dispatch.grid_words import is_of_rows, of_rows
from bushpc.dispatch.status import read_status
from bushpc.dispatch.step_time import StepTime, step_time
from bushpc.errors import BushpcError, ConfigError, DataError, unknown_name
from bushpc.runs.layout import RunDir
from bushpc.shards.card import Card
from bushpc.shards.manifest import Manifest
from bushpc.shards.paper_split import draw_split
from bushpc.shards.split import FOLDS, find_folds, load_folds

STEP_KEYS = ("what", "command")
COMMANDS = ("cv", "grid", "export")
REFERENCE = re.compile(r"\{(run|export):([a-z0-9_]+)\}")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command of a paper. command: with references `{run:STEP}` and `{export:NAME}`."""

    name: str
    what: str
    command: tuple[str, ...]

    @property
    def references(self) -> list[tuple[str, str]]:
        """What the command names: (`run`, a step) or (`export`, a folder that another step writes)."""
        return REFERENCE.findall(" ".join(self.command))


@dataclass(frozen=True, kw_only=True)
class Paper:
    """A file of configs/reproduce.

    given: its name or path, for another call. words: settings that are added to every training command; they win.
    """

    name: str
    given: str
    title: str
    steps: tuple[Step, ...]
    words: tuple[str, ...] = ()

    @property
    def runs_dir(self) -> Path:
        """Where all its runs lie."""
        given = [word.partition("=")[2] for word in self.words if word.startswith("runs_dir=")]
        return Path(given[-1]).expanduser().resolve() if given else places.home() / "runs"

    def run_dir(self, step: str) -> Path:
        """The run of a step."""
        return self.runs_dir / f"reproduce-{self.name}-{step}"

    def command(self, step: Step) -> list[str]:
        """The words of `bushpc …`, with folders in place of references."""
        words = [REFERENCE.sub(lambda found: str(self._folder(*found.groups())), word) for word in step.command]
        if step.command[0] == "export":
            return words
        return [*words, *self.words, f"name={self.run_dir(step.name).name}"]

    def needed(self, step: Step) -> list[Step]:
        """The steps whose results this one reads."""
        makers = {}
        for other in self.steps:
            makers["run", other.name] = other
            if other.command[0] == "export":
                makers |= {found: other for found in other.references if found[0] == "export"}
        return [makers[found] for found in step.references if makers[found] is not step]

    def _folder(self, kind: str, name: str) -> Path:
        return self.run_dir(name) if kind == "run" else self.runs_dir / f"reproduce-{self.name}-exports" / name


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a step needs and where it stands.

    state: done, live (its jobs are queued or run), waits (for other steps), missing (something is not at hand), ready.
    cells: trainings. data, weight_files: by name, whether they are at hand. gpu_hours: of the cells whose step time is
    known; unknown: how many cells are not in it. sources: what it follows from. missing: what to do, a sentence each.
    """

    step: Step
    command: list[str]
    state: str
    cells: int = 0
    data: dict[str, bool] = field(default_factory=dict)
    weight_files: dict[str, bool] = field(default_factory=dict)
    gpu_hours: float = 0.0
    unknown: int = 0
    sources: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        """The command as it is typed."""
        return shlex.join(["bushpc", *self.command])


def load_paper(name: str, words: Sequence[str] = ()) -> Paper:
    """Read configs/reproduce/<name>.yaml, or a yaml file by its path. Raises: ConfigError if it cannot be meant."""
    path = Path(name) if name.endswith(".yaml") else places.config_file(f"reproduce/{name}")
    if path is None:
        raise ConfigError(unknown_name("paper", name, config_names("reproduce"), "Or the path of a .yaml file."))
    try:
        content = load_yaml(path.read_text())
        steps = tuple(
            Step(name=str(step), what=str(each["what"]), command=tuple(map(str, each["command"])))
            for step, each in content["steps"].items()
        )
        given = str(path.resolve()) if name.endswith(".yaml") else name
        paper = Paper(name=path.stem, given=given, title=str(content["title"]), steps=steps, words=tuple(words))
    except (*YAML_FAILS, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path}: `title` and `steps` are needed, each step with {' and '.join(STEP_KEYS)} ({error!r})"
        ) from error
    for step in steps:
        if not step.command or step.command[0] not in COMMANDS:
            raise ConfigError(f"{path}, step {step.name}: the command must be one of {', '.join(COMMANDS)}")
        try:
            paper.needed(step)
        except KeyError as error:
            raise ConfigError(f"{path}, step {step.name}: no step makes {error.args[0]}") from error
    for word in words:
        if word.partition("=")[0] in ("name", "grid", "model", "data", "folds"):
            raise ConfigError(f"{word}: the steps of {path.name} say this themselves; edit a copy of that file instead")
    return paper


def look_at(paper: Paper) -> list[Found]:
    """Every step: what it needs, and what of that is missing. Writes nothing."""
    found: dict[str, Found] = {}
    for step in paper.steps:
        found[step.name] = _look_at(paper, step, [found[each.name] for each in paper.needed(step)])
    return list(found.values())


def run_steps(paper: Paper, say: t.Callable[[str], None]) -> list[Found]:
    """Run every step that is ready, as its own command would. Returns what is found afterwards.

    Raises: ConfigError if a command fails; what it says has been printed by then.
    """
    for step in paper.steps:
        now = _look_at(paper, step, [_look_at(paper, each, ()) for each in paper.needed(step)])
        if now.state != "ready":
            continue
        say(now.line)
        command = [sys.executable, "-m", "bushpc.cli", *now.command]
        status = subprocess.run(command, env=environment.for_process(environment.WORKER)).returncode
        if status not in (0, 1):
            raise ConfigError(f"step {step.name} of {paper.name} was not started, see above: {now.line}")
    return look_at(paper)


def _look_at(paper: Paper, step: Step, before: Iterable[Found]) -> Found:
    command, waits = paper.command(step), [each.step.name for each in before if each.state != "done"]
    if step.command[0] == "export":
        done = (Path(command[2]) / "export.json").exists()
        return Found(step=step, command=command, state="done" if done else "waits" if waits else "ready")
    run = RunDir(paper.run_dir(step.name))
    state = "waits" if waits else "ready"
    if run.file.exists():
        status = read_status(run.path, only_show=True)
        live = any(cell.live for cell in status.cells)
        state = "done" if status.complete else "live" if live else state
    try:
        cells = _cells(command)
    except BushpcError as error:
        return Found(step=step, command=command, state=_or_missing(state), missing=(str(error),))
    first = cells[0]
    data, missing = _data(first)
    weight_files: dict[str, bool] = {}
    for cell in cells:
        missing += _weights(cell, weight_files, waits)
    hours, unknown, sources = 0.0, 0, []
    count = _folds(first)
    for cell in cells:
        if time := step_time(cell, paper.runs_dir):
            hours += _hours(cell, time, count)
            sources.append(time.source)
        else:
            unknown += count
            sources.append(f"not known for {cell.choices['model']} as set in {step.name}")
    return Found(
        step=step,
        command=command,
        state=_or_missing(state) if missing else state,
        cells=len(cells) * count,
        data=data,
        weight_files=weight_files,
        gpu_hours=hours,
        unknown=unknown,
        sources=tuple(dict.fromkeys(sources)),
        missing=tuple(dict.fromkeys(missing)),
    )


def _or_missing(state: str) -> str:
    return state if state in ("done", "live") else "missing"


def _cells(command: Sequence[str]) -> list[CellConfig]:
    """The settings of every row, without a fold. Raises: ConfigError."""
    words = [word for word in command[1:] if not (word.startswith(("-", "grid=")) or is_of_rows(word))]
    if command[0] == "cv":
        return [Composer(words)({})]
    name = next(word.partition("=")[2] for word in command if word.startswith("grid="))
    if not name.endswith(".yaml") and places.config_file(f"grid/{name}") is None:
        raise ConfigError(f"grid {name}: there is no configs/grid/{name}.yaml in this version of bushpc")
    grid = of_rows(load_grid(name), [word for word in command if is_of_rows(word)])
    composer = Composer([*grid.base, *words])
    to_come = {"data.synthetic": TO_COME}
    rows = [row.settings | (to_come if row.scans else {}) for row in grid.rows]
    # The first one says which data the step needs.
    return [composer(settings) for settings in (*rows, *(row.settings for row in grid.generators))]


def _data(cell: CellConfig) -> tuple[dict[str, bool], list[str]]:
    """Of the dataset and those of the external test."""
    folders = {cell.data.name: cell.data.folder, **{Path(each).name: Path(each) for each in cell.evaluate.external}}
    there, missing = {}, []
    for name, folder in folders.items():
        try:
            manifest = Manifest.load(folder)
            there[name] = True
            if name == cell.data.name and (split := split_of(cell.folds, name)):
                draw_split(manifest.records, split)
            elif name == cell.data.name:
                find_folds(manifest, folder, cell.folds)
        except DataError as error:
            if there.setdefault(name, False):
                missing.append(str(error))
            else:
                out = "" if folder == places.home() / "shards" / name else f" out={folder}"
                missing.append(f"data {name}: {_where(name)}; then: bushpc pack data={name} src=FOLDER{out}")
    return there, missing


def _where(name: str) -> str:
    try:
        card = Card.find(name, places.home() / "shards" / name)
    except DataError:
        return "not packed"
    return f"download it from {card.where}" if card.where else "made here"


def _weights(cell: CellConfig, known: dict[str, bool], waits: Sequence[str]) -> list[str]:
    """Reasons why a cell's weights are not there. known: file → whether it is staged; takes what is found."""
    folder = cell.weights_folder
    try:
        for file in cell.model.weight_files():
            known[file.name] = (Path(folder) / file.name).is_file()
        lacking = [file.name for file in cell.model.weight_files() if not known[file.name]]
    except ConfigError as error:
        return [] if waits else [str(error)]
    if not lacking:
        return []
    return [f"weights {', '.join(lacking)}: {weights.pull_command(cell.model_class, cell.model, folder)}"]


def _folds(cell: CellConfig) -> int:
    if cell.fold is not None or cell.folds in SOURCES:
        return 1
    try:
        manifest = Manifest.load(cell.data.folder)
        path = find_folds(manifest, cell.data.folder, cell.folds)
        return load_folds(path, manifest.records, manifest.excerpt, normals=cell.data.normals).count
    except DataError:
        return FOLDS


def _hours(cell: CellConfig, time: StepTime, folds: int) -> float:
    """GPU hours of the training steps of all folds; evaluation and start are not in it."""
    images = steps_of(cell.train, _train_scans(cell, folds)) * cell.train.batch_size
    return folds * images * time.image_s / 3600


def _train_scans(cell: CellConfig, folds: int) -> int:
    """About how many scans train in a fold."""
    counts: Mapping[str, int]
    try:
        counts = Counter(record.label for record in Manifest.load(cell.data.folder).records)
    except DataError:
        counts = Card.find(cell.data.name, cell.data.folder).counts
    if (split := split_of(cell.folds, cell.data.name)) and split.counts:
        return split.counts[0]
    scans = sum(count for label, count in counts.items() if cell.data.normals or label != "normal")
    return round(scans * (1 - 1 / max(folds, FOLDS if folds == 1 else folds)))
