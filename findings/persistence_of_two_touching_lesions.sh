#!/usr/bin/env bash
# gudhi 3.13.0, cripser 0.0.37, ripser 0.6.15: connected components of one image by cubical persistence: two dark
# lesions (value 0 on a background of 1) whose corners touch.
#
# Guess: all agree on the number of components at level 0 and write the one that never dies with death = infinity.
# Seen: gudhi's CubicalComplex(vertices=…) and cripser's computePH count two, gudhi's top_dimensional_cells and ripser's
# lower_star_img one (pixels that share a corner are connected). And cripser's last component dies at 1.8e308, the
# largest float, which numpy calls finite: whoever filters by isfinite and adds up lifetimes gets 1.8e308.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  gudhi==3.13.0 cripser==0.0.37 ripser==0.6.15 numpy==2.4.6
seen=$("$folder/venv/bin/python" -W ignore -c '
import cripser, gudhi, numpy as np, ripser
image = np.ones((8, 8))
image[1:4, 1:4] = image[4:7, 4:7] = 0
def by_gudhi(**image):
    complex = gudhi.CubicalComplex(**image)
    complex.compute_persistence()
    return complex.persistence_intervals_in_dimension(0)
rows = cripser.computePH(image, maxdim=0)
components = {
    "vertices": by_gudhi(vertices=image),
    "cells": by_gudhi(top_dimensional_cells=image),
    "cripser": rows[rows[:, 0] == 0][:, 1:3],
    "ripser": ripser.lower_star_img(image),
}
for name, intervals in components.items():
    lives = intervals[(intervals[:, 0] == 0) & (intervals[:, 1] > 0.5)]
    print(name, len(lives), "last one dies at", lives[:, 1].max())')
echo "$seen"
[ "$(echo $seen)" = "vertices 2 last one dies at inf cells 1 last one dies at inf cripser 2 last one dies at 1.7976931348623157e+308 ripser 1 last one dies at inf" ]
