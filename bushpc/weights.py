"""Pretrained weights: pulled by a person on a login node, checked before a submit, only read by jobs.

    hub ─pull→ weights folder + weights.lock.json ─check→ submit ─load_staged→ model

Nothing here but `pull` touches the network, and only `.safetensors` are read: a pickle can run code.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import tempfile
import typing as t
from pathlib import Path

from bushpc.config import ModelConfig, as_word, compose, model_names
from bushpc.errors import DataError, WeightsError
from bushpc.files import read_json, sha256_of, write_atomically

if t.TYPE_CHECKING:  # models import this module
    import torch

    from bushpc.models.base import Model, WeightFile

LOCK = "weights.lock.json"


def pull(model_class: type[Model], config: ModelConfig, weights_dir: str | Path) -> list[Path]:
    """Stage every pretrained file of this configuration; those that verify already are left alone.

    Each file is downloaded aside, hashed, renamed to its place, and recorded in `weights.lock.json` with
    the commit that its revision stood for. Returns the paths. Raises: WeightsError when the hub does not
    give the file.
    """
    folder = Path(weights_dir)
    folder.mkdir(parents=True, exist_ok=True)
    files = model_class.weight_files(config)
    for file in files:
        if _problem(file, folder):
            _record(folder, file, _download(file, folder))
    return [folder / file.name for file in files]


def check(model_class: type[Model], config: ModelConfig, weights_dir: str | Path) -> list[str]:
    """What keeps a job with this configuration from loading its weights, one sentence each; [] if nothing.

    Reads and hashes local files only.
    """
    folder = Path(weights_dir)
    problems = (_problem(file, folder) for file in model_class.weight_files(config))
    return [problem for problem in problems if problem]


def require(model_class: type[Model], config: ModelConfig, weights_dir: str | Path) -> None:
    """`check`, as an error. Raises: WeightsError with every problem and the command that mends them all."""
    problems = check(model_class, config, weights_dir)
    if problems:
        raise WeightsError("\n".join([*problems, f"Run: {pull_command(model_class, config, weights_dir)}"]))


def load_staged(model_class: type[Model], file: WeightFile, weights_dir: str | Path | None) -> dict[str, torch.Tensor]:
    """The tensors of one staged file, on the CPU. Raises: WeightsError when it is missing or unreadable."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if weights_dir is None:
        raise WeightsError(
            f"{model_class.__name__} was asked to start from pretrained weights, and no weights folder was given. "
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


def pull_command(
    model_class: type[Model], config: ModelConfig | None = None, weights_dir: str | Path | None = None
) -> str:
    """The command a user types into a shell on the login node.

    config: what it must stage the files of: every setting that differs from the model's yaml is spelled out, since
        some of them decide which files are loaded. Without it the command names the model alone.
    weights_dir: where it must put them; left out if it is the folder that the command takes by itself.
    """
    name, settings = _nearest_yaml(model_class, config) if config else (_yamls_of(model_class)[0], {})
    settings = {f"model.{key}": value for key, value in settings.items()}
    if weights_dir is not None:
        folder = str(Path(weights_dir).resolve())
        # Inside a job the folder below the current directory is not the one that the user's shell would find.
        if config is None or folder != compose([f"model={name}"]).weights_dir:
            settings["weights_dir"] = folder
    words = [f"model={name}", *(f"{key}={as_word(value)}" for key, value in settings.items())]
    return shlex.join(["bushpc", "weights", "pull", *words])


def _advice_in_a_job(model_class: type[Model], weights_dir: str | Path | None) -> str:
    # The check before the submit named the whole command; in here only model and folder are known.
    return f"run, with this run's model settings, {pull_command(model_class, weights_dir=weights_dir)}"


def _yamls_of(model_class: type[Model]) -> list[str]:
    """The names that `model=` takes for this class."""
    target = f"{model_class.__module__}.{model_class.__name__}"
    names = model_names(target)
    assert names, f"no yaml of configs/model has _target_: {target}"
    return names


def _nearest_yaml(model_class: type[Model], config: ModelConfig) -> tuple[str, dict[str, t.Any]]:
    """The yaml that needs the fewest changes to become `config`, and these changes."""
    changes = {}
    for name in _yamls_of(model_class):
        given, own = dataclasses.asdict(config), dataclasses.asdict(compose([f"model={name}"]).model)
        changes[name] = {key: value for key, value in given.items() if value != own[key]}
    nearest = min(changes, key=lambda name: len(changes[name]))
    return nearest, changes[nearest]


def _problem(file: WeightFile, folder: Path) -> str | None:
    path = folder / file.name
    if not path.is_file():
        return f"{path} is not staged."
    entry = _read_lock(folder).get(file.name)
    if entry is None:
        return f"{path} is not recorded in {LOCK}, so nobody knows what it is."
    if entry["hub_repo"] != file.hub_repo or entry["hub_file"] != file.hub_file:
        return f"{path} was pulled from {entry['hub_repo']}/{entry['hub_file']}, not {file.hub_repo}/{file.hub_file}."
    if entry["revision"] != file.revision:
        return f"{path} was pulled at revision {entry['revision']}, not {file.revision}."
    found = sha256_of(path)
    if found != entry["sha256"]:
        return f"{path} has sha256 {found}, and {LOCK} says {entry['sha256']}: it changed after it was pulled."
    return None


def _download(file: WeightFile, folder: Path) -> str:
    """Fetch one file to its final name; returns the commit it came from."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    assert file.name.endswith(".safetensors"), file.name
    try:
        # A branch may move between two requests, so it is resolved first and the file asked for by commit.
        commit = huggingface_hub.HfApi().model_info(file.hub_repo, revision=file.revision).sha
        with tempfile.TemporaryDirectory(dir=folder, prefix=".pull-") as aside:
            downloaded = huggingface_hub.hf_hub_download(file.hub_repo, file.hub_file, revision=commit, local_dir=aside)
            (folder / file.name).parent.mkdir(parents=True, exist_ok=True)
            Path(downloaded).replace(folder / file.name)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise WeightsError(
            f"could not pull {file.hub_repo}/{file.hub_file} at {file.revision}: {error}. "
            "Pull on a machine with internet access and copy the weights folder, its lock file included."
        ) from error
    return str(commit)


def _record(folder: Path, file: WeightFile, commit: str) -> None:
    path = folder / file.name
    entry = {
        "hub_repo": file.hub_repo,
        "hub_file": file.hub_file,
        "revision": file.revision,
        "commit": commit,
        "sha256": sha256_of(path),
        "bytes": path.stat().st_size,
    }
    lock = {**_read_lock(folder), file.name: entry}
    write_atomically(folder / LOCK, json.dumps(lock, indent=2, sort_keys=True) + "\n")


def _read_lock(folder: Path) -> dict[str, dict[str, t.Any]]:
    path = folder / LOCK
    try:
        return read_json(path) or {}
    except DataError as error:
        raise WeightsError(f"{error}: remove it and pull the weights again") from error
