"""`xbusnet_released` beside the authors' released code: network, pictures, sentences, loss, learning rate, metrics.

    python -m tools.bench.xbusnet_release CLONE --breast FOLDER [--out FOLDER]

CLONE: a clone of github.com/rmallina14/XBusNet at ba770f6. It is run as it is; only what it loads from its authors'
home folder is replaced: CLIP by our randomly drawn towers, the ResNet's file by random weights, the package `clip` by
open_clip's tokenizer. FOLDER: BrEaST as published. Exit status 1 if any row is beyond its tolerance.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib
import math
import os
import re
import subprocess
import sys
import types
import typing as t
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from torch import nn

from bushpc.conditions.released import Highlight, numeric_prompt, spreadsheet_prompt
from bushpc.config import compose
from bushpc.metrics.mask import MaskPair
from bushpc.metrics.registry import METRICS
from bushpc.nn.normalize import IMAGENET_MEAN, IMAGENET_STD
from bushpc.sample import Batch
from bushpc.train.optim import Schedule

COMMIT = "ba770f6"
# Our name → the release's, as the beginnings of tensor names; the first that fits holds.
NAMES = (
    ("gfe.project", "GFE.image_proj"),
    ("gfe.W_mul", "GFE.film_mul"),
    ("gfe.W_add", "GFE.film_add"),
    ("gfe.refine", "GFE.spatial_refine"),
    ("lfe.encoder.conv1", "LFE.enc1.0"),
    ("lfe.encoder.bn1", "LFE.enc1.1"),
    ("lfe.encoder.layer1", "LFE.enc2.1"),
    ("lfe.encoder.layer2", "LFE.enc3"),
    ("lfe.encoder.layer3", "LFE.enc4"),
    ("lfe.encoder.layer4", "LFE.enc5"),
    ("lfe.transformer4.layer", "LFE.attention4"),
    ("lfe.transformer5.layer", "LFE.center_attention"),
    *((f"lfe.up{i}.up", f"LFE.up{i}.up") for i in (1, 2, 3, 4)),
    *((f"lfe.up{i}.merge.0", f"LFE.up{i}.conv_block.conv1") for i in (1, 2, 3, 4)),
    *((f"lfe.up{i}.merge.1", f"LFE.up{i}.conv_block.bn1") for i in (1, 2, 3, 4)),
    *((f"lfe.up{i}.merge.3", f"LFE.up{i}.conv_block.conv2") for i in (1, 2, 3, 4)),
    *((f"lfe.up{i}.merge.4", f"LFE.up{i}.conv_block.bn2") for i in (1, 2, 3, 4)),
    ("lfe.project", "LFE.final_up"),
    *((f"lfe.sfa.{site}.mlp", f"LFE.sfa_{site}.proj") for site in ("enc4", "dec4", "dec3", "dec2")),
    *((f"fusion.{i}.body.0", f"PH.{i}.in_layers.0") for i in (0, 1)),
    *((f"fusion.{i}.body.2", f"PH.{i}.in_layers.2") for i in (0, 1)),
    *((f"fusion.{i}.body.3", f"PH.{i}.out_layers.0") for i in (0, 1)),
    *((f"fusion.{i}.body.5", f"PH.{i}.out_layers.2") for i in (0, 1)),
    ("fusion.0.skip", "PH.0.skip"),
    ("fusion.2", "PH.2"),
)


class Row(t.NamedTuple):
    """One comparison. difference: the largest, in the unit of `of`; allowed: its tolerance."""

    what: str
    of: str
    difference: float
    allowed: float
    note: str = ""


def theirs(name: str) -> str:
    """The release's name of one of our tensors."""
    for ours, release in NAMES:
        if name == ours or name.startswith(f"{ours}."):
            return release + name[len(ours) :]
    raise KeyError(name)


class Clip(nn.Module):
    """What the release asks of CLIP, answered by our towers."""

    def __init__(self, text: nn.Module, picture: nn.Module) -> None:
        super().__init__()
        self.text, self.picture = text, picture

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """T(p)."""
        return t.cast(torch.Tensor, self.text(tokens))

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """V(x)."""
        return t.cast(torch.Tensor, self.picture(image))


