#!/usr/bin/env bash
# statsmodels 0.15.0: multipletests on the p-values 0.01, nan, 0.04, where one comparison of three could not be made.
#
# Guess: nan stays nan, and the other two are adjusted as two tests: 0.02 and 0.04 in both methods.
# Seen: Holm counts the missing test as one (0.03 and 0.08: the second is no longer significant). Benjamini-Hochberg
# returns nan for all three adjusted values, and in the same answer rejects the first hypothesis.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  statsmodels==0.15.0 scipy==1.17.1 pandas==3.1.1 numpy==2.4.6
seen=$("$folder/venv/bin/python" -W ignore -c '
from statsmodels.stats.multitest import multipletests
for method in ("holm", "fdr_bh"):
    for p in ([0.01, float("nan"), 0.04], [0.01, 0.04]):
        reject, adjusted = multipletests(p, method=method)[:2]
        print(method, *(f"{value:.2f}" for value in adjusted), *reject)')
echo "$seen"
expected="holm 0.03 nan 0.08 True False False
holm 0.02 0.04 True True
fdr_bh nan nan nan True False False
fdr_bh 0.02 0.04 True True"
[ "$seen" = "$expected" ]
