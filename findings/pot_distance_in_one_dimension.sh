#!/usr/bin/env bash
# POT 0.9.7.post1: the 2-Wasserstein distance of the points 0, 1 and the same points moved by 3, by four of its functions.
#
# Guess: each gives 3, as a distance that moves every point by 3 must.
# Seen: wasserstein_1d(p=2) gives 9, the distance to the power p, while sliced_wasserstein_distance(p=2), which is made
# of it, and bures_wasserstein_distance give 3; emd2_1d, whose name says squared, gives 9 and with metric="euclidean" 3.
# A sum of such terms over several p or functions mixes pixels with square pixels.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check POT==0.9.7.post1 scipy==1.17.1 numpy==2.4.6
seen=$("$folder/venv/bin/python" -W ignore -c '
import numpy as np
import ot
here, there = np.array([0.0, 1.0]), np.array([3.0, 4.0])
print("wasserstein_1d", round(float(ot.wasserstein_1d(here, there, p=2)), 6))
sliced = ot.sliced_wasserstein_distance(here[:, None], there[:, None], p=2, n_projections=5, seed=0)
print("sliced_wasserstein_distance", round(float(sliced), 6))
one = np.eye(1)
print("bures_wasserstein_distance", round(float(ot.gaussian.bures_wasserstein_distance(here[:1], there[:1], one, one)), 6))
print("emd2_1d", round(float(ot.emd2_1d(here, there)), 6), round(float(ot.emd2_1d(here, there, metric="euclidean")), 6))')
echo "$seen"
[ "$(echo $seen)" = "wasserstein_1d 9.0 sliced_wasserstein_distance 3.0 bures_wasserstein_distance 3.0 emd2_1d 9.0 3.0" ]
