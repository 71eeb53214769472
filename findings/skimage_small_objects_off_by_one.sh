#!/usr/bin/env bash
# scikit-image 0.26.0 beside 0.25.2: remove_small_objects(mask, min_size=n), with which masks are cleaned after
# segmentation.
#
# Guess: the deprecated min_size still means what it did: an object of exactly n pixels is kept.
# Seen: in 0.26.0 the same call removes it. The value is taken over by the new max_size, which removes objects "smaller
# than or equal to"; only a FutureWarning says so. Scores of two machines differ where lesions of that size are scored.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
kept() {
  python3 -m venv "$folder/$1"
  "$folder/$1/bin/pip" install --quiet --disable-pip-version-check "scikit-image==$1" numpy==2.4.6
  "$folder/$1/bin/python" -W ignore -c '
import numpy as np
from skimage.morphology import remove_small_objects
mask = np.zeros((12, 12), bool)
mask[0, :4] = mask[4, :5] = mask[8, :6] = True
print(*(int(row.sum()) for row in remove_small_objects(mask, min_size=5)[::4]))'
}
before=$(kept 0.25.2)
now=$(kept 0.26.0)
echo "objects of 4, 5 and 6 pixels, min_size=5: kept by 0.25.2: $before; by 0.26.0: $now"
[ "$before" = "0 5 6" ] && [ "$now" = "0 0 6" ]
