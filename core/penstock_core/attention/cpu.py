"""Paged attention on the CPU: the C kernel, which reads pages in place, and plain PyTorch where it cannot.

The kernel takes each token's keys in one fixed order, so its bits depend neither on chunking nor on the batch.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from penstock_core.attention.batch import AttentionBatch, AttentionSpec, LayerPages
from penstock_core.attention.portable import PortablePagedAttention
from penstock_core.attention.varlen import HeadShape
from penstock_core.kernels import native


@dataclass(slots=True)
class CPUPlan:
    """What every layer of one forward pass shares; a portable plan is made only where a layer needs it."""

    batch: AttentionBatch
    call: native.AttentionCall  # what of the kernel's arguments is the same for every layer
    portable: Any = None


class CPUPagedAttention:
    """Chooses per layer. `deterministic`: the portable way's bits, too, depend neither on chunking nor on the batch."""

    def __init__(self, deterministic: bool = False) -> None:
        self._portable = PortablePagedAttention(deterministic)

    def by_kernel(self, batch: AttentionBatch) -> bool:
        """Whether no sequence of the batch goes the portable way."""
        return native.kernels() is not None

    def in_place(self, shape: HeadShape, pages: LayerPages, spec: AttentionSpec, *, decoding: bool) -> bool:
        """Never: nothing is captured on the CPU."""
        return False

    def plan(self, batch: AttentionBatch) -> CPUPlan:
        """What the layers share; once per forward pass."""
        call = native.AttentionCall(
            block_table=batch.block_table.data_ptr(),
            table_stride=batch.block_table.stride(0),
            query_start=batch.query_start.data_ptr(),
            seq_lens=batch.seq_lens.data_ptr(),
            sequences=batch.num_sequences,
            page_size=batch.page_size,
            threads=torch.get_num_threads(),
        )
        return CPUPlan(batch, call)

    def attend(self, q: Tensor, pages: LayerPages, plan: CPUPlan, spec: AttentionSpec) -> Tensor:
        """Attend every token to its sequence's pages. q: [T, H, D] -> [T, H, D]."""
        kernels = native.kernels()
        if kernels is None or not _kernel_reads(q, pages):
            if plan.portable is None:
                plan.portable = self._portable.plan(plan.batch)
            return self._portable.attend(q, pages, plan.portable, spec)
        out = torch.empty(q.shape, dtype=q.dtype)
        call = plan.call
        call.q, call.out, call.q_stride = q.data_ptr(), out.data_ptr(), q.stride(0)
        call.k, call.v = pages.k.data_ptr(), pages.v.data_ptr()
        call.k_scale, call.v_scale = native.pointer(pages.k_scale), native.pointer(pages.v_scale)
        call.heads, call.kv_heads, call.dim = q.shape[1], pages.k.shape[2], q.shape[2]
        call.kv_type = native.stored_type(pages.k.dtype)
        call.scale, call.window, call.softcap = spec.scale, spec.window or 0, spec.softcap or 0.0
        kernels.paged_attention(ctypes.byref(call))
        return out


def _kernel_reads(q: Tensor, pages: LayerPages) -> bool:
    """Whether the kernel knows these dtypes and sizes."""
    return (
        q.dtype == torch.float32
        and q.stride(2) == 1
        and q.stride(1) == q.shape[2]
        and native.stored_type(pages.k.dtype) is not None
        and q.shape[2] <= native.MAX_HEAD_DIM
    )
