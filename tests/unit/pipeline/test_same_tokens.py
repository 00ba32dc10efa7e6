"""A request's tokens depend on its prompt, options and seed; not on the batch, the cache, preemption or attempts.

Nor on whether the next step is launched before this one's tokens are read: each test runs both ways.
"""

from __future__ import annotations

from typing import Any

import pytest

from penstock_core.pipeline import ResumedChoice
from tests.unit.pipeline.fake_engine import Collected, FakeEngine, pipeline, request, run_one

OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.9},
    "filtered": {"temperature": 1.1, "top_k": 40, "top_p": 0.9},
    "penalised": {"temperature": 0.7, "repetition_penalty": 1.2, "frequency_penalty": 0.4},
    "constrained": {"temperature": 1.0, "response_format": {"regex": "[a-z ]{4,60}"}},
    "two choices": {"temperature": 1.0, "n": 2},
    "ranked": {"temperature": 1.0, "n": 2, "best_of": 3},
    "with logprobs": {"temperature": 1.0, "logprobs": 3, "prompt_logprobs": 2},
    "stop strings": {"temperature": 1.0, "stop": ("e", "th"), "min_tokens": 3},
}


@pytest.fixture(params=OPTIONS.values(), ids=OPTIONS)
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {**request.param, "ignore_eos": True, "max_tokens": 20}


@pytest.fixture(params=[False, True], ids=["in turn", "overlapped"])
def overlap(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def outcome(result: Any) -> Any:
    return result.choices, result.prompt_logprobs


def test_in_a_crowd_as_alone(options: dict[str, Any], overlap: bool) -> None:
    alone = run_one(request("x", 23, **options))
    pipe = pipeline(FakeEngine(num_pages=2048), max_num_sequences=64, overlap=overlap)
    for i in range(63):
        pipe.add_request(request(f"other {i}", 5 + i % 17, seed=i, temperature=1.0, max_tokens=25))
    pipe.add_request(request("x", 23, **options))
    assert outcome(Collected(pipe).run().results["x"]) == outcome(alone)


@pytest.mark.parametrize("budget", [1, 3, 7])
def test_chunked_as_whole(options: dict[str, Any], budget: int, overlap: bool) -> None:
    whole = run_one(request("x", 23, **options))
    rows = 1 if budget == 1 else 3
    pipe = pipeline(max_batch_tokens=budget, max_num_sequences=rows, overlap=overlap)
    chunked = run_one(request("x", 23, **options), pipe)
    assert outcome(chunked) == outcome(whole)


@pytest.mark.parametrize("length", [23, 24, 25, 1, 4])
def test_cached_as_cold(options: dict[str, Any], length: int, overlap: bool) -> None:
    pipe = pipeline(overlap=overlap)
    cold = run_one(request("cold", length, **options), pipe)
    warm = run_one(request("warm", length, **options), pipe)
    assert outcome(warm) == outcome(cold)
    if "prompt_logprobs" not in options:
        assert warm.usage.cached_tokens >= (length - 1) // 4 * 4


def test_preempted_as_undisturbed(options: dict[str, Any], overlap: bool) -> None:
    calm = [run_one(request(f"{i}", 26 + i, **options)) for i in range(4)]
    crowded = pipeline(FakeEngine(num_pages=30, max_model_len=80), overlap=overlap)
    for i in range(4):
        crowded.add_request(request(f"{i}", 26 + i, cache_salt=f"{i}", **options))
    results = Collected(crowded).run().results
    assert crowded.statistics().preemptions > 0
    for i in range(4):
        assert outcome(results[f"{i}"]) == outcome(calm[i])


def test_resumed_anywhere_as_never_interrupted(options: dict[str, Any], overlap: bool) -> None:
    if "best_of" in options:
        pytest.skip("best_of publishes nothing before the end")
    whole = run_one(request("x", 23, **options))
    pipe = pipeline(overlap=overlap)
    length = max(len(choice.token_ids) for choice in whole.choices)
    for cut in range(length + 1):
        resume = []
        for choice in whole.choices:
            tokens = choice.token_ids[:cut]
            logprobs = choice.logprobs[:cut] if choice.logprobs is not None else None
            resume.append(ResumedChoice(choice.index, tokens, logprobs))
        pipe.add_request(request("again", 23, resume=resume, **options))
        collected = Collected(pipe).run()
        assert outcome(collected.results["again"]) == outcome(whole)
        for choice in whole.choices:
            assert collected.tokens("again", choice.index) == list(choice.token_ids[cut:])


def test_without_a_seed_the_pipelines_own_seed_decides() -> None:
    def tokens(seed: int | None) -> Any:
        return run_one(request("x", seed=None, temperature=1.0), pipeline(seed=seed)).choices[0].token_ids

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)
    assert tokens(None) != tokens(None)
