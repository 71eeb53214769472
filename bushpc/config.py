"""Hydra yaml + overrides → one typed, frozen `CellConfig` per training run. Every command starts here.

`configs/` documents each field where it stands; the dataclasses below give each its type. A name, key or value
that cannot work is refused here, on the login node, before anything is queued.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import json
import math
import os
import re
import sys
import types
import typing as t
from dataclasses import dataclass
from pathlib import Path

import yaml

from bushpc.errors import ConfigError, unknown_name
from bushpc.metrics.names import ALWAYS, LABEL_METRICS, METRICS
from bushpc.sample import LABELS

if t.TYPE_CHECKING:
    from bushpc.models.base import Model, ModelConfig

Settings = t.TypeVar("Settings")
ROOT = Path(__file__).resolve().parents[1]
CONFIG_DIR = ROOT / "configs"
GROUPS = ("data", "model", "engine", "cluster")
ENGINES = ("ddp", "zero1", "zero2", "zero3")
SCHEDULES = ("cosine", "constant", "plateau")
# Tools that show curves, and how each is installed.
TOOLS = {"tensorboard": "tensorboard", "wandb": "'bushpc[wandb]'", "mlflow": "'bushpc[mlflow]'"}
PROMPT_SOURCES = ("first_pass", "oracle", "none", "wrong_size", "wrong_quadrant", "shuffled_attributes")
# What a cell learns does not depend on these, so they are not part of its hash and may change on resume.
NOT_HASHED = (
    *("name", "runs_dir", "weights_dir", "cluster", "loader", "choices", "data.root", "evaluate.batch_size"),
    "data.synthetic",  # where its images lie; what they are is data.synthetic_sha256
    "evaluate.explain",
    *("train.save_every", "train.keep", "train.keep_every", "train.keep_best", "train.log_every"),
    *("train.validate_every", "train.track", "engine.recompute", "engine.hang_s", "data.stream"),
    "resume_changes",
    # Only weights are taken whose training had the very settings of the cell that takes them.
    "train.weights_from",
)
# Predictions depend on these and on a model's `prediction_fields`; what training comes to does not.
OF_PREDICTION = ("prompts", "also_prompts", "prompting.tau", "evaluate")
# Which samples a step takes follows from these, and a checkpoint stands at a step: no run may go on with others.
ORDER = (
    *("seed", "train.batch_size", "loader.lanes"),
    *("data.synthetic_sha256", "data.synthetic_ratio", "data.real"),
)


# What reading YAML that is not what it should be raises.
YAML_FAILS = (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError, yaml.YAMLError)
# libyaml's where PyYAML was built with it: ten times as fast, and a grid has a thousand configs.
YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
YAML_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
# So deep a file may be nested at most for libyaml, which takes the process with it where its stack ends.
DEEP = 500
MOST_INT = 2**63
FOLDER_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
# Characters of a wrong value in a message.
MOST_SHOWN = 200


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    iterations: int
    epochs: int | None
    batch_size: int
    accumulate: int
    balance: bool
    lr: float
    schedule: str
    plateau_factor: float
    plateau_patience: int
    stop_patience: int
    holdout: float
    weight_decay: float
    warmup: int
    grad_clip: float
    ema: float
    save_every: int
    keep: int
    keep_every: int
    keep_best: str | None
    log_every: int
    track: tuple[str, ...]
    validate_every: int
    weights_from: str | None

    def __post_init__(self) -> None:
        for name in ("iterations", "batch_size", "accumulate", "save_every", "keep", "log_every"):
            _require(getattr(self, name) >= 1, f"train.{name}={getattr(self, name)}", "1 or more")
        for name in ("warmup", "grad_clip", "validate_every", "weight_decay", "keep_every"):
            _require(getattr(self, name) >= 0, f"train.{name}={getattr(self, name)}", "0 or more")
        _require(self.epochs is None or self.epochs >= 1, f"train.epochs={self.epochs}", "1 or more, or null")
        _require(0 <= self.ema < 1, f"train.ema={self.ema}", "0 (off) to below 1")
        if self.schedule not in SCHEDULES:
            raise ConfigError(unknown_name("train.schedule", self.schedule, SCHEDULES))
        _require(0 < self.plateau_factor < 1, f"train.plateau_factor={self.plateau_factor}", "between 0 and 1")
        _require(self.plateau_patience >= 1, f"train.plateau_patience={self.plateau_patience}", "1 or more")
        _require(self.stop_patience >= 0, f"train.stop_patience={self.stop_patience}", "0 (off) or more")
        _require(0 <= self.holdout <= 0.5, f"train.holdout={self.holdout}", "0 (none) to 0.5")
        if self.tuned != bool(self.holdout):
            raise ConfigError(
                f"train.holdout={self.holdout} with train.schedule={self.schedule} and train.stop_patience="
                f"{self.stop_patience}: a part of the training samples is held out exactly where something watches "
                "its loss; set train.holdout=0.2 with train.schedule=plateau or train.stop_patience, else 0"
            )
        for tool in self.track:
            if tool not in TOOLS:
                raise ConfigError(unknown_name("tool in train.track", tool, TOOLS))
        if self.keep_best is not None and self.keep_best not in METRICS:
            raise ConfigError(unknown_name("train.keep_best", self.keep_best, METRICS))
        if self.keep_best is not None and not self.validate_every:
            raise ConfigError(
                f"train.keep_best={self.keep_best} needs validations during training: set train.validate_every"
            )
        _require(0 < self.lr < math.inf, f"train.lr={self.lr}", "a number above 0")

    @property
    def tuned(self) -> bool:
        """Whether learning rate or length follow the loss on samples that are held out of training."""
        return self.schedule == "plateau" or self.stop_patience > 0


@dataclass(frozen=True, kw_only=True)
class PromptingConfig:
    spatial_dropout: float
    size_quantiles: tuple[float, ...]
    tau: float

    def __post_init__(self) -> None:
        _require(0 <= self.spatial_dropout <= 1, f"prompting.spatial_dropout={self.spatial_dropout}", "0 to 1")
        _require(0 < self.tau < 1, f"prompting.tau={self.tau}", "between 0 and 1")
        low_high = self.size_quantiles
        _require(
            len(low_high) == 2 and 0 < low_high[0] < low_high[1] < 1,
            f"prompting.size_quantiles={list(low_high)}",
            "two rising numbers between 0 and 1",
        )


@dataclass(frozen=True, kw_only=True)
class StrengthConfig:
    benign: float
    malignant: float
    normal: float

    def __post_init__(self) -> None:
        for label in LABELS:
            given = getattr(self, label)
            _require(0 <= given <= 1, f"augment.strength.{label}={given}", "0 (unchanged) to 1")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    hflip: float
    rotate: float
    zoom: float
    brightness: float
    contrast: float
    strength: StrengthConfig
    variants: int

    def __post_init__(self) -> None:
        _require(self.variants >= 0, f"augment.variants={self.variants}", "0 (a new change every time) or more")
        for name in ("hflip", "brightness", "contrast"):
            _require(0 <= getattr(self, name) <= 1, f"augment.{name}={getattr(self, name)}", "0 to 1")
        _require(0 <= self.zoom < 1, f"augment.zoom={self.zoom}", "0 to below 1")
        _require(0 <= self.rotate <= 180, f"augment.rotate={self.rotate}", "0 to 180 degrees")

    @property
    def changes(self) -> bool:
        """Whether scans of any label are changed at all."""
        strongest = max(self.strength.benign, self.strength.malignant, self.strength.normal)
        return bool(strongest * max(self.hflip, self.rotate, self.zoom, self.brightness, self.contrast))


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    metrics: tuple[str, ...]
    threshold: float
    nsd_mm: float
    nsd_px: float
    batch_size: int
    explain: int
    external: tuple[str, ...]

    def __post_init__(self) -> None:
        names = self.external_names
        for name in names:
            if not re.fullmatch(FOLDER_NAME, name) or names.count(name) > 1:
                raise ConfigError(
                    f"evaluate.external={list(self.external)}: the last part of each is its name in the tables, of "
                    "letters, digits, '.', '_' and '-', and each name stands for one dataset"
                )
        for metric in self.metrics:
            if metric not in METRICS:
                raise ConfigError(unknown_name("metric in evaluate.metrics", metric, METRICS))
        _require(len(set(self.metrics)) == len(self.metrics) > 0, f"evaluate.metrics={list(self.metrics)}", "each once")
        for name in ("nsd_mm", "nsd_px"):
            _require(0 < getattr(self, name) < math.inf, f"evaluate.{name}={getattr(self, name)}", "more than 0")
        _require(0 < self.threshold < 1, f"evaluate.threshold={self.threshold}", "between 0 and 1")
        _require(self.batch_size >= 1, f"evaluate.batch_size={self.batch_size}", "1 or more")
        _require(self.explain >= 0, f"evaluate.explain={self.explain}", "0 (off) or more")

    @property
    def external_names(self) -> list[str]:
        """What the datasets of `external` are called."""
        return [Path(given).name for given in self.external]


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    workers: int
    cache_dir: str | None
    cache_gb: float
    features: bool
    features_dir: str | None
    lanes: int

    def __post_init__(self) -> None:
        _require(self.workers >= 0, f"loader.workers={self.workers}", "0 or more")
        _require(self.cache_gb > 0, f"loader.cache_gb={self.cache_gb}", "more than 0")
        _require(self.lanes >= 1, f"loader.lanes={self.lanes}", "1 or more")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    name: str
    root: str | None
    stream: str | None
    normals: bool
    synthetic: str | None
    synthetic_sha256: str | None
    synthetic_ratio: float | None
    real: bool

    def __post_init__(self) -> None:
        _require(self.stream != "", "data.stream=''", "a URL, a folder with '/' at its end, a pipe: command, or null")
        _require(self.synthetic != "", "data.synthetic=''", "a folder that `bushpc generate` wrote, or null")
        ratio = self.synthetic_ratio
        _require(ratio is None or 0 <= ratio < math.inf, f"data.synthetic_ratio={ratio}", "0 or more")
        if ratio and self.synthetic is None:
            raise ConfigError(
                f"data.synthetic_ratio={ratio:g} without data.synthetic: set that to a folder that `bushpc generate` "
                "wrote"
            )
        if not self.real and not self.mixed:
            raise ConfigError(
                f"data.real=false with data.synthetic={self.synthetic or 'null'} and data.synthetic_ratio={ratio}: "
                "nothing is left to train on; set data.synthetic to a folder that `bushpc generate` wrote and the "
                "ratio above 0, or data.real=true"
            )
        if self.mixed and self.stream:
            raise ConfigError(
                "data.synthetic with data.stream: a stream delivers one dataset; read the shards from data.root "
                "instead, or set data.synthetic=null"
            )

    @property
    def folder(self) -> Path:
        """The folder with card, folds, tars and manifest."""
        return Path(self.root).expanduser().resolve() if self.root else ROOT / "shards" / self.name

    @property
    def mixed(self) -> bool:
        """Whether synthetic scans train."""
        return self.synthetic is not None and self.synthetic_ratio != 0


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    kind: str
    device: str
    precision: str
    deterministic: bool
    compile: bool
    channels_last: bool
    recompute: bool
    hang_s: float

    def __post_init__(self) -> None:
        valid_words = {
            "kind": ENGINES,
            "device": ("cpu", "cuda", "auto"),
            "precision": ("fp32", "bf16", "fp16", "auto"),
        }
        for name, valid in valid_words.items():
            if getattr(self, name) not in valid:
                raise ConfigError(unknown_name(f"engine.{name}", getattr(self, name), valid))
        if self.compile and self.recompute:
            raise ConfigError(
                "engine.compile=true with engine.recompute=true: torch.compile cannot trace what is computed again; "
                "set one of them"
            )
        _require(self.hang_s >= 0, f"engine.hang_s={self.hang_s}", "0 (off) or more")


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    executor: str
    nodes: int
    ranks_per_node: int
    gpus_per_node: int
    cpus_per_rank: int
    parallel: int
    cells_per_job: int
    time_min: int
    stop_lead_s: int
    grace_s: float | None
    report_time_min: int
    mem_gb: int | None
    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    setup: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.executor not in ("local", "slurm"):
            raise ConfigError(unknown_name("cluster.executor", self.executor, ("local", "slurm")))
        at_least_1 = ("nodes", "ranks_per_node", "cpus_per_rank", "cells_per_job", "time_min", "stop_lead_s")
        for name in (*at_least_1, "report_time_min"):
            _require(getattr(self, name) >= 1, f"cluster.{name}={getattr(self, name)}", "1 or more")
        for name in ("gpus_per_node", "parallel"):
            _require(getattr(self, name) >= 0, f"cluster.{name}={getattr(self, name)}", "0 or more")
        _require(self.grace_s is None or self.grace_s > 0, f"cluster.grace_s={self.grace_s}", "more than 0, or null")
        if self.executor == "local" and self.nodes > 1:
            raise ConfigError(f"cluster.nodes={self.nodes}: the local executor has one machine; use cluster=slurm")
        if self.cells_per_job > 1 and self.world_size > 1:
            raise ConfigError(
                f"cluster.cells_per_job={self.cells_per_job} with {self.world_size} ranks per cell: only cells of one "
                "rank share a job; set cluster.nodes=1 and cluster.ranks_per_node=1, or cluster.cells_per_job=1"
            )
        if self.gpus_per_node and self.gpus_per_node != self.ranks_per_node:
            raise ConfigError(
                f"cluster.gpus_per_node={self.gpus_per_node} with cluster.ranks_per_node={self.ranks_per_node}: "
                "each rank drives one GPU, so set both to the same number"
            )

    @property
    def world_size(self) -> int:
        """Ranks of one cell."""
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True, kw_only=True)
class CellConfig:
    """One training run, fully composed. `to_dict` and `from_dict` are inverse; `hash` names what it will learn."""

    name: str | None
    runs_dir: str | None
    weights_dir: str | None
    resume_changes: tuple[str, ...]
    seed: int
    folds: str
    fold: int | None
    prompts: str
    also_prompts: tuple[str, ...]
    model_class: type[Model]
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    prompting: PromptingConfig
    augment: AugmentConfig
    evaluate: EvaluateConfig
    loader: LoaderConfig
    engine: EngineConfig
    cluster: ClusterConfig
    choices: dict[str, str]

    def __post_init__(self) -> None:
        if self.name is not None and not re.fullmatch(FOLDER_NAME, self.name):
            raise ConfigError(f"name={self.name!r}: a folder name of letters, digits, '.', '_' and '-' is needed")
        if self.folds not in ("frozen", "published", "grouped"):
            raise ConfigError(unknown_name("folds", self.folds, ("frozen", "published", "grouped")))
        for source in (self.prompts, *self.also_prompts):
            if source not in PROMPT_SOURCES:
                raise ConfigError(unknown_name("prompt source", source, PROMPT_SOURCES))
        for key in self.resume_changes:
            if key not in self.settings:
                raise ConfigError(unknown_name("setting in resume_changes", key, self.settings))
            if key in ORDER:
                raise ConfigError(f"resume_changes=[{key}]: {way_on([key])}")
        if self.engine.recompute and not self.model_class.blocks:
            raise ConfigError(
                f"engine.recompute=true: {self.model_class.__name__} names no blocks that could be computed again; "
                "set engine.recompute=false"
            )
        shares = self.cluster.world_size * self.train.accumulate
        if self.train.batch_size % shares:
            raise ConfigError(
                f"train.batch_size={self.train.batch_size} cannot be shared by {self.cluster.world_size} ranks "
                f"(cluster.nodes x cluster.ranks_per_node) in train.accumulate={self.train.accumulate} parts each: "
                f"make it a multiple of {shares}"
            )
        self._check_keep_best()
        if self.loader.features:
            self._check_features()
        if self.train.tuned and not self.data.real:
            raise ConfigError(
                f"data.real=false with train.holdout={self.train.holdout}: the held-out scans are real ones, and this "
                "model is to see none; take a schedule that follows no loss (train.schedule=cosine, "
                "train.stop_patience=0, train.holdout=0)"
            )
        if self.data.stream:
            if self.train.balance:
                raise ConfigError(
                    "train.balance=true with data.stream: a stream delivers each sample once an epoch; read the shards "
                    "from data.root instead, or set train.balance=false"
                )
            self._check_lanes()

    def _check_keep_best(self) -> None:
        """A metric that no validation has would keep no checkpoint, and nobody would hear of it."""
        best, name = self.train.keep_best, self.model_class.__name__
        if best in LABEL_METRICS and "class_prob_BL" not in self.model_class.makes:
            raise ConfigError(f"train.keep_best={best}: {name} tells no labels apart; choose a metric of masks")
        if best is not None and best not in (*ALWAYS, *LABEL_METRICS, *self.evaluate.metrics):
            raise ConfigError(
                f"train.keep_best={best}: no validation measures it; add it to evaluate.metrics, which are "
                f"{', '.join(self.evaluate.metrics)}"
            )

    def _check_features(self) -> None:
        """What is computed once must be the same whenever it is asked for."""
        name = self.model_class.__name__
        if not self.model_class.feature_settings(self.model):
            raise ConfigError(
                f"loader.features=true: {name} as it is configured has no frozen part whose outputs could be kept; set "
                "loader.features=false"
            )
        if self.data.stream:
            raise ConfigError("loader.features=true with data.stream: a stream is read once; set one of them")
        if self.augment.changes and not self.augment.variants:
            raise ConfigError(
                "loader.features=true with augment.variants=0: each image is changed anew each time, and what "
                f"{name}'s frozen part makes of it cannot be kept. Set augment.variants to a number of fixed changes "
                "per sample, such as 4, or switch augment off, or set loader.features=false"
            )

    def _check_lanes(self) -> None:
        """A lane belongs to one rank, and gives equally many samples to every step."""
        ranks, batch_size, lanes = self.cluster.world_size, self.train.batch_size, self.loader.lanes
        if lanes % ranks or batch_size % lanes:
            valid = [str(count) for count in range(ranks, batch_size + 1, ranks) if batch_size % count == 0]
            raise ConfigError(
                f"loader.lanes={lanes} with data.stream: the {ranks} rank(s) must divide it and it must divide "
                f"train.batch_size={batch_size}; here that allows {', '.join(valid)}"
            )

    @property
    def weights_folder(self) -> str:
        """`weights_dir` as composition settled it."""
        assert self.weights_dir is not None, "composition sets it"
        return self.weights_dir

    @property
    def run_dir(self) -> Path:
        """The run's folder, once dispatch has named the run."""
        assert self.runs_dir is not None, "composition sets it"
        assert self.name is not None, "dispatch sets it"
        return Path(self.runs_dir) / self.name

    @property
    def prompt_sources(self) -> list[str]:
        """Prompt sources to evaluate, headline first, each as what it comes to for what this model reads.

        So a model that reads no prompt has only `none`. One that reads no attribute prompts has no
        `shuffled_attributes`, one that reads no spatial prompts has `none` and, where it was asked for, that.
        """
        needs = self.model_class.needs(self.model)

        def comes_to(source: str) -> str:
            if source == "shuffled_attributes" and "attribute_prompts" not in needs:
                source = "first_pass"
            if source != "shuffled_attributes" and "spatial_prompts" not in needs:
                source = "none"
            return source

        return list(dict.fromkeys(comes_to(source) for source in (self.prompts, *self.also_prompts)))

    @functools.cached_property
    def hash(self) -> str:
        """12 hex digits over everything that determines the result."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def settings(self) -> dict[str, t.Any]:
        """Every setting that determines the result, as `train.lr` → value."""
        settings = flat(self.to_dict())
        hashed = {k: v for k, v in settings.items() if k not in NOT_HASHED and k.split(".")[0] not in NOT_HASHED}
        # A stream's order depends on its lanes, not on where it comes from; without a stream there are none.
        hashed["loader.lanes"] = self.loader.lanes if self.data.stream else None
        if not self.data.mixed:
            hashed |= {"data.synthetic_sha256": None, "data.synthetic_ratio": None}
        hashed["evaluate.external"] = self.evaluate.external_names  # wherever they lie
        # Where epochs are counted, each fold's number of steps follows from them.
        return hashed | ({"train.iterations": None} if self.train.epochs else {})

    @property
    def training_hash(self) -> str:
        """As `hash`, over what the trained weights depend on: cells in which it is the same may share a training."""
        of_training = {key: value for key, value in self.settings.items() if not self._is_of_prediction(key)}
        return hashlib.sha256(json.dumps(of_training, sort_keys=True).encode()).hexdigest()[:12]

    def unlike(self, trained: t.Mapping[str, t.Any]) -> list[str]:
        """In what this cell's training differs from one with these `settings`: `train.lr: 0.0001 → 0.0003` each."""
        return [line for line in _changes(trained, self.settings) if not self._is_of_prediction(line.partition(":")[0])]

    def _is_of_prediction(self, key: str) -> bool:
        group, _, name = key.partition(".")
        return (
            key in OF_PREDICTION
            or group in OF_PREDICTION
            or (group == "model" and name in self.model_class.prediction_fields)
        )

    def to_dict(self) -> dict[str, t.Any]:
        """Plain data in the layout of the yaml files."""
        out = _plain({f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "model_class"})
        out["model"] = {"_target_": f"{self.model_class.__module__}.{self.model_class.__name__}", **out["model"]}
        return out

    def to_yaml(self) -> str:
        """The frozen `config.yaml` of a run directory."""
        return yaml.dump(self.to_dict(), Dumper=YAML_DUMPER, sort_keys=False)

    @classmethod
    def from_dict(cls, content: t.Mapping[str, t.Any]) -> CellConfig:
        """Build and check. Raises: ConfigError for an unknown key, a wrong type or an impossible combination."""
        if not isinstance(content, t.Mapping) or not isinstance(content.get("model", {}), t.Mapping):
            raise ConfigError("expected a group of settings, and in it another one named `model`")
        content = dict(content)
        model_class, model = model_of(content.pop("model", {}))
        return cls(model_class=model_class, model=model, **_build(cls, content, "", skip=("model_class", "model")))

    @classmethod
    def load(cls, path: Path) -> CellConfig:
        """Read a frozen `config.yaml`. Raises: ConfigError also where it is missing or damaged."""
        try:
            content = _load_yaml(path.read_text())
        except YAML_FAILS as error:
            raise ConfigError(
                f"{path} cannot be read ({type(error).__name__}: {error}). It was written when the run was submitted: "
                "move it away and submit again"
            ) from error
        return cls.from_dict(content)


