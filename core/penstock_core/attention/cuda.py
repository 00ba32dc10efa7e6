"""Paged attention on CUDA through PyTorch's own variable-length kernel, which reads pages by block table.

`torch.nn.attention.varlen.varlen_attn` takes a `block_table` from PyTorch 2.11 on; which page sizes and head sizes it
accepts depends on the card and the build, so each combination is tried once on a tiny batch. Whatever it does not do
(float32, soft-capped scores, int8 pages) goes the portable way.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from penstock_core.attention.batch import AttentionBatch, AttentionSpec, LayerPages
from penstock_core.attention.portable import PortablePagedAttention


@cache
def _paged_kernel() -> Any:
    """`varlen_attn`, if it exists here and reads pages; else None."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    wanted = {"block_table", "seqused_k", "num_splits", "window_size", "enable_gqa"}
    return varlen_attn if wanted <= set(inspect.signature(varlen_attn).parameters) else None


def _attend(q: Tensor, pages: LayerPages, batch: AttentionBatch, spec: AttentionSpec, num_splits: int | None) -> Tensor:
    out = _paged_kernel()(
        q,
        pages.k,
        pages.v,
        batch.query_start,
        None,
        batch.max_query_len,
        batch.max_seq_len,
        scale=spec.scale,
        window_size=(-1 if spec.window is None else spec.window - 1, 0),
        enable_gqa=True,
        seqused_k=batch.seq_lens,
        block_table=batch.block_table,
        num_splits=num_splits,
    )
    assert isinstance(out, Tensor)  # a tuple only comes back when auxiliary results are asked for
    return out


@cache
def _accepts(dtype: torch.dtype, page_size: int, dim: int, device: torch.device, num_splits: int | None) -> bool:
    """Whether the kernel takes pages and heads of these sizes, found by asking it."""
    if _paged_kernel() is None or dtype not in (torch.float16, torch.bfloat16):
        return False
    batch = AttentionBatch.build([[0]], [1], [[1]], page_size, device)
    zeros = torch.zeros(2, page_size, 1, dim, dtype=dtype, device=device)
    try:
        _attend(zeros[0, :1], LayerPages(zeros, zeros), batch, AttentionSpec(1.0), num_splits)
    except (RuntimeError, ValueError, TypeError, NotImplementedError):
        return False
    return True


@dataclass(slots=True)
class CUDAPlan:
    """What every layer of one forward pass shares; the portable plan is made only if a layer needs it."""

    batch: AttentionBatch
    portable: Any = None


class CUDAPagedAttention:
    """FlashAttention over pages. `deterministic` fixes the reduction order whatever else is in the batch."""

    def __init__(self, deterministic: bool = False) -> None:
        self._num_splits = 1 if deterministic else None
        self._portable = PortablePagedAttention(deterministic)

    def by_kernel(self, batch: AttentionBatch) -> bool:
        """Never: the C kernels are for the CPU."""
        return False

    def plan(self, batch: AttentionBatch) -> CUDAPlan:
        """Nothing to prepare: the kernel reads the batch's own tensors."""
        return CUDAPlan(batch)

    def attend(self, q: Tensor, pages: LayerPages, plan: CUDAPlan, spec: AttentionSpec) -> Tensor:
        """Attend every token to its sequence's pages. q: [T, H, D] -> [T, H, D]."""
        fits = spec.softcap is None and q.dtype == pages.k.dtype
        if fits and _accepts(q.dtype, pages.k.shape[1], q.shape[2], q.device, self._num_splits):
            return _attend(q, pages, plan.batch, spec, self._num_splits)
        if plan.portable is None:
            plan.portable = self._portable.plan(plan.batch)
        return self._portable.attend(q, pages, plan.portable, spec)
