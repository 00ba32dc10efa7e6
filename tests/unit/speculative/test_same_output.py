"""Speculation never changes an output: whoever drafts, alone or in a batch, stopped, preempted, resumed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from penstock_core.cache import extend_digests, root_digest
from penstock_core.pipeline import FinishedRequest, ResumedChoice, UnifiedInferencePipeline
from penstock_core.protocol.jobs import FinishReason
from penstock_core.protocol.requests import SamplingParams
from tests.unit.pipeline.fake_engine import Collected, pipeline, request
from tests.unit.sampling.reference import chi_squared_p_value, distribution
from tests.unit.speculative.engines import DraftEngine, RepetitiveEngine, logits_of, speculating, state_of

PROPOSERS = ("ngram", "suffix", "draft", "auto")
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.8},
    "filtered": {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    "stopped by a string": {"temperature": 0.6, "stop": ("z", "e", "ing")},
    "stopped by a token": {"temperature": 0.8, "stop_token_ids": (41, 50, 63), "min_tokens": 5},
    "grammar": {"temperature": 1.0, "response_format": {"regex": "([a-z]{2,5} ){2,12}"}},
    "penalties": {"temperature": 0.7, "presence_penalty": 0.5, "frequency_penalty": 0.3, "repetition_penalty": 1.1},
    "bad words": {"temperature": 0.5, "bad_words": ("H", "JK")},
    "log-probabilities": {"temperature": 0.8, "logprobs": 2, "prompt_logprobs": 1},
    "two choices": {"temperature": 0.8, "n": 2},
    "best of three": {"temperature": 0.8, "best_of": 3},
}


def copying(number: int = 0) -> list[int]:
    """A prompt that already repeats itself."""
    return [20 + number, *range(40, 50), 21, *range(40, 46)]


def outcome(result: FinishedRequest) -> Any:
    return result.choices, result.prompt_logprobs, result.usage.completion_tokens


def run(pipe: UnifiedInferencePipeline, options: dict[str, Any], count: int) -> list[Any]:
    for number in range(count):
        pipe.add_request(request(f"r{number}", copying(number), **{"max_tokens": 30, "seed": number, **options}))
    results = Collected(pipe).run().results
    pipe.close()
    return [outcome(results[f"r{number}"]) for number in range(count)]


@pytest.mark.parametrize("count", [1, 6], ids=["alone", "batch"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("proposer", PROPOSERS)
def test_output_is_that_of_plain_decoding(proposer: str, name: str, count: int) -> None:
    plain = run(pipeline(RepetitiveEngine()), OPTIONS[name], count)
    assert run(speculating(proposer), OPTIONS[name], count) == plain
    assert run(speculating(proposer, depth=None), OPTIONS[name], count) == plain


EVENTS: dict[str, dict[str, Any]] = {
    "preempted": {},
    "resumed": {},
    "stopped by a string": {"stop": ("z", "e", "ing")},
    "grammar": {"response_format": {"regex": "([a-z]{2,5} ){2,12}"}},
}


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("count", [1, 4], ids=["alone", "batch"])
@pytest.mark.parametrize("temperature", [0.0, 0.8], ids=["greedy", "seeded"])
@pytest.mark.parametrize("proposer", PROPOSERS)
def test_whatever_happens_on_the_way(proposer: str, temperature: float, count: int, event: str) -> None:
    options = {"temperature": temperature, "max_tokens": 30, "ignore_eos": True, **EVENTS[event]}
    plain = run(pipeline(RepetitiveEngine()), options, count)
    for depth in (4, None):
        pipe = speculating(proposer, depth)
        for number in range(count):
            done = plain[number][0][0].token_ids[: 7 + number] if event == "resumed" else ()
            resume = (ResumedChoice(0, done, None, None),) if done else ()
            pipe.add_request(request(f"r{number}", copying(number), resume=resume, **{"seed": number, **options}))
        collected = Collected(pipe)
        while pipe.has_work:
            if event == "preempted" and pipe.statistics().steps % 4 == 3:
                for sequence in list(pipe.batcher.running):
                    pipe.batcher._preempt(sequence)
            collected.step()
        pipe.close()
        assert [outcome(collected.results[f"r{number}"]) for number in range(count)] == plain
        assert event != "preempted" or pipe.statistics().preemptions >= count


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("proposer", PROPOSERS)
def test_preempted_while_speculating(proposer: str, temperature: float) -> None:
    options = {"temperature": temperature, "ignore_eos": True, "max_tokens": 40, "frequency_penalty": 0.1}
    plain = run(pipeline(RepetitiveEngine(num_pages=512)), options, 6)
    small = speculating(proposer, engine=RepetitiveEngine(num_pages=64), draft=DraftEngine(num_pages=64))
    assert run(small, options, 6) == plain
    assert small.statistics().preemptions > 0


@pytest.mark.parametrize("proposer", PROPOSERS)
@pytest.mark.parametrize("name", ["greedy", "sampled", "grammar", "penalties", "stopped by a string"])
def test_resumed_while_speculating(proposer: str, name: str) -> None:
    options = {"max_tokens": 30, "seed": 3, **OPTIONS[name]}
    pipe = pipeline(RepetitiveEngine())
    pipe.add_request(request("r", copying(), **options))
    whole = Collected(pipe).run().results["r"]
    tokens = whole.choices[0].token_ids
    for cut in {1, 2, len(tokens) // 2, len(tokens) - 1} - {0}:
        resumed = speculating(proposer)
        resumed.add_request(request("r", copying(), resume=(ResumedChoice(0, tokens[:cut], None, None),), **options))
        assert outcome(Collected(resumed).run().results["r"]) == outcome(whole)


@pytest.mark.parametrize("proposer", PROPOSERS)
def test_a_cancelled_sequence_leaves_nothing_behind(proposer: str) -> None:
    draft = DraftEngine()
    pipe = speculating(proposer, draft=draft)
    for number in range(4):
        pipe.add_request(request(f"r{number}", copying(number), max_tokens=50, ignore_eos=True, seed=number))
    collected = Collected(pipe)
    for _ in range(6):
        collected.step()
    pipe.abort("r1", FinishReason.CANCELLED)
    pipe.abort("r3", FinishReason.CANCELLED)
    collected.run()
    alone = speculating(proposer)
    alone.add_request(request("r0", copying(0), max_tokens=50, ignore_eos=True, seed=0))
    assert Collected(alone).run().results["r0"].choices == collected.results["r0"].choices
    pipe.close()  # checks that every page is back


@pytest.mark.parametrize("proposer", PROPOSERS)
def test_drafts_are_accepted_and_save_steps(proposer: str) -> None:
    pipe = speculating(proposer)
    run(pipe, {"temperature": 0.0, "ignore_eos": True, "max_tokens": 60}, 2)
    statistics = pipe.statistics()
    assert statistics.accepted_tokens > 20
    assert statistics.steps < 60
    detail = statistics.speculation
    assert detail is not None
    assert detail.accepted == sum(detail.accepted_at) == sum(detail.accepted_by.values()) == statistics.accepted_tokens
    assert detail.drafted == sum(detail.drafted_at) == sum(depth * n for depth, n in enumerate(detail.depths))


@pytest.mark.parametrize("proposer", PROPOSERS)
def test_every_result_tells_what_speculation_did_for_it(proposer: str) -> None:
    pipe = speculating(proposer)
    for number, choices in enumerate((1, 1, 3)):
        pipe.add_request(request(f"r{number}", copying(number), max_tokens=40, n=choices, seed=number, ignore_eos=True))
    results = Collected(pipe).run().results
    told = [result.speculation for result in results.values()]
    assert all(own is not None for own in told)
    detail = pipe.statistics().speculation
    assert detail is not None
    for result, own in zip(results.values(), told, strict=True):
        assert own is not None
        assert sum(own.drafted_at) == result.timings.drafted_tokens
        assert sum(own.accepted_at) == result.timings.accepted_tokens
        assert sum(own.drafted_at) == sum(depth * steps for depth, steps in enumerate(own.depths))
        assert all(right <= drafted for right, drafted in zip(own.accepted_at, own.drafted_at, strict=False))
    assert sum(sum(own.drafted_at) for own in told if own is not None) == detail.drafted
    pipe.close()


def test_a_result_without_speculation_says_nothing_of_it() -> None:
    pipe = pipeline(RepetitiveEngine())
    pipe.add_request(request("r", copying(), max_tokens=10))
    assert Collected(pipe).run().results["r"].speculation is None


@pytest.mark.parametrize("proposer", PROPOSERS)
def test_rejected_drafts_never_enter_the_prefix_cache(proposer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = speculating(proposer, draft=DraftEngine(noise=3.0))
    indexed: list[bytes] = []
    index = pipe.cache.index

    def recording(page: int, digest: bytes, root: bytes) -> None:
        indexed.append(digest)
        index(page, digest, root)

    monkeypatch.setattr(pipe.cache, "index", recording)
    pipe.add_request(request("r", copying(), max_tokens=60, temperature=0.9, seed=3, ignore_eos=True))
    result = Collected(pipe).run().results["r"]
    detail = pipe.statistics().speculation
    assert detail is not None
    assert detail.drafted > detail.accepted  # something was rejected
    text = np.array([*copying(), *result.choices[0].token_ids], dtype=np.int32)
    real: list[bytes] = []
    extend_digests(real, root_digest(""), text, pipe.engine.page_size)
    assert set(indexed) <= set(real)
    assert len(set(indexed)) >= len(real) - 1
    pipe.close()


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_draft_model_equal_to_the_target_is_always_right(temperature: float) -> None:
    """Also sampled: both choose with the same noise. Any mistake in the draft's pages or positions would show here."""
    options = {"temperature": temperature, "ignore_eos": True, "max_tokens": 41, "frequency_penalty": 0.2}
    pipe = speculating("draft", draft=DraftEngine(noise=0.0))
    run(pipe, options, 5)
    detail = pipe.statistics().speculation
    assert detail is not None
    assert detail.acceptance_rate == 1.0
    assert detail.depths[4] >= 5 * 7