def model_of(content: t.Mapping[str, t.Any]) -> tuple[type[Model], ModelConfig]:
    """The model's class and settings from the group `model` of a config, `_target_` included. Raises: ConfigError."""
    content = dict(content)
    model_class = _model_class(content.pop("_target_", None))
    return model_class, _build_instance(model_class.Config, content, "model.")


def load_frozen(path: Path, run_dir: Path, command: str) -> CellConfig:
    """A frozen `config.yaml` of a run. command: what else goes on with that run, by the code that lies in it.

    Raises: ConfigError with that way on where another version of bushpc wrote it.
    """
    try:
        return CellConfig.load(path)
    except ConfigError as error:
        codes = sorted((run_dir / "code").glob("*"), key=lambda code: code.stat().st_mtime)
        # Not by PYTHONPATH: `python -m` looks into the current folder first, which may be a clone.
        way_on = f"(cd {codes[-1]} && {sys.executable} -m bushpc.cli {command})" if codes else "none"
        raise ConfigError(
            f"{path} is no config of this version of bushpc ({error}). With the version that wrote it the run goes on: "
            f"{way_on}. Or start anew under another name=…"
        ) from error


def compose(overrides: t.Sequence[str]) -> CellConfig:
    """Compose `configs/` with Hydra-style overrides into one checked config.

    Raises: ConfigError naming the nearest valid group, option or key for anything unknown.
    """
    return Composer(overrides)({})


