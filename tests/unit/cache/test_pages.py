"""How many pages there are, what they cost, and that copies copy everything."""

from __future__ import annotations

import pytest
import torch

from penstock_core.attention.pages import bits
from penstock_core.cache import (
    PageConfig,
    PageShape,
    allocate_pages,
    least_pages,
    most_pages,
    move_pages,
    stored_dtype,
)
from penstock_core.protocol.errors import InvalidConfiguration


def shape(dtype: torch.dtype) -> PageShape:
    return PageShape(num_layers=3, page_size=16, num_kv_heads=2, head_dim=32, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_page_bytes_are_what_the_tensors_take(dtype: torch.dtype) -> None:
    layers = allocate_pages(shape(dtype), 5, torch.device("cpu"))
    tensors = [t for layer in layers for t in (layer.k, layer.v, layer.k_scale, layer.v_scale) if t is not None]
    assert sum(t.nbytes for t in tensors) == 5 * shape(dtype).page_bytes
    assert all(not bits(t).any() for t in tensors)
    assert len(layers) == 3
    assert layers[0].quantized == (dtype in (torch.int8, torch.float8_e4m3fn))
    assert layers[0].k.shape == (5, 16, 2, 32)


def test_int8_pages_hold_almost_four_times_the_tokens() -> None:
    assert shape(torch.float32).page_bytes / shape(torch.int8).page_bytes == pytest.approx(4 * 32 / 36)


def test_auto_stores_what_the_model_computes_in() -> None:
    assert stored_dtype("auto", torch.bfloat16) is torch.bfloat16
    assert stored_dtype("int8", torch.float32) is torch.int8
    assert stored_dtype("float8", torch.bfloat16) is torch.float8_e4m3fn
    assert stored_dtype("float16", torch.float32) is torch.float16


def test_pool_that_cannot_hold_one_sequence_is_refused_with_what_would() -> None:
    assert least_pages(PageConfig(), max_model_len=160) == 10
    assert most_pages(PageConfig(), max_model_len=161, max_num_sequences=4) == 45
    with pytest.raises(
        InvalidConfiguration, match=r"page\.num_pages: .*at least 10 pages.*max_model_len to at most 144"
    ):
        least_pages(PageConfig(num_pages=9), max_model_len=160)


def test_a_pool_in_tokens_is_counted_in_pages_once_their_size_is_known() -> None:
    asked = PageConfig(num_tokens=1000)
    assert (asked.sized(256).size, asked.sized(256).num_pages) == (256, 4)
    assert PageConfig(page_size=32).sized(256) == PageConfig(page_size=32)
    assert PageConfig().size == 16
    with pytest.raises(InvalidConfiguration, match=r"page\.num_tokens"):
        PageConfig(num_tokens=100, num_pages=10)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_copies_read_every_source_before_they_write(dtype: torch.dtype) -> None:
    layers = allocate_pages(shape(dtype), 4, torch.device("cpu"))
    for layer in layers:
        assert layer.k_scale is not None
        assert layer.v_scale is not None
        for page in range(4):
            for tensor in (layer.k, layer.v, layer.k_scale, layer.v_scale):
                tensor[page] = page + 1
    move_pages(layers, layers, [(0, 1), (1, 2)])
    for layer in layers:
        for tensor in (layer.k, layer.v, layer.k_scale, layer.v_scale):
            assert tensor is not None
            assert [tensor[page].float().unique().tolist() for page in range(4)] == [[1], [1], [2], [4]]
