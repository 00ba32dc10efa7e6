"""On a GPU: attention agrees with the portable implementation, and a whole model with itself on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from penstock_core.attention import AttentionBatch, AttentionSpec, LayerPages, attention_for, varlen
from penstock_core.attention.pages import store
from penstock_core.attention.portable import PortablePagedAttention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def scene(page_size: int, news: list[int], heads: int, dim: int) -> tuple[torch.Tensor, LayerPages, AttentionBatch]:
    lengths = [40, 1, 700, 7]
    pages_of, tables = 0, []
    for length in lengths:
        count = -(-length // page_size)
        tables.append(list(range(pages_of, pages_of + count))[::-1])
        pages_of += count
    generator = torch.Generator("cuda").manual_seed(1)
    k, v = (
        torch.randn(pages_of, page_size, 2, dim, device="cuda", dtype=torch.bfloat16, generator=generator) for _ in "kv"
    )
    q = torch.randn(sum(news), heads, dim, device="cuda", dtype=torch.bfloat16, generator=generator)
    computed = [length - new for length, new in zip(lengths, news, strict=True)]
    return q, LayerPages(k, v), AttentionBatch.build([[0] * new for new in news], computed, tables, page_size, "cuda")


@pytest.mark.parametrize("page_size", [16, 256])
@pytest.mark.parametrize("spec", [AttentionSpec(0.1), AttentionSpec(0.1, window=7), AttentionSpec(0.1, softcap=5.0)])
@pytest.mark.parametrize("news", [[1, 1, 30, 7], [1, 1, 1, 1]], ids=["mixed", "decodes"])
@pytest.mark.parametrize(("heads", "dim"), [(8, 64), (2, 128)])
@pytest.mark.parametrize("deterministic", [False, True])
def test_equals_the_portable_implementation(
    page_size: int, spec: AttentionSpec, news: list[int], heads: int, dim: int, deterministic: bool
) -> None:
    q, pages, batch = scene(page_size, news, heads, dim)
    outputs = [
        attention.attend(q, pages, attention.plan(batch), spec)
        for attention in (attention_for("cuda", deterministic=deterministic), PortablePagedAttention())
    ]
    torch.testing.assert_close(*outputs, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("decoding", [False, True])
def test_some_pages_are_read_in_place(decoding: bool) -> None:
    """Where this fails, every step gathers: right, but slow. FlashAttention needs an Ampere card or a newer one."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("the card is too old for FlashAttention")
    shape = varlen.HeadShape(torch.bfloat16, torch.device("cuda"), 16, 128)
    assert varlen.convention_for(shape, varlen.usual_page_size(shape, 8), 8, False, decoding, False) is not None


@pytest.mark.parametrize(("stored", "limit"), [(torch.int8, 0.03), (torch.float8_e4m3fn, 0.07)])
@pytest.mark.parametrize("news", [[1, 1, 30, 7], [1, 1, 1, 1]], ids=["mixed", "decodes"])
def test_eight_bit_pages_stay_within_their_rounding(stored: torch.dtype, limit: float, news: list[int]) -> None:
    q, pages, batch = scene(16, news, 8, 64)
    shape = pages.k.shape
    small = LayerPages(
        *(torch.zeros(shape, dtype=stored, device="cuda") for _ in "kv"),
        *(torch.zeros(shape[:3], device="cuda") for _ in "kv"),
    )
    slots = torch.arange(shape[0] * shape[1], device="cuda")
    store(pages.k.flatten(0, 1), small.k, small.k_scale, slots)
    store(pages.v.flatten(0, 1), small.v, small.v_scale, slots)
    attention, spec = attention_for("cuda"), AttentionSpec(64**-0.5)
    found = attention.attend(q, small, attention.plan(batch), spec)
    expected = attention.attend(q, pages, attention.plan(batch), spec)
    assert (found - expected).abs().max() < limit * expected.abs().max()


@pytest.mark.parametrize("family", ["llama", "qwen 3", "gemma 2", "mixtral"])
def test_a_model_on_the_gpu_equals_itself_on_the_cpu(family: str, tmp_path: Path) -> None:
    from penstock_core.models import load_model
    from tests.parity.checkpoints import logits_of, write_checkpoint
    from tests.parity.families import CONFIGS

    write_checkpoint(tmp_path, CONFIGS[family]())
    prompts = [[5, 9, 100, 3, 7, 7, 20, 44], [150, 8]]
    cpu = logits_of(load_model(tmp_path), prompts)
    gpu = logits_of(load_model(tmp_path, device="cuda", dtype="float32"), prompts)
    for a, b in zip(cpu, gpu, strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-3, atol=1e-3 * float(a.abs().max()))
