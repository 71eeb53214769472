"""The content of export.json → README.md, the model card: front matter that the Hub reads, and text for people.

The front matter has the Hub's own keys, written by its library. Figures stand there as a model-index, with interval,
grid and folds as `args` of the metric; those whose prompts come from the ground truth are only in the text.
"""

from __future__ import annotations

import textwrap
import typing as t
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from bushpc.conditions import VARIANTS
from bushpc.evaluate.graphs import FILES
from bushpc.metrics.registry import METRICS
from bushpc.report.model_figures import INTERVAL
from bushpc.shards.licences import NO_LICENCE, STARTED_FROM, DataLicence, conflicts, fitting, unclear

LIBRARY = "bushpc"
LABELLING: dict[str, t.Any] = {"task_type": "image-classification", "task_name": "Lesion classification"}


def model_card(content: Mapping[str, t.Any]) -> str:
    """README.md: what the model is, what it was trained on, how good it was there, and what it is not for."""
    run, data, folds = (content[key] for key in ("run", "data", "folds"))
    of = f", row {run['row']}" if run["row"] else ""
    excerpt = " **An excerpt of it only: these numbers are not the dataset's.**" if data["excerpt"] else ""
    missing = content["missing_folds"]
    size = content["model"]["image_size"]
    graphs = "".join(
        f"- `<fold>/{FILES[kind]}`: {kind}, image (B x 3 x {size} x {size}, 0 to 1) → probability; off by at most "
        f"{max(fold['graphs'][kind]['largest_deviation'] for fold in folds):.1g} from the model\n"
        for kind in content["graphs"]
    )
    return f"""---
{_front_matter(content)}
---

# {_name(content)}, trained on {data["title"]}

{_purpose(content)} Exported from run `{run["name"]}`{of} by bushpc
{content["bushpc"]} (trained by commit {run["commit"]}).

## Use

{_use(content)}
- `<fold>/model.safetensors`: all tensors; {content["parameters"]:,} parameters in the network
{graphs}- `export.json`: everything that loading takes; `config.yaml`: the settings of the training

## Training data

{data["title"]}{f", {data['where']}" if data["where"] else ""}.{excerpt} Licence of the data: {data["licence"]}. Cite:
{data["citation"]}

## Licences

{_licences(content)}
## How good it was

Each fold's model on its own validation part, which it was not trained on; means over images.
{_ensemble_line(folds, missing)}
{_score_table(folds)}
{_figure_tables(content["figures"])}{_condition_notes(content)}
## Intended use and limits

For research. It is no medical device, and no clinical decision may rest on it. It was trained on images of the
scanners, operators and patients of one dataset and will do worse on others{_limits(content)}
"""


def _name(content: Mapping[str, t.Any]) -> str:
    return str(content["model"]["_target_"].rpartition(".")[2])


# --- for the Hub ------------------------------------------------------------------------------------------------


def _front_matter(content: Mapping[str, t.Any]) -> str:
    from huggingface_hub import ModelCardData

    figures = [figure for figure in content["figures"] if not figure["uses_ground_truth"]]
    licences = [DataLicence(**each) for each in content["licences"]]
    data = ModelCardData(
        license=content["licence"] or NO_LICENCE,
        library_name=LIBRARY,
        pipeline_tag=_task(content)["task_type"],
        base_model=content["weights_from"] or None,
        tags=_tags(content),
        datasets=list(dict.fromkeys(each.data for each in licences if each.role != STARTED_FROM)),
        metrics=list(dict.fromkeys(figure["metric"] for figure in figures)) or None,
        model_name=_name(content),
        eval_results=[_eval_result(content, figure) for figure in figures] or None,
    )
    return str(data.to_yaml())


def _tags(content: Mapping[str, t.Any]) -> list[str]:
    ultrasound = "ultrasound" in f"{content['data']['title']} {content['data']['what']}".lower()
    return [LIBRARY, *["ultrasound"] * ultrasound, "medical-imaging", _name(content).lower()]


def _task(content: Mapping[str, t.Any]) -> dict[str, t.Any]:
    if _makes_masks(content):
        return {"task_type": "image-segmentation", "task_name": "Lesion segmentation"}
    if "class_prob_BL" in content["makes"]:
        return LABELLING
    return {"task_type": "text-to-image", "task_name": "Image generation"}


