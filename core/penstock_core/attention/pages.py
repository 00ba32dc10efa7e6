"""Writing keys and values to page slots, and gathering whole pages, in plain PyTorch on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def store(values: Tensor, pages: Tensor, scales: Tensor | None, slots: Tensor) -> None:
    """Write rows into page slots, quantising if the pages are int8. values: [T, Hkv, D]; slots: int64 [T]."""
    if scales is not None:
        scale = values.abs().amax(-1).float().clamp_min(1e-12) / 127
        scales.view(-1, scales.shape[-1]).index_copy_(0, slots, scale)
        values = (values.float() / scale[..., None]).round()
    pages.view(-1, *pages.shape[2:]).index_copy_(0, slots, values.to(pages.dtype))


def load(pages: Tensor, scales: Tensor | None, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Gather whole pages, dequantised. index: int64 [n] -> [n, page_size, Hkv, D]."""
    values = pages.index_select(0, index).to(dtype)
    if scales is not None:
        values = values * scales.index_select(0, index)[..., None].to(dtype)
    return values
