"""Tensors of shared memory never overlap, start at cache lines, and hold what was copied into them."""

from __future__ import annotations

import pytest
import torch

from penstock_core.kernels import memory

SIZES = [
    (size, dtype)
    for size in (1, 5, 40, 333, 2000, 9000)  # the last takes more than a chunk
    for dtype in (torch.float32, torch.bfloat16, torch.uint8)
]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CHUNK", 1 << 16)
    monkeypatch.setattr(memory, "_SMALL", 1000)
    monkeypatch.setattr(memory, "_rest", torch.empty(0, dtype=torch.uint8))


def test_copies_keep_their_numbers_beside_each_other(small_chunks: None) -> None:
    random = torch.Generator().manual_seed(1)
    originals = [torch.randn(size, 3, generator=random).to(dtype) for size, dtype in SIZES]
    copies = [memory.copied(original.t()) for original in originals]
    for copy, original in zip(copies, originals, strict=True):
        assert copy.is_contiguous()
        assert copy.data_ptr() % 64 == 0
        assert torch.equal(copy, original.t())


def test_what_will_be_replaced_leaves_no_hole(small_chunks: None) -> None:
    first = memory.empty([1000], torch.uint8)
    memory.empty([1 << 14], torch.float32, lasting=False)
    assert memory.empty([1000], torch.uint8).data_ptr() == first.data_ptr() + 1024


def test_a_chunk_lives_while_any_of_its_tensors_does(small_chunks: None) -> None:
    first = memory.copied(torch.arange(100))
    for _ in range(50):
        memory.empty([1 << 14], torch.uint8).fill_(255)
    assert torch.equal(first, torch.arange(100))


def test_zeros_are_zero_and_start_at_cache_lines_or_huge_pages() -> None:
    for size, dtype in [*SIZES, (1 << 20, torch.float32)]:
        zeros = memory.zeros([size, 3], dtype)
        assert zeros.shape == (size, 3)
        assert zeros.dtype == dtype
        assert zeros.data_ptr() % (2 << 20 if zeros.nbytes >= 2 << 20 else 64) == 0
        assert not zeros.any()
