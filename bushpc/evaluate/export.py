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
import textwrap
import time
import typing as t
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from bushpc.conditions import VARIANTS
from bushpc.config import CellConfig, freeze
from bushpc.data.lineage import of_cell
from bushpc.errors import ConfigError, DataError
from bushpc.evaluate.evaluate import means
from bushpc.evaluate.predictor import (
    Member,
    Recipe,
    TrainedCell,
    TrainedRun,
    all_tensors,
    load_cell,
    load_export,
    open_run,
)
from bushpc.files import EXPORT_FILE, flush_file, flush_folder, read_json, sha256_of, write_atomically
from bushpc.metrics.registry import METRICS
from bushpc.models.base import Model
from bushpc.sample import LABELS, Batch
from bushpc.shards.card import Card

FORMATS = ("safetensors", "torch", "onnx")
FILES = {"torch": "model.pt2", "onnx": "model.onnx"}
# What a graph may differ by from the model that it was made of, in probability: rounding, not another model.
GRAPH_TOLERANCE = {"torch": 1e-6, "onnx": 1e-4}
# Fields of a Batch that are tensors of the image; a model that reads others is more than one graph.
GRAPH_INPUTS = {"image_BCHW", "mask_BKHW", "label_B"}


def export(
    run_dir: Path,
    out: Path,
    *,
    fold: int | None = None,
    row: str | None = None,
    formats: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> dict[str, t.Any]:
    """Write the trained model of a run, whole or not at all; returns the content of export.json.

    fold: None takes every fold that is done. formats: besides safetensors, which is always there.
    The same call again finds it done. Raises: ConfigError where `out` holds something else, and for a format that the
    model cannot have; otherwise as `bushpc.load`.
    """
    if (run_dir / EXPORT_FILE).exists():
        raise ConfigError(f"{run_dir} is an exported model already: copy the folder, or export from its run")
    run = open_run(run_dir, fold, row, say)
    graphs = [name for name in FORMATS if name in formats and name in FILES]
    _refuse_graphs(run.cells[0].config, graphs)
    members = [load_cell(cell) for cell in run.cells]
    content = _describe(run, members, graphs)
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
            deviation = _write_graph(member.model, kind, graph)
            entry["graphs"][kind] = {"file": f"{member.name}/{graph.name}", "largest_deviation": deviation}
    write_atomically(folder / "config.yaml", _portable(run.cells[0].config))
    write_atomically(folder / "README.md", _model_card(content))
    write_atomically(folder / EXPORT_FILE, json.dumps(content, indent=1))


def _compare(folder: Path, members: list[Member]) -> None:
    """Load what was written, as its users will, and hold every tensor to the run's."""
    loaded, _ = load_export(folder)
    differ = [mine.name for mine, theirs in zip(members, loaded, strict=True) if mine.sha256 != theirs.sha256]
    if differ:
        raise DataError(f"{', '.join(differ)} came back changed from {folder}: is the disk full, or broken?")


# --- what it is -------------------------------------------------------------------------------------------------


def _describe(run: TrainedRun, members: list[Member], graphs: list[str]) -> dict[str, t.Any]:
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
        "recipe": dataclasses.asdict(Recipe.of(config)),
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
            }
            for cell, member in zip(run.cells, members, strict=True)
        ],
        "missing_folds": run.missing,
        "graphs": graphs,
        "prompts": config.variants[0].name,
        "data": {
            **{"name": card.name, "title": card.title, "licence": card.licence, "citation": card.citation},
            **{"where": card.where, "excerpt": record.excerpt},
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
    return [folds, content.get("graphs"), content.get("recipe")]


# --- graphs -----------------------------------------------------------------------------------------------------


class _Graph(nn.Module):
    """A model as one function of tensors: image (B x 3 x S x S, 0 to 1) → probability of lesion (B x K x S x S)."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        batch = Batch(
            keys=[],
            epochs=[],
            image_BCHW=image_BCHW,
            mask_BKHW=torch.zeros_like(image_BCHW[:, :1]),
            label_B=torch.zeros_like(image_BCHW[:, 0, 0, 0], dtype=torch.int64),
        )
        prob_BKHW = self.model.predict(batch).prob_BKHW
        assert prob_BKHW is not None
        return prob_BKHW


def _refuse_graphs(config: CellConfig, graphs: Sequence[str]) -> None:
    more = sorted(config.model.needs - GRAPH_INPUTS | {kind.name for kind in config.model.conditions})
    if graphs and more:
        raise ConfigError(
            f"--format {' '.join(graphs)}: {config.model_class.__name__} reads {', '.join(more)}, sentences that are "
            "made, embedded and, after a first pass, made again: that is no one function of an image, which is what a "
            "graph holds. Leave the format out: safetensors holds all of it, for bushpc.load"
        )
    if "onnx" in graphs:
        lacking = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
        if lacking:
            raise ConfigError(f"--format onnx needs {', '.join(lacking)}: pip install 'bushpc[onnx]', or leave it out")


def _write_graph(model: Model, kind: str, path: Path) -> float:
    """Write it for any batch size, run what was written, and return how far it is off at most, in probability.

    Raises: ConfigError when it is not the same function.
    """
    graph = _Graph(model).eval()
    size = model.config.image_size
    image_BCHW = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        shapes = ({0: torch.export.Dim("batch", min=1)},)
        # Not strict: bytecode tracing is for programs with control flow, and takes several times as long.
        try:
            program = torch.export.export(graph, (image_BCHW,), dynamic_shapes=shapes, strict=False)
        except Exception as error:  # whatever the model's code does that cannot be traced
            raise ConfigError(
                f"--format {kind}: torch cannot make a graph of {type(model).__name__} "
                f"({type(error).__name__}: {str(error).splitlines()[0]}). Leave the format out"
            ) from error
        if kind == "torch":
            torch.export.save(program, path)
            run: Callable[[torch.Tensor], torch.Tensor] = torch.export.load(path).module()
        else:
            torch.onnx.export(
                program,
                (image_BCHW,),
                path,
                input_names=["image"],
                output_names=["probability"],
                external_data=False,
                verbose=False,
            )
            run = _onnx_session(path)
        # Another batch than the one that was traced, and a single image.
        others = [image_BCHW[:1], image_BCHW.flip(0)[:2]]
        deviation = max(float((run(other) - graph(other)).abs().max()) for other in others)
    if not deviation <= (allowed := GRAPH_TOLERANCE[kind]):
        raise ConfigError(
            f"--format {kind}: the graph is off by {deviation:.2g} in probability, {allowed:g} is allowed: it is not "
            "this model. Leave the format out"
        )
    flush_file(path)
    return deviation


def _onnx_session(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda image_BCHW: torch.from_numpy(session.run(None, {"image": image_BCHW.numpy()})[0])


# --- for the reader ---------------------------------------------------------------------------------------------


def _model_card(content: Mapping[str, t.Any]) -> str:
    """README.md: what the model is, what it was trained on, how good it was there, and what it is not for."""
    run, data, folds = (content[key] for key in ("run", "data", "folds"))
    name = content["model"]["_target_"].rpartition(".")[2]
    of = f", row {run['row']}" if run["row"] else ""
    excerpt = " **An excerpt of it only: these numbers are not the dataset's.**" if data["excerpt"] else ""
    missing = content["missing_folds"]
    graphs = "".join(
        f"- `<fold>/{FILES[kind]}`: {kind}, image (B x 3 x {content['model']['image_size']} x "
        f"{content['model']['image_size']}, 0 to 1) → probability; off by at most "
        f"{max(fold['graphs'][kind]['largest_deviation'] for fold in folds):.1g} from the model\n"
        for kind in content["graphs"]
    )
    return f"""# {name}, trained on {data["title"]}

{_purpose(content)} Exported from run `{run["name"]}`{of} by bushpc
{content["bushpc"]} (trained by commit {run["commit"]}).

## Use

{_use(content)}
- `<fold>/model.safetensors`: all tensors; {content["parameters"]:,} parameters in the network
{graphs}- `export.json`: everything that loading takes; `config.yaml`: the settings of the training

## Training data

{data["title"]}{f", {data['where']}" if data["where"] else ""}.{excerpt} Licence of the data: {data["licence"]}. Cite:
{data["citation"]}

## How good it was

Each fold's model on its own validation part, which it was not trained on; means over images.
{_ensemble_line(folds, missing)}
{_score_table(folds)}
{_condition_notes(content)}
## Intended use and limits

For research. It is no medical device, and no clinical decision may rest on it. It was trained on images of the
scanners, operators and patients of one dataset and will do worse on others{_limits(content)}
"""


def _makes_masks(content: Mapping[str, t.Any]) -> bool:
    return "prob_BKHW" in content["makes"]


def _purpose(content: Mapping[str, t.Any]) -> str:
    return "Segments lesions in breast ultrasound images." if _makes_masks(content) else content["about"]


def _use(content: Mapping[str, t.Any]) -> str:
    if not _makes_masks(content):
        opens = content["folds"][0]["opens_with"]
        return f"With `<fold>` as folder: {opens}.\n" if opens else "By `bushpc`, from its run.\n"
    label = ", result.label, result.class_prob" if "class_prob_BL" in content["makes"] else ""
    return f"""```python
import bushpc
predictor = bushpc.load("this folder")
result = predictor("image.png")
result.mask_HW, result.prob_HW, result.long_axis_mm{label}
```

`bushpc predict <this folder> <images> <out>` does it for a folder of images. Neither needs the run, its data or a
network connection.

Input is an RGB image, resized to {content["preprocessing"]["resize"]}; a pixel is lesion from a probability of
{content["recipe"]["threshold"]:g} on.
"""


def _limits(content: Mapping[str, t.Any]) -> str:
    if not _makes_masks(content):
        return "."
    seen = (
        "scans without a lesion were among them, and it may find one there all the same"
        if content["data"]["normals"]
        else "images with lesions only, so it may well find one where there is none"
    )
    return f""";
{seen}. Where an image holds several lesions, or none,
look at the probability map. Axes in millimetres are as right as the pixel size that was given."""


def _ensemble_line(folds: Sequence[Mapping[str, t.Any]], missing: Sequence[str]) -> str:
    line = ""
    if len(folds) > 1:
        line += "No number here is the ensemble's: each of these images was in the training part of the other folds.\n"
    if missing:
        line += f"**Not in here, as they were not done: {', '.join(missing)}.**\n"
    return line


def _score_table(folds: Sequence[Mapping[str, t.Any]]) -> str:
    names = [name for name in METRICS if all(name in of for fold in folds for of in fold["scores"].values())]
    lines = [
        f"| prompts | fold | images | {' | '.join(METRICS[name].title for name in names)} |",
        f"| --- | --- | ---: |{' ---: |' * len(names)}",
    ]
    for source in folds[0]["scores"]:
        scores = [fold["scores"][source] for fold in folds]
        label = VARIANTS[source].label if source in VARIANTS else source
        for fold, of in zip(folds, scores, strict=True):
            values = " | ".join(f"{of[name]:.4f}" for name in names)
            lines.append(f"| {label} | {fold['fold']} | {of['images']} | {values} |")
        if len(folds) > 1:
            spread = (np.array([of[name] for of in scores]) for name in names)
            values = " | ".join(f"{of.mean():.4f} ± {of.std(ddof=1):.4f}" for of in spread)
            lines.append(f"| {label} | mean ± SD | {sum(int(of['images']) for of in scores)} | {values} |")
    return "\n".join(lines) + "\n"


def _condition_notes(content: Mapping[str, t.Any]) -> str:
    if not content["conditions"]:
        return ""
    names = ", ".join(content["conditions"]).replace("_", " ")
    notes = " ".join(filter(None, content["conditions"].values()))
    return "\n## Conditions\n\n" + textwrap.fill(f"Besides the image it reads {names}. {notes}", 120) + "\n"


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
