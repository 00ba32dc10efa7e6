"""Paged attention on the CPU: the C kernel, and fused PyTorch products for the longest prefill chunks.

The kernel reads pages in place and takes each token's keys in one fixed order, so `deterministic` uses it for
everything; chunks of many hundred tokens over thousands are a quarter faster as large products. Without the kernels all
goes the portable way.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock_core.attention.batch import AttentionBatch, AttentionSpec, LayerPages
from penstock_core.attention.portable import PortablePagedAttention
from penstock_core.kernels import native

SHORT_QUERY = 256  # tokens; longer chunks over long contexts are faster as products
SHORT_WORK = 1 << 20  # query tokens x context; below it the pass stays one call of the kernels, which saves more


@dataclass(slots=True)
class CPUPlan:
    """What every layer of one forward pass shares; a portable plan is made only where a layer needs it."""

    batch: AttentionBatch
    selected: Tensor  # int32: the sequences the kernel computes
    call: native.AttentionCall  # what of the kernel's arguments is the same for every layer
    long: list[int]  # the sequences left to the portable way
    portable_long: object = None
    portable_all: object = None


class CPUPagedAttention:
    """Chooses per sequence. `deterministic`: bits depend neither on chunking nor on the batch."""

    def __init__(self, deterministic: bool = False) -> None:
        self._deterministic = deterministic
        self._portable = PortablePagedAttention(deterministic)

    def by_kernel(self, batch: AttentionBatch) -> bool:
        """Whether no sequence of the batch goes the portable way."""
        return native.kernels() is not None and (
            self._deterministic
            or batch.max_query_len <= SHORT_QUERY
            or batch.max_query_len * batch.max_seq_len <= SHORT_WORK
        )

    def plan(self, batch: AttentionBatch) -> CPUPlan:
        """Share the batch's sequences out; once per forward pass."""
        long: list[int] = []
        if self.by_kernel(batch):
            selected = torch.arange(batch.num_sequences, dtype=torch.int32)
            longest = batch.max_query_len
        else:
            lengths = batch.query_start.diff()
            is_short = (lengths <= SHORT_QUERY) | (lengths * batch.seq_lens <= SHORT_WORK)
            selected = is_short.nonzero()[:, 0].int()
            long = (~is_short).nonzero()[:, 0].tolist()
            longest = int((lengths * is_short).max())  # the kernel looks at as many blocks of every sequence
        call = native.AttentionCall(
            block_table=batch.block_table.data_ptr(),
            table_stride=batch.block_table.stride(0),
            query_start=batch.query_start.data_ptr(),
            seq_lens=batch.seq_lens.data_ptr(),
            selected=selected.data_ptr(),
            num_selected=len(selected),
            page_size=batch.page_size,
            max_query_len=longest,
            threads=torch.get_num_threads(),
        )
        return CPUPlan(batch, selected, call, long)

    def attend(self, q: Tensor, pages: LayerPages, plan: CPUPlan, spec: AttentionSpec) -> Tensor:
        """Attend every token to its sequence's pages. q: [T, H, D] -> [T, H, D]."""
        out = torch.empty(q.shape, dtype=q.dtype)
        kernels = native.kernels()
        if kernels is None or not _kernel_reads(q, pages):
            if plan.portable_all is None:
                plan.portable_all = self._portable.plan(plan.batch)
            self._portable.attend_into(out, q, pages, plan.portable_all, spec)  # type: ignore[arg-type]
            return out
        if plan.long:
            if plan.portable_long is None:
                plan.portable_long = self._portable.plan(plan.batch, plan.long)
            self._portable.attend_into(out, q, pages, plan.portable_long, spec)  # type: ignore[arg-type]
        call = plan.call
        if call.num_selected:
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
        and pages.k.shape[1] <= native.MAX_PAGE_SIZE
    )
