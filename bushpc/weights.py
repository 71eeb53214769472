"""Pretrained weights: a user pulls them on the login node, submit checks them, jobs only read them.

    hub ─pull→ weights folder + weights.lock.json ─check→ submit ─load_staged→ model

Only `pull` uses the network. Only `.safetensors` files are read, because a pickle can run code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import shlex
import tempfile
import textwrap
import typing as t
from pathlib import Path

from bushpc import weight_file
from bushpc.config import ModelConfig, WeightFile, as_word, compose, config_names, model_names, target_of
from bushpc.config.places import config_folders
from bushpc.errors import DataError, WeightsError, first_of
from bushpc.files import read_json, sha256_of, write_atomically

if t.TYPE_CHECKING:
    import torch

LOCK = "weights.lock.json"
MOST_OF_A_REASON = 600  # characters: torch names each of a network's hundreds of tensors


def pull(model_class: type[torch.nn.Module], config: ModelConfig, weights_dir: str | Path) -> list[Path]:
    """Stage every pretrained file of this configuration, except those that are already valid; returns the paths.

    Each file is downloaded to a temporary folder, hashed, moved into place, and recorded in `weights.lock.json` with
    the commit of its revision. Raises: WeightsError if the download fails.
    """
    folder = Path(weights_dir)
    folder.mkdir(parents=True, exist_ok=True)
    files = config.weight_files()
    for file in files:
        if _problem(file, folder):
            _record(folder, file, _download(file, folder))
    return [folder / file.name for file in files]


def check(model_class: type[torch.nn.Module], config: ModelConfig, weights_dir: str | Path) -> list[str]:
    """One sentence for each reason why a job with this configuration cannot load its weights; [] if there is none.

    Only reads and hashes local files.
    """
    problems = _problems(config, weights_dir)
    try:
        _require_imported(model_class, config)
    except WeightsError as error:
        problems.append(f"model.weights: {error}.")
    return problems


def require(model_class: type[torch.nn.Module], config: ModelConfig, weights_dir: str | Path) -> None:
    """Raises: WeightsError with every problem that `check` finds and what fixes them."""
    if problems := _problems(config, weights_dir):
        raise WeightsError("\n".join([*problems, f"Run: {pull_command(model_class, config, weights_dir)}"]))
    _require_imported(model_class, config)


def _problems(config: ModelConfig, weights_dir: str | Path) -> list[str]:
    """Of the staged files."""
    folder = Path(weights_dir)
    problems = (_problem(file, folder) for file in config.weight_files())
    return [problem for problem in problems if problem]


def _require_imported(model_class: type[torch.nn.Module], config: ModelConfig) -> None:
    """Of the file that model.weights names. Raises: WeightsError."""
    if config.weights is not None:
        weight_file.require(Path(config.weights), config.weights_sha256, target_of(model_class))


def load_staged(
    model_class: type[torch.nn.Module], file: WeightFile, weights_dir: str | Path | None
) -> dict[str, torch.Tensor]:
    """The tensors of a staged file, on the CPU. Raises: WeightsError if it is missing or unreadable."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if weights_dir is None:
        raise WeightsError(
            f"{model_class.__name__} needs pretrained weights, but no weights folder is given. "
            f"Set weights_dir and {_advice_in_a_job(model_class, None)}; or set pretrained=false."
        )
    path = Path(weights_dir) / file.name
    if not path.is_file():
        raise WeightsError(f"{path} is not staged: {_advice_in_a_job(model_class, weights_dir)}")
    try:
        return load_file(path)
    except SafetensorError as error:
        advice = _advice_in_a_job(model_class, weights_dir)
        raise WeightsError(f"{path} is not a readable safetensors file ({error}): {advice}") from error


@contextlib.contextmanager
def fits(model_class: type[torch.nn.Module], file: WeightFile) -> t.Iterator[None]:
    """Around loading tensors of a staged file. Raises: WeightsError for tensors that are missing or have other shapes.

    A RuntimeError is torch's, of `load_state_dict`; a KeyError is of a tensor that the model looks up by its name.
    """
    try:
        yield
    except (RuntimeError, KeyError) as error:
        reason = f"it has no tensor {error}." if isinstance(error, KeyError) else str(error)
        raise WeightsError(
            f"{file.name} does not fit the model it is meant for: {textwrap.shorten(reason, MOST_OF_A_REASON)} "
            f"Run: {pull_command(model_class)}"
        ) from error


def start_features(
    network: torch.nn.Module, model_class: type[torch.nn.Module], file: WeightFile, weights_dir: str | Path | None
) -> None:
    """`network`, which makes features, starts from a staged classifier, whose last layer is left out.

    Raises: WeightsError.
    """
    staged = load_staged(model_class, file, weights_dir)
    with fits(model_class, file):
        missing, beyond = network.load_state_dict(staged, strict=False)
        if missing:
            raise KeyError(missing[0])
        layers = list(dict.fromkeys(name.rpartition(".")[0] for name in beyond))
        if len(layers) > 1:
            raise RuntimeError(f"it has layers that the network lacks: {first_of(layers, 3)}.")


def origins(config: ModelConfig, weights_dir: str | Path) -> list[dict[str, t.Any]]:
    """Of every pulled file that this configuration loads: name, repository, commit, SHA-256 and licence.

    The licence is empty where the library that knows the file states none.
    """
    files = config.weight_files()
    lock = _read_lock(Path(weights_dir)) if files else {}
    return [
        {
            "name": file.name,
            "hub_repo": file.hub_repo,
            "licence": file.licence,
            **{key: lock[file.name][key] for key in ("commit", "sha256") if file.name in lock},
        }
        for file in files
    ]


