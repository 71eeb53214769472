#!/usr/bin/env bash
# seg-metrics 1.2.8 (SimpleITK 2.5.7): surface distances of a lesion that the model missed entirely.
#
# Guess: inf, nan or an error, as there is no surface to measure to.
# Seen: Hausdorff distance, its 95th percentile and the mean surface distance are 0.0, the best that there is, while
# Dice is 0. A mean HD95 over a test set improves with every missed lesion; the warning speaks of precision and recall.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  seg-metrics==1.2.8 SimpleITK==2.5.7 scipy==1.17.1 numpy==2.2.6
seen=$("$folder/venv/bin/python" -W ignore -c '
import logging, numpy as np
from seg_metrics.seg_metrics import write_metrics
logging.disable()
lesion = np.zeros((64, 64), np.uint8)
lesion[20:40, 20:40] = 1
for predicted in (np.roll(lesion, 5, axis=1), np.zeros_like(lesion)):
    [scores] = write_metrics(labels=[1], gdth_img=lesion, pred_img=predicted, spacing=np.ones(2))
    print(*(round(float(scores[name][0]), 2) for name in ("dice", "hd", "hd95", "msd")))' | grep -v '^ *$')
echo "Dice, HD, HD95 and mean distance of a mask 5 pixels aside, then of no mask:"
echo "$seen"
[ "$(tail -1 <<<"$seen")" = "0.0 0.0 0.0 0.0" ] && [ "$(head -1 <<<"$seen" | cut -d' ' -f2)" = "5.0" ]
