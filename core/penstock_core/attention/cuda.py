"""Paged attention on CUDA through PyTorch's own variable-length kernel, which reads pages by block table.

How `torch.nn.attention.varlen.varlen_attn` wants to be asked depends on what is behind it, so `varlen.py` finds that
out by asking. Whatever it does not do (float32, soft-capped scores, 8-bit pages, other page sizes) is gathered and goes
the portable way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from penstock_core.attention import varlen
from penstock_core.attention.batch import AttentionBatch, AttentionSpec, LayerPages
from penstock_core.attention.portable import PortablePagedAttention


@dataclass(slots=True)
class CUDAPlan:
    """What every layer of one forward pass shares; what only some layers need is made when the first of them comes."""

    batch: AttentionBatch
    key_starts: Tensor | None = None
    portable: Any = None


class CUDAPagedAttention:
    """FlashAttention over pages. `deterministic` fixes the reduction order whatever else is in the batch."""

    def __init__(self, deterministic: bool = False) -> None:
        self._deterministic = deterministic
        self._portable = PortablePagedAttention(deterministic)

    def by_kernel(self, batch: AttentionBatch) -> bool:
        """Never: the C kernels are for the CPU."""
        return False

    def in_place(self, shape: varlen.HeadShape, pages: LayerPages, spec: AttentionSpec, *, decoding: bool) -> bool:
        """Whether pages are read where they lie, by a kernel that needs nothing of the host (and can be captured)."""
        return self._convention(shape, pages, spec, decoding) is not None

    def plan(self, batch: AttentionBatch) -> CUDAPlan:
        """Nothing to prepare: the kernel reads the batch's own tensors."""
        return CUDAPlan(batch)

    def attend(self, q: Tensor, pages: LayerPages, plan: CUDAPlan, spec: AttentionSpec) -> Tensor:
        """Attend every token to its sequence's pages. q: [T, H, D] -> [T, H, D]."""
        batch = plan.batch
        shape = varlen.HeadShape(q.dtype, q.device, q.shape[1], q.shape[2])
        convention = self._convention(shape, pages, spec, batch.max_query_len == 1)
        if convention is not None:
            if plan.key_starts is None and convention.wants_key_starts:
                plan.key_starts = varlen.key_starts(batch)
            return varlen.attend(q, pages, batch, spec, convention, plan.key_starts)
        if plan.portable is None:
            decoding = batch.max_query_len == 1 and not self._deterministic
            plan.portable = self._portable.plan_decodes(batch) if decoding else self._portable.plan(batch)
        return self._portable.attend(q, pages, plan.portable, spec)

    def _convention(
        self, shape: varlen.HeadShape, pages: LayerPages, spec: AttentionSpec, decoding: bool
    ) -> varlen.Convention | None:
        if spec.softcap is not None or shape.dtype != pages.k.dtype:
            return None
        _, page_size, kv_heads, _ = pages.k.shape
        return varlen.convention_for(shape, page_size, kv_heads, spec.window is not None, decoding, self._deterministic)
