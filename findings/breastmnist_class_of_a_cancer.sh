#!/usr/bin/env bash
# medmnist 3.0.2: the classes of BreastMNIST (BUSI at 28 to 224 pixels), to test a classifier trained elsewhere on it.
#
# Guess: 1 is malignant, as in every published breast-ultrasound card, so P(malignant) is scored against the label.
# Seen: 0 is malignant, and 1 is "normal, benign" together: the AUC of such a score comes out as 1 - AUC, and a healthy
# breast counts as a benign lesion. The package lists it; nothing in an AUC of 0.2 tells it from a bad model.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
# Its dependencies (torch among them) only load pictures; the table of classes needs none.
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps medmnist==3.0.2
seen=$("$folder/venv/bin/python" -c '
import pathlib, runpy, sysconfig
info = runpy.run_path(str(pathlib.Path(sysconfig.get_paths()["purelib"]) / "medmnist" / "info.py"))["INFO"]
print(info["breastmnist"]["label"])')
echo "$seen"
[ "$seen" = "{'0': 'malignant', '1': 'normal, benign'}" ]
