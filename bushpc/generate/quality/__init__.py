"""Quality of generated images, measured before anything is trained on them.

    synthetic shards, real shards → thumbnails, features, predicted masks → figures → terminal, CSV, JSON, page

It answers four questions, each with the corresponding figure for real images. Are the distributions similar (FID,
KID)? Are training images copied (nearest neighbours)? Is the lesion where the mask says (a segmenter trained on real
images)? Are the images as diverse as real ones? The real images are held out from the generator: with
`part=validation`, they are the validation part of the fold in which it was trained.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from bushpc.files import write_atomically
from bushpc.generate.quality import image_sets, measure
from bushpc.generate.quality.records import ALL, HELD_OUT, SYNTHETIC, TRAINING, Quality, QualityRequest
from bushpc.shards.progress import Show

__all__ = ["Quality", "QualityRequest", "measure_quality", "write"]


def measure_quality(request: QualityRequest, say: Callable[[str], None], progress: Show | None = None) -> Quality:
    """Compare the sets. say: receives messages for the user.

    Raises: ConfigError if they cannot be compared, WeightsError if Inception's file is missing, DataError for shards
    that cannot be read, and what `bushpc.load` raises.
    """
    synthetic, real = image_sets.open_manifests(request)
    request = image_sets.settle_fold(request, real)
    sets = image_sets.image_sets(request, synthetic, real)
    manifests = {name: synthetic if name == SYNTHETIC else real for name in sets}
    features = image_sets.feature_extractor(request, synthetic, real, say)
    segmenter = image_sets.segmenter(request, synthetic, real, say)
    tested = [sets[SYNTHETIC], sets[HELD_OUT]]
    tick = measure.ticks(progress, [*sets.values(), *(tested if segmenter else [])])
    edge = image_sets.common_edge(sets[SYNTHETIC].records)
    observed = {name: measure.observe(images_of, edge, features, tick) for name, images_of in sets.items()}
    same = measure.same_pictures(observed)
    images = pd.DataFrame([measure.facts_of(each.name, record) for each in tested for record in each.records])
    if TRAINING in sets:
        images = images.assign(**measure.nearest_training_images(sets, observed, same))
    found: dict[str, np.ndarray] = {}
    if segmenter:
        images["dice"] = [
            measure.dice_of(*masks)
            for each in tested
            for masks in measure.predicted_masks(each, each.records, segmenter, tick)
        ]
        shown = [sets[SYNTHETIC].records[i] for i in measure.images_to_show(images)]
        masks = measure.predicted_masks(sets[SYNTHETIC], shown, segmenter, lambda: None)
        found = {record.key: found_HW for record, (_, found_HW) in zip(shown, masks, strict=True)}
    tick("comparing the images")
    labels = [ALL, *sorted(sets[SYNTHETIC].labels.keys() & sets[HELD_OUT].labels.keys())]
    return Quality(
        request=request,
        manifests=manifests,
        sets=sets,
        edge=edge,
        features=features,
        distances=[each for label in labels for each in measure.distances(label, sets, observed)] if features else [],
        nearness=measure.nearness(images),
        agreement=[each for label in labels for each in measure.agreement(label, images)] if segmenter else [],
        diversity=[each for label in labels for each in measure.diversity(label, sets, observed, same)],
        images=images,
        found=found,
        elsewhere=image_sets.other_training_data(request, real),
        notes=image_sets.label_notes(sets),
    )


def write(quality: Quality, folder: Path) -> None:
    """Write `folder`/images.csv and quality.json, each atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "images.csv", quality.images.to_csv(index=False, lineterminator="\n"))
    write_atomically(folder / "quality.json", quality.to_json())
