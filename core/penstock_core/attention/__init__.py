"""Paged attention: one interface, a CPU and a CUDA implementation.

A forward pass calls `plan` once; every layer writes its keys and values to the pages, then calls `attend`, which reads
them back from there. `attention_for` picks the implementation.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from penstock_core.attention import varlen
from penstock_core.attention.batch import AttentionBatch, AttentionSpec, LayerPages
from penstock_core.attention.cpu import CPUPagedAttention
from penstock_core.attention.cuda import CUDAPagedAttention
from penstock_core.attention.varlen import HeadShape

__all__ = [
    "AttentionBatch",
    "AttentionSpec",
    "HeadShape",
    "LayerPages",
    "PagedAttention",
    "attention_for",
    "usual_page_size",
]


class PagedAttention(Protocol):
    """Attention over pages. What `plan` returns is opaque to the caller and valid for one forward pass."""

    def plan(self, batch: AttentionBatch) -> Any:
        """Prepare what all layers of one forward pass share."""

    def attend(self, q: Tensor, pages: LayerPages, plan: Any, spec: AttentionSpec) -> Tensor:
        """Causal attention of this step's tokens over their sequences' pages. q: [T, H, D] -> [T, H, D]."""

    def in_place(self, shape: HeadShape, pages: LayerPages, spec: AttentionSpec, *, decoding: bool) -> bool:
        """Whether pages are read by a kernel that needs nothing of the host, so that a graph can capture it."""

    def by_kernel(self, batch: AttentionBatch) -> bool:
        """Whether the C kernel computes all of this batch, so that a whole-decoder call may."""


def usual_page_size(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, dim: int) -> int:
    """Tokens per page, where nobody asks for a number: what the device's attention reads in place."""
    if device.type != "cuda":
        return varlen.SMALL_PAGE
    return varlen.usual_page_size(varlen.HeadShape(dtype, device, heads, dim), kv_heads)


def attention_for(device: torch.device | str, *, deterministic: bool = False) -> PagedAttention:
    """The implementation for a device; `deterministic` asks for sums whose order ignores the rest of the batch."""
    if torch.device(device).type == "cuda":
        return CUDAPagedAttention(deterministic)
    return CPUPagedAttention(deterministic)
