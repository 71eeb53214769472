"""Classification loss, always in float32.

logits (model) + label (Batch) → loss
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


def labelled_cross_entropy(logits_BL: torch.Tensor, label_B: torch.Tensor) -> torch.Tensor:
    """Cross-entropy, averaged over the labelled samples (label is not -1); 0 if there are none."""
    total = F.cross_entropy(logits_BL.float(), label_B, ignore_index=-1, reduction="sum")
    return total / (label_B >= 0).sum().clamp(min=1)


def focal_loss(logits_BL: torch.Tensor, label_B: torch.Tensor, gamma: float) -> torch.Tensor:
    """(1 - p)^gamma times the cross-entropy -log p, averaged over the labelled samples; 0 if there are none."""
    ce_B = F.cross_entropy(logits_BL.float(), label_B, ignore_index=-1, reduction="none")
    return ((1 - (-ce_B).exp()) ** gamma * ce_B).sum() / (label_B >= 0).sum().clamp(min=1)
