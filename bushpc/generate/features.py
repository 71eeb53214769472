"""Images → features for comparing sets of images: Inception's (for FID and KID), or those of a trained model.

FID and KID are distances in the features of one particular network, the Inception v3 of 2015-12-05 (Heusel et al.
2017); we use torch-fidelity's port with torchmetrics' preprocessing. It was trained on photographs. Features of an
ultrasound classifier may be more meaningful but give different values, so the distances then have other names. Features
of an untrained network are meaningless and not offered.
"""

from __future__ import annotations

import io
import shlex
import typing as t
import urllib.error
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from bushpc.config import places
from bushpc.errors import ConfigError, WeightsError
from bushpc.evaluate.predictor import batch_of, load_cell, load_export
from bushpc.evaluate.trained import open_run
from bushpc.files import EXPORT_FILE, sha256_of

INCEPTION, NONE = "inception", "none"
# As in torch's hub, the name ends with the first digits of the hash.
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


@dataclass(frozen=True, kw_only=True)
class FeatureExtractor:
    """A network that extracts features.

    name: describes the network. frechet, kernel: names of the two distances in its features.
    see: images of one size (uint8, H x W x 3) → float32, images x features.
    """

    name: str
    frechet: str
    kernel: str
    see: Callable[[Sequence[np.ndarray]], np.ndarray]


def inception(weights_dir: Path, device: str) -> FeatureExtractor:
    """The network for FID and KID, from its staged file. Raises: WeightsError if the file is missing or wrong."""
    from torchmetrics.image.fid import NoTrainInceptionV3

    require_inception(weights_dir)
    # torch-fidelity unpickles its input, so read the tensors safely first and pass only these on.
    tensors: t.Any = io.BytesIO()
    torch.save(torch.load(weights_dir / INCEPTION_FILE, map_location="cpu", weights_only=True), tensors)
    tensors.seek(0)
    network = NoTrainInceptionV3("inception-v3-compat", ["2048"], tensors).to(device)

    def see(images: Sequence[np.ndarray]) -> np.ndarray:
        with torch.inference_mode():
            features_ND = network(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(device))
        return features_ND.float().cpu().numpy()

    return FeatureExtractor(name="Inception v3 of 2015-12-05", frechet="FID", kernel="KID", see=see)


def of_model(run_dir: Path, fold: int | None, device: str, say: Callable[[str], None]) -> FeatureExtractor:
    """Features of a trained model: the output of its `cam_layer` (a classifier's last features), averaged over space.

    run_dir: a run, or the output of `bushpc export`. fold: None selects the first trained fold.
    Raises: as `bushpc.load`; ConfigError for a model without such a layer.
    """
    if (run_dir / EXPORT_FILE).exists():
        member = load_export(run_dir, fold)[0][0]
    else:
        member = load_cell(open_run(run_dir, fold, None, say).cells[0])
    model = member.model.to(device).eval()
    layer = model.cam_layer()
    if layer is None:
        raise ConfigError(
            f"features={run_dir}: {type(model).__name__} defines no feature layer (cam_layer). "
            "Use the run of a model that does, such as efficientnet, or features=inception"
        )
    given: list[torch.Tensor] = []

    def keep(module: nn.Module, inputs: t.Any, output: torch.Tensor) -> None:
        given[:] = [output]  # with several passes, keep the last

    layer.register_forward_hook(keep)

    def see(images: Sequence[np.ndarray]) -> np.ndarray:
        batch = batch_of(images, model.config).to(device)
        with torch.inference_mode():
            model.predict(batch)
        return given.pop().float().flatten(2).mean(dim=2).cpu().numpy()

    place = next(name for name, module in model.named_modules() if module is layer)
    return FeatureExtractor(
        name=f"{type(model).__name__} ({place}) of {run_dir}, {member.name}",
        frechet="Fréchet distance",
        kernel="Kernel distance",
        see=see,
    )


# --- the staged file --------------------------------------------------------------------------------------------


def pull_inception(weights_dir: Path) -> None:
    """Stage Inception's file, unless it is staged. Raises: WeightsError if the download fails or its hash is wrong."""
    if _inception_problem(weights_dir) is None:
        return
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    weights_dir.mkdir(parents=True, exist_ok=True)
    try:  # downloads to a temporary name, and renames once the hash is verified
        torch.hub.download_url_to_file(
            URL_INCEPTION_V3, str(weights_dir / INCEPTION_FILE), hash_prefix=INCEPTION_SHA256, progress=False
        )
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        raise WeightsError(
            f"could not pull {URL_INCEPTION_V3}: {error}. Pull on a machine with internet access and copy the file to "
            f"{weights_dir}"
        ) from error


def require_inception(weights_dir: Path) -> None:
    """Raises: WeightsError, with alternatives, if Inception's file is missing or wrong."""
    problem = _inception_problem(weights_dir)
    if problem:
        folder = [] if weights_dir == places.home() / "weights" else [f"weights_dir={weights_dir}"]
        pull = shlex.join(["bushpc", "weights", "pull", f"features={INCEPTION}", *folder])
        raise WeightsError(
            f"{problem} FID and KID are distances in this network's features. On a machine with internet, run: {pull}\n"
            "Alternatives: features=RUN uses the features of a model that you trained (the distances are then not FID "
            f"and KID, and have other names); features={NONE} skips everything that needs features"
        )


def _inception_problem(weights_dir: Path) -> str | None:
    path = weights_dir / INCEPTION_FILE
    if not path.is_file():
        return f"{path} is not staged."
    found = sha256_of(path)
    return None if found == INCEPTION_SHA256 else f"{path} has sha256 {found}, not {INCEPTION_SHA256}: pull it again."
