"""What a policy does, as a picture: the scan, then draws of it, each with the outline of its lesion."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np

from bushpc.config import AugmentConfig
from bushpc.files import write_atomically

OUTLINE = (255, 196, 0)
GAP = 4  # pixels between scans


def draws_of(
    config: AugmentConfig,
    image_HWC: np.ndarray,
    mask_HW: np.ndarray,
    *,
    draws: int,
    label: str = "benign",
    seed: int = 0,
) -> list[np.ndarray]:
    """The scan and `draws` changes of it, RGB with the outlined lesion. image_HWC: uint8, square; mask_HW: bits."""
    from bushpc.data.augment import Augment

    augment = Augment(config)
    turns = list(range(draws))
    records = [SimpleNamespace(key="picture", label=label)] * draws
    images, masks = [image_HWC] * draws, [mask_HW] * draws
    image_BCHW, mask_BKHW, changes = augment.batch(images, masks, records, seed, turns)  # type: ignore[arg-type]
    if changes is not None:
        from bushpc.data.augment import device

        image_BCHW, mask_BKHW = device.apply(changes, image_BCHW, mask_BKHW)
    drawn = zip(image_BCHW.permute(0, 2, 3, 1).numpy(), mask_BKHW[:, 0].numpy(), strict=True)
    return [_outlined(*pair) for pair in ((image_HWC, mask_HW), *drawn)]


def draw_policies(
    policies: dict[str, AugmentConfig],
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
    for name, config in policies.items():
        tiles = draws_of(config, image_HWC, mask_HW, draws=draws, seed=seed)
        edge = tiles[0].shape[0]
        title = np.zeros((edge, 120, 3), np.uint8)
        cv2.putText(title, name, (8, edge // 2), cv2.FONT_HERSHEY_SIMPLEX, 0.55, (255, 255, 255), 1, cv2.LINE_AA)
        gap = np.zeros((edge, GAP, 3), np.uint8)
        rows.append(np.hstack([title, *(part for tile in tiles for part in (gap, tile))]))
        rows.append(np.zeros((GAP, rows[-1].shape[1], 3), np.uint8))
    written, png = cv2.imencode(".png", np.vstack(rows)[..., ::-1])
    assert written
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, png.tobytes())


def _outlined(image_HWC: np.ndarray, mask_HW: np.ndarray) -> np.ndarray:
    """The edge lies on the lesion's own pixels, so that a shift by one shows."""
    import cv2

    picture = np.ascontiguousarray(image_HWC[..., :3] if image_HWC.shape[2] >= 3 else image_HWC[..., [0, 0, 0]])
    lesion = (mask_HW > 0).astype(np.uint8)
    inside = cv2.erode(lesion, np.ones((3, 3), np.uint8), borderType=cv2.BORDER_CONSTANT, borderValue=1)
    picture[(lesion > 0) & (inside == 0)] = OUTLINE
    return picture
