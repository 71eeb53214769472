"""Exports on the Hugging Face Hub: `bushpc export --push OWNER/NAME`, `bushpc predict hub:OWNER/NAME`.

    export folder ─push→ one commit of a model repository ─fetch→ the Hub library's cache → predictor.load

Only safetensors and JSON are fetched, because other formats can run code. What was fetched once needs no network.
"""

from __future__ import annotations

import contextlib
import re
import typing as t
from collections.abc import Iterator, Mapping
from pathlib import Path

from bushpc.errors import ConfigError, DataError
from bushpc.evaluate.graphs import FILES
from bushpc.files import EXPORT_FILE, is_inside, read_json
from bushpc.weights import hub_errors

PREFIX = "hub:"
NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"


def fetch(address: str, fold: int | None = None) -> Path:
    """The local folder of an export on the Hub. address: hub:OWNER/NAME, with @REVISION for a branch, tag or commit.

    fold: fetch only this fold's weights. Raises: ConfigError for an address that cannot be; DataError if there is no
    export, or if it can't be fetched.
    """
    from huggingface_hub import snapshot_download

    repo, _, revision = address.removeprefix(PREFIX).partition("@")
    _check_name(repo, address)
    advice = (
        "Check the name; for a private one log in with `hf auth login`. Without network, run this once on a machine "
        "that has it: what was fetched is kept in HF_HOME, which jobs can read"
    )
    with _told(f"{address} cannot be fetched", advice):
        folder = Path(snapshot_download(repo, revision=revision or None, allow_patterns=[EXPORT_FILE]))
        content = read_json(folder / EXPORT_FILE)
        if content is None:
            raise DataError(
                f"{address} has no {EXPORT_FILE}: it is no model of bushpc. `bushpc export --push` makes one"
            )
        files = weight_files(content, address, fold)
        # By commit: a branch may move between two requests.
        return Path(snapshot_download(repo, revision=folder.name, allow_patterns=[EXPORT_FILE, "README.md", *files]))


def weight_files(content: Mapping[str, t.Any], address: str, fold: int | None) -> list[str]:
    """What an export.json of somebody else names to be fetched. The Hub's library takes these names for patterns, by
    which one could name every file of a repository. Raises: DataError.
    """
    try:
        files = [each["weights"] for each in content.get("folds", []) if fold is None or each["fold"] == fold]
    except (TypeError, LookupError, AttributeError) as error:
        raise DataError(f"{address}: its {EXPORT_FILE} is damaged ({type(error).__name__}: {error})") from error
    for file in files:
        if not is_inside(file) or not file.endswith(".safetensors") or any(sign in file for sign in "*?[]"):
            raise DataError(f"{address}: its {EXPORT_FILE} names {file!r}; allowed: a .safetensors file in it")
    return files


def check_push(repo: str, licence: str | None) -> None:
    """Refuse what can't be pushed before hours are spent on it. Raises: ConfigError."""
    from huggingface_hub import HfApi

    _check_name(repo, f"--push {repo}")
    if licence is None:
        raise ConfigError(
            f"--push {repo} needs --licence, the terms on which others may use the model. Leave --push out to see in "
            "OUT/README.md which ones the licences of the data allow"
        )
    with _told(f"--push {repo}: the Hub doesn't know who you are", LOG_IN):
        me = HfApi().whoami()
    owner, owners = repo.partition("/")[0], [me["name"], *(each["name"] for each in me.get("orgs", []))]
    if owner not in owners:
        raise ConfigError(f"--push {repo}: you are not a member of {owner}; allowed are {', '.join(owners)}")


def push(folder: Path, repo: str) -> str:
    """Make the repository hold this export, in one commit; returns its address. Nothing changed: no commit.

    A new repository is private. Raises: ConfigError if the repository holds something else; DataError if it fails.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _told(f"{folder} cannot be pushed to {repo}", f"Run the same command again to go on; or {LOG_IN}"):
        address = str(api.create_repo(repo, private=True, exist_ok=True))
        there = set(api.list_repo_files(repo))
        if there - {".gitattributes", "README.md"} and EXPORT_FILE not in there:
            raise ConfigError(f"{repo} holds something else than an export of bushpc: choose another name")
        weights = [f"*/{name}" for name in ("model.safetensors", *FILES.values())]
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message="Export of bushpc",
            ignore_patterns=".*",
            delete_patterns=weights,  # of folds that this export lacks
        )
    return address


def _check_name(repo: str, given: str) -> None:
    if not NAME.fullmatch(repo):
        raise ConfigError(
            f"{given}: must be OWNER/NAME of letters, digits, '-', '_' and '.', as in {PREFIX}my-lab/xbusnet-breast"
        )


@contextlib.contextmanager
def _told(what: str, advice: str) -> Iterator[None]:
    """Errors of the Hub and of the network as a DataError with advice."""
    # ValueError: names that the library rejects, and model cards that the Hub does.
    expected: tuple[type[Exception], ...] = (*hub_errors(), ValueError)
    try:
        yield
    except expected as error:
        lines = str(error).strip().splitlines()
        raise DataError(f"{what} ({lines[0] if lines else type(error).__name__}). {advice}") from error
