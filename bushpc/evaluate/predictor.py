"""Trained model → masks of any image. The one way in for `bushpc predict`, for exported models and for Python.

    import bushpc
    predictor = bushpc.load("runs/cv-…")          # run folder, or folder that `bushpc export` wrote
    result = predictor("image.png")
    result.mask_HW, result.prob_HW, result.long_axis_mm

What the network sees is what it saw in training: `bushpc.shards.images` decodes as the packer does, and
`bushpc.data.square.resize` is the loader's own. The probability map comes back to the image's size before it is cut at
the threshold, so the mask has the image's own pixels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import typing as t
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from PIL import Image

from bushpc.conditions import Condition, Known, kinds_for
from bushpc.config import CellConfig, ModelConfig, freeze, model_of
from bushpc.config.inference import refuse_tta
from bushpc.data.loader import FoldData
from bushpc.data.square import resize
from bushpc.errors import BushpcWarning, ConfigError, DataError, ResumeError, unknown_name
from bushpc.evaluate import hub
from bushpc.evaluate.components import processed
from bushpc.evaluate.measure import Measures, measure
from bushpc.evaluate.trained import TrainedCell, open_run, rule_for
from bushpc.evaluate.views import predict_view, resized, views_of
from bushpc.files import EXPORT_FILE, is_inside, read_json, sha256_of
from bushpc.models.base import OUTSIDE, Model, all_tensors, load_imported
from bushpc.runs import checkpoint
from bushpc.runs.chosen import PLAIN, Rule, rule_of
from bushpc.sample import LABELS, Batch, PixelSize, Prediction, Regions, pixel_size
from bushpc.shards import pictures
from bushpc.shards.images import as_rgb, open_picture

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model's predictions are made; part of an export.

    threshold: probability at and above which a pixel is lesion.
    device, precision: of its evaluation; on another device it runs in fp32.
    batch_size: images per forward pass. tta: test-time augmentation of its evaluation; exports of before it have none.
    postprocess: of masks, as fields of a `Rule`; None for none.
    """

    threshold: float
    device: str
    precision: str
    batch_size: int
    tta: str = "none"
    postprocess: dict[str, t.Any] | None = None

    @classmethod
    def of(cls, cell: CellConfig, rule: Rule = PLAIN) -> Recipe:
        """A cell's, with what was chosen for its masks."""
        return cls(
            threshold=cell.evaluate.threshold,
            device=cell.engine.device,
            precision=cell.engine.precision,
            batch_size=cell.evaluate.batch_size,
            tta=cell.evaluate.tta,
            postprocess=None if rule == PLAIN else msgspec.to_builtins(rule),
        )

    def to_dict(self) -> dict[str, t.Any]:
        """For an export. What is off is left out, so that exports of before it are still the same."""
        off = {"tta": "none", "postprocess": None}
        return {name: value for name, value in dataclasses.asdict(self).items() if off.get(name, ...) != value}


@dataclass(frozen=True, kw_only=True)
class Member:
    """One fold's trained model. conditions: the kinds it reads, fitted to its training part.

    sha256: over all of its tensors, so it is the same for a run and for what was exported of it.
    """

    name: str
    model: Model
    conditions: tuple[Condition, ...]
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Result(Measures):
    """A prediction at the image's own size, measured.

    mask_HW: uint8, 1 inside the lesion. prob_HW: float32 in [0, 1].
    uncertainty_HW: standard deviation of the probability over everything whose mean it is: samples, folds and mirror
        images; None of one sample of one fold.
    mean_prob: mean probability inside the mask, the confidence in what was found; None for an empty mask. max_prob: in
        the whole image.
    class_prob: label → probability, where the model classifies. label: the most probable one.
    conditions: column (of predictions.csv) → the distinct values that the model used, over folds and mirror images, for
        the image as it is.
    """

    mask_HW: np.ndarray
    prob_HW: np.ndarray
    uncertainty_HW: np.ndarray | None
    mean_prob: float | None
    max_prob: float
    class_prob: dict[str, float] | None
    label: str | None
    conditions: dict[str, list[str]]


