"""The one reader of settings: Hydra's groups and yaml files, site yamls, grids and words → a checked `CellConfig`.

    compose(["model=unet", "cluster=mysite", "train.lr=3e-4"])

Later wins: a field's default, `config.yaml`, the chosen `data/`, `augment/`, `model/`, `engine/` and `cluster/` yamls,
words of the command line, the row of a grid. Whatever cannot work is refused here, on the login node, before anything
is queued. A text is taken as it is typed; other values are read by Hydra's grammar.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import typing as t
from pathlib import Path

from bushpc.config import paper_splits, places
from bushpc.config.catalogue import field_of, kinds
from bushpc.config.cell import CellConfig
from bushpc.config.cluster import ClusterConfig
from bushpc.config.content import Content, defaults_of, quoted, words_of
from bushpc.config.engine import Precision
from bushpc.config.fields import About, Options, Settings, allowed, as_word, fields_of
from bushpc.config.gpus import capability_of, without_bf16
from bushpc.config.model import ModelConfig, model_class_of
from bushpc.config.read import Scalar, build, flat, plain
from bushpc.config.source import hydra_choices, hydra_compose, read_config, read_main_config
from bushpc.config.train import TOOLS
from bushpc.errors import ConfigError, unknown_name
from bushpc.files import sha256_of_unchanged

GROUPS = ("data", "augment", "model", "engine", "cluster")
# What a model's yaml may choose; an explicit word or row wins over it.
LEFT_TO_THE_MODEL = ("augment",)
NEWEST_METHOD = Scalar("one_warp", quoted=True, where="default")
S = t.TypeVar("S", bound=Settings)


class Origin(t.NamedTuple):
    """A composed setting. source: `default`, a yaml file with its line, or the word that sets it."""

    key: str
    value: t.Any
    source: str
    about: About


class Described(t.NamedTuple):
    """A setting as help shows it. allowed: type and bounds. default: as it is typed; empty where there is none."""

    key: str
    allowed: str
    default: str
    about: About


def compose(overrides: t.Sequence[str]) -> CellConfig:
    """Compose the configs with Hydra-style overrides into one checked config.

    Raises: ConfigError naming the nearest valid group, option or key for anything unknown.
    """
    return Composer(overrides)({})


class Composer:
    """Overrides that many cells share → cells. Hydra is asked once per choice of groups.

    overrides: as on the command line; a later word wins. Raises: ConfigError, as `compose` does.
    """

    def __init__(self, overrides: t.Sequence[str]) -> None:
        self.words = words_of(overrides)
        left = [group for group in LEFT_TO_THE_MODEL if group not in self.words]
        self.chosen = {group: _group_choice(self.words, group) for group in GROUPS if group not in left}
        self._composed: dict[tuple[str, ...], Content] = {}

    def __call__(self, settings: t.Mapping[str, t.Any]) -> CellConfig:
        """The cell with `settings` as well, as `train.lr` → value, or a group → one of its names; they win.

        Raises: ConfigError.
        """
        groups = {key: _group_choice({key: str(value)}, key) for key, value in settings.items() if key in GROUPS}
        chosen = self.chosen | groups
        composed = self.content(chosen)
        values = {key: composed.of_row(value) for key, value in settings.items() if key not in GROUPS}
        content = composed.with_values(values)
        stated = "augment.method" in (values.keys() | self.words.keys())
        if not stated and composed.source("augment.method") == "default":
            # Not the field's default, which is what runs did before there was this field.
            content["augment"] = {**content["augment"], "method": NEWEST_METHOD}
        cell = _resolve(CellConfig.from_dict({**content, "choices": {**composed.choices, **chosen}}))
        if cell.folds == paper_splits.PAPER_SPLIT:  # rows share the folds, so it isn't the row's model that counts
            source = paper_splits.source_for(cell.data.name, self.chosen.get("model", cell.choices["model"]))
            cell = dataclasses.replace(cell, folds=t.cast(t.Any, source))
        # Here alone: a frozen cell keeps what it was trained with.
        return dataclasses.replace(cell, model=cell.model.follow_network())

    def content(self, chosen: t.Mapping[str, str]) -> Content:
        """The settings under this choice of groups, words included."""
        groups = tuple(f"{group}={choice}" for group, choice in chosen.items())
        if groups not in self._composed:
            yaml, choices = hydra_choices("config", groups)
            model = model_class_of(str(yaml.get("model", {}).get("_target_"))).Config
            words = {key: text for key, text in self.words.items() if key not in GROUPS}
            content = Content(CellConfig, defaults_of(CellConfig, model), yaml, words, model)
            content.choices = {group: choices[group] for group in GROUPS}
            self._composed[groups] = content
        return self._composed[groups]


def explain(overrides: t.Sequence[str]) -> list[Origin]:
    """Every setting of `compose(overrides)` with where its value comes from. Raises: ConfigError, as `compose` does."""
    composer = Composer(overrides)
    cell, composed = composer({}), composer.content(composer.chosen)
    values = flat(cell.to_dict())
    abouts = kinds(CellConfig) | kinds(type(cell.model))
    sources = {key: f"{key}={text}" for key, text in composer.words.items()}
    if iterations := sources.get("train.iterations"):  # which a model's epochs give way to
        sources.setdefault("train.epochs", iterations)
    found = []
    for key, (about, default) in abouts.items():
        if isinstance(default, Options):
            names = [name for name in values if name.startswith(f"{key}.")]
            if not names:
                names, values[key] = [key], {}
        else:
            names = [key] if key in values else []
        for name in names:
            source = sources.get(name) or sources.get(key) or composed.source(name)
            found.append(Origin(name, values[name], source, about))
    return found


def described(cls: type[Settings] = CellConfig) -> list[Described]:
    """Every setting of a config class, and of those that it holds; a model's own are `described(model.Config)`."""
    found = []
    for key, (about, _) in kinds(cls).items():
        place = field_of(cls, key.removeprefix(cls.prefix))
        assert place is not None, key
        owner, name = place
        info = fields_of(owner)[name]
        default = "" if info.is_required() else as_word(plain(owner.default(name)))
        found.append(Described(key, allowed(owner, name), default, about))
    return found