def test_the_draft_model_reads_each_token_about_once() -> None:
    draft = DraftEngine(noise=0.0)
    run(speculating("draft", draft=draft), {"temperature": 0.0, "ignore_eos": True, "max_tokens": 40}, 1)
    assert draft.tokens_read <= len(copying()) + 40 + 10


def test_a_draft_model_without_pages_left_drafts_for_those_it_has_room_for() -> None:
    pipe = speculating("draft", draft=DraftEngine(noise=0.0, num_pages=20))
    options = {"temperature": 0.0, "ignore_eos": True, "max_tokens": 30}
    assert run(pipe, options, 4) == run(pipeline(RepetitiveEngine()), options, 4)
    detail = pipe.statistics().speculation
    assert detail is not None
    assert 0 < detail.drafted < 4 * 30


def next_token_distribution(first: int, second: int) -> dict[int, float]:
    logits = logits_of(torch.tensor([[state_of(np.array([first, second]), 2)]]), RepetitiveEngine().config.vocab_size)
    return distribution(logits[0].tolist(), SamplingParams())


@pytest.mark.parametrize("proposer", PROPOSERS)
def test_sampled_frequencies_follow_the_target(proposer: str) -> None:
    """After equal beginnings, the token that is drafted and checked, against the target's distribution."""
    likeliest = max(next_token_distribution(44, 45).items(), key=lambda item: item[1])[0]
    expected = next_token_distribution(45, likeliest)
    prompt = [20, 44, 45, likeliest, max(expected, key=lambda token: expected[token]), 21]  # so that lookups find it
    pipe = speculating(proposer, depth=2, max_num_sequences=64, engine=RepetitiveEngine(num_pages=1024))
    for seed in range(2000):
        resume = (ResumedChoice(0, [44, 45], None, None),)
        pipe.add_request(request(f"r{seed}", prompt, resume=resume, max_tokens=5, seed=seed, ignore_eos=True))
    outputs = [result.choices[0].token_ids for result in Collected(pipe).run().results.values()]
    counts = np.bincount([o[3] for o in outputs if o[2] == likeliest], minlength=RepetitiveEngine().config.vocab_size)
    assert counts.sum() > 200
    assert chi_squared_p_value(counts, np.array([expected[token] for token in range(len(counts))])) > 1e-4
    assert pipe.statistics().accepted_tokens > 50
