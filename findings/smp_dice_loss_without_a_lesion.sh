#!/usr/bin/env bash
# segmentation-models-pytorch 0.6.0 (torch 2.15.0): overlap losses of a batch of normal scans, of which the network
# calls every pixel a lesion.
#
# Guess: the Dice loss is near 1, its worst value, as none of the pixels is right.
# Seen: DiceLoss, JaccardLoss and TverskyLoss are exactly 0, their best value, and so are their gradients: a class
# without a pixel in the batch is left out. LovaszLoss of the same batch is 11. A network that is trained with these on
# batches of few scans isn't told of false lesions on normal ones.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  segmentation-models-pytorch==0.6.0 torch==2.15.0 numpy==2.4.6
seen=$("$folder/venv/bin/python" -W ignore -c '
import torch
from segmentation_models_pytorch import losses
for kind in (losses.DiceLoss, losses.JaccardLoss, losses.TverskyLoss, losses.LovaszLoss):
    logits = torch.full((2, 1, 8, 8), 10.0, requires_grad=True)
    loss = kind("binary")(logits, torch.zeros(2, 1, 8, 8))
    loss.backward()
    print(kind.__name__, float(loss), "gradient" if logits.grad.any() else "no gradient")')
echo "$seen"
[ "$(echo $seen)" = "DiceLoss 0.0 no gradient JaccardLoss 0.0 no gradient TverskyLoss 0.0 no gradient LovaszLoss 11.0 gradient" ]