def group_names() -> dict[str, list[str]]:
    """The groups and what can be chosen of each: `cluster` → [a100, local, slurm]."""
    return {group: config_names(group) for group in GROUPS}


def reconfigure(cell: CellConfig, overrides: t.Sequence[str], kept: t.Mapping[str, t.Any]) -> CellConfig:
    """A frozen cell with these overrides, which may choose another cluster profile. kept: wins over that profile.

    Raises: ConfigError.
    """
    if not overrides:
        return cell
    words = words_of(overrides)
    base, yaml, choices = quoted(cell.to_dict()), {}, cell.choices
    del base["choices"]
    if "cluster" in words:
        choices = {**choices, "cluster": _group_choice(words, "cluster")}
        # The other groups are those of the frozen cell, whatever became of their files.
        yaml = {"cluster": hydra_compose("config", [f"cluster={choices['cluster']}"]).get("cluster", {})}
        base["cluster"] = quoted(plain(ClusterConfig()))
    given = {key: text for key, text in words.items() if key not in GROUPS}
    composed = Content(CellConfig, base, yaml, given, type(cell.model))
    values = {key: composed.of_row(value) for key, value in kept.items() if "cluster" in words and key not in given}
    changed = _resolve(CellConfig.from_dict({**composed.with_values(values), "choices": choices}))
    if changed.cluster.gpu_count and changed.engine.device == "cpu":
        raise ConfigError(
            f"cluster.gpus={changed.cluster.gpus}: this run trains on the CPU (engine.device=cpu, on "
            "which its result depends); add cluster.gpus=0"
        )
    return changed


def compose_command(cls: type[S], name: str, overrides: t.Sequence[str]) -> S:
    """The settings of a command that trains nothing: defaults, `<name>.yaml`, words. Raises: ConfigError."""
    yaml = hydra_compose(name, []) if places.config_file(name) else {}
    return build(cls, Content(cls, defaults_of(cls), yaml, words_of(overrides)).with_values({}))


def config_names(group: str) -> list[str]:
    """The valid names of a group: the yaml files in its folder, the user's own included."""
    return sorted({path.stem for folder in places.config_folders() for path in (folder / group).glob("*.yaml")})


def model_names(target: str) -> list[str]:
    """The names that `model=` takes for this class, such as `bushpc.models.baselines.UNet`."""
    names = []
    for name in config_names("model"):
        path = places.config_file(f"model/{name}")
        content = read_config(path)[1] if path else {}
        if "defaults" in content:  # it may take its class from another file
            content = hydra_compose("config", [f"model={name}"])
        if str((content.get("model") or {}).get("_target_")) == target:
            names.append(name)
    return names


def _group_choice(words: t.Mapping[str, str], group: str) -> str:
    choice = words[group] if group in words else _main_choices()[group]
    if choice not in config_names(group):
        raise ConfigError(unknown_name(group, choice, config_names(group)))
    return choice


def _main_choices() -> dict[str, str]:
    """What config.yaml chooses of each group."""
    path = places.config_file("config")
    assert path is not None, "bushpc ships one"
    entries = read_main_config(path)[1]["defaults"]
    return {group: str(name) for entry in entries if isinstance(entry, dict) for group, name in entry.items()}


