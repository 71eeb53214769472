"""One cell's settings: the groups together, what their combinations allow, its hashes, its frozen `config.yaml`."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
import typing as t
from pathlib import Path

import yaml

from bushpc.conditions import VARIANTS, Variant
from bushpc.config import freeze, inference
from bushpc.config.augment import AugmentConfig
from bushpc.config.catalogue import is_hashed, kinds
from bushpc.config.cluster import ClusterConfig
from bushpc.config.data import DataConfig
from bushpc.config.engine import EngineConfig
from bushpc.config.evaluate import EvaluateConfig
from bushpc.config.fields import About, Settings, config_class, group, setting
from bushpc.config.loader import LoaderConfig
from bushpc.config.model import ModelConfig, model_of, target_of
from bushpc.config.places import FOLDER_NAME
from bushpc.config.prompting import PromptingConfig
from bushpc.config.read import YAML_DUMPER, YAML_FAILS, build_fields, flat, load_yaml, plain
from bushpc.config.synthesis import SynthesisConfig, Work
from bushpc.config.train import TrainConfig
from bushpc.errors import ConfigError, unknown_name
from bushpc.metrics.registry import ALWAYS, LABEL_METRICS


@config_class
class CellConfig(Settings):
    """One training run, fully composed. `to_dict` and `from_dict` are inverse; `hash` names what it will learn."""

    name: str | None = setting(
        None,
        "Name of the run's folder below runs_dir; null derives it from model, data and a hash of the settings.",
        affects="nothing",
    )
    runs_dir: str | None = setting(
        None,
        "Folder of all run folders, visible from every node of the cluster; null uses runs/ in the clone.",
        affects="nothing",
    )
    weights_dir: str | None = setting(
        None,
        "Folder of staged pretrained weights (`bushpc weights pull`); null uses weights/ in the clone.",
        affects="nothing",
    )
    resume_changes: tuple[str, ...] = setting(
        (),
        "Settings in which a run may differ from its own earlier submissions and checkpoints, e.g. [train.lr]; any "
        "other difference is an error. Settings that determine the order of samples cannot be named here.",
        affects="nothing",
    )
    seed: int = setting(
        0, "Seed of initialisation, order, augmentation and dropout; the same seed gives the same run.", order=True
    )
    folds: t.Literal[
        "frozen",
        "published",
        "grouped",
        "paper_split",
        "hybrid_attention_split",
        "sam_multitask_split",
        "tumor_generator_split",
    ] = setting(
        "frozen",
        "Which folds: frozen (shards/<name>/folds.csv), published (folds_published.csv, from the paper's authors) or "
        "grouped (folds_grouped.csv, near duplicates share a fold: `bushpc shards folds data=… duplicates=group`). Or "
        "one fold, the single split of a paper, drawn with seed 0, as no paper published its list: paper_split (that "
        "of the model's paper), or one by its name.",
    )
    fold: int | None = setting(None, "Train only this fold; null trains every fold.")
    prompts: str = setting(
        "first_pass",
        "Source of the prompts behind the report's headline: first_pass (sees no mask), oracle (uses the ground-truth "
        "mask and is labelled so), none (no spatial prompt), or a deliberately wrong one: wrong_size and "
        "wrong_quadrant (the oracle's sentence with another size or the opposite quadrant) and shuffled_attributes "
        "(first_pass with another patient's attributes). A model that reads no prompts has `none` alone. One that "
        "lacks the source is refused, but for rows of a grid and for first_pass, which become `none`.",
        affects="predictions",
    )
    also_prompts: tuple[str, ...] = setting(
        ("oracle", "none"), "Prompt sources evaluated in addition to the headline one.", affects="predictions"
    )
    model_class: type[t.Any]
    model: ModelConfig
    data: DataConfig = group(DataConfig, "Which dataset trains and validates.")
    train: TrainConfig = group(TrainConfig, "How the model is trained.")
    prompting: PromptingConfig = group(PromptingConfig, "How text prompts are made.")
    augment: AugmentConfig = group(AugmentConfig, "Random changes of training scans.")
    evaluate: EvaluateConfig = group(EvaluateConfig, "How predictions are scored.")
    loader: LoaderConfig = group(LoaderConfig, "How samples reach the model.")
    engine: EngineConfig = group(EngineConfig, "What runs a training step.")
    cluster: ClusterConfig = group(ClusterConfig, "Where and with what resources jobs run.")
    synthesis: SynthesisConfig = group(SynthesisConfig, "What generators do after their training.")
    work: Work = setting(
        "train", "What the cell does. Set when a run is planned: see synthesis.n.", affects="evaluation", since=4
    )
    source: str | None = setting(
        None, "The cell of the same run whose result this one reads. Set when planned.", affects="nothing"
    )
    choices: dict[str, str] = group(dict, "The name chosen of each group.", affects="nothing")

    def __post_init__(self) -> None:
        if self.name is not None and not re.fullmatch(FOLDER_NAME, self.name):
            raise ConfigError(f"name={self.name!r}: a folder name of letters, digits, '.', '_' and '-' is needed")
        known = {**VARIANTS, **{variant.name: variant for variant in self.model.variants}}
        for name in (self.prompts, *self.also_prompts):
            if name not in known:
                raise ConfigError(unknown_name("prompt source", name, known))
        for key in self.resume_changes:
            if key not in self.settings:
                raise ConfigError(unknown_name("setting in resume_changes", key, self.settings))
            if key in ORDER:
                raise ConfigError(f"resume_changes=[{key}]: {way_on([key])}")
        if self.engine.recompute and not self.model.blocks:
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
        part, least = self.train.batch_size // shares, self.model.least_images
        if part < least:
            raise ConfigError(
                f"train.batch_size={self.train.batch_size}, shared by {self.cluster.world_size} rank(s) in "
                f"train.accumulate={self.train.accumulate} part(s) each, leaves {part} image to a part, and "
                f"{self.model_class.__name__} with model.image_size={self.model.image_size} has a "
                f"BatchNorm that needs {least}: set train.batch_size to {least * shares} or more, or use fewer ranks "
                "or parts"
            )
        self._check_keep_best()
        self._check_start()
        inference.refuse_impossible(self.evaluate, self.data, self.model, self.model_class.makes)
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

    def _check_start(self) -> None:
        """One source of first weights, and a loop that knows of it."""
        train, model = self.train, self.model
        for name, other in (("model.weights", model.weights), ("train.weights_from", train.weights_from)):
            if train.start_from and other:
                raise ConfigError(
                    f"train.start_from={train.start_from} with {name}={other}: both give the weights; set one of them "
                    "to null"
                )
        used = train.start_from or model.weights or train.freeze or train.layer_decay != 1
        if used and self.model_class.trainer:
            raise ConfigError(
                f"{model.title} is trained by its own package, which knows no train.start_from, model.weights, "
                "train.freeze or train.layer_decay: leave them out"
            )

    def _check_features(self) -> None:
        """What is computed once must be the same whenever it is asked for."""
        name = self.model_class.__name__
        if not self.model.feature_settings:
            raise ConfigError(
                f"loader.features=true: {name} as it is configured has no frozen part whose outputs could be kept; set "
                "loader.features=false"
            )
        if self.data.stream:
            raise ConfigError("loader.features=true with data.stream: a stream is read once; set one of them")
        if self.augment.changes and not self.augment.variants:
            raise ConfigError(
                "loader.features=true with augment.variants=0: images are changed differently every time, so the "
                f"outputs of {name}'s frozen part cannot be kept. Set augment.variants to a number of fixed changes "
                "per sample, such as 4, or switch augment off, or set loader.features=false"
            )
        if self.augment.changes and self.augment.where == "device":
            raise ConfigError(
                f"loader.features=true with augment.where=device: the outputs of {name}'s frozen part are computed of "
                "scans that the loader has changed; set augment.where=workers"
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
    def folders(self) -> list[str]:
        """Every folder outside the run's that training and evaluation read or write."""
        stream = self.data.stream if self.data.stream and self.data.stream.startswith("/") else None
        starts = (self.weights_dir, self.model.weights, self.train.weights_from, self.train.start_from)
        given = (str(self.data.folder), stream, self.data.synthetic, *starts)
        caches = (*(self.loader.cache_dir or "").split(os.pathsep), self.loader.features_dir)
        return [folder for folder in (*given, *caches, *self.evaluate.external) if folder]

    @property
    def run_dir(self) -> Path:
        """The run's folder, once dispatch has named the run."""
        assert self.runs_dir is not None, "composition sets it"
        assert self.name is not None, "dispatch sets it"
        return Path(self.runs_dir) / self.name

    @property
    def variants(self) -> list[Variant]:
        """The model's evaluation variants that `prompts` and `also_prompts` ask for, headline first.

        A variant that the model doesn't have becomes its first one: a model that reads no prompts only has `none`.
        """
        own = {variant.name: variant for variant in self.model.variants}
        asked = [own.get(name, self.model.variants[0]) for name in (self.prompts, *self.also_prompts)]
        return list({variant.name: variant for variant in asked}.values())

    def check_prompts(self, *, in_grid: bool) -> None:
        """Refuse a headline whose prompts the model lacks. On the login node: frozen cells go on as they began.

        Models that read no prompts follow any. In a grid, whose rows share the source, and with the default source, a
        model goes without a spatial prompt; but its first variant is no stand-in if that looks at the ground truth.
        Raises: ConfigError.
        """
        first, own = self.model.variants[0], [variant.name for variant in self.model.variants]
        asked_here = not in_grid and self.prompts != self.default("prompts")
        if self.prompts in own or len(own) == 1 or not (first.uses_ground_truth or asked_here):
            return
        raise ConfigError(
            f"prompts={self.prompts}: {self.model.title} with these settings has no such prompt source; set prompts to "
            f"one of {', '.join(own)}, or choose another model"
        )

    @functools.cached_property
    def hash(self) -> str:
        """12 hex digits over everything that determines the result."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def settings(self) -> dict[str, t.Any]:
        """Every setting that determines the result, as `train.lr` → value."""
        kinds = self._known
        groups = {name: value for name, value in self._plain.items() if self.about(name).affects != "nothing"}
        hashed = {key: value for key, value in flat(groups).items() if is_hashed(kinds.get(key), value)}
        # A stream's order depends on its lanes, not on where it comes from; without a stream there are none.
        hashed["loader.lanes"] = self.loader.lanes if self.data.stream else None
        if not self.data.mixed:
            hashed |= {"data.synthetic_sha256": None, "data.synthetic_ratio": None}
        hashed["evaluate.external"] = self.evaluate.external_names  # wherever they lie
        if self.work == "train":  # what follows it changes no training
            hashed = {key: value for key, value in hashed.items() if not key.startswith("synthesis.")}
        if not self.augment.changes:  # a cell without augmentation is what it was before there were two methods
            hashed.pop("augment.method", None)
        # Where epochs are counted, each fold's number of steps follows from them.
        return hashed | ({"train.iterations": None} if self.train.epochs else {})

    @property
    def _known(self) -> dict[str, tuple[About, t.Any]]:
        return {**kinds(type(self)), **kinds(type(self.model))}

    @property
    def training_hash(self) -> str:
        """As `hash`, over what the trained weights depend on: cells in which it is the same may share a training."""
        of_training = {key: value for key, value in self.settings.items() if not self._is_of_prediction(key)}
        return hashlib.sha256(json.dumps(of_training, sort_keys=True).encode()).hexdigest()[:12]

    def unlike(self, trained: t.Mapping[str, t.Any]) -> list[str]:
        """In what this cell's training differs from one with these `settings`: `train.lr: 0.0001 → 0.0003` each."""
        return [line for line in _changes(trained, self.settings) if not self._is_of_prediction(line.partition(":")[0])]

    def _is_of_prediction(self, key: str) -> bool:
        about = self._known[key][0] if key in self._known else None
        return about is not None and about.affects in ("predictions", "evaluation")

    @functools.cached_property
    def _plain(self) -> dict[str, t.Any]:
        """As `to_dict`, made once; nobody changes it."""
        return self.to_dict()

    def to_dict(self) -> dict[str, t.Any]:
        """Plain data in the layout of the yaml files."""
        out = plain({f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "model_class"})
        out["model"] = {"_target_": target_of(self.model_class), **out["model"]}
        return out

    def to_yaml(self) -> str:
        """The frozen `config.yaml` of a run directory."""
        content = {**freeze.CONFIG.stamp(), **self._plain}
        return "".join(_group_text(json.dumps({key: value})) for key, value in content.items())

    @classmethod
    def from_dict(cls, content: t.Mapping[str, t.Any]) -> CellConfig:
        """Build and check. Raises: ConfigError for an unknown key, a wrong type or an impossible combination."""
        if not isinstance(content, t.Mapping) or not isinstance(content.get("model", {}), t.Mapping):
            raise ConfigError("expected a group of settings, and in it another one named `model`")
        content = freeze.CONFIG.read(content)
        model_class, model = model_of(content.pop("model", {}))
        return cls(
            model_class=model_class, model=model, **build_fields(cls, content, "", skip=("model_class", "model"))
        )

    @classmethod
    def load(cls, path: Path) -> CellConfig:
        """Read a frozen `config.yaml`. Raises: ConfigError also where it is missing or damaged."""
        try:
            content = load_yaml(path.read_text())
        except YAML_FAILS as error:
            raise ConfigError(
                f"{path} cannot be read ({type(error).__name__}: {error}). It was written when the run was submitted: "
                "move it away and submit again"
            ) from error
        return cls.from_dict(content)


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
            "repeat others: choose another name=… and start again"
        )
    return f"choose another name=…, or go on with the new settings: resume_changes=[{','.join(names)}]"


@functools.lru_cache(maxsize=1024)
def _group_text(group: str) -> str:
    """One group of settings, given as JSON, as YAML: a thousand cells of a grid share most of their groups."""
    return yaml.dump(json.loads(group), Dumper=YAML_DUMPER, sort_keys=False)


# Which samples a step sees follows from these, and a checkpoint belongs to a step: no run may resume with others.
ORDER = tuple(key for key, (about, _) in kinds(CellConfig).items() if about.order)
