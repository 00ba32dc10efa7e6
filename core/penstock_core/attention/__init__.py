"""Paged attention: one interface, a CPU and a CUDA implementation.

A forward pass calls `plan` once; every layer writes its keys and values to the pages, then calls `attend`, which reads
them back from there. `attention_for` picks the implementation.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from penstock_core.attention.batch import AttentionBatch, AttentionSpec, LayerPages
from penstock_core.attention.cpu import CPUPagedAttention
from penstock_core.attention.cuda import CUDAPagedAttention

__all__ = ["AttentionBatch", "AttentionSpec", "LayerPages", "PagedAttention", "attention_for"]


class PagedAttention(Protocol):
    """Attention over pages. What `plan` returns is opaque to the caller and valid for one forward pass."""

    def plan(self, batch: AttentionBatch) -> Any:
        """Prepare what all layers of one forward pass share."""

    def attend(self, q: Tensor, pages: LayerPages, plan: Any, spec: AttentionSpec) -> Tensor:
        """Causal attention of this step's tokens over their sequences' pages. q: [T, H, D] -> [T, H, D]."""

    def by_kernel(self, batch: AttentionBatch) -> bool:
        """Whether the C kernel computes all of this batch, so that a whole-decoder call may."""


def attention_for(device: torch.device | str, *, deterministic: bool = False) -> PagedAttention:
    """The implementation for a device; `deterministic` asks for sums whose order ignores the rest of the batch."""
    if torch.device(device).type == "cuda":
        return CUDAPagedAttention(deterministic)
    return CPUPagedAttention(deterministic)