def pull_command(
    model_class: type[torch.nn.Module], config: ModelConfig | None = None, weights_dir: str | Path | None = None
) -> str:
    """The shell command that stages the weights on the login node.

    config: the configuration to stage. The command contains every setting that differs from the model's yaml, because
        some settings decide which files are loaded. Without a config, it contains only the model.
    weights_dir: the target folder; omitted from the command if it is the default.
    """
    name, settings = _nearest_yaml(model_class, config) if config else (_yamls_of(model_class)[0], {})
    settings = {f"model.{key}": value for key, value in settings.items()}
    if weights_dir is not None:
        folder = str(Path(weights_dir).resolve())
        # A job's current directory differs from the user's, so the default folder is not the same there.
        if config is None or folder != compose([f"model={name}"]).weights_dir:
            settings["weights_dir"] = folder
    words = [f"model={name}", *(f"{key}={as_word(value)}" for key, value in settings.items())]
    return shlex.join(["bushpc", "weights", "pull", *words])


def _advice_in_a_job(model_class: type[torch.nn.Module], weights_dir: str | Path | None) -> str:
    # The check at submission printed the full command; a job knows only model and folder.
    return f"run, with this run's model settings, {pull_command(model_class, weights_dir=weights_dir)}"


def _yamls_of(model_class: type[torch.nn.Module]) -> list[str]:
    """The names that `model=` takes for this class."""
    target = target_of(model_class)
    names = _names_among(target, tuple(config_names("model")), tuple(config_folders()))
    assert names, f"no yaml of configs/model has _target_: {target}"
    return names


# `bushpc reproduce` asks for the commands of many cells: each yaml is read once for all, until somebody adds one.
@functools.lru_cache
def _names_among(target: str, names: tuple[str, ...], folders: tuple[Path, ...]) -> list[str]:
    return model_names(target)


@functools.lru_cache
def _settings_of(name: str, folders: tuple[Path, ...]) -> dict[str, t.Any]:
    return dataclasses.asdict(compose([f"model={name}"]).model)


def _nearest_yaml(model_class: type[torch.nn.Module], config: ModelConfig) -> tuple[str, dict[str, t.Any]]:
    """The yaml with the fewest differences to `config`, and these differences."""
    changes = {}
    for name in _yamls_of(model_class):
        given, own = dataclasses.asdict(config), _settings_of(name, tuple(config_folders()))
        changes[name] = {key: value for key, value in given.items() if value != own[key]}
    nearest = min(changes, key=lambda name: len(changes[name]))
    return nearest, changes[nearest]


def _problem(file: WeightFile, folder: Path) -> str | None:
    path = folder / file.name
    if not path.is_file():
        return f"{path} is not staged."
    entry = _read_lock(folder).get(file.name)
    if entry is None:
        return f"{path} is not recorded in {LOCK}, so its origin is unknown."
    if entry["hub_repo"] != file.hub_repo or entry["hub_file"] != file.hub_file:
        return f"{path} was pulled from {entry['hub_repo']}/{entry['hub_file']}, not {file.hub_repo}/{file.hub_file}."
    if entry["revision"] != file.revision:
        return f"{path} was pulled at revision {entry['revision']}, not {file.revision}."
    found = sha256_of(path)
    if found != entry["sha256"]:
        return f"{path} has sha256 {found}, but {LOCK} has {entry['sha256']}: the file changed after it was pulled."
    return None


def _download(file: WeightFile, folder: Path) -> str:
    """Download one file to its final name; returns its commit."""
    import huggingface_hub

    assert file.name.endswith(".safetensors"), file.name
    try:
        # A branch may move between two requests, so resolve it first and request the file by commit.
        commit = huggingface_hub.HfApi().model_info(file.hub_repo, revision=file.revision).sha
        with tempfile.TemporaryDirectory(dir=folder, prefix=".pull-") as aside:
            downloaded = huggingface_hub.hf_hub_download(file.hub_repo, file.hub_file, revision=commit, local_dir=aside)
            (folder / file.name).parent.mkdir(parents=True, exist_ok=True)
            Path(downloaded).replace(folder / file.name)
    except hub_errors() as error:
        raise WeightsError(
            f"could not pull {file.hub_repo}/{file.hub_file} at {file.revision}: {error}. "
            "Pull on a machine with internet access, and copy the weights folder including its lock file."
        ) from error
    return str(commit)


def hub_errors() -> tuple[type[Exception], ...]:
    """What the Hub's library raises when the Hub, the network or the disk fails."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    # A refused connection is neither of them and no OSError either, but of the HTTP library: httpx, or its successor.
    http_error = next(each for each in HfHubHTTPError.__bases__ if each is not OSError)
    return (HfHubHTTPError, LocalEntryNotFoundError, http_error, OSError)


def _record(folder: Path, file: WeightFile, commit: str) -> None:
    path = folder / file.name
    entry = {
        "hub_repo": file.hub_repo,
        "hub_file": file.hub_file,
        "revision": file.revision,
        "commit": commit,
        "sha256": sha256_of(path),
        "bytes": path.stat().st_size,
        "licence": file.licence,
    }
    lock = {**_read_lock(folder), file.name: entry}
    write_atomically(folder / LOCK, json.dumps(lock, indent=2, sort_keys=True) + "\n")


def _read_lock(folder: Path) -> dict[str, dict[str, t.Any]]:
    path = folder / LOCK
    try:
        return read_json(path) or {}
    except DataError as error:
        raise WeightsError(f"{error}: delete it and pull the weights again") from error
