"""How files.tar.gz came to be: run folders, an export and what followed from them, written by bushpc of commit 71c433b.

    git worktree add /tmp/71c433b 71c433b && cd /tmp/71c433b
    PYTHONPATH=/tmp/71c433b python <this folder>/make.py OUT.tar.gz

Not to be run with a later bushpc: the point of the files is that an old one wrote them.

    data/       the packed phantom, two folds of small scans
    images/     pictures of three of its scans
    runs/sam    fold0 is done, fold1 was stopped in the middle of its training
    runs/text   fold0 of a model that reads prompts is done
    export/     of runs/sam
    expected/   sam, text: per_image.csv and weights of cells that nothing stopped; predict: masks of images/

Folders of the machine read @HERE@ in texts. Code snapshots, the report and all but the newest checkpoint are left out.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PLACEHOLDER = "@HERE@"
COMMON = (
    *("data=phantom", "cluster=local", "model.image_size=32", "train.batch_size=4", "train.save_every=2"),
    *("train.log_every=1", "train.track=[]", "train.warmup=1"),
)
SAM = (
    *("name=sam", "model=sam_multitask_small", "model.width=16", "model.depth=2", "model.heads=2", "model.window=2"),
    *("model.global_blocks=[1]", "model.neck=8", "model.skip_blocks=[0]", "model.decoder_channels=[8,4,4]"),
    *("model.classifier_width=8", "model.curriculum=[1,1,1]", "train.epochs=3", "evaluate.explain=0"),
)
TEXT = (
    *("name=text", "model=xbusnet_small", "model.lfe=false", "model.clip_width=16", "model.clip_layers=1"),
    *("model.layers=[1]", "model.clip_heads=2", "model.text_width=8", "model.text_layers=1", "model.text_heads=2"),
    *("model.text_dim=8", "model.reduce_dim=8", "model.global_channels=4", "model.local_channels=4"),
    *("model.attention_heads=2", "model.decoder_channels=[8,8,8,8]", "model.fusion_channels=4"),
    *("train.iterations=4", "evaluate.explain=1", "fold=0"),
)
STOPPED_AT = 3


def main(target: Path) -> None:
    here = Path(tempfile.mkdtemp(prefix="compat-"))
    bushpc("pack", "data=phantom", f"out={here}/data", "count=12", "normals=2", "height=64", "width=80", "workers=1")
    two_folds(here / "data")
    pictures(here / "data", here / "images")
    for run, words in (("sam", SAM), ("text", TEXT)):
        plan(here, words)
        train(here / "runs" / run / "cells" / "fold0")
    # Its twin is trained on to the end first: what the stopped one is to become.
    shutil.copytree(here / "runs" / "sam" / "cells" / "fold1", here / "whole" / "cells" / "fold1")
    shutil.copy(here / "runs" / "sam" / "folds.csv", here / "whole")
    train(here / "whole" / "cells" / "fold1")
    train(here / "runs" / "sam" / "cells" / "fold1", stop_at=STOPPED_AT)
    expect(here, "sam", "fold0", here / "runs" / "sam" / "cells" / "fold0")
    expect(here, "sam", "fold1", here / "whole" / "cells" / "fold1")
    expect(here, "text", "fold0", here / "runs" / "text" / "cells" / "fold0")
    bushpc("predict", f"{here}/runs/sam", f"{here}/images", f"{here}/expected/predict", "--prob")
    bushpc("export", f"{here}/runs/sam", f"{here}/export")
    bushpc("report", f"{here}/runs/sam")
    shutil.copy(here / "runs" / "sam" / "report" / "summary.json", here / "expected" / "sam")
    for name in ("data", "images", "runs", "export", "expected"):
        clean(here / name, here)
    with tarfile.open(target, "w:gz") as tar:
        for name in ("data", "images", "runs", "export", "expected"):
            tar.add(here / name, name, filter=nobody)
    print(f"{target}: {target.stat().st_size} bytes; left in {here}")


def bushpc(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "bushpc.cli", *words], check=True)


def two_folds(folder: Path) -> None:
    from bushpc.shards.manifest import Manifest
    from bushpc.shards.split import make_folds, write_folds

    records = Manifest.load(folder).records
    write_folds(folder / "folds.csv", records, make_folds(records, k=2))


def pictures(folder: Path, images: Path) -> None:
    images.mkdir()
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar.getmembers():
                if member.name.endswith("image.png") and len(list(images.iterdir())) < 3:
                    source = tar.extractfile(member)
                    assert source is not None
                    (images / f"{Path(member.name).name.partition('.')[0]}.png").write_bytes(source.read())


def plan(here: Path, words: tuple[str, ...]) -> None:
    from bushpc.config import compose
    from bushpc.dispatch.plan import cv_plan
    from bushpc.dispatch.run_folder import write_run

    where = (f"data.root={here}/data", f"runs_dir={here}/runs", f"loader.cache_dir={here}/cache")
    config = compose([*COMMON, *words, *where])
    write_run(config.run_dir, cv_plan(config), ["bushpc", "cv", *COMMON, *words])


def train(cell_dir: Path, stop_at: int | None = None) -> None:
    """In a process of its own, with one thread."""
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import make; make.child(sys.argv[1:])"
    subprocess.run([sys.executable, "-c", code, str(cell_dir), str(stop_at or "")], check=True)


def child(words: list[str]) -> None:
    import torch
    from bushpc.run import run_cell

    from bushpc.dist import World
    from bushpc.train.preempt import StopFlag
    from bushpc.train.track import Tracker

    torch.set_num_threads(1)
    cell_dir, stop_at, steps = Path(words[0]), int(words[1] or 0), [0]
    log_step = Tracker.train

    def and_stop(self: Tracker, *args: object) -> None:
        log_step(self, *args)
        steps[0] += 1
        if steps[0] == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    Tracker.train = and_stop
    with StopFlag() as stop:
        print(cell_dir, run_cell(cell_dir, World(), stop))


def expect(here: Path, run: str, cell: str, folder: Path) -> None:
    target = here / "expected" / run / cell
    target.mkdir(parents=True)
    shutil.copy(folder / "per_image.csv", target)
    newest = max((folder / "checkpoints").glob("step_*"))
    shutil.copy(newest / "model.safetensors", target)


def clean(folder: Path, here: Path) -> None:
    clone = str(Path.cwd())
    for checkpoints in folder.rglob("checkpoints"):
        for path in sorted(checkpoints.glob("step_*"))[:-1]:
            shutil.rmtree(path)
    for path in sorted(folder.rglob("*")):
        if path.is_dir() and path.name in ("code", "tensorboard", "jobs", "report"):
            shutil.rmtree(path)
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".yaml", ".json", ".jsonl", ".csv", ".txt", ".log", ".md") and path.is_file():
            dates = path.stat()
            path.write_text(path.read_text().replace(str(here), PLACEHOLDER).replace(clone, PLACEHOLDER))
            os.utime(path, (dates.st_atime, dates.st_mtime))


def nobody(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