class Predictor:
    """One fold, or several as an ensemble: the mean of their probabilities.

    tta: test-time augmentation, `bushpc.evaluate.views`; None takes that of the model's own evaluation. True is
        `mirror`, False `none`. postprocess: whether masks get the post-processing that was chosen for the model.
    """

    def __init__(
        self,
        members: Sequence[Member],
        recipe: Recipe,
        *,
        device: str = "auto",
        tta: str | bool | None = None,
        postprocess: bool = True,
    ) -> None:
        """Raises: ConfigError for a model that makes no mask or cannot be averaged so, for members that differ, and
        for a device that is not there.
        """
        if isinstance(tta, bool):
            tta = "mirror" if tta else "none"
        self.members, self.recipe, self.tta = list(members), recipe, recipe.tta if tta is None else tta
        self.rule = rule_of(recipe.postprocess) if postprocess else PLAIN
        self.device = choose_device(device)
        first = members[0].model
        if "prob_BKHW" not in first.makes:
            raise ConfigError(f"{type(first).__name__} makes no mask (it makes {', '.join(sorted(first.makes))})")
        _refuse_differing(members)
        refuse_tta(self.tta, first.config, first.makes, f"test-time augmentation {self.tta}")
        self.views = views_of(self.tta, first.config)
        self.reads = first.config.reads
        for member in members:
            member.model.to(self.device).eval()

    def __call__(
        self,
        image: str | Path | Image.Image | np.ndarray,
        *,
        pixel_mm: float | Sequence[float] | None = None,
        frame: int | None = None,
        grey_max: float | None = None,
        **conditions: str,
    ) -> Result:
        """Predict one image: a path, a PIL image, or an array of uint8, H x W or H x W x 3 (RGB).

        pixel_mm: one number, or (x, y); None takes what a DICOM file says. frame: which, from 0, of a file with
        several. grey_max: value of white in a 16-bit or float picture; None takes what the file states, else the
        smallest full scale that holds its values. conditions: what you know of it, named as the columns of a table for
        `bushpc predict --prompts`: spatial_prompt="a small lesion in …", shape="oval". "" is unknown.
        Raises: DataError for an image that cannot be read; ConfigError for another name.
        """
        kinds = kinds_for(self.members[0].conditions)
        valid = [column for kind in kinds for column in kind.user_columns]
        for name in conditions:
            if name not in valid:
                raise ConfigError(
                    unknown_name("keyword of a prediction", name, [*valid, "pixel_mm", "frame", "grey_max"])
                )
        own_mm: PixelSize | Regions | None = None
        if isinstance(image, str | Path):
            image_HWC, own_mm = _read(Path(image), frame, grey_max)
        else:
            image_HWC = as_rgb(image)
        known = Known.of(conditions, own_mm if pixel_mm is None else pixel_size(pixel_mm), kinds)
        return self.predict([image_HWC], [known])[0]

    def predict(self, images: Sequence[np.ndarray], known: Sequence[Known]) -> list[Result]:
        """A batch of images (uint8, H x W x 3, of any sizes), and what is known of each."""
        batch = batch_of(images, self.members[0].model.config).to(self.device)
        passes = list(self._passes(batch, known))
        prob_PBHW = torch.stack([p.prob_BKHW[:, 0].float().cpu() for p in passes if p.prob_BKHW is not None])
        variances = [p.uncertainty_BKHW[:, 0].float().cpu() ** 2 for p in passes if p.uncertainty_BKHW is not None]
        deviation_BHW = None
        if variances or len(passes) > 1:  # within the passes and between them
            within = torch.stack(variances).mean(0) if variances else 0.0
            deviation_BHW = (within + prob_PBHW.var(0, correction=0)).sqrt()
        classes = [p.class_prob_BL.float().cpu() for p in passes if p.class_prob_BL is not None]
        class_prob_BL = torch.stack(classes).mean(0) if classes else None
        return [
            self._result(
                image_HWC,
                each,
                prob_PBHW.mean(0)[i],
                None if deviation_BHW is None else deviation_BHW[i],
                None if class_prob_BL is None else class_prob_BL[i],
                self._used(passes, i),
            )
            for i, (image_HWC, each) in enumerate(zip(images, known, strict=True))
        ]

    def _used(self, passes: Sequence[Prediction], i: int) -> dict[str, list[str]]:
        """Column → distinct values of image `i`."""
        return {
            kind.column: list(dict.fromkeys(kind.written((p.conditions or {})[kind.name][i]) for p in passes))
            for kind in self.members[0].conditions
            if kind.column
        }

    def _passes(self, batch: Batch, known: Sequence[Known]) -> Iterator[Prediction]:
        """Every member on every view, each prediction turned back to the image as it is.

        Their conditions are those that the prediction was made with, all kinds of them.
        """
        for view in self.views:
            for member in self.members:
                given = dataclasses.replace(batch, conditions=_conditions(member, known))
                with torch.inference_mode(), self._precision():
                    made = predict_view(member.model, given, member.conditions, view)
                assert made.prob_BKHW is not None, f"{type(member.model).__name__}.makes promises it"
                if made.prob_BKHW.shape[1] > 1:
                    raise ConfigError(
                        f"{type(member.model).__name__} was trained on masks of {made.prob_BKHW.shape[1]} classes, and "
                        "images are predicted for one; the maps of the validation part are in its cells' predictions/"
                    )
                yield made

    @contextlib.contextmanager
    def _precision(self) -> Iterator[None]:
        """As in evaluation, on the device of the evaluation."""
        precision = self.recipe.precision if self.device == self.recipe.device else "fp32"
        with torch.autocast(self.device, DTYPES[precision], enabled=precision != "fp32"):
            yield

    def _result(
        self,
        image_HWC: np.ndarray,
        known: Known,
        prob_SS: torch.Tensor,
        deviation_SS: torch.Tensor | None,
        class_prob_L: torch.Tensor | None,
        conditions: dict[str, list[str]],
    ) -> Result:
        def enlarged(map_SS: torch.Tensor) -> np.ndarray:
            return resized(map_SS[None, None], image_HWC.shape[:2])[0, 0].clamp(0, 1).numpy()

        prob_HW = enlarged(prob_SS)
        mask_HW = processed((prob_HW >= self.recipe.threshold).astype(np.uint8), self.rule)
        size = known.pixel_mm
        measures = measure(mask_HW, size.pixel_mm(mask_HW) if isinstance(size, Regions) else size)
        class_prob = None if class_prob_L is None else dict(zip(LABELS, class_prob_L.tolist(), strict=False))
        return Result(
            **vars(measures),
            mask_HW=mask_HW,
            prob_HW=prob_HW,
            uncertainty_HW=None if deviation_SS is None else enlarged(deviation_SS),
            mean_prob=float(prob_HW[mask_HW > 0].mean()) if measures.area_px else None,
            max_prob=float(prob_HW.max()),
            class_prob=class_prob,
            label=max(class_prob, key=lambda label: class_prob[label]) if class_prob else None,
            conditions=conditions,
        )


