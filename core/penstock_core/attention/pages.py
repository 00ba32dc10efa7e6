"""Writing keys and values to page slots, and gathering whole pages, in plain PyTorch on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def store(values: Tensor, pages: Tensor, scales: Tensor | None, slots: Tensor) -> None:
    """Write rows into page slots, quantising if the pages have scales. values: [T, Hkv, D]; slots: int64 [T]."""
    if scales is not None:
        whole = pages.dtype == torch.int8
        scale = values.abs().amax(-1).float().clamp_min(1e-12) / (127 if whole else torch.finfo(pages.dtype).max)
        scales.view(-1, scales.shape[-1]).index_copy_(0, slots, scale)
        values = values.float() / scale[..., None]
        if whole:
            values = values.round()
    bits(pages).view(-1, *pages.shape[2:]).index_copy_(0, slots, bits(values.to(pages.dtype)))


def bits(values: Tensor) -> Tensor:
    """8-bit floats as plain bytes, to be copied about: PyTorch indexes few tensors of them. Others as they are."""
    return values.view(torch.uint8) if values.dtype == torch.float8_e4m3fn else values


def load(pages: Tensor, scales: Tensor | None, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Gather whole pages, dequantised. index: int64 [n] -> [n, page_size, Hkv, D]."""
    values = bits(pages).index_select(0, index).view(pages.dtype).to(dtype)
    if scales is not None:
        values = values * scales.index_select(0, index)[..., None].to(dtype)
    return values
