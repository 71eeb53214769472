"""Shards, and weights of others: imported files, checkpoints, exports."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from safetensors.torch import save, save_file

from .reader import Reader, file, without

READERS: dict[str, Reader] = {}


def _shards(name: str) -> Callable[[Path, Path], Path]:
    def write(folder: Path, phantom: Path) -> Path:
        shutil.copytree(phantom, folder / "shards")
        return sorted((folder / "shards").glob(name))[0]

    return write


def _forge(folder: Path, content: bytes) -> bytes:
    """A manifest whose own hash holds."""
    try:
        found = json.loads(content)
        found.pop("hash", None)
        text = json.dumps(found, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return json.dumps({**found, "hash": hashlib.sha256(text.encode()).hexdigest()}).encode()
    except (ValueError, AttributeError, TypeError, RecursionError):
        return content


def _use_shards(folder: Path) -> None:
    from bushpc.errors import DataError
    from bushpc.shards.manifest import Manifest, read_image, read_mask, verify
    from bushpc.shards.split import load_folds

    manifest = Manifest.load(folder / "shards")
    for record in manifest.records[:2]:
        for read in (read_image, read_mask):
            try:
                assert read(folder / "shards", record).dtype == np.uint8
            except DataError:
                continue
    load_folds(folder / "shards" / "folds.csv", manifest.records)
    verify(folder / "shards", manifest, deep=True)


def _shipped_card(folder: Path, _: Path) -> Path:
    from bushpc.shards.card import PROJECT_SHARDS

    (folder / "shards").mkdir()
    return Path(shutil.copy(PROJECT_SHARDS / "busi" / "card.yaml", folder / "shards"))


def _card(folder: Path) -> None:
    from bushpc.shards.card import Card

    card = Card.load(folder / "shards")
    card.save(folder / "again")
    assert Card.load(folder / "again") == card
    assert all(isinstance(each.counts, dict) for each in card.every_layout)


READERS["manifest.json"] = Reader(write=_shards("manifest.json"), read=_use_shards)
READERS["manifest.json under its own hash"] = Reader(write=_shards("manifest.json"), read=_use_shards, covered=_forge)
READERS["a tar"] = Reader(write=_shards("*.tar"), read=_use_shards)
READERS["folds.csv"] = Reader(write=_shards("folds.csv"), read=_use_shards)
READERS["card.yaml"] = Reader(write=_shipped_card, read=_card, clean=without("again"))


def _weights(folder: Path, _: Path) -> Path:
    from bushpc.weight_file import Origin

    path = folder / "w.safetensors"
    origin = Origin(kind="file", name="w", target="bushpc.models.baselines.UNet", trained_on=[], settings={"a": 1})
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.int64)}, path, metadata=origin.to_metadata())
    return path


def _use_weights(folder: Path) -> None:
    from bushpc.weight_file import read_header, read_tensors, require

    header, tensors = read_header(folder / "w.safetensors"), read_tensors(folder / "w.safetensors")
    assert {name: tuple(each.shape) for name, each in tensors.items()} == header.shapes
    require(folder / "w.safetensors", None, "bushpc.models.baselines.UNet")


def _pickled(folder: Path, _: Path) -> Path:
    torch.save({"state_dict": {"a.weight": torch.zeros(2, 3)}, "epoch": 3}, folder / "w.pth")
    return folder / "w.pth"


def _open_source(folder: Path) -> None:
    from bushpc.convert.sources import open_source

    open_source(str(folder / "w.pth"))


def _checkpoint(name: str) -> Callable[[Path, Path], Path]:
    def write(folder: Path, _: Path) -> Path:
        from bushpc.runs import checkpoint

        parts = {"model": {"a.weight": torch.arange(6.0).view(2, 3)}, "optimizer": {"exp_avg/a": torch.ones(2)}}
        meta = {"frozen": None, "config": "abc", "settings": {"train.lr": 0.1}, "validation": {"dice": 0.5}}
        return checkpoint.write(folder / "checkpoints", 1, parts, meta) / name

    return write


def _seal_for(name: str) -> Callable[[Path, bytes], bytes]:
    def covered(folder: Path, content: bytes) -> bytes:
        seal = folder / "checkpoints" / "step_00000001" / "seal.json"
        seal.write_text(json.dumps({**json.loads(seal.read_text()), name: hashlib.sha256(content).hexdigest()}))
        return content

    return covered


def _use_checkpoint(folder: Path) -> None:
    from bushpc.runs import checkpoint

    checkpoint.read(folder / "checkpoints" / "step_00000001", folder / "frozen")


READERS["imported .safetensors"] = Reader(write=_weights, read=_use_weights)
READERS["a .pth to import"] = Reader(write=_pickled, read=_open_source)
for part in ("model.safetensors", "meta.json"):
    READERS[f"a checkpoint's {part}"] = Reader(write=_checkpoint(part), read=_use_checkpoint, covered=_seal_for(part))
READERS["a checkpoint's seal.json"] = Reader(write=_checkpoint("seal.json"), read=_use_checkpoint)


NARROW = ("model.encoder_depth=3", "model.decoder_channels=[8,8,8]")


def _export(name: str) -> Callable[[Path, Path], Path]:
    """As `bushpc export` writes it: settings, conditions, recipe, weights with their hash."""

    def write(folder: Path, _: Path) -> Path:
        from bushpc.config import compose
        from bushpc.evaluate.predictor import Recipe
        from bushpc.files import EXPORT_FILE
        from bushpc.models.base import all_tensors
        from bushpc.runs.chosen import PLAIN

        cell = compose(["model=unet_small", "data=phantom", "model.image_size=32", *NARROW])
        model = cell.model_class(cell.model)
        out = folder / "export"
        out.mkdir()
        weights = save(all_tensors(model))
        (out / "fold0.safetensors").write_bytes(weights)
        sha256 = hashlib.sha256(weights).hexdigest()
        fold = {"fold": 0, "name": "fold0", "weights": "fold0.safetensors", "sha256": sha256, "conditions": {}}
        settings = {
            "_target_": "bushpc.models.baselines.UNet",
            **json.loads(json.dumps(dataclasses.asdict(cell.model))),
        }
        content = {"format": 2, "model": settings, "recipe": Recipe.of(cell, PLAIN).to_dict(), "folds": [fold]}
        (out / EXPORT_FILE).write_text(json.dumps(content, default=dataclasses.asdict))
        return out / (name or EXPORT_FILE)

    return write


def _forged_weights(folder: Path, content: bytes) -> bytes:
    from bushpc.files import EXPORT_FILE

    path = folder / "export" / EXPORT_FILE
    stated = json.loads(path.read_text())
    stated["folds"][0]["sha256"] = hashlib.sha256(content).hexdigest()
    path.write_text(json.dumps(stated))
    return content


def _use_export(folder: Path) -> None:
    from bushpc.evaluate.predictor import load

    load(folder / "export", device="cpu", say=lambda _: None)


PROMPTS = (
    "file,spatial_prompt,shape,margin,birads,pixel_mm\n"
    "a.png,a small lesion in the upper inner quadrant,oval,circumscribed,3,0.1\n"
    "b/ü.png,,irregular,,5,\n"
)


def _known(folder: Path) -> None:
    from bushpc.conditions.known import read_table

    read_table(folder / "prompts.csv", [PurePosixPath("a.png"), PurePosixPath("b/ü.png")])


READERS["a CSV of prompts"] = Reader(write=file("prompts.csv", PROMPTS), read=_known)
READERS["an export's settings"] = Reader(write=_export(""), read=_use_export, slow=8)
READERS["an export's weights"] = Reader(
    write=_export("fold0.safetensors"), read=_use_export, covered=_forged_weights, slow=8
)
