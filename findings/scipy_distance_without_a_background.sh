#!/usr/bin/env bash
# scipy 1.17.1: ndimage.distance_transform_edt where there is nothing to measure to, as when a surface distance is taken
# to the mask of a missed lesion (edt of its complement, which is all ones).
#
# Guess: inf everywhere, so that the missed lesion cannot be overlooked.
# Seen: finite, plausible numbers: the distance to a pixel at row -1, column 0, outside of the image. A lesion near the
# upper left corner then looks nearly found (1.0 at the corner). distance_transform_cdt gives -1 everywhere.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check scipy==1.17.1 numpy==2.4.6
seen=$("$folder/venv/bin/python" -c '
import numpy as np
from scipy import ndimage
missed = np.zeros((4, 5), bool)
euclidean, chessboard = ndimage.distance_transform_edt(~missed), ndimage.distance_transform_cdt(~missed)
rows, columns = np.mgrid[:4, :5]
print(euclidean[0, 0], euclidean[3, 4].round(2), np.allclose(euclidean, np.hypot(rows + 1, columns)), *np.unique(chessboard))')
echo "edt at the first and last pixel, whether it is the distance to (-1, 0), values of cdt: $seen"
[ "$seen" = "1.0 5.66 True -1" ]
