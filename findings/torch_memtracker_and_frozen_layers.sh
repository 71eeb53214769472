#!/usr/bin/env bash
# torch 2.15.0: the estimator of a training step's memory, torch.distributed._tools.mem_tracker.MemTracker, for a small
# network of which all layers are trained, and for the same with its first layer frozen, as in fine-tuning.
#
# Guess: it counts both, and the frozen layer costs no gradient.
# Seen: the first is counted, the second raises RuntimeError "cannot register a hook on a tensor that doesn't require
# gradient", so no estimate of a network with a frozen encoder can be made this way.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.15.0 numpy==2.4.6
cat >"$folder/track.py" <<'PYTHON'
import torch
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker

for name, frozen in (("all trained", False), ("first layer frozen", True)):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    model[0].requires_grad_(not frozen)
    tracker = MemTracker()
    tracker.track_external(model)
    try:
        with tracker:
            model(torch.ones(1, 8)).sum().backward()
        print(name, "counted")
    except RuntimeError as error:
        print(name, error)
PYTHON
seen=$("$folder/venv/bin/python" -W ignore "$folder/track.py")
echo "$seen"
[ "$seen" = "all trained counted
first layer frozen cannot register a hook on a tensor that doesn't require gradient" ]
