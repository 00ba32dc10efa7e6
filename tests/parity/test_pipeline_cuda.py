"""On a GPU: the engine's tokens are those of the CPU, with graphs and without, overlapped and in turn, on two ranks.

Products of one shape (`deterministic`) make bits independent of how many rows a step has, so that tokens can be
compared exactly although a recorded step is filled up with rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from penstock_core.cache import PageConfig
from penstock_core.distributed import DistributedConfig
from penstock_core.pipeline import InferencePipelineExecutor, PipelineConfig
from penstock_core.pipeline.returns import TokenReturns
from penstock_core.protocol.requests import SamplingParams
from penstock_core.sampling import Sampler, SamplingTable

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.parity,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

BUNDLED = Path(__file__).parents[2] / "worker/penstock_worker/bundled/penstock-story"
PROMPTS = ("Once upon a time", "The fox", "Beside the river there lived a baker and", "One winter evening", "A", "Why")
PARAMS = [
    SamplingParams(temperature=0.8, seed=n, max_tokens=20 + 9 * n, ignore_eos=True)
    if n % 2
    else SamplingParams(temperature=0.0, max_tokens=20 + 9 * n, ignore_eos=True)
    for n in range(len(PROMPTS))
]


@contextmanager
def executor(device: str = "cuda", **options: Any) -> Iterator[InferencePipelineExecutor]:
    options.setdefault("max_num_sequences", 5)
    page = options.pop("page", PageConfig(num_tokens=4096))
    made = InferencePipelineExecutor(
        PipelineConfig(BUNDLED, device=device, page=page, max_model_len=256, max_batch_tokens=64, **options)
    )
    try:
        yield made
    finally:
        made.pipeline.close()


def tokens(device: str = "cuda", **options: Any) -> list[tuple[int, ...]]:
    with executor(device, **options) as engine:
        return [result.token_ids for result in engine.generate(PROMPTS, PARAMS)]


def test_in_float32_tokens_are_the_cpus() -> None:
    assert tokens(dtype="float32") == tokens("cpu", dtype="float32")


@pytest.mark.parametrize("graphs", [None, False])
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_neither_graphs_nor_overlap_change_a_token(graphs: bool | None, overlap: bool, dtype: str) -> None:
    plain = tokens(dtype=dtype, deterministic=True, graphs=False, overlap=False)
    assert tokens(dtype=dtype, deterministic=True, graphs=graphs, overlap=overlap) == plain


def test_decode_steps_are_captured_where_pages_are_read_in_place() -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("the card is too old for FlashAttention")
    with executor(dtype="bfloat16", graphs=True) as engine:
        replayed = 0
        recorded = engine.pipeline.engine._graphs
        assert recorded is not None
        run = recorded.run

        def counted(*arguments: Any) -> torch.Tensor:
            nonlocal replayed
            replayed += 1
            return run(*arguments)

        recorded.run = counted  # type: ignore[method-assign]
        engine.generate(PROMPTS, PARAMS)
        assert replayed > 20


@pytest.mark.parametrize("page_size", [16, 64])
def test_preemption_changes_no_token(page_size: int) -> None:
    def under(num_tokens: int) -> tuple[list[tuple[int, ...]], int]:
        page = PageConfig(num_tokens=num_tokens, page_size=page_size)
        params = [SamplingParams(temperature=0.8, seed=n, max_tokens=110, ignore_eos=True) for n in range(len(PROMPTS))]
        with executor(dtype="float32", deterministic=True, page=page) as engine:
            found = [result.token_ids for result in engine.generate(PROMPTS, params)]
            return found, engine.pipeline.statistics().preemptions

    (calm, none), (crowded, some) = under(4096), under(256)
    assert crowded == calm
    assert none == 0 < some


def test_filtered_and_penalised_requests_join_overlapped_ones() -> None:
    params = [
        SamplingParams(temperature=0.9, seed=1, top_p=0.9, max_tokens=24, ignore_eos=True),
        SamplingParams(temperature=0.9, seed=2, repetition_penalty=1.2, max_tokens=24, ignore_eos=True),
        SamplingParams(temperature=0.9, seed=3, max_tokens=40, ignore_eos=True),
    ]
    found = []
    for overlap in (True, False):
        with executor(dtype="bfloat16", deterministic=True, overlap=overlap) as engine:
            found.append([result.token_ids for result in engine.generate(PROMPTS[:3], params)])
    assert found[0] == found[1]


@pytest.mark.parametrize(("kv_dtype", "limit"), [("int8", 0.02), ("float8", 0.05)])
def test_text_is_hardly_more_surprising_with_eight_bit_pages(kv_dtype: str, limit: float) -> None:
    with executor(dtype="bfloat16") as whole:
        texts = [result.token_ids for result in whole.generate(PROMPTS, PARAMS)]
        expected = _surprise(whole, texts)
    with executor(dtype="bfloat16", page=PageConfig(num_tokens=4096, kv_dtype=kv_dtype)) as small:
        assert abs(_surprise(small, texts) - expected) < limit


def test_equal_logits_give_the_tokens_of_the_host() -> None:
    generator = np.random.default_rng(3)
    logits = torch.from_numpy(generator.normal(0, 3, (12, 3000)).astype(np.float32))
    table = SamplingTable(12, 3000)
    for row in range(12):
        options: dict[str, Any] = [{"temperature": 0.0}, {"temperature": 0.9}, {"temperature": 1.2, "top_k": 30}][
            row % 3
        ]
        table.add(row, SamplingParams(**options), 7 + row, 0)
    rows, positions = np.arange(12), np.arange(12)
    here = Sampler().sample(table, logits.clone(), rows, positions).token_ids
    there = Sampler().sample(table, logits.cuda(), rows, positions).token_ids
    np.testing.assert_array_equal(here, there)


def test_tokens_return_in_order_while_the_device_goes_on() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    returns = TokenReturns(device, 8)
    sent = []
    for step in range(20):
        work = torch.randn(512, 512, device=device)
        for _ in range(5):
            work = work @ work.softmax(-1)
        sent.append(returns.send((work.argmax() * 0 + torch.arange(step, step + 8, device=device)).long()))
        if step % 2:
            assert sent[step - 1].read().tolist() == list(range(step - 1, step + 7))
    for step in range(1, 20, 2):
        assert sent[step].read().tolist() == list(range(step, step + 8))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_two_ranks_give_the_tokens_of_one() -> None:
    """Over NCCL; in float32, whose rounding differs by the order of one sum."""
    assert tokens(dtype="float32", distributed=DistributedConfig(tensor_parallel=2)) == tokens(dtype="float32")


def _surprise(engine: InferencePipelineExecutor, texts: list[tuple[int, ...]]) -> float:
    """Mean negative log-probability per token, in nats; the prompt is chunked, so pages are read back."""
    records = [
        record
        for result in engine.generate(texts, SamplingParams(max_tokens=1, prompt_logprobs=0))
        for record in result.prompt_logprobs or ()
        if record is not None
    ]
    return -sum(record.logprob for record in records) / len(records)
