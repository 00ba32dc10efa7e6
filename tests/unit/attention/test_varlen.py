"""The CUDA attention finds out how PyTorch's paged kernel wants to be called, and trusts no answer that is wrong.

Stand-ins with the kernels' published demands compute on the CPU; `test_cuda.py` asks the real one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from penstock_core.attention import AttentionBatch, AttentionSpec, LayerPages, varlen
from penstock_core.attention.cuda import CUDAPagedAttention
from penstock_core.attention.pages import store
from penstock_core.attention.portable import PortablePagedAttention

CPU = torch.device("cpu")
HEADS = varlen.HeadShape(torch.bfloat16, CPU, 8, 32)
LENGTHS, NEWS = [40, 1, 300, 7], [1, 1, 30, 7]


def dense(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, lengths: Tensor, table: Tensor, **options: Any) -> Tensor:
    """What the kernel computes, one sequence at a time, in float32."""
    out = torch.empty_like(q)
    left, right = options["window_size"]
    for n, length in enumerate(lengths.tolist()):
        rows = slice(int(starts[n]), int(starts[n + 1]))
        shared = q.shape[1] // k.shape[2]
        keys, values = (
            side[table[n].long()].flatten(0, 1)[:length].float().repeat_interleave(shared, 1) for side in (k, v)
        )
        scores = torch.einsum("qhd,khd->hqk", q[rows].float(), keys) * options["scale"]
        count = rows.stop - rows.start
        position, key = torch.arange(length - count, length)[:, None], torch.arange(length)
        seen = torch.ones(count, length, dtype=torch.bool)
        if right >= 0:
            seen &= key <= position + right
        if left >= 0:
            seen &= key >= position - left
        scores = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out[rows] = torch.einsum("hqk,khd->qhd", scores, values).to(q.dtype)
    return out


def flash_2(
    q: Tensor, k: Tensor, v: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor | None, max_q: int, max_k: int, *,
    scale: float, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False, seqused_k: Tensor,
    block_table: Tensor, num_splits: int | None = None,
) -> Tensor:  # fmt: skip
    """Large pages, running sums, and nonsense where it may cut the keys."""
    assert enable_gqa
    if cu_seq_k is None or k.shape[1] % 256 or block_table.dtype != torch.int32 or cu_seq_k.dtype != torch.int32:
        raise RuntimeError("this is not what FlashAttention 2 wants")
    out = dense(q, k, v, cu_seq_q, seqused_k, block_table, scale=scale, window_size=window_size)
    return out if num_splits == 1 else out.index_fill(0, torch.tensor([len(out) - 1]), float("nan"))


def flash_3(
    q: Tensor, k: Tensor, v: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor | None, max_q: int, max_k: int, *,
    scale: float, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False, seqused_k: Tensor,
    block_table: Tensor, num_splits: int | None = None,
) -> Tensor:  # fmt: skip
    """Any pages, and no running sums."""
    if cu_seq_k is not None:
        raise RuntimeError("If cu_seqlens_k is passed in, then page table is not supported")
    return dense(q, k, v, cu_seq_q, seqused_k, block_table, scale=scale, window_size=window_size)


def always_wrong(q: Tensor, *others: Any, seqused_k: Any, block_table: Any, window_size: Any, scale: Any) -> Tensor:
    return torch.zeros_like(q)


def refuses_plain_decodes(*arguments: Any, **options: Any) -> Tensor:
    """A build in which an unmasked single query is answered wrongly."""
    out = flash_2(*arguments, **options)
    return out if options["window_size"] != (-1, -1) else out + 1.0


refuses_plain_decodes.__signature__ = inspect.signature(flash_2)  # type: ignore[attr-defined]


@pytest.fixture
def behind(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], None]]:
    """Put a stand-in behind the kernel."""

    def put(stand_in: Any) -> None:
        varlen.convention_for.cache_clear()
        monkeypatch.setattr(varlen, "kernel", lambda: stand_in)

    yield put
    varlen.convention_for.cache_clear()


def scene(page_size: int, lengths: list[int], news: list[int]) -> tuple[Tensor, LayerPages, AttentionBatch]:
    tables, used = [], 0
    for length in lengths:
        count = -(-length // page_size)
        tables.append(list(range(used, used + count))[::-1])
        used += count
    generator = torch.Generator().manual_seed(1)
    k, v = (torch.randn(used, page_size, 2, 32, generator=generator).bfloat16() for _ in "kv")
    q = torch.randn(sum(news), 8, 32, generator=generator).bfloat16()
    computed = [length - new for length, new in zip(lengths, news, strict=True)]
    return q, LayerPages(k, v), AttentionBatch.build([[0] * new for new in news], computed, tables, page_size)


@pytest.mark.parametrize("decoding", [False, True])
@pytest.mark.parametrize("window", [None, 300])
def test_large_pages_are_read_in_place_by_flash_attention_2(behind: Any, decoding: bool, window: int | None) -> None:
    behind(flash_2)
    found = varlen.convention_for(HEADS, 256, 2, window is not None, decoding, False)
    assert found == varlen.Convention(True, 1, causal_decodes=not (decoding and window is None))


@pytest.mark.parametrize("page_size", [16, 256, 19])
def test_any_pages_are_read_in_place_by_flash_attention_3(behind: Any, page_size: int) -> None:
    behind(flash_3)
    assert varlen.convention_for(HEADS, page_size, 2, False, False, False) == varlen.Convention(False, 1, True)


@pytest.mark.parametrize(("deterministic", "splits"), [(False, None), (True, 1)])
def test_only_an_implementation_that_cuts_well_may_cut(
    behind: Any, monkeypatch: pytest.MonkeyPatch, deterministic: bool, splits: int | None
) -> None:
    behind(flash_3)
    monkeypatch.setattr("torch.nn.attention.current_flash_attention_impl", lambda: "FA3")
    found = varlen.convention_for(HEADS, 16, 2, False, True, deterministic)
    assert found is not None
    assert found.num_splits == splits


@pytest.mark.parametrize(("stand_in", "page_size"), [(always_wrong, 256), (flash_2, 16), (flash_2, 128), (None, 256)])
def test_what_refuses_or_answers_wrongly_is_not_used(behind: Any, stand_in: Any, page_size: int) -> None:
    behind(stand_in)
    assert varlen.convention_for(HEADS, page_size, 2, False, False, False) is None


def test_a_plain_decode_that_is_answered_wrongly_is_masked_instead(behind: Any) -> None:
    behind(refuses_plain_decodes)
    assert varlen.convention_for(HEADS, 256, 2, False, True, False) == varlen.Convention(True, 1, True)


def test_float32_and_uneven_heads_are_not_asked_for(behind: Any) -> None:
    behind(flash_3)
    assert varlen.convention_for(varlen.HeadShape(torch.float32, CPU, 8, 32), 16, 2, False, False, False) is None
    assert varlen.convention_for(varlen.HeadShape(torch.bfloat16, CPU, 8, 32), 16, 3, False, False, False) is None


@pytest.mark.parametrize(("stand_in", "expected"), [(flash_2, 256), (flash_3, 16), (None, 16), (always_wrong, 16)])
def test_pages_are_as_small_as_the_kernel_reads(behind: Any, stand_in: Any, expected: int) -> None:
    behind(stand_in)
    assert varlen.usual_page_size(HEADS, 2) == expected


@pytest.mark.parametrize("stand_in", [flash_2, flash_3, always_wrong, None])
@pytest.mark.parametrize("page_size", [16, 256])
@pytest.mark.parametrize("spec", [AttentionSpec(0.2), AttentionSpec(0.2, window=7), AttentionSpec(0.2, softcap=5.0)])
@pytest.mark.parametrize("news", [NEWS, [1, 1, 1, 1]], ids=["mixed", "decodes"])
def test_every_way_gives_the_same(
    behind: Any, stand_in: Any, page_size: int, spec: AttentionSpec, news: list[int]
) -> None:
    behind(stand_in)
    q, pages, batch = scene(page_size, LENGTHS, news)
    attention, portable = CUDAPagedAttention(), PortablePagedAttention()
    found = attention.attend(q, pages, attention.plan(batch), spec)
    expected = portable.attend(q, pages, portable.plan(batch), spec)
    torch.testing.assert_close(found, expected, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize(("stored", "limit"), [(torch.int8, 0.02), (torch.float8_e4m3fn, 0.06)])
@pytest.mark.parametrize("news", [NEWS, [1, 1, 1, 1]], ids=["mixed", "decodes"])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
def test_eight_bit_pages_stay_within_their_rounding(
    stored: torch.dtype, limit: float, news: list[int], size: float
) -> None:
    q, pages, batch = scene(16, LENGTHS, news)
    k, v = pages.k.flatten(0, 1).float(), pages.v.flatten(0, 1).float() * size
    small = LayerPages(
        torch.zeros(pages.k.shape, dtype=stored),
        torch.zeros(pages.k.shape, dtype=stored),
        torch.zeros(pages.k.shape[:3]),
        torch.zeros(pages.k.shape[:3]),
    )
    slots = torch.arange(len(k))
    store(k, small.k, small.k_scale, slots)
    store(v, small.v, small.v_scale, slots)
    attention, portable = CUDAPagedAttention(), PortablePagedAttention()
    whole = LayerPages(k.view(pages.k.shape), v.view(pages.k.shape))
    found = attention.attend(q.float(), small, attention.plan(batch), AttentionSpec(32**-0.5))
    expected = portable.attend(q.float(), whole, portable.plan(batch), AttentionSpec(32**-0.5))
    assert (found - expected).abs().max() < limit * expected.abs().max()


def test_pages_are_read_in_place_exactly_where_the_kernel_computes(behind: Any) -> None:
    behind(flash_2)
    attention = CUDAPagedAttention()
    _, pages, _ = scene(256, LENGTHS, NEWS)
    eight_bits = LayerPages(pages.k.to(torch.int8), pages.v.to(torch.int8), torch.ones(1), torch.ones(1))
    for spec, stored, expected in (
        (AttentionSpec(0.2), pages, True),
        (AttentionSpec(0.2, window=9), pages, True),
        (AttentionSpec(0.2, softcap=5.0), pages, False),
        (AttentionSpec(0.2), eight_bits, False),
    ):
        assert attention.in_place(HEADS, stored, spec, decoding=True) is expected


def test_decodes_are_planned_without_reading_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """`plan` asks for lengths on the host, which on a GPU waits for everything before; a decode step must not."""
    q, pages, batch = scene(16, [40, 1, 300, 7], [1, 1, 1, 1])
    portable = PortablePagedAttention()
    expected = portable.attend(q, pages, portable.plan(batch), AttentionSpec(0.2))
    for name in ("tolist", "item", "cpu", "numpy", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("the host asks the device"))
    found = portable.attend(q, pages, portable.plan_decodes(batch), AttentionSpec(0.2))
    monkeypatch.undo()
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_the_installed_pytorch_has_the_kernel_with_these_arguments() -> None:
    from torch.nn.attention.varlen import varlen_attn

    assert varlen.kernel() is varlen_attn
    named = {"scale", "window_size", "enable_gqa", "seqused_k", "block_table", "num_splits"}
    assert named <= set(inspect.signature(varlen_attn).parameters)
