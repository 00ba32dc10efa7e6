"""Paged attention on CUDA through PyTorch's own variable-length kernel, which reads pages by block table.

`torch.nn.attention.varlen.varlen_attn` appeared with `block_table` in PyTorch 2.11; `supported()` asks for it by
signature. Soft-capped scores and int8 pages, which it cannot do, go through the portable implementation.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from penstock_core.attention.batch import AttentionBatch, AttentionSpec, LayerPages
from penstock_core.attention.portable import PortablePagedAttention


def supported() -> bool:
    """Whether this PyTorch has a CUDA device and a varlen kernel that reads pages."""
    if not torch.cuda.is_available():
        return False
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"block_table", "seqused_k", "num_splits", "window_size"} <= set(inspect.signature(varlen_attn).parameters)


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

    def plan(self, batch: AttentionBatch) -> CUDAPlan:
        """Nothing to prepare: the kernel reads the batch's own tensors."""
        return CUDAPlan(batch)

    def attend(self, q: Tensor, pages: LayerPages, plan: CUDAPlan, spec: AttentionSpec) -> Tensor:
        """Attend every token to its sequence's pages. q: [T, H, D] -> [T, H, D]."""
        from torch.nn.attention.varlen import varlen_attn

        if spec.softcap is not None or pages.quantized or q.dtype not in (torch.float16, torch.bfloat16):
            if plan.portable is None:
                plan.portable = self._portable.plan(plan.batch)
            return self._portable.attend(q, pages, plan.portable, spec)
        batch = plan.batch
        out = varlen_attn(
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
            num_splits=self._num_splits,
        )
        assert isinstance(out, Tensor)  # a tuple only comes back when auxiliary results are asked for
        return out
