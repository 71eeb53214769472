#!/usr/bin/env bash
# segmentation-models-pytorch 0.6.0 (timm 1.0.22, torch 2.15.0): DeepLabV3+ needs an encoder whose last stages are dilated
# instead of halved. timm's Swin transformers have no dilation.
#
# Guess: the library refuses a Swin encoder when the network is built, as it does with encoders that it knows to lack it.
# Seen: it is built, output_stride=16 is accepted, and all parameters are there; the first forward raises RuntimeError
# because the sizes of two feature maps differ (32 against 64). A ConvNeXt encoder, which can be dilated, works. So a
# check that only builds the network does not protect a job in the queue.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  segmentation-models-pytorch==0.6.0 timm==1.0.22 torch==2.15.0 numpy==2.4.6
seen=$("$folder/venv/bin/python" -W ignore -c '
import torch, segmentation_models_pytorch as smp
for encoder, more in (("convnext_atto", {}), ("swin_tiny_patch4_window7_224", {"img_size": 256, "window_size": 8})):
    net = smp.DeepLabV3Plus("tu-" + encoder, encoder_weights=None, **more).eval()
    try:
        with torch.no_grad():
            print(encoder, "built,", tuple(net(torch.rand(1, 3, 256, 256)).shape))
    except RuntimeError as error:
        print(encoder, "built,", error)')
echo "$seen"
[ "$seen" = "convnext_atto built, (1, 1, 256, 256)
swin_tiny_patch4_window7_224 built, Sizes of tensors must match except in dimension 1. Expected size 32 but got size 64 for tensor number 1 in the list." ]
