"""Small versions of the four grids of rivals on an excerpt of BrEaST or BUS-BRA, on a CPU, to their tables; and
full-size counts.

    python tools/bench/rivals.py counts [--out benchmarks/<date>_rivals]
    python tools/bench/rivals.py xbusnet hybrid_attention … --src <raw BrEaST> [--work FOLDER] [--out …]
    python tools/bench/rivals.py xbusnet … --data bus_bra --src <raw BUS-BRA> [--steps 24] …

A small version is the grid's own yaml with small networks in its rows; all else, quoted rows included, stays. It shows
that every row trains, is evaluated and stands in the table, and says nothing about the rows' quality.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import typing as t
from pathlib import Path

import yaml
from common import ROOT, machine, write_result

PAPERS = ("xbusnet", "hybrid_attention", "vit_diffusion", "sam_multitask")
BUSHPC = [sys.executable, "-m", "bushpc.cli"]
CASES = 24  # of BrEaST, and the normal ones among its first 64; of BUS-BRA the first scans
NORMAL = (45, 61)
WORDS = (
    *("model.image_size=64", "train.epochs=null", "train.batch_size=4", "train.lr=1e-3"),
    *("train.holdout=0", "train.schedule=cosine", "train.stop_patience=0", "train.ema=0"),
    *("evaluate.batch_size=4", "loader.workers=0", "cluster=local"),
)
# Of models without a small version in configs/model: what makes them small.
SMALL: dict[str, dict[str, t.Any]] = {
    "classic_unet": {"model.width": 8},
    "attention_unet": {"model.widths": [8, 16, 32]},
    "unet_plus_plus": {"model.widths": [8, 8, 16, 16, 32, 8]},
    "swin_unetr": {"model.widths": [12]},
    "fcn": {"model.pretrained": False, "model.image_size": 32},  # its ResNet50 cannot be made smaller
    "deeplabv3": {"model.pretrained": False, "model.image_size": 32},
    "mask_rcnn": {"model.network": "resnet18", "model.pretrained": False},
    "smp": {"model.architecture": "DeepLabV3Plus", "model.encoder": "resnet18", "model.pretrained": False},
    "edcnn": {"model.xception": "test_resnet", "model.mobilenet": "test_efficientnet", "model.width": 8},
}
SMALL_SAMPLING = {"model.inference": "generative", "model.sampler": "ddim", "model.steps": 4}
# A release's count is that of its network with one class, built from the code of its repository.
PUBLISHED = {  # model and settings → (published count, where; what differs)
    "classic_unet": (34_513_345, "Aslam et al., Table 2", ""),
    "unet_plus_plus": (
        9_041_601,
        "Zhou et al.'s Keras code, MrGiovanni/UNetPlusPlus, keras/helper_functions.py",
        "one channel and no normalisation there; MONAI's transposed convolutions",
    ),
    "attention_unet model.widths=[64,128,256,512,1024]": (None, "published in three dimensions", "MONAI's"),
    "fcn": (35_322_218, "torchvision", "21 classes and an auxiliary head there"),
    "deeplabv3": (42_004_074, "torchvision", "21 classes and an auxiliary head there"),
    "mask_rcnn": (44_401_393, "torchvision", "91 classes there, scales of the frozen normalisations not counted"),
    "smp model.architecture=DeepLabV3Plus model.encoder=resnet101": (None, "on Xception there", ""),
    "unet": (None, "the paper cites nothing for U-ResNet", ""),
    "swin_unetr model.widths=[48]": (
        62_100_000,
        "62.1 M, Project-MONAI/research-contributions, SwinUNETR/BTCV/README.md",
        "three dimensions, one channel and 14 classes there",
    ),
    "edcnn": (None, "parts: Keras' Xception 22.86 M, MobileNet 4.23 M trained, with 1000 labels", ""),
    "bussam": (None, "", ""),
    "clip_tnseg": (None, "", "CLIP's text tower included"),
    "transunet model.image_size=224": (105_275_921, "release: Beckschen/TransUNet at 02ef001", ""),
    "swin_unet": (27_168_132, "release: HuCaoFighting/Swin-Unet at f48f623", ""),
    "u_kan": (6_356_689, "release: CUHK-AIM-Group/U-KAN at b20bf63", ""),
    "aau_net": (None, "the count is of our network: the authors released its module alone", ""),
    "anatosegnet": (
        94_906_217,
        "release: kuanhuang0624/AnatoSegNet at 7292d02",
        "2,049,000 of a classifier there, which nothing reads",
    ),
    "multitask_nnunet": (15_819_799, "release: caumente/multi_task_breast_cancer at 6f02482", "one channel there"),
    "medsegdiff": (130_527_814, "release: KidsWithTokens/MedSegDiff at 60850bf", "another encoder of the image there"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=["counts", *PAPERS])
    parser.add_argument("--data", choices=["breast", "bus_bra"], default="breast")
    parser.add_argument("--src", type=Path, help="the publisher's folder of that dataset")
    parser.add_argument("--steps", type=int, default=24, help="of each training")
    parser.add_argument("--work", type=Path, help="folder of packed data and runs; by default a temporary one")
    parser.add_argument("--out", type=Path, help="folder for the tables")
    given = parser.parse_args()
    if "counts" in given.what:
        report = counts()
        print(report)
        if given.out:
            write_result(given.out, "counts", report, {"machine": machine()})
    papers = [paper for paper in PAPERS if paper in given.what]
    if papers and not given.src:
        parser.error("--src is needed")
    with tempfile.TemporaryDirectory(prefix="rivals-") as temporary:
        work = given.work or Path(temporary)
        for paper in papers:
            table = run(paper, excerpt(given.data, given.src, work), work, given.steps)
            print(table)
            if given.out:
                given.out.mkdir(parents=True, exist_ok=True)
                (given.out / f"{paper}.md").write_text(table)


def excerpt(data: str, src: Path, work: Path) -> Path:
    """A packed excerpt in two folds."""
    from bushpc.shards.manifest import Manifest
    from bushpc.shards.split import make_folds, write_folds

    packed, raw = work / data, work / "raw"
    if packed.exists():
        return packed
    if data == "breast":
        wanted = {f"case{number:03d}" for number in (*range(1, CASES + 1), *NORMAL)}
    else:  # bus_0001-l.png and mask_0001-l.png
        wanted = {path.name[4:] for path in sorted(src.rglob("bus_*.png"))[:CASES]}
    for path in src.rglob("*"):
        name = path.name[:7] if data == "breast" else path.name.partition("_")[2]
        if path.name == "bus_data.csv" or path.suffix == ".xlsx" or (path.suffix == ".png" and name in wanted):
            target = raw / path.relative_to(src)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    pack = ["pack", f"data={data}", f"src={raw}", f"out={packed}", "excerpt=true", "workers=1"]
    subprocess.run([*BUSHPC, *pack], check=True)
    records = Manifest.load(packed).records
    write_folds(packed / "folds.csv", records, make_folds(records, k=2))
    return packed


def small(paper: str) -> dict[str, t.Any]:
    """The paper's grid with small networks."""
    content = yaml.safe_load((ROOT / "configs" / "grid" / f"{paper}_rivals.yaml").read_text())
    kept = [word for word in content["base"] if not word.startswith(("model", "train"))]
    content["base"] = [f"model={paper}_small", *kept]
    for row in content["rows"].values():
        if "set" in row:
            row["set"] = _small_row(row["set"])
    return t.cast("dict[str, t.Any]", content)


