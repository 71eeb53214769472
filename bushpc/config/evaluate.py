"""Settings of evaluation: metrics, thresholds, other datasets."""

from __future__ import annotations

import math
import re
import typing as t
from pathlib import Path

from bushpc.config import inference, places
from bushpc.config.fields import Settings, config_class, setting
from bushpc.errors import ConfigError, unknown_name
from bushpc.metrics.registry import METRICS, ON_ORIGINAL


@config_class
class EvaluateConfig(Settings):
    """How predictions are scored."""

    prefix: t.ClassVar[str] = "evaluate."

    metrics: tuple[str, ...] = setting(
        ("dice", "iou", "fpr", "fnr"),
        "Metrics of the report's tables, in this order; the first one ranks. Masks: dice, iou, fpr, fnr, sensitivity, "
        "specificity, precision, accuracy (of pixels), bce, hd95_mm, hd95_px, nsd_mm, nsd_px (millimetres only where "
        "the dataset has a pixel size; pixels are those of the original image), hd95_network_px (pixels of the "
        "network's image), betti_error (components and holes), dice_2class, iou_2class, fpr_2class, fnr_2class (means "
        "over lesion and background, as XBusNet's release). "
        "Labels, for models that predict them: label_accuracy, label_f1 (macro), label_auc (macro, one against the "
        "rest; with two labels the AUC of P(malignant | benign or malignant)), label_ce.",
        affects="evaluation",
    )
    threshold: float = setting(
        0.5, "Pixels with at least this probability count as lesion (paper 2.4).", affects="evaluation", gt=0, lt=1
    )
    resolution: inference.Resolution = setting(
        "network",
        "Grid that masks are scored on. network: the square images that the network reads. original: also the scans as "
        "they were packed, to whose size the probabilities are brought; these metrics, called <metric>_original, then "
        "lead the tables.",
        affects="evaluation",
        since=2,
    )
    tta: inference.Tta = setting(
        "none",
        "Test-time augmentation: the mean probability over the image and its left-right mirror image (mirror), or over "
        "both at 0.75, 1 and 1.25 times the input size too (mirror_scale, of models whose input size is free). "
        "`bushpc predict` and exports then do the same.",
        affects="predictions",
        since=2,
    )
    nsd_mm: float = setting(
        1.0,
        "Surfaces up to this far apart count as equal in nsd_mm.",
        unit="mm",
        affects="evaluation",
        gt=0,
        lt=math.inf,
    )
    nsd_px: float = setting(
        5.0,
        "Surfaces up to this far apart count as equal in nsd_px.",
        unit="pixels of the original image",
        affects="evaluation",
        gt=0,
        lt=math.inf,
    )
    batch_size: int = setting(8, "Images per forward pass.", unit="images", affects="nothing", ge=1)
    explain: int = setting(
        2,
        "Make Grad-CAM maps of this many images per fold, the same images for every model; 0 makes none.",
        unit="images",
        affects="nothing",
        ge=0,
    )
    external: tuple[str, ...] = setting(
        (),
        "Other datasets, by name or as folders of shards, on which every fold's model is also scored, under the "
        "headline prompt source; for example [udiat, stu]. Scans without labels only get metrics of masks.",
        affects="evaluation",
    )

    def __post_init__(self) -> None:
        names = self.external_names
        for name in names:
            if not re.fullmatch(places.FOLDER_NAME, name) or names.count(name) > 1:
                raise ConfigError(
                    f"evaluate.external has {name[:100]!r}: the last part of each path names the dataset in the "
                    "tables; it must consist of letters, digits, '.', '_' and '-', and each name may occur once"
                )
        for metric in self.metrics:
            if metric not in METRICS:
                raise ConfigError(unknown_name("metric in evaluate.metrics", metric, METRICS))
            if METRICS[metric].grid == "original":
                raise ConfigError(
                    f"evaluate.metrics names {metric}: name {metric.removesuffix(ON_ORIGINAL)}, and set "
                    "evaluate.resolution=original for the metrics on the original scans"
                )
        if not len(set(self.metrics)) == len(self.metrics) > 0:
            raise ConfigError(
                f"evaluate.metrics={list(self.metrics)}: name at least one metric, and each only once; for example "
                "evaluate.metrics=[dice,iou]"
            )

    @property
    def external_names(self) -> list[str]:
        """What the datasets of `external` are called."""
        return [Path(given).name for given in self.external]
