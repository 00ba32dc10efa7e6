"""PyTorch's `varlen_attn` over pages: whether it is there, how it wants to be called, and whether it answers rightly.

Behind it is FlashAttention 2, or what `torch.nn.attention.activate_flash_attention_impl` has put there. 2 wants pages
of a multiple of 256 tokens, and running sums of the key lengths; 3 takes any page size, and refuses the sums beside a
block table. Cutting the keys in parts, 2 has given wrong rows and NaN over pages (PyTorch issue 194167): it is asked
for one part. None of that is promised: each way to call is tried once, on random numbers, against the portable
implementation, and used only if it agrees.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock_core.attention.batch import AttentionBatch, AttentionSpec, LayerPages
from penstock_core.attention.portable import PortablePagedAttention

SMALL_PAGE, LARGE_PAGE = 16, 256
_NEEDED = {"seqused_k", "block_table", "window_size", "scale"}
_TOLERANCE = 0.03  # in 16 bits, of values around 1
_SEED = 20_260


@dataclass(frozen=True, slots=True)
class HeadShape:
    """Queries of one layer: their dtype, where they are, how many heads and how large."""

    dtype: torch.dtype
    device: torch.device
    heads: int
    dim: int


@dataclass(frozen=True, slots=True)
class Convention:
    """How the kernel is called.

    Attributes:
        wants_key_starts: with running sums of the key lengths beside the lengths themselves.
        num_splits: parts that the keys are cut into; None lets the kernel choose.
        causal_decodes: a single query is masked like the last of several; otherwise it is not masked at all, which is
            the same, and lets query heads that share keys share their loads.
    """

    wants_key_starts: bool
    num_splits: int | None
    causal_decodes: bool


@cache
def kernel() -> Callable[..., Any] | None:
    """`varlen_attn`, if it exists here and reads pages; else None."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if _parameters(varlen_attn) >= _NEEDED else None


def key_starts(batch: AttentionBatch) -> Tensor:
    """int32 [N + 1], running sum of the context lengths; computed on the device."""
    return F.pad(batch.seq_lens.cumsum(0), (1, 0)).to(torch.int32)


def attend(
    q: Tensor,
    pages: LayerPages,
    batch: AttentionBatch,
    spec: AttentionSpec,
    convention: Convention,
    starts: Tensor | None,
) -> Tensor:
    """Attend every token to its sequence's pages. q: [T, H, D] -> [T, H, D]. starts: `key_starts`, where wanted."""
    call = kernel()
    assert call is not None
    window = (-1 if spec.window is None else spec.window - 1, 0)
    if batch.max_query_len == 1 and spec.window is None and not convention.causal_decodes:
        window = (-1, -1)
    options: dict[str, Any] = {}
    known = _parameters(call)
    if "enable_gqa" in known:
        options["enable_gqa"] = True
    if "num_splits" in known:
        options["num_splits"] = convention.num_splits
    out: Tensor = call(
        q,
        pages.k,
        pages.v,
        batch.query_start,
        starts if convention.wants_key_starts else None,
        batch.max_query_len,
        batch.max_seq_len,
        scale=spec.scale,
        window_size=window,
        seqused_k=batch.seq_lens,
        block_table=batch.block_table,
        **options,
    )
    return out


@cache
def _parameters(call: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(call).parameters)


@cache
def convention_for(
    shape: HeadShape, page_size: int, kv_heads: int, windowed: bool, decoding: bool, deterministic: bool
) -> Convention | None:
    """How to call the kernel for such heads and pages; None where no way gives what it should.

    Args:
        shape, page_size, kv_heads: of queries and pages.
        windowed: with a sliding window.
        decoding: one query per sequence.
        deterministic: in one part, so that sums do not depend on the rest of the batch.
    """
    if kernel() is None or shape.dtype not in (torch.float16, torch.bfloat16) or shape.heads % kv_heads:
        return None
    spec = AttentionSpec(shape.dim**-0.5, window=page_size + 3 if windowed else None)
    with torch.inference_mode():
        trial = _Trial(shape, page_size, kv_heads, decoding)
        expected = trial.portably(spec)
        for convention in _conventions(decoding and not windowed, deterministic):
            try:
                found = trial.by_kernel(spec, convention)
            except (RuntimeError, ValueError, TypeError, NotImplementedError):
                continue
            allowed = _TOLERANCE * (1.0 + expected.float().abs())
            if bool(((found.float() - expected.float()).abs() < allowed).all()):  # False where one is NaN
                return convention
    return None


def usual_page_size(shape: HeadShape, kv_heads: int) -> int:
    """Tokens per page: few, for the prefix cache, unless the kernel reads larger ones only."""
    for page_size in (SMALL_PAGE, LARGE_PAGE):
        if all(convention_for(shape, page_size, kv_heads, False, decoding, False) for decoding in (False, True)):
            return page_size
    return SMALL_PAGE


def _conventions(decoding: bool, deterministic: bool) -> Iterator[Convention]:
    """The ways there are, the fastest first."""
    splits = None if _chooses_splits_well() and not deterministic else 1
    # Where bits must not depend on chunking, a decode is computed as the last query of a prompt is.
    for causal_decodes in (False, True) if decoding and not deterministic else (True,):
        for wants_key_starts in (False, True):
            yield Convention(wants_key_starts, splits, causal_decodes)


def _chooses_splits_well() -> bool:
    """Whether what is behind the kernel may be left to cut the keys as it likes."""
    try:
        from torch.nn.attention import current_flash_attention_impl
    except ImportError:
        return False
    return current_flash_attention_impl() in ("FA3", "FA4")


class _Trial:
    """A few sequences of random keys and values over pages that do not lie in order."""

    def __init__(self, shape: HeadShape, page_size: int, kv_heads: int, decoding: bool) -> None:
        generator = torch.Generator().manual_seed(_SEED)

        def numbers(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator).to(shape.device, shape.dtype)

        lengths = [2 * page_size + 5, 7, page_size, 3 * page_size - 1]
        news = [1] * 4 if decoding else [9, 7, 1, 33]
        news = [min(new, length) for new, length in zip(news, lengths, strict=True)]
        order = torch.randperm(12, generator=generator).tolist()
        tables = [[order.pop() for _ in range(-(-length // page_size))] for length in lengths]
        computed = [length - new for length, new in zip(lengths, news, strict=True)]
        self._batch = AttentionBatch.build([[0] * new for new in news], computed, tables, page_size, shape.device)
        self._pages = LayerPages(*(numbers(12, page_size, kv_heads, shape.dim) for _ in "kv"))
        self._q = numbers(sum(news), shape.heads, shape.dim)

    def portably(self, spec: AttentionSpec) -> Tensor:
        portable = PortablePagedAttention()
        return portable.attend(self._q, self._pages, portable.plan(self._batch), spec)

    def by_kernel(self, spec: AttentionSpec, convention: Convention) -> Tensor:
        starts = key_starts(self._batch) if convention.wants_key_starts else None
        return attend(self._q, self._pages, self._batch, spec, convention, starts)
