"""Trained run → a folder that needs nothing else: `bushpc export`. Read back by `bushpc.evaluate.predictor.load`.

    OUT/export.json              model, its settings, folds, fitted conditions, preprocessing, data, versions
    OUT/README.md                model card
    OUT/config.yaml              the run's settings without the folders of this machine, for the reader
    OUT/fold0/model.safetensors  every tensor, frozen ones and the text tower included
    OUT/fold0/model.pt2          with format torch: torch.export, image → probability map
    OUT/fold0/model.onnx         with format onnx: the same
    OUT/fold0/…                  what another library opens, of models that have such a form (Model.save_pretrained)

The folder is written aside and renamed when it is whole, and every file in it has been read back and compared.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import os
import platform
import shutil
import socket
import time
import typing as t
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import msgspec
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file

from bushpc.config import CellConfig, freeze
from bushpc.data.lineage import licences, licences_of_pulled, licences_of_start, of_cell
from bushpc.errors import ConfigError, DataError
from bushpc.evaluate.evaluate import means
from bushpc.evaluate.graphs import FILES, refuse_graphs, write_graph
from bushpc.evaluate.model_card import model_card
from bushpc.evaluate.predictor import Member, Recipe, load_cell, load_export
from bushpc.evaluate.trained import TrainedCell, TrainedRun, open_run, rule_for
from bushpc.files import EXPORT_FILE, flush_file, flush_folder, read_json, sha256_of, write_atomically
from bushpc.metrics.registry import METRICS
from bushpc.models.base import all_tensors
from bushpc.report.model_figures import model_figures
from bushpc.sample import LABELS
from bushpc.shards.card import Card
from bushpc.shards.licences import DataLicence, checked, conflicts, unclear

FORMATS = ("safetensors", "torch", "onnx")


def export(
    run_dir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    fold: int | None = None,
    row: str | None = None,
    formats: Sequence[str] = (),
    licence: str | None = None,
    to_share: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, t.Any]:
    """Write the trained model of a run, whole or not at all; returns the content of export.json.

    fold: None takes every fold that is done. formats: besides safetensors, which is always there. licence: the
    model's, by the Hub's identifier; `say` is told where the licences of the data contradict it or are unclear.
    to_share: a contradiction is an error, before anything is written.
    The same call again finds it done. Raises: ConfigError where `out` holds something else, and for a format that the
    model cannot have; otherwise as `bushpc.load`.
    """
    run_dir, out = Path(run_dir), Path(out)
    if (run_dir / EXPORT_FILE).exists():
        raise ConfigError(f"{run_dir} is an exported model already: copy the folder, or export from its run")
    licence = None if licence is None else checked(licence)
    run = open_run(run_dir, fold, row, say)
    graphs = [name for name in FORMATS if name in formats and name in FILES]
    refuse_graphs(run.cells[0].config, graphs)
    members = [load_cell(cell) for cell in run.cells]
    content = _describe(run, members, graphs, licence, fold)
    _judge_licences(content, to_share, say)
    if out.exists():
        there = read_json(out / EXPORT_FILE) or {}
        if _identity(there) == _identity(content):
            try:
                _compare(out, members)
            except (DataError, ConfigError) as error:
                raise ConfigError(f"{out} is damaged ({error}): delete it, and export again") from error
            return there
        raise ConfigError(f"{out} exists and is not this export: choose another folder, or delete it")
    aside = out.with_name(f".{out.name}.{socket.gethostname()}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        _write(aside, run, members, content)
        _compare(aside, members)
        aside.rename(out)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):  # the latter is how safetensors reports a full disk
            raise DataError(
                f"{out} could not be written ({error}); nothing was left there. Make room, or choose another"
            ) from error
        raise
    flush_folder(out.parent)
    return content


def _write(folder: Path, run: TrainedRun, members: list[Member], content: dict[str, t.Any]) -> None:
    for member, entry in zip(members, content["folds"], strict=True):
        path = folder / entry["weights"]
        path.parent.mkdir(parents=True)
        save_file(all_tensors(member.model), path)
        entry["opens_with"] = member.model.save_pretrained(path.parent)
        for file in filter(Path.is_file, path.parent.rglob("*")):
            shutil.copymode(folder, file)  # safetensors' own leaves out the group, whatever the umask
            file.chmod(file.stat().st_mode & ~0o111)
            flush_file(file)
        entry["sha256"] = sha256_of(path)
        entry["graphs"] = {}
        for kind in content["graphs"]:
            graph = path.with_name(FILES[kind])
            deviation = write_graph(member.model, kind, graph)
            entry["graphs"][kind] = {"file": f"{member.name}/{graph.name}", "largest_deviation": deviation}
    write_atomically(folder / "config.yaml", _portable(run.cells[0].config))
    write_atomically(folder / "README.md", model_card(content))
    write_atomically(folder / EXPORT_FILE, json.dumps(content, indent=1))


def _compare(folder: Path, members: list[Member]) -> None:
    """Load what was written, as its users will, and hold every tensor to the run's."""
    loaded, _ = load_export(folder)
    differ = [mine.name for mine, theirs in zip(members, loaded, strict=True) if mine.sha256 != theirs.sha256]
    if differ:
        raise DataError(f"{', '.join(differ)} came back changed from {folder}: is the disk full, or broken?")


# --- what it is -------------------------------------------------------------------------------------------------


