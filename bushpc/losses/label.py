"""Loss of the labels that models give, always in float32.

logits (model) + label (Batch) → loss
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


def labelled_cross_entropy(logits_BL: torch.Tensor, label_B: torch.Tensor) -> torch.Tensor:
    """Cross-entropy, the mean over the samples that have a label (not -1); 0 if none has."""
    total = F.cross_entropy(logits_BL.float(), label_B, ignore_index=-1, reduction="sum")
    return total / (label_B >= 0).sum().clamp(min=1)
