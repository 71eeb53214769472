#!/usr/bin/env bash
# thop 0.1.1.post2209072238, ptflops 0.7.5, torchinfo 1.8.0 (timm 1.0.22, torch 2.15.0): multiply-adds of one forward
# pass of timm's vit_tiny_patch16_224, as papers state them, beside torch's own counter (its FLOP by two).
#
# Guess: all four agree within a few per cent; a ViT is matrix products.
# Seen, in millions: torch 1254, thop 1075 and ptflops (aten) 1079, which miss the fused attention (179), ptflops
# (pytorch) 913, torchinfo 34. Figures of two papers can be compared only where both name the counter.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  thop==0.1.1.post2209072238 ptflops==0.7.5 torchinfo==1.8.0 timm==1.0.22 torch==2.15.0 numpy==2.4.6
seen=$("$folder/venv/bin/python" -W ignore -c '
import ptflops, thop, timm, torch, torchinfo
from torch.utils.flop_counter import FlopCounterMode
vit, scan = timm.create_model("vit_tiny_patch16_224").eval(), torch.rand(1, 3, 224, 224)
with FlopCounterMode(display=False) as counter, torch.no_grad():
    vit(scan)
print("torch", round(counter.get_total_flops() / 2e6))
print("torchinfo", round(torchinfo.summary(vit, input_data=scan, verbose=0).total_mult_adds / 1e6))
for backend in ("aten", "pytorch"):
    count, _ = ptflops.get_model_complexity_info(
        vit, (3, 224, 224), as_strings=False, print_per_layer_stat=False, verbose=False, backend=backend)
    print("ptflops", backend, round(count / 1e6))
print("thop", round(thop.profile(vit, (scan,), verbose=False)[0] / 1e6))')
echo "$seen"
[ "$(echo $seen)" = "torch 1254 torchinfo 34 ptflops aten 1079 ptflops pytorch 913 thop 1075" ]