def _describe(
    run: TrainedRun, members: list[Member], graphs: list[str], licence: str | None, fold: int | None
) -> dict[str, t.Any]:
    config = run.cells[0].config
    record = run.record
    card = Card.find(config.data.name, config.data.folder)
    return {
        "format": freeze.EXPORT.number,
        "bushpc": version("bushpc"),
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "run": {"name": record.name, "commit": record.commit, "created": record.created, "row": run.row},
        "model": _portable_model(config),
        "about": (config.model_class.__doc__ or "").partition("\n")[0],
        "parameters": members[0].model.parameter_count(),
        "makes": sorted(config.model_class.makes),
        "conditions": {kind.name: kind.note for kind in config.model.conditions},
        "labels": list(LABELS),
        "recipe": Recipe.of(config, rule_for(run, fold)).to_dict(),
        "preprocessing": {
            "image": "RGB, uint8, what is transparent black",
            "resize": f"{config.model.image_size} x {config.model.image_size}, bilinear with antialiasing, aspect not "
            "kept",
            "range": "0 to 1, float32; the model normalises by itself",
            "output": "probability of lesion at that size, resized to the image's (bilinear), cut at the threshold",
        },
        "folds": [
            {
                "name": cell.name,
                "fold": cell.fold,
                "step": cell.step,
                "config": cell.config.hash,
                "weights": f"{cell.name}/model.safetensors",
                "tensors_sha256": member.sha256,
                "conditions": {kind.name: kind.state() for kind in member.conditions},
                "scores": _scores(cell),
                "trained_on": of_cell(record, cell.name),
                "started_from": record.cell(cell.name).started_from,
            }
            for cell, member in zip(run.cells, members, strict=True)
        ],
        "missing_folds": run.missing,
        "figures": msgspec.to_builtins(model_figures(run.path, run.row, [cell.fold for cell in run.cells])),
        "licence": licence,
        "licences": [each._asdict() for each in _licences(run)],
        "weights_from": sorted({file.hub_repo for file in config.model.weight_files()}),
        "graphs": graphs,
        "prompts": config.variants[0].name,
        "data": {
            **{"name": card.name, "title": card.title, "licence": card.licence, "citation": card.citation},
            **{"where": card.where, "excerpt": record.excerpt, "what": card.what},
            "normals": config.data.normals,
            **record.facts,
        },
        "versions": {"trained_with": record.versions, "python": platform.python_version()}
        | {"torch": torch.__version__},
    }


def _identity(content: Mapping[str, t.Any]) -> list[t.Any]:
    """What makes two exports the same, whichever version wrote them."""
    with contextlib.suppress(DataError, LookupError, TypeError, AttributeError):  # a damaged one is another one
        content = freeze.EXPORT.read(content)
    folds = [(each.get("name"), each.get("tensors_sha256")) for each in content.get("folds", [])]
    return [folds, content.get("graphs"), content.get("recipe"), content.get("licence")]


def _licences(run: TrainedRun) -> list[DataLicence]:
    """The licences of the data behind all folds."""
    found = [each for cell in run.cells for each in licences(cell.config, of_cell(run.record, cell.name))]
    found += [each for cell in run.cells for each in licences_of_start(run.record.cell(cell.name).started_from)]
    found += licences_of_pulled(run.cells[0].config.model.weight_files())
    return list(dict.fromkeys(found))


def _judge_licences(content: Mapping[str, t.Any], to_share: bool, say: Callable[[str], None]) -> None:
    """Say what is to be done about the licences before sharing. Raises: ConfigError for a conflict, `to_share`."""
    data = [DataLicence(**each) for each in content["licences"]]
    found = conflicts(content["licence"], data)
    if found and to_share:
        raise ConfigError("licence conflict, so nothing was pushed: " + "; ".join(found))
    for sentence in [*(f"licence conflict: {each}" for each in found), *unclear(data)]:
        say(sentence)


# --- settings without folders of this machine -------------------------------------------------------------------


def _portable(config: CellConfig) -> str:
    """Without folders of this machine, which say nothing elsewhere and should not be published."""
    there = dataclasses.replace(
        config,
        fold=None,
        runs_dir=None,
        weights_dir=None,
        data=dataclasses.replace(config.data, root=None, stream=None),
        loader=dataclasses.replace(config.loader, cache_dir=None, features_dir=None),
    )
    return yaml.dump({**freeze.CONFIG.stamp(), **there.to_dict(), "model": _portable_model(config)}, sort_keys=False)


def _portable_model(config: CellConfig) -> dict[str, t.Any]:
    """The model's settings without folders that it started from; whether it was pretrained stays, for the reader."""
    alone = dataclasses.replace(config, model=config.model.standalone()).to_dict()["model"]
    return {**alone, "pretrained": config.model.pretrained}


def _scores(cell: TrainedCell) -> dict[str, dict[str, float]]:
    """Prompt source → metric → mean over the fold's validation images."""
    rows: dict[str, list[dict[str, t.Any]]] = {}
    with cell.folder.per_image.open(newline="") as file:
        for row in csv.DictReader(file):
            numbers = {name: float(text) for name, text in row.items() if name in METRICS or name.startswith("prob_")}
            rows.setdefault(row["prompts"], []).append(row | numbers)
    return {source: means(of) | {"images": len(of)} for source, of in rows.items()}
