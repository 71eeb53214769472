"""What a policy does to a scan: draws of it as arrays, and several policies as one picture."""

from __future__ import annotations

import typing as t
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from bushpc.config import AugmentConfig, config_names, places
from bushpc.data.augment import Augment
from bushpc.files import write_atomically
from bushpc.shards.manifest import Record

OUTLINE = (255, 196, 0)
GAP = 4  # pixels between scans
BITS = 8  # of a mask
TITLE = 120  # pixels for a policy's name

Pair = tuple[np.ndarray, np.ndarray]


def policies() -> dict[str, str]:
    """The names that `augment=` takes, each with the first line of its yaml."""
    found = {}
    for name in config_names("augment"):
        path = places.config_file(f"augment/{name}")
        assert path is not None, name
        first = path.read_text().partition("\n")[0]
        found[name] = first.lstrip("# ") if first.startswith("#") else ""
    return found


def draws_of(
    image_HWC: np.ndarray, mask_HW: np.ndarray, config: AugmentConfig, draws: int = 6, seed: int = 0
) -> list[Pair]:
    """Changes of a square scan, uint8, and its mask's bits, as training draws them for a benign scan."""
    augment = Augment(config)
    record = t.cast(Record, SimpleNamespace(key="picture", label="benign"))
    found = []
    for turn in range(draws):
        image = np.ascontiguousarray(image_HWC)
        images, masks, changes = augment.batch([image], [mask_HW], [record], seed, [turn], BITS)
        if changes is not None:
            from bushpc.data.augment import device

            images, masks = device.apply(changes, images, masks)
        bits = (masks[0].numpy() << np.arange(BITS, dtype=np.uint8)[:, None, None]).sum(axis=0, dtype=np.uint8)
        found.append((images[0].permute(1, 2, 0).numpy(), bits))
    return found


def draw_policies(
    configs: dict[str, AugmentConfig],
    image_HWC: np.ndarray,
    mask_HW: np.ndarray,
    out: Path,
    *,
    draws: int = 6,
    seed: int = 0,
) -> None:
    """A PNG at `out`: a row per policy, its name at the left, the unchanged scan first."""
    import cv2

    rows = []
    for name, config in configs.items():
        pairs = [(image_HWC, mask_HW), *draws_of(image_HWC, mask_HW, config, draws, seed)]
        edge = len(mask_HW)
        title, gap = np.zeros((edge, TITLE, 3), np.uint8), np.zeros((edge, GAP, 3), np.uint8)
        cv2.putText(title, name, (8, edge // 2), cv2.FONT_HERSHEY_SIMPLEX, 0.55, (255, 255, 255), 1, cv2.LINE_AA)
        rows.append(np.hstack([title, *(part for pair in pairs for part in (gap, _outlined(*pair)))]))
        rows.append(np.zeros((GAP, rows[-1].shape[1], 3), np.uint8))
    written, png = cv2.imencode(".png", np.vstack(rows)[..., ::-1])
    assert written
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, png.tobytes())


def _outlined(image_HWC: np.ndarray, mask_HW: np.ndarray) -> np.ndarray:
    """The outline lies on the lesion's own pixels, so that a shift by one shows."""
    import cv2

    picture = np.ascontiguousarray(image_HWC[..., :3] if image_HWC.shape[2] >= 3 else image_HWC[..., [0, 0, 0]])
    lesion = (mask_HW > 0).astype(np.uint8)
    inside = cv2.erode(lesion, np.ones((3, 3), np.uint8), borderType=cv2.BORDER_CONSTANT, borderValue=1)
    picture[(lesion > 0) & (inside == 0)] = OUTLINE
    return picture
