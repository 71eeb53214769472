#!/usr/bin/env bash
# torch 2.15.0: matrix products of float32 and float64 on the meta device and on fake CUDA tensors, on which shapes and
# dtypes of a network are checked before there is a GPU.
#
# Guess: the product of two dtypes raises there as it does on every real device.
# Seen: CPU tensors raise RuntimeError (the same dtype is expected). Meta tensors and fake CUDA tensors return a result in
# the dtype of the first factor, linear layers too, so a mix of precisions passes the check and would fail on the device.
# A convolution raises on fake CUDA tensors and passes on meta ones.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.15.0 numpy==2.4.6
seen=$("$folder/venv/bin/python" -W ignore -c '
import contextlib, torch
from torch._subclasses import FakeTensorMode
F = torch.nn.functional
operations = {
    "product": (lambda a, b: a @ b, (2, 2), (2, 2)),
    "linear": (F.linear, (2, 2), (2, 2)),
    "conv2d": (F.conv2d, (1, 2, 4, 4), (2, 2, 3, 3)),
}
for name, (operation, one, other) in operations.items():
    for device, mode in (("cpu", contextlib.nullcontext()), ("meta", contextlib.nullcontext()), ("cuda", FakeTensorMode())):
        with mode:
            try:
                out = operation(torch.ones(one, device=device), torch.ones(other, device=device, dtype=torch.float64))
                print(name, device, out.dtype)
            except RuntimeError:
                print(name, device, "raises")')
echo "$seen"
[ "$seen" = "product cpu raises
product meta torch.float32
product cuda torch.float32
linear cpu raises
linear meta torch.float32
linear cuda torch.float32
conv2d cpu raises
conv2d meta torch.float32
conv2d cuda raises" ]