class Composer:
    """Overrides that many cells share → cells. Hydra takes a third of a second, and is asked once per choice of groups.

    overrides: as on the command line; a later word wins. Raises: ConfigError, as `compose` does.
    """

    def __init__(self, overrides: t.Sequence[str]) -> None:
        self.overrides = tuple(overrides)
        self._chosen = {group: _group_choice(overrides, group) for group in GROUPS}
        self._composed: dict[tuple[str, ...], tuple[set[str], dict[str, t.Any]]] = {}

    def __call__(self, settings: t.Mapping[str, t.Any]) -> CellConfig:
        """The cell with `settings` besides, as `train.lr` → value, or a group → one of its names; they win.

        Raises: ConfigError.
        """
        groups = {key: _group_choice([f"{key}={value}"], key) for key, value in settings.items() if key in GROUPS}
        chosen = self._chosen | groups
        valid, content = self._compose(chosen)
        content = copy.deepcopy(content)
        for key, value in settings.items():
            if key in GROUPS:
                continue
            if key not in valid:
                raise ConfigError(unknown_name("setting", key, valid))
            *path, last = key.split(".")
            group = content
            for name in path:
                group = group[name]
            group[last] = value
        content["choices"] = chosen
        return _resolve(CellConfig.from_dict(content))

    def _compose(self, chosen: t.Mapping[str, str]) -> tuple[set[str], dict[str, t.Any]]:
        """Valid keys under this choice of groups, and the settings that the overrides give them."""
        groups = tuple(f"{group}={choice}" for group, choice in chosen.items())
        if groups not in self._composed:
            values = [word for word in self.overrides if word.partition("=")[0] not in GROUPS]
            valid = _leaf_keys(_hydra_compose(list(groups)))
            for word in values:
                key, equals, _ = word.partition("=")
                if not equals:
                    raise ConfigError(f"'{word}' is not an override: write key=value, for example train.lr=3e-4")
                if key not in valid:
                    raise ConfigError(unknown_name("setting", key, sorted(valid)))
            self._composed[groups] = valid, _hydra_compose([*groups, *values])
        return self._composed[groups]