def batch_of(images: Sequence[np.ndarray], model: ModelConfig) -> Batch:
    """Images (uint8, H x W x 3, of any sizes) as the loader would give them to this model, without conditions."""
    size = model.image_size
    pixels = [resize(image_HWC, np.zeros(image_HWC.shape[:2], np.uint8), size)[0] for image_HWC in images]
    return Batch(
        # Models that draw noise do so by key: by what the image is, not by where it stands or how it is called.
        keys=[hashlib.sha256(image_HWC.tobytes()).hexdigest() for image_HWC in images],
        epochs=[0] * len(images),
        image_BCHW=torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2),
        mask_BKHW=torch.zeros(len(images), 1, size, size, dtype=torch.uint8),
        label_B=torch.zeros(len(images), dtype=torch.int64),
        conditions={kind.name: [kind.absent] * len(images) for kind in model.conditions},
    )


def _conditions(member: Member, known: Sequence[Known]) -> dict[str, list[t.Any]]:
    """Name → values for a member: what the user knows, else what the kind takes where nothing is known."""
    return {
        kind.name: [each.conditions.get(kind.name, kind.when_unknown()) for each in known] for kind in member.conditions
    }


def _refuse_differing(members: Sequence[Member]) -> None:
    """An ensemble is one model trained several times. Raises: ConfigError where members differ in what they predict."""
    kinds = {
        (type(each.model).__name__, each.model.config.image_size, tuple(kind.name for kind in each.conditions))
        for each in members
    }
    if len(kinds) > 1:
        listed = "; ".join(f"{name} of {size} pixels" for name, size, _ in sorted(kinds))
        raise ConfigError(
            f"an ensemble of differing models ({listed}): it averages the maps of one model, trained several times. "
            "Choose one fold, `--fold K`, or a run whose cells have the same settings"
        )


def _warn(message: str) -> None:
    warnings.warn(message, BushpcWarning, stacklevel=3)


def load(
    path: str | os.PathLike[str],
    *,
    fold: int | None = None,
    row: str | None = None,
    device: str = "auto",
    tta: str | bool | None = None,
    postprocess: bool = True,
    say: Callable[[str], None] = _warn,
) -> Predictor:
    """The trained model in a run folder, in a folder that `bushpc export` wrote, or on the Hub (`hub:OWNER/NAME`).

    fold: one of them; None takes all as an ensemble, and says which are missing. row: of a grid. device: auto, cpu or
    cuda. tta, postprocess: see `Predictor`. say: told what the user should know.
    Raises: DataError for a folder that is neither, or damaged; ConfigError for a name that does not exist; ResumeError
    for a fold that is not done, or no longer whole.
    """
    choose_device(device)  # before gigabytes are read
    folder = hub.fetch(str(path), fold) if str(path).startswith(hub.PREFIX) else Path(path)
    if (folder / EXPORT_FILE).exists():
        if row is not None:
            raise ConfigError(f"{folder} is an exported model and has no rows; leave row={row} out")
        members, recipe = load_export(folder, fold)
    else:
        run = open_run(folder, fold, row, say)
        members = [load_cell(cell) for cell in run.cells]
        recipe = Recipe.of(run.cells[0].config, rule_for(run, fold) if postprocess else PLAIN)
    return Predictor(members, recipe, device=device, tta=tta, postprocess=postprocess)