def _eval_result(content: Mapping[str, t.Any], figure: Mapping[str, t.Any]) -> t.Any:
    from huggingface_hub import EvalResult

    metric, data, folds = METRICS[figure["metric"]], content["data"], [fold["fold"] for fold in content["folds"]]
    own = figure["dataset"] is None
    about = {
        "unit": metric.unit or None,
        "of": figure["of"],
        "ci95": list(figure["ci95"]) if figure["ci95"] else None,
        "ci95_of": _interval(figure) if figure["ci95"] else None,
        "sd_over_folds": figure["sd"],
        "folds": folds,
        "images": figure["images"],
        "patients": figure["patients"],
        "grid": figure["grid"],
    }
    return EvalResult(
        **(LABELLING if metric.of == "labels" else _task(content)),
        dataset_type=data["name"] if own else figure["dataset"],
        dataset_name=(data["title"] + " (excerpt)" * data["excerpt"]) if own else figure["dataset"],
        dataset_config=figure["source"],
        dataset_split="validation parts of the folds" if own else "all, external test",
        metric_type=metric.name,
        metric_name=metric.heading,
        metric_value=figure["value"],
        metric_args={key: value for key, value in about.items() if value is not None},
    )


def _interval(figure: Mapping[str, t.Any]) -> str:
    return INTERVAL if METRICS[figure["metric"]].of == "labels" else f"{INTERVAL}, of the mean over images"


# --- for people -------------------------------------------------------------------------------------------------


def _licences(content: Mapping[str, t.Any]) -> str:
    licence, data = content["licence"], [DataLicence(**each) for each in content["licences"]]
    fits = " or ".join(fitting(data))
    lines = [f"Model: {licence}." if licence else "Model: no licence was chosen, so nobody but its authors may use it."]
    if not licence and fits:
        lines += [f"What the licences below require, {fits} would keep (`bushpc export --licence`)."]
    lines += ["", "| data | role | licence | where |", "| --- | --- | --- | --- |"]
    lines += [f"| {each.title} | {each.role} | {each.licence} | {each.where} |" for each in data]
    if content["weights_from"]:
        repositories = ", ".join(f"https://huggingface.co/{name}" for name in content["weights_from"])
        lines += ["", f"It started from these pretrained weights: {repositories}."]
    starts = [(fold["name"], fold["started_from"]) for fold in content["folds"] if fold.get("started_from")]
    lines += ["", *(f"- {_start(name, note)}" for name, note in starts)] if starts else []
    found, open_questions = conflicts(licence, data), unclear(data)
    if not fits:
        open_questions.append("No common licence keeps what all of these require: ask the publishers")
    lines += ["", *(f"**Conflict:** {each}." for each in found)] if found else []
    lines += ["", *(f"**To be settled:** {each}." for each in open_questions)] if open_questions else []
    return "\n".join(lines) + "\n"


def _start(name: str, note: Mapping[str, t.Any]) -> str:
    """What a fold started from, in a line."""
    of = f"{note['cell']} of run {note['name']}, trained on {note['data']}" if "cell" in note else note["name"]
    return f"{name} started from {of} (sha256 {note['sha256']})"


def _figure_tables(figures: Iterable[Mapping[str, t.Any]]) -> str:
    own = [figure for figure in figures if figure["dataset"] is None]
    others = [figure for figure in figures if figure["dataset"] is not None]
    text = ""
    if own:
        text += f"{INTERVAL}; for metrics of pixels, of the mean over images.\n\n{_figure_table('prompts', own)}"
    if others:
        text += f"\nOn other datasets, which it was not trained on:\n\n{_figure_table('dataset', others)}"
    return text


def _figure_table(second: str, figures: Iterable[Mapping[str, t.Any]]) -> str:
    """second: the key of a figure that the second column shows."""
    titles = ("metric", second, "value", "SD over folds", "95 % interval", "images", "patients", "grid")
    lines = [f"| {' | '.join(titles)} |", "| --- | --- | ---: | ---: | --- | ---: | ---: | --- |"]
    lines += [f"| {_heading(figure)} | {figure[second]} | {_numbers(figure)} |" for figure in figures]
    return "\n".join(lines) + "\n"


def _heading(figure: Mapping[str, t.Any]) -> str:
    return f"{METRICS[figure['metric']].heading}, {figure['of']}"


def _numbers(figure: Mapping[str, t.Any]) -> str:
    sd = "-" if figure["sd"] is None else f"{figure['sd']:.4f}"
    interval = "-" if not figure["ci95"] else f"{figure['ci95'][0]:.4f} to {figure['ci95'][1]:.4f}"
    counted = f"{figure['images']} | {figure['patients']} | {figure['grid'] or '-'}"
    return f"{figure['value']:.4f} | {sd} | {interval} | {counted}"


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
        line += "Ensemble performance was not measured: the other folds trained on these images.\n"
    if missing:
        line += f"**Not included, as they were not done: {', '.join(missing)}.**\n"
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