def reconfigure(cell: CellConfig, overrides: t.Sequence[str], kept: t.Mapping[str, t.Any]) -> CellConfig:
    """A frozen cell with these overrides, which may choose another cluster profile. kept: wins over that profile.

    Raises: ConfigError.
    """
    if not overrides:
        return cell
    content = cell.to_dict()
    profiles = [word.partition("=")[2] for word in overrides if word.startswith("cluster=")]
    settings: dict[str, t.Any] = {}
    if profiles:
        name = _group_choice([f"cluster={profiles[-1]}"], "cluster")
        content["cluster"] = yaml.safe_load((CONFIG_DIR / "cluster" / f"{name}.yaml").read_text())
        content["choices"] = {**cell.choices, "cluster": name}
        settings |= kept
    for word in overrides:
        key, equals, _ = word.partition("=")
        if equals and key not in GROUPS:
            settings[key] = _parsed(word)
    for key, value in settings.items():
        group, _, name = key.rpartition(".")
        if not isinstance(content.get(group), dict) or name not in content[group]:
            raise ConfigError(unknown_name("setting", key, sorted(_leaf_keys(content))))
        content[group][name] = value
    changed = _resolve(CellConfig.from_dict(content))
    if changed.cluster.gpus_per_node and changed.engine.device == "cpu":
        raise ConfigError(
            f"cluster.gpus_per_node={changed.cluster.gpus_per_node}: this run trains on the CPU (engine.device=cpu, on "
            "which its result depends); add cluster.gpus_per_node=0"
        )
    return changed