# --- from a run -------------------------------------------------------------------------------------------------


def load_cell(cell: TrainedCell) -> Member:
    """The weights that the cell was evaluated with: its last step's, averaged where `train.ema` is on."""
    run = cell.folder.run
    saved = checkpoint.read(cell.folder.checkpoint(cell.step), run.frozen)
    config = cell.config
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers are not ours to draw
        model = config.model_class(config.model, config.weights_dir)
    load_imported(model, only_outside=True)  # the rest is in the checkpoint
    conditions = config.model.conditions
    if any(kind.is_fitted for kind in conditions):
        conditions = FoldData.open(config, cell.fold, run.folds).conditions
    state = saved.parts["model"] | saved.parts.get("ema", {})
    return _member(cell.name, model, conditions, state, str(saved.path))


# --- from an export ---------------------------------------------------------------------------------------------


def load_export(path: Path, fold: int | None = None) -> tuple[list[Member], Recipe]:
    """The models in a folder that `bushpc export` wrote, whatever they make. Raises: DataError, ConfigError."""
    content = read_json(path / EXPORT_FILE) or {}
    if "format" not in content:
        raise DataError(f"{path / EXPORT_FILE} states no format: it is damaged, or no export. Export the run again")
    try:
        content = freeze.EXPORT.read(content, str(path / EXPORT_FILE))
        folds = {each["fold"]: each for each in content["folds"]}
        if fold is not None and fold not in folds:
            raise ConfigError(f"fold {fold} does not exist in {path}; valid: {', '.join(map(str, sorted(folds)))}")
        wanted = [each for number, each in folds.items() if fold in (None, number)]
        # Whatever it started from is in the file: nothing is staged, nothing fetched.
        model_class, config = model_of({**content["model"], "pretrained": False})
        recipe = Recipe(**content["recipe"])
        msgspec.convert(content["recipe"], Recipe)  # of these types
        if recipe.precision not in DTYPES:
            raise ValueError(f"precision '{recipe.precision}'")
        return [_load_exported_fold(path, each, model_class, config) for each in wanted], recipe
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise DataError(f"{path / EXPORT_FILE} is damaged ({type(error).__name__}: {error}): export again") from error


def _load_exported_fold(path: Path, each: Mapping[str, t.Any], model_class: type[Model], config: t.Any) -> Member:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not is_inside(each["weights"]):
        raise DataError(f"{path / EXPORT_FILE} names weights outside its folder: {each['weights']!r}")
    file = path / each["weights"]
    if not file.is_file() or sha256_of(file) != each["sha256"]:
        raise DataError(f"{file} is missing, or is not what {EXPORT_FILE} says: copy or export the folder again")
    with torch.random.fork_rng(devices=[]):
        model = model_class(config)
    try:
        tensors = load_file(file)
        for name, module in model.outside_state().items():
            prefix = f"{OUTSIDE}{name}/"
            module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    except (SafetensorError, OSError, RuntimeError) as error:
        raise DataError(
            f"{file} does not hold this model's weights ({error}): copy or export the folder again"
        ) from error
    state = {k: v for k, v in tensors.items() if not k.startswith(OUTSIDE)}
    conditions = tuple(kind.restored(each["conditions"].get(kind.name, {})) for kind in model.config.conditions)
    return _member(each["name"], model, conditions, state, str(file))


def _member(
    name: str, model: Model, conditions: tuple[Condition, ...], state: dict[str, torch.Tensor], where: str
) -> Member:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ResumeError(f"{where} does not fit this model: {error}") from error
    return Member(name=name, model=model, conditions=conditions, sha256=_hash(all_tensors(model)))


def _hash(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(path: Path, frame: int | None, grey_max: float | None) -> tuple[np.ndarray, PixelSize | Regions | None]:
    try:
        picture = open_picture(path, None if grey_max is None else pictures.given(grey_max))
        if frame is None and picture.frames > 1:
            raise DataError(f"it has {picture.frames} frames: choose one with frame=0 to frame={picture.frames - 1}")
        if not 0 <= (frame or 0) < picture.frames:
            raise DataError(f"frame={frame} does not exist: it has {picture.frames}, from 0")
        return picture.read(frame or 0), picture.scale
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def choose_device(name: str) -> str:
    """cpu or cuda, of one of DEVICES. Raises: ConfigError for another name, and for a GPU that is not there."""
    if name not in DEVICES:
        raise ConfigError(unknown_name("device", name, DEVICES))
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise ConfigError("device=cuda, but torch finds no GPU here; use device=cpu, or auto")
    return "cuda" if there and name != "cpu" else "cpu"