def _resolve(cell: CellConfig) -> CellConfig:
    """Turn `auto` into what the cluster really has, refuse what is not there, make folders absolute.

    Jobs run from a code snapshot in another folder, so nothing relative may survive composition.
    """
    has_gpu = cell.cluster.gpu_count > 0
    device = cell.engine.device
    if device == "auto":
        device = "cuda" if has_gpu else "cpu"
    if device == "cuda" and not has_gpu:
        raise ConfigError(
            f"engine.device=cuda, but cluster={cell.choices['cluster']} gives a cell no GPU: "
            "set cluster.gpus, or engine=cpu"
        )
    for tool in cell.train.track:
        if importlib.util.find_spec(tool) is None:
            raise ConfigError(
                f"train.track names {tool}, which is not installed: pip install {TOOLS[tool]}, or leave it out"
            )
    precision = cell.engine.precision
    if precision == "auto":
        precision = _fastest_precision(cell.cluster) if device == "cuda" else "fp32"
    engine = dataclasses.replace(cell.engine, device=device, precision=precision)
    resolved = dataclasses.replace(
        cell,
        engine=engine,
        model=_with_weights(cell.model),
        train=dataclasses.replace(
            cell.train,
            weights_from=_absolute(cell.train.weights_from),
            start_from=_absolute(cell.train.start_from),
        ),
        data=dataclasses.replace(
            cell.data,
            root=str(cell.data.folder),
            stream=_absolute_stream(cell.data.stream),
            synthetic=_absolute(cell.data.synthetic),
            synthetic_ratio=float(cell.data.mixed) if cell.data.synthetic_ratio is None else cell.data.synthetic_ratio,
        ),
        runs_dir=_absolute(cell.runs_dir) or str(places.home() / "runs"),
        weights_dir=_absolute(cell.weights_dir) or str(places.home() / "weights"),
        evaluate=dataclasses.replace(
            cell.evaluate, external=tuple(str(shards_folder(given)) for given in cell.evaluate.external)
        ),
        loader=dataclasses.replace(
            cell.loader,
            cache_dir=_absolute(cell.loader.cache_dir),
            features_dir=_absolute(cell.loader.features_dir),
        ),
    )
    return _with_mounts(resolved) if resolved.cluster.container.used else resolved


def _with_weights(model: ModelConfig) -> ModelConfig:
    """The model with the hash of the file that it starts from. Raises: ConfigError for another one than asked for."""
    if model.weights is None:
        if model.weights_sha256:
            raise ConfigError("model.weights_sha256 without model.weights: set that to a file of imported weights")
        return model
    path = Path(model.weights).expanduser().resolve()
    if not path.is_file():  # the plan refuses it, unless the run has checkpoints already
        return dataclasses.replace(model, weights=str(path))
    found = sha256_of_unchanged(path)
    if model.weights_sha256 not in (None, found):
        raise ConfigError(
            f"model.weights={model.weights} has sha256 {found}, not model.weights_sha256={model.weights_sha256}: bring "
            "that file back, or leave model.weights_sha256 out"
        )
    return dataclasses.replace(model, weights=str(path), weights_sha256=found)


def _with_mounts(cell: CellConfig) -> CellConfig:
    """The cell with all of its folders mounted in the container that its ranks run in."""
    container = cell.cluster.container
    image = container.image
    if image and image.startswith((".", "~")):  # anything else may be a name in a registry
        image = _absolute(image)
    container = dataclasses.replace(
        container, image=image, binds=tuple(dict.fromkeys((*container.binds, *cell.folders)))
    )
    return dataclasses.replace(cell, cluster=dataclasses.replace(cell.cluster, container=container))


def _fastest_precision(cluster: ClusterConfig) -> Precision:
    """bf16, or fp16 where the profile may give a job GPUs that have none, such as V100.

    A type or feature names the GPU for certain; where neither does, partitions and accounts are often called after it.
    """
    told = (cluster.gpu_type, cluster.constraint)
    if not any(capability_of(text) for text in told if text):
        told = (cluster.partition, cluster.account)
    return "fp16" if without_bf16(told) else "bf16"


def shards_folder(data: str) -> Path:
    """The folder of a packed dataset, given by its name or itself. Raises: ConfigError."""
    if data in config_names("data"):
        path = places.config_file(f"data/{data}")
        root = read_config(path)[1].get("root") if path else None  # of an imported cohort that lies elsewhere
        return Path(root.text) if isinstance(root, Scalar) else places.home() / "shards" / data
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
