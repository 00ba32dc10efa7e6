"""Paged attention: one interface, a CPU and a CUDA implementation.

A forward pass calls `plan` once, then `write` and `attend` in every layer. `attention_for` picks the implementation.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from penstock_core.attention.batch import AttentionBatch, AttentionSpec, LayerPages

__all__ = ["AttentionBatch", "AttentionSpec", "LayerPages", "PagedAttention", "attention_for"]


class PagedAttention(Protocol):
    """Attention over pages. What `plan` returns is opaque to the caller and valid for one forward pass."""

    def plan(self, batch: AttentionBatch) -> Any:
        """Prepare what all layers of one forward pass share."""

    def write(self, k: Tensor, v: Tensor, pages: LayerPages, plan: Any) -> None:
        """Store this step's keys and values in their pages. k, v: [T, Hkv, D]."""

    def attend(self, q: Tensor, pages: LayerPages, plan: Any, spec: AttentionSpec) -> Tensor:
        """Causal attention of this step's tokens over their sequences' pages. q: [T, H, D] -> [T, H, D]."""


def attention_for(device: torch.device | str, *, deterministic: bool = False) -> PagedAttention:
    """The implementation for a device; `deterministic` asks for sums whose order ignores the rest of the batch."""
    from penstock_core.attention.cpu import CPUPagedAttention

    if torch.device(device).type == "cuda":
        from penstock_core.attention import cuda

        if cuda.supported():
            return cuda.CUDAPagedAttention(deterministic)
    return CPUPagedAttention()
