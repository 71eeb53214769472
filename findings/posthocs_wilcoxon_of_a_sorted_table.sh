#!/usr/bin/env bash
# scikit-posthocs 0.17.1: posthoc_wilcoxon, the paired test, on a long table of Dice per scan and method, once in the
# order of the scans and once sorted by value.
#
# Guess: the same p-values, or an error, as a paired test must know which two values belong to one scan.
# Seen: no error and other p-values: values are paired by their order among the rows of their method. The function
# has no argument that names the scan. Sorted by value, every pair of methods looks different at p = 0.008.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  scikit-posthocs==0.17.1 scipy==1.17.1 pandas==3.1.1 numpy==2.4.6
seen=$("$folder/venv/bin/python" -W ignore -c '
import pandas as pd
import scikit_posthocs
dice = {"A": [0.61, 0.85, 0.72, 0.90, 0.55, 0.78, 0.81, 0.66], "B": [0.83, 0.64, 0.92, 0.73, 0.79, 0.58, 0.69, 0.88]}
table = pd.DataFrame(dice).melt(var_name="method", value_name="dice")
for name, rows in (("by scan", table), ("by value", table.sort_values("dice"))):
    p = scikit_posthocs.posthoc_wilcoxon(rows, val_col="dice", group_col="method")
    print(name, round(float(p.loc["A", "B"]), 4))')
echo "$seen"
[ "$(echo $seen)" = "by scan 0.4062 by value 0.0078" ]