def import_release(clone: Path) -> SimpleNamespace:
    """Its modules, under the names that it imports them by."""
    from open_clip.tokenizer import tokenize

    sys.path.insert(0, str(clone))
    sys.modules["clip"] = types.ModuleType("clip")
    sys.modules["clip"].tokenize = tokenize  # type: ignore[attr-defined]
    found = {name: importlib.import_module(name) for name in ("diceloss", "metrics", "model.xbusnet", "dataset.utils")}
    sys.modules |= {"datasets": types.ModuleType("datasets"), "datasets.utils": found["dataset.utils"]}
    found["dataset.blu"] = importlib.import_module("dataset.blu")
    return SimpleNamespace(**{name.rpartition(".")[2]: module for name, module in found.items()})


def build_both(release: SimpleNamespace) -> tuple[t.Any, nn.Module]:
    """Our model and the release's with the same random weights, without dropout."""
    from torchvision.models import resnet50

    config = compose(["model=xbusnet_released", "data=phantom", "cluster=local", "fold=0", "model.pretrained=false"])
    ours = config.model_class(config.model, None)
    torch.manual_seed(0)
    clip = Clip(ours.text.tower, ours.picture.tower)
    with (
        mock.patch("torch.jit.load", return_value=clip),
        mock.patch("torch.load", return_value=resnet50().state_dict()),
        mock.patch("os.path.isfile", return_value=True),
    ):
        network: nn.Module = release.xbusnet.XBusNet()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics as after some training
            nn.init.normal_(t.cast(torch.Tensor, module.running_mean), std=0.1)
            nn.init.uniform_(t.cast(torch.Tensor, module.running_var), 0.5, 1.5)
    state = network.state_dict()
    ours.load_state_dict({name: state[theirs(name)] for name in ours.state_dict()})
    for module in (*ours.modules(), *network.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return ours, network


def compare_network(release: SimpleNamespace, dataset: t.Any, images: int) -> list[Row]:
    """Predictions, and loss and gradients of a training step, on the first scans of a fold."""
    ours, network = build_both(release)
    items = [dataset[i] for i in range(images)]
    x_BCHW, mask_BKHW = torch.stack([x[0] for x, _ in items]), torch.stack([y[0] for _, y in items])
    p_c, p_l = [x[1] for x, _ in items], [x[2] for x, _ in items]
    pictures = [x[3] if bool(x[4]) else None for x, _ in items]
    mean, std = (torch.tensor(of)[:, None, None] for of in (IMAGENET_MEAN, IMAGENET_STD))
    batch = Batch(
        keys=p_c,
        epochs=[0] * images,
        image_BCHW=x_BCHW * std + mean,
        mask_BKHW=mask_BKHW.to(torch.uint8),
        label_B=torch.zeros(images, dtype=torch.int64),
        conditions={
            "spatial_prompts": p_c,
            "attribute_prompts": p_l,
            "highlights": [None if x is None else x.permute(1, 2, 0).numpy() for x in pictures],
        },
    )
    ours.eval(), network.eval()
    with torch.no_grad():
        logits = network(x_BCHW, conditional=p_c, phrase=p_l)
        mine = ours._logits(batch, ours._sentences(batch))
    spread = float(logits.std())
    rows = [Row("logits", f"{images} x 352 x 352, deviation {spread:.3f}", _apart(mine, logits), 1e-4)]

    ours.train(), network.train()
    torch.manual_seed(1)
    total = ours(batch).total
    total.backward()
    total = total.detach()
    torch.manual_seed(1)
    branch: t.Any = network.GFE
    with torch.no_grad():
        text = branch.compute_conditional(branch.sample_prompts(p_c))
        visual, _, _ = branch.visual_forward(torch.stack([x[3] for x, _ in items]))
    torch.manual_seed(1)
    w = torch.rand(images, 1)
    loss = release.diceloss.SoftDiceLoss()(
        network(x_BCHW, conditional=text * w + visual * (1 - w), phrase=p_l), mask_BKHW
    )
    loss.backward()
    loss = loss.detach()
    rows.append(Row("training loss", "sentences mixed with pictures", abs(float(total) - float(loss)), 1e-4))
    gradients = dict(network.named_parameters())
    trained = [(mine.grad, gradients[theirs(name)].grad) for name, mine in ours.named_parameters()]
    pairs = [(a, t.cast(torch.Tensor, b)) for a, b in trained if a is not None]
    apart = math.sqrt(sum(float((a - b).square().sum()) for a, b in pairs))
    worst = apart / math.sqrt(sum(float(b.square().sum()) for _, b in pairs))
    unused = [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None]
    note = f"the release's {', '.join(unused)} get none"
    rows.append(Row("its gradients", "norm of the difference, as a share of the norm", worst, 5e-3, note))
    empty = torch.zeros(1, 1, 8, 8)
    lowest = float(release.diceloss.SoftDiceLoss()(torch.full((1, 1, 8, 8), -50.0), empty))
    rows.append(Row("soft Dice, empty mask found empty", "the release's, beside -1", abs(lowest + 1), 1e-6))
    return rows


def compare_pictures(release: SimpleNamespace, dataset: t.Any, images: int) -> Row:
    """Highlighted scans."""
    kind = Highlight(mean=IMAGENET_MEAN, std=IMAGENET_STD)
    worst = 0.0
    for i in range(images):
        image, mask = dataset.load_image_mask(i)
        mean, std = (torch.tensor(of)[:, None, None] for of in (IMAGENET_MEAN, IMAGENET_STD))
        grey = ((image * std + mean) * 255).round().to(torch.uint8)  # what the cache would hold
        again = (grey / 255 - mean) / std
        shown = release.utils.generate_visual_blend(again, mask, mode=dataset._resolve_visual_mode(), image_size=352)
        ours = kind.pictured(grey.permute(1, 2, 0).numpy(), mask.numpy())
        worst = max(worst, float(np.abs(ours.transpose(2, 0, 1) - shown[0]).max()))
    return Row("highlighted pictures", f"{images} scans, normalised values", worst, 1e-4)


def compare_sentences(clone: Path, breast: Path) -> list[Row]:
    """The published sentences, and ours from masks on the network's grid and from the spreadsheet."""
    from bushpc.shards.manifest import Manifest, read_mask

    manifest = Manifest.load(breast)
    records = {record.key.removeprefix("breast_"): record for record in manifest.records}
    published = {
        row["Image Name"].removesuffix(".png").removeprefix("case"): row
        for fold in range(5)
        for row in csv.DictReader((clone / f"folds/val_fold{fold}.csv").open(encoding="utf-8-sig"))
    }
    numbers, differing_words = [], 0
    for number, row in published.items():
        record = next(r for key, r in records.items() if key.endswith(number))
        mask = torch.from_numpy(read_mask(breast, record))[None, None]
        on_grid = torch.nn.functional.interpolate(mask, (352, 352), mode="nearest-exact")[0, 0].numpy() > 0
        ours = numeric_prompt(on_grid, record.height, record.width)
        assert re.sub(r"\d+", "N", ours) == re.sub(r"\d+", "N", row["Sentence"]), (ours, row["Sentence"])
        both = [list(map(int, re.findall(r"\d+", text))) for text in (ours, row["Sentence"])]
        numbers.append(int(np.abs(np.subtract(both[0], both[1])).max()))
        differing_words += spreadsheet_prompt(record.attributes) != row["AGM_Prompt"]
    exact = sum(n == 0 for n in numbers)
    note = f"{exact} of {len(numbers)} equal to the pixel; median {np.median(numbers):.0f}"
    return [
        Row("spatial sentences", f"{len(numbers)}, pixels of the original image", float(max(numbers)), 6, note),
        Row("attribute sentences", f"{len(numbers)}, how many differ", differing_words, 0),
    ]


def compare_rates() -> Row:
    """The learning rate of 1,000 steps."""
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1e-4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20000, 1e-6)
    schedule = Schedule(compose(["model=xbusnet_released", "data=phantom", "cluster=local", "fold=0"]).train, 201)
    worst = 0.0
    for step in range(1000):
        worst = max(worst, abs(schedule.lr(step) / optimizer.param_groups[0]["lr"] - 1))
        optimizer.step()
        cosine.step()
    return Row("learning rate", "1,000 steps, relative", worst, 1e-9, f"the last is {schedule.lr(999):.4g}")


