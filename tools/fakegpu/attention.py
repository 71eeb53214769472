"""Which kernel scaled_dot_product_attention takes on an A100: torch's own choice needs a driver.

The rules are those of torch's selection for compute capability 8.0: flash for half precision, then the memory-efficient
kernel, then plain products, which write the N x N map down.
"""

from __future__ import annotations

import typing as t
from collections import Counter

import torch
from torch.nn import functional as F

aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)
WIDEST_FLASH = 256


class Attention:
    """Stands in for torch.nn.functional.scaled_dot_product_attention. chosen: how often each kernel was."""

    def __init__(self) -> None:
        self.chosen: Counter[str] = Counter()
        self.plain = F.scaled_dot_product_attention

    def __call__(self, *args: t.Any, **kwargs: t.Any) -> torch.Tensor:
        """On `cuda:0` by the kernel that a GPU would take, elsewhere as it is."""
        tensor = args[0] if args else kwargs["query"]
        return (self._attend if tensor.device.type == "cuda" else self.plain)(*args, **kwargs)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        q, k, v = query, key, value
        if torch.is_autocast_enabled("cuda"):  # on autocast's list of what runs in half precision
            q, k, v = (x.to(torch.get_autocast_dtype("cuda")) for x in (q, k, v))
            attn_mask = attn_mask if attn_mask is None or attn_mask.dtype == torch.bool else attn_mask.to(q.dtype)
        with torch.autocast("cuda", enabled=False):
            kernel = kernel_for(q, k, v, attn_mask)
            self.chosen[kernel] += 1
            if kernel == "flash":
                width = q.shape[-1]
                scale = width**-0.5 if scale is None else scale
                q, k, v = (F.pad(x, (0, -width % 8)) for x in (q, k, v)) if width % 8 else (q, k, v)
                made = aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)
                return made[0][..., :width]
            if kernel == "efficient":
                needs = any(x.requires_grad for x in (q, k, v)) and torch.is_grad_enabled()
                if attn_mask is not None:
                    attn_mask = attn_mask.expand(*q.shape[:-1], k.shape[-2])
                made = aten._scaled_dot_product_efficient_attention(
                    q, k, v, attn_mask, needs, dropout_p, is_causal, scale=scale
                )
                return made[0]
            return self.plain(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def kernel_for(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor | None) -> str:
    """`flash`, `efficient` or `math`."""
    if q.ndim != 4 or any(x.stride(-1) != 1 for x in (q, k, v)) or k.shape[1] != q.shape[1]:
        return "math"
    widths = {x.shape[-1] for x in (q, k, v)}
    if q.dtype in HALF and attn_mask is None and len(widths) == 1 and max(widths) <= WIDEST_FLASH:
        return "flash"
    aligned = 8 if q.dtype in HALF else 4
    if q.dtype in (*HALF, torch.float32) and q.shape[-1] == k.shape[-1] and not any(w % aligned for w in widths):
        return "efficient"
    return "math"