def _small_row(full: dict[str, t.Any]) -> dict[str, t.Any]:
    name = full["model"]
    if name in SMALL:
        return {"model": name, **SMALL[name]}
    made: dict[str, t.Any] = {"model": f"{name}_small"}
    if name == "nnunet":  # it decides most settings itself
        made |= {"model.iterations_per_epoch": 4, "train.batch_size": 1, "train.save_every": 4}
    if full.get("model.inference") == "generative":
        made |= SMALL_SAMPLING
    return made | {key: value for key, value in full.items() if key in ("model.decoder", "model.mask_guided")}


def run(paper: str, packed: Path, work: Path, steps: int) -> str:
    """Run the small grid to the end; returns its table in Markdown."""
    from bushpc.cell import run_cell
    from bushpc.dispatch.plan import grid_plan
    from bushpc.dispatch.run_folder import write_run
    from bushpc.dist import World
    from bushpc.runs.layout import RunDir

    grid = work / f"{paper}_rivals.yaml"
    grid.write_text(yaml.safe_dump(small(paper), sort_keys=False))
    folder = work / "runs" / paper
    words = [f"grid={grid}", f"data={packed.name}", f"data.root={packed}", f"runs_dir={folder.parent}", f"name={paper}"]
    plan = grid_plan([*words, *WORDS, f"train.iterations={steps}", f"train.save_every={steps}"])
    write_run(folder, plan, ["tools/bench/rivals.py", paper])
    for name in plan.wanted:  # in this process: each would import its libraries anew
        cell = RunDir(folder).cell(name)
        if not cell.is_done():
            run_cell(cell, World())
    subprocess.run([*BUSHPC, "report", str(folder)], check=True)
    report = (folder / "report" / "report.md").read_text()
    section = re.search(r"^### [^\n]*: every row of the paper's table\n.*?(?=^### )", report, flags=re.M | re.S)
    assert section, "a grid of rivals has this table"
    return section[0].replace("### ", "# ", 1).rstrip() + "\n"


def counts() -> str:
    """Parameters of every full-size rival, counted without memory where its library builds on the meta device."""
    import torch

    from bushpc.config import compose

    lines = ["| model | here | published | where | what differs |", "| --- | ---: | ---: | --- | --- |"]
    for words, (published, where, differs) in PUBLISHED.items():
        config = compose([f"model={words.split()[0]}", *words.split()[1:], "model.pretrained=false"])
        for device in ("meta", "cpu"):
            try:
                with torch.device(device):
                    count = config.model_class(config.model).parameter_count()
                break
            except (RuntimeError, NotImplementedError):
                if device == "cpu":
                    raise
        shown = f"{published:,}" if published else "—"
        lines.append(f"| `{words}` | {count:,} | {shown} | {where} | {differs} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