def compare_metrics(release: SimpleNamespace, dataset: t.Any, masks: int) -> list[Row]:
    """Its evaluation of disturbed masks beside ours, at 352 x 352."""
    draw, worst, means = np.random.default_rng(0), dict.fromkeys(("dice", "iou", "fpr", "fnr"), 0.0), []
    for i in range(masks):
        _, mask = dataset.load_image_mask(i)
        prob_HW = disturbed(mask.numpy(), draw)
        _, iou, dice, _, fpr, fnr = release.metrics.compute_segmentation_scores(
            torch.from_numpy(prob_HW)[None, None], mask[None, None].long()
        )
        pair = MaskPair(prob=prob_HW, mask=mask.numpy().astype(np.uint8))
        for name, value in {"dice": dice, "iou": iou, "fpr": fpr, "fnr": fnr}.items():
            worst[name] = max(worst[name], abs(value_of(f"{name}_2class", pair) - float(value)))
        means.append((value_of("dice", pair), float(dice)))
    lesion, both = np.mean(means, axis=0)
    note = f"a mean lesion Dice of {lesion:.3f} is {both:.3f} there"
    return [
        Row(f"{name}_2class", f"{masks} disturbed masks", difference, 1e-6, note if name == "dice" else "")
        for name, difference in worst.items()
    ]


