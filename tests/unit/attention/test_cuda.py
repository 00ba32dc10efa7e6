"""On a GPU, the CUDA implementation and a whole model agree with the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from penstock_core.attention import AttentionBatch, AttentionSpec, LayerPages, attention_for
from penstock_core.attention.portable import PortablePagedAttention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("page_size", [16, 256])
@pytest.mark.parametrize("spec", [AttentionSpec(0.1), AttentionSpec(0.1, window=7), AttentionSpec(0.1, softcap=5.0)])
def test_equals_the_portable_implementation(page_size: int, spec: AttentionSpec) -> None:
    lengths, news = [40, 1, 300, 7], [1, 1, 30, 7]
    pages_of, tables = 0, []
    for length in lengths:
        count = -(-length // page_size)
        tables.append(list(range(pages_of, pages_of + count)))
        pages_of += count
    generator = torch.Generator("cuda").manual_seed(1)
    k, v = (
        torch.randn(pages_of, page_size, 2, 64, device="cuda", dtype=torch.bfloat16, generator=generator) for _ in "kv"
    )
    q = torch.randn(sum(news), 8, 64, device="cuda", dtype=torch.bfloat16, generator=generator)
    computed = [length - new for length, new in zip(lengths, news, strict=True)]
    batch = AttentionBatch.build([[0] * new for new in news], computed, tables, page_size, "cuda")
    outputs = [
        attention.attend(q, LayerPages(k, v), attention.plan(batch), spec)
        for attention in (attention_for("cuda"), PortablePagedAttention())
    ]
    torch.testing.assert_close(*outputs, rtol=2e-2, atol=2e-2)


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
