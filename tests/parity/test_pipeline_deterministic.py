"""With `deterministic`, log-probabilities are equal bit for bit however a request was computed; without, not so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock_core.cache import PageConfig
from penstock_core.kernels import native
from penstock_core.pipeline import EngineRequest, PipelineConfig, ResumedChoice, UnifiedInferencePipeline
from penstock_core.protocol.jobs import Choice
from penstock_core.protocol.requests import SamplingParams

pytestmark = pytest.mark.parity

BUNDLED = Path(__file__).parents[2] / "worker/penstock_worker/bundled/penstock-story"
PARAMS = SamplingParams(temperature=0.8, seed=3, max_tokens=16, logprobs=4, ignore_eos=True)
PROMPT = [(7 * i) % 2000 + 7 for i in range(230)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pipeline(deterministic: bool = True, **options: Any) -> UnifiedInferencePipeline:
    page = PageConfig(page_size=8, num_pages=options.pop("num_pages", 600))
    options = {"max_model_len": 256, **options}
    return UnifiedInferencePipeline(
        PipelineConfig(BUNDLED, device="cpu", page=page, deterministic=deterministic, **options)
    )


def run(pipe: UnifiedInferencePipeline, *requests: EngineRequest) -> dict[str, Choice]:
    for request in requests:
        pipe.add_request(request)
    choices = {}
    while pipe.has_work:
        for output in pipe.step():
            if output.result is not None:
                assert output.result.error is None
                choices[output.request_id] = output.result.choices[0]
    return choices


def wanted(name: str = "x", **fields: Any) -> EngineRequest:
    return EngineRequest(name, PROMPT, PARAMS, **fields)


def others(count: int) -> list[EngineRequest]:
    return [EngineRequest(f"{n}", [(5 * i + n) % 2000 for i in range(3 + n % 29)], PARAMS) for n in range(count)]


@pytest.fixture(scope="module")
def alone() -> Choice:
    return run(pipeline(prefix_cache=False), wanted())["x"]


def test_in_a_crowd(alone: Choice) -> None:
    assert run(pipeline(), *others(20), wanted(), *others(40)[20:])["x"] == alone


def test_in_chunks(alone: Choice) -> None:
    assert run(pipeline(max_batch_tokens=37, max_num_sequences=4), wanted())["x"] == alone


def test_after_a_prefix_hit(alone: Choice) -> None:
    pipe = pipeline()
    run(pipe, wanted("before"))
    assert run(pipe, wanted())["x"] == alone


def test_after_preemption(alone: Choice) -> None:
    pipe = pipeline(num_pages=60, prefix_cache=False)
    assert run(pipe, wanted("first"), wanted())["x"] == alone
    assert pipe.statistics().preemptions > 0


def test_after_a_crash(alone: Choice) -> None:
    resume = [ResumedChoice(0, alone.token_ids[:7], (alone.logprobs or ())[:7])]
    assert run(pipeline(), wanted(resume=resume))["x"] == alone


def test_without_the_setting_the_last_bits_differ() -> None:
    """What the setting is for where there are no kernels, whose bits hold without it: the same request in chunks."""
    request = EngineRequest("x", PROMPT * 2, PARAMS)
    with native.using(None):
        whole = run(pipeline(deterministic=False, prefix_cache=False, max_model_len=512), request)["x"]
        small = pipeline(deterministic=False, max_batch_tokens=37, max_num_sequences=4, max_model_len=512)
        chunked = run(small, request)["x"]
    assert chunked.token_ids == whole.token_ids
    assert chunked.logprobs != whole.logprobs