def value_of(metric: str, pair: MaskPair) -> float:
    """Of a metric of masks."""
    return float(t.cast(t.Any, METRICS[metric].function)(pair))


def disturbed(mask_HW: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """A probability map of a shifted, grown or shrunk lesion, with a false patch now and then."""
    from scipy import ndimage

    moved = np.roll(mask_HW > 0, tuple(draw.integers(-12, 13, 2)), axis=(0, 1))
    steps = int(draw.integers(1, 9))
    moved = (ndimage.binary_dilation if draw.random() < 0.5 else ndimage.binary_erosion)(moved, iterations=steps)
    if draw.random() < 0.3:
        y, x = draw.integers(0, 330, 2)
        moved[y : y + 20, x : x + 20] = True
    return np.where(moved, 0.9, 0.1).astype(np.float32)


def _apart(ours: t.Any, other: torch.Tensor) -> float:
    return float((ours - other).abs().max())


def written(rows: list[Row], commit: str) -> str:
    """The table."""
    lines = [
        f"# xbusnet_released beside the release, {datetime.date.today()}",
        "",
        f"bushpc {commit}, rmallina14/XBusNet {COMMIT}, torch {torch.__version__}, float32 on a CPU, the same random "
        "weights.",
        "",
        "| compared | of | largest difference | allowed | |",
        "| --- | --- | --- | --- | --- |",
        *(f"| {r.what} | {r.of} | {r.difference:.2g} | {r.allowed:g} | {r.note} |" for r in rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path)
    parser.add_argument("--breast", type=Path, required=True, help="BrEaST as published: the folder with its PNGs")
    parser.add_argument("--shards", type=Path, help="BrEaST packed; its sentences are compared, too")
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    found = subprocess.run(["git", "-C", given.clone, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    if not found.stdout.startswith(COMMIT):
        parser.error(f"{given.clone} is at {found.stdout.strip()[:7]}: check out {COMMIT} there")
    release = import_release(given.clone)
    dataset = release.blu.XBusNetDataset(
        str(given.clone / "folds/train_fold0.csv"), str(given.breast), str(given.breast)
    )
    todo: list[Callable[[], Row | list[Row]]] = [
        lambda: compare_network(release, dataset, given.images),
        lambda: compare_pictures(release, dataset, 20),
        compare_rates,
        lambda: compare_metrics(release, dataset, 50),
    ]
    if given.shards:
        todo.append(lambda: compare_sentences(given.clone, given.shards))
    rows: list[Row] = []
    for compare in todo:
        found_rows = compare()
        new = [found_rows] if isinstance(found_rows, Row) else found_rows
        rows += new
        for r in new:
            print(f"{r.what}: {r.difference:.3g} (allowed {r.allowed:g}) {r.note}", flush=True)
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=os.getcwd())
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "README.md").write_text(written(rows, head.stdout.strip()))
    return int(any(math.isnan(r.difference) or r.difference > r.allowed for r in rows))


if __name__ == "__main__":
    sys.exit(main())