def compose_command(cls: type[Settings], name: str, overrides: t.Sequence[str]) -> Settings:
    """`configs/<name>.yaml` with overrides: the settings of a command that trains nothing. Raises: ConfigError."""
    content = yaml.safe_load((CONFIG_DIR / f"{name}.yaml").read_text())
    valid = _leaf_keys(content)
    for word in overrides:
        *path, last = word.partition("=")[0].split(".")
        if ".".join([*path, last]) not in valid:
            raise ConfigError(unknown_name("setting", word.partition("=")[0], valid))
        group = content
        for key in path:
            group = group[key]
        group[last] = _parsed(word)
    return t.cast("Settings", _build_instance(cls, content, ""))


def _parsed(word: str) -> t.Any:
    """The value of one override in Hydra's grammar."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(word).value()
    except HydraException as error:
        raise ConfigError(f"{word} cannot be read: {error}") from error


def config_names(group: str) -> list[str]:
    """The valid names of a group: the yaml files in its folder."""
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))


def differences(ours: CellConfig, theirs: CellConfig) -> list[str]:
    """Settings that determine the result and differ, one line each: `train.lr: 0.0001 → 0.0003`.

    Those that `theirs.resume_changes` names may differ.
    """
    changed = _changes(ours.settings, theirs.settings)
    return [line for line in changed if line.partition(":")[0] not in theirs.resume_changes]


def _changes(then: t.Mapping[str, t.Any], now: t.Mapping[str, t.Any]) -> list[str]:
    changed = [key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)]
    return [f"{key}: {then.get(key)} → {now.get(key)}" for key in changed]


def way_on(names: t.Sequence[str]) -> str:
    """What to do about settings in which a run differs from its earlier submission or checkpoint."""
    if order := [name for name in names if name in ORDER]:
        return (
            f"which samples a step takes follows from {', '.join(order)}, so a run that went on would skip some and "
            "repeat others: choose another name=… and start anew"
        )
    return f"choose another name=…, or go on with the new settings: resume_changes=[{','.join(names)}]"


def _group_choice(overrides: t.Sequence[str], group: str) -> str:
    given = [word.partition("=")[2] for word in overrides if word.partition("=")[0] == group]
    if not given:
        given = [entry[group] for entry in _main_defaults() if isinstance(entry, dict) and group in entry]
    choice = given[-1]
    if choice not in config_names(group):
        raise ConfigError(unknown_name(group, choice, config_names(group)))
    return choice


def _main_defaults() -> list[t.Any]:
    return yaml.safe_load((CONFIG_DIR / "config.yaml").read_text())["defaults"]


def _hydra_compose(overrides: list[str]) -> dict[str, t.Any]:
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            config = hydra.compose("config", overrides=overrides)
            return t.cast("dict[str, t.Any]", OmegaConf.to_container(config, resolve=True))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"the overrides {overrides} cannot be read: {error}") from error


def _resolve(cell: CellConfig) -> CellConfig:
    """Turn `auto` into what the cluster really has, refuse what is not there, make folders absolute.

    Jobs run from a code snapshot in another folder, so nothing relative may survive composition.
    """
    has_gpu = cell.cluster.gpus_per_node > 0
    device = cell.engine.device
    if device == "auto":
        device = "cuda" if has_gpu else "cpu"
    if device == "cuda" and not has_gpu:
        raise ConfigError(
            f"engine.device=cuda, but cluster={cell.choices['cluster']} gives a cell no GPU: "
            "set cluster.gpus_per_node, or engine=cpu"
        )
    for tool in cell.train.track:
        if importlib.util.find_spec(tool) is None:
            raise ConfigError(
                f"train.track names {tool}, which is not installed: pip install {TOOLS[tool]}, or leave it out"
            )
    precision = cell.engine.precision
    if precision == "auto":
        precision = "bf16" if device == "cuda" else "fp32"
    engine = dataclasses.replace(cell.engine, device=device, precision=precision)
    return dataclasses.replace(
        cell,
        engine=engine,
        train=dataclasses.replace(cell.train, weights_from=_absolute(cell.train.weights_from)),
        data=dataclasses.replace(
            cell.data,
            root=str(cell.data.folder),
            stream=_absolute_stream(cell.data.stream),
            synthetic=_absolute(cell.data.synthetic),
            synthetic_ratio=float(cell.data.mixed) if cell.data.synthetic_ratio is None else cell.data.synthetic_ratio,
        ),
        runs_dir=_absolute(cell.runs_dir) or str(ROOT / "runs"),
        weights_dir=_absolute(cell.weights_dir) or str(ROOT / "weights"),
        evaluate=dataclasses.replace(
            cell.evaluate, external=tuple(str(shards_folder(given)) for given in cell.evaluate.external)
        ),
        loader=dataclasses.replace(
            cell.loader,
            cache_dir=_absolute(cell.loader.cache_dir),
            features_dir=_absolute(cell.loader.features_dir),
        ),
    )


def shards_folder(data: str) -> Path:
    """The folder of a packed dataset, given by its name or itself. Raises: ConfigError."""
    if data in config_names("data"):
        return ROOT / "shards" / data
    if data and Path(data).expanduser().is_dir():
        return Path(data).expanduser().resolve()
    raise ConfigError(unknown_name("data", data, config_names("data"), "Or a folder of shards that is there."))


def _absolute(folder: str | None) -> str | None:
    return folder and str(Path(folder).expanduser().resolve())


def _absolute_stream(stream: str | None) -> str | None:
    """A local prefix of shard names made absolute, as jobs run elsewhere; URLs and commands as they are."""
    if stream is None or re.match(r"[a-z]+:", stream):
        return stream
    return os.path.abspath(os.path.expanduser(stream)) + ("/" if stream.endswith("/") else "")


def _model_class(target: t.Any) -> type[Model]:
    if not isinstance(target, str) or not target.startswith("bushpc.models."):
        raise ConfigError(f"model._target_={target}: must name a class below bushpc.models, see configs/model")
    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"model._target_={target} cannot be imported: {error}") from error
    if not isinstance(found, type) or not hasattr(found, "Config"):
        raise ConfigError(f"model._target_={target} is no model, see configs/model")
    return t.cast("type[Model]", found)


def _build_instance(cls: type[t.Any], content: t.Any, prefix: str) -> t.Any:
    if not isinstance(content, t.Mapping):
        raise ConfigError(f"{prefix[:-1]}={_shown(content)}: expected a group of settings")
    return cls(**_build(cls, content, prefix))


def _build(cls: type, content: t.Mapping[str, t.Any], prefix: str, skip: t.Sequence[str] = ()) -> dict[str, t.Any]:
    hints = {name: hint for name, hint in _hints(cls).items() if name not in skip}
    fields = [f.name for f in dataclasses.fields(cls) if f.name not in skip]
    for key in content:
        if key not in fields:
            raise ConfigError(unknown_name("setting", f"{prefix}{key}", [prefix + name for name in fields]))
    missing = [prefix + name for name in fields if name not in content]
    if missing:
        raise ConfigError(f"settings without a value: {', '.join(missing)}. Add them to the yaml of their group.")
    return {name: _coerce(hints[name], content[name], prefix + name) for name in fields}


@functools.cache  # evaluating annotations is most of the time that a thousand cells take
def _hints(cls: type) -> dict[str, t.Any]:
    return t.get_type_hints(cls, localns=_LATE)


def _coerce(hint: t.Any, value: t.Any, key: str) -> t.Any:
    """`value` as the type that the field declares. Only losslessly: 1 → 1.0, list → tuple; never "3" → 3."""
    origin, args = t.get_origin(hint), t.get_args(hint)
    if origin in (t.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _coerce(next(arg for arg in args if arg is not type(None)), value, key)
    if dataclasses.is_dataclass(hint):
        return _build_instance(t.cast(type, hint), value, key + ".")
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_coerce(args[0], item, f"{key}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, t.Mapping):
        return {
            _coerce(args[0], name, f"{key} (a name)"): _coerce(args[1], item, f"{key}.{name}")
            for name, item in value.items()
        }
    if value != value or (type(value) is int and abs(value) >= MOST_INT):
        raise ConfigError(f"{key} is not a number, or one too large to count with; allowed: below 2^63")
    if hint is float and type(value) is int:
        return float(value)
    if hint is str and isinstance(value, str) and not value.isprintable():
        raise ConfigError(
            f"{key}={_shown(value)}: line breaks and control characters are not allowed, jobs are shell scripts"
        )
    if hint in (int, float, str, bool) and type(value) is hint:
        return value
    if hint is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)  # `name=2024` is read as a number by yaml
    wanted = getattr(hint, "__name__", str(hint))
    raise ConfigError(f"{key}={_shown(value)} is a {type(value).__name__}; allowed: {wanted}")


def _shown(value: t.Any) -> str:
    """A wrong value for a message. Not the inside of lists: a few lines of YAML can stand for gigabytes of it."""
    return "…" if isinstance(value, (t.Mapping, list)) else repr(value)[:MOST_SHOWN]


def _load_yaml(text: str) -> t.Any:
    """What a yaml text holds. Each level of nesting costs one of these characters, or a column of indentation."""
    deepest = sum(map(text.count, "[{?-:")) + max(len(line) - len(line.lstrip()) for line in text.split("\n"))
    return yaml.load(text, Loader=YAML_LOADER if deepest < DEEP else yaml.SafeLoader)


def _plain(value: t.Any) -> t.Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def flat(content: t.Mapping[str, t.Any], prefix: str = "") -> dict[str, t.Any]:
    """Nested settings by their dotted names: {"train": {"lr": 1}} → {"train.lr": 1}."""
    out: dict[str, t.Any] = {}
    for key, value in content.items():
        out.update(flat(value, f"{prefix}{key}.") if isinstance(value, t.Mapping) else {prefix + key: value})
    return out


def _leaf_keys(content: t.Mapping[str, t.Any]) -> set[str]:
    return set(flat(content)) - {"model._target_"}


def _require(holds: bool, given: str, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"{given}: allowed is {allowed}")


# Names that only a type checker sees at import; get_type_hints needs something to resolve them to.
_LATE: dict[str, t.Any] = {"Model": object, "ModelConfig": object}
