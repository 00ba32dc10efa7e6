"""A model cut over processes says what it says whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from penstock_core.pipeline import InferencePipelineExecutor
from penstock_core.protocol.requests import ResponseFormat, SamplingParams
from tests.parity.cuts import CUTS, PROMPTS, SAMPLED, SHARED, checkpoint, executor, follower_ids, one_thread

__all__ = ["checkpoint", "one_thread"]

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> InferencePipelineExecutor:
    """The whole model in one process, with room for everything."""
    return executor(checkpoint, {})


@pytest.fixture(scope="module", params=CUTS)
def group(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[InferencePipelineExecutor]:
    """The same model cut, with so little room that prompts enter in chunks and sequences take turns."""
    made = executor(
        checkpoint, CUTS[request.param], num_pages=20, host_pages=50, max_batch_tokens=24, max_num_sequences=8
    )
    processes = [psutil.Process(pid) for pid in follower_ids(made)]
    yield made
    assert made.pipeline.engine.fallen() is None
    made.shutdown(timeout_s=30)
    assert not psutil.wait_procs(processes, timeout=120)[1], "followers outlive their group"


def test_seeded_tokens_and_logprobs(alone: InferencePipelineExecutor, group: InferencePipelineExecutor) -> None:
    options = [
        SAMPLED,
        SAMPLED.model_copy(update={"n": 3, "logprobs": 2}),
        SAMPLED.model_copy(update={"temperature": 0.0, "prompt_logprobs": 1}),
    ]
    expected = alone.generate(PROMPTS, options)
    for _ in range(2):  # the second time with cached prefixes
        together = group.generate(PROMPTS, options)
        for one, two in zip(expected, together, strict=True):
            assert [choice.token_ids for choice in two.choices] == [choice.token_ids for choice in one.choices]
        records = zip(expected[2].prompt_logprobs or (), together[2].prompt_logprobs or (), strict=True)
        compared = [(one, two) for one, two in records if one is not None and two is not None]
        assert len(compared) == len(PROMPTS[2]) - 1
        for one_record, two_record in compared:
            assert two_record.logprob == pytest.approx(one_record.logprob, abs=1e-4)


def test_prefixes_evictions_trips_to_host_memory_and_preemption(
    alone: InferencePipelineExecutor, group: InferencePipelineExecutor
) -> None:
    before = group.statistics()
    prompts = [SHARED + PROMPTS[1][: n + 1] for n in range(4)] + [PROMPTS[2], *(SHARED[n:] for n in (3, 9))]
    expected = [result.token_ids for result in alone.generate(prompts, SAMPLED)]
    for _ in range(2):
        assert [result.token_ids for result in group.generate(prompts, SAMPLED)] == expected
    after = group.statistics()
    assert after.cache.hit_tokens > before.cache.hit_tokens
    assert after.cache.restored_pages > 0
    assert after.preemptions > 0
    assert after.batch_tokens / after.steps < 24


def test_structured_output(alone: InferencePipelineExecutor, group: InferencePipelineExecutor) -> None:
    formats = [ResponseFormat(choice=("lantern", "lamp", "light")), ResponseFormat(regex="[a-c]{3}-[0-9]{2}")]
    options = [SamplingParams(temperature=1.0, seed=5, max_tokens=20, response_format=given) for given in formats]
    expected = alone.generate(PROMPTS[:2], options)
    together = group.generate(PROMPTS[:2], options)
    assert [result.text for result in together] == [result.text for result in expected]
    assert together[0].text in ("lantern", "lamp", "light")
