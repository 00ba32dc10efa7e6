"""Pages of less precision than the model: how much accuracy they cost, measured on text the model knows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from penstock_core.cache import PageConfig
from penstock_core.pipeline import InferencePipelineExecutor, PipelineConfig, UnifiedInferencePipeline
from penstock_core.protocol.requests import SamplingParams

pytestmark = pytest.mark.parity

BUNDLED = Path(__file__).parents[2] / "worker/penstock_worker/bundled/penstock-story"
GREEDY = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
OPENINGS = ("Once upon a time", "The fox", "Beside the river there lived", "One winter evening")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def executor(kv_dtype: str) -> InferencePipelineExecutor:
    page = PageConfig(num_pages=256, kv_dtype=kv_dtype)
    return InferencePipelineExecutor(UnifiedInferencePipeline(PipelineConfig(BUNDLED, device="cpu", page=page)))


def surprise(engine: InferencePipelineExecutor, texts: list[tuple[int, ...]]) -> float:
    """Mean negative log-probability per token, in nats. The prompt is chunked, so pages are read back."""
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    records = [
        record
        for result in engine.generate(texts, params)
        for record in result.prompt_logprobs or ()
        if record is not None
    ]
    return -sum(record.logprob for record in records) / len(records)


@pytest.mark.parametrize(
    ("kv_dtype", "limit"), [("float16", 0.0005), ("bfloat16", 0.005), ("int8", 0.005), ("float8", 0.02)]
)
def test_text_is_hardly_more_surprising_to_a_model_with_smaller_pages(kv_dtype: str, limit: float) -> None:
    whole = executor("float32")
    texts = [result.token_ids for result in whole.generate(list(OPENINGS), GREEDY)]
    small = executor(kv_dtype)
    assert small.pipeline.engine.page_bytes < whole.pipeline.engine.page_bytes
    assert abs(surprise(small, texts) - surprise(whole, texts)) < limit


@pytest.mark.parametrize("kv_dtype", ["float16", "bfloat16", "int8", "float8"])
def test_smaller_pages_keep_same_seed_same_tokens(kv_dtype: str) -> None:
    engine = executor(kv_dtype)
    params = SamplingParams(temperature=0.8, seed=7, max_tokens=40, ignore_eos=True)
    (alone,) = engine.generate(OPENINGS[0], params)
    crowd = engine.generate([*OPENINGS, OPENINGS[0]], params)
    assert crowd[0].token_ids == crowd[-1].token_ids == alone.token_ids
