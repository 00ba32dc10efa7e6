"""What the pipeline promises of a request: its chunks, its ending, its numbers."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from penstock_core.pipeline import ResumedChoice
from penstock_core.protocol.errors import InvalidRequest
from penstock_core.protocol.jobs import FinishReason
from penstock_core.protocol.requests import GenerationRequest, ResponseFormat
from tests.unit.pipeline.fake_engine import EOS, Collected, FakeEngine, pipeline, request, run_one, tokenizer


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("options", [{}, {"n": 3}, {"n": 2, "best_of": 4}, {"echo": True}, {"stop": ("a", "of")}])
def test_chunks_laid_end_to_end_are_the_result(options: dict[str, Any]) -> None:
    pipe = pipeline()
    pipe.add_request(request("x", temperature=1.0, ignore_eos=True, **options))
    collected = Collected(pipe).run()
    result = collected.results["x"]
    assert len(result.choices) == options.get("n", 1)
    for choice in result.choices:
        assert collected.tokens("x", choice.index) == list(choice.token_ids)
        assert collected.text("x", choice.index) == choice.text
    last = [chunk for chunk in collected.chunks["x"] if chunk.finish_reason is not None]
    assert sorted(chunk.index for chunk in last) == list(range(len(result.choices)))
    pipe.cache.check(idle=True)


def test_end_of_sequence_ends_a_choice_and_leaves_no_text() -> None:
    result = run_one(request("x", temperature=0.0, logit_bias={EOS: 100.0}))
    assert result.choices[0].finish_reason is FinishReason.STOP
    assert result.choices[0].token_ids == (EOS,)
    assert result.choices[0].text == ""


def test_min_tokens_puts_off_every_ending() -> None:
    bias = {EOS: 50.0, 300: 40.0}
    result = run_one(request("x", temperature=0.0, logit_bias=bias, min_tokens=5, stop_token_ids=(301,)))
    assert result.choices[0].token_ids == (300,) * 5 + (EOS,)
    text = tokenizer().decode([300])
    stopped = run_one(request("x", temperature=0.0, logit_bias={300: 90.0}, min_tokens=5, stop=(text.strip(),)))
    assert stopped.choices[0].token_ids == (300,) * 6
    assert stopped.choices[0].finish_reason is FinishReason.STOP


def test_stop_ids_cut_their_text_unless_included() -> None:
    options: dict[str, Any] = {"temperature": 0.0, "logit_bias": {300: 90.0}, "stop_token_ids": (300,)}
    assert run_one(request("x", **options)).choices[0].text == ""
    kept = run_one(request("x", include_stop=True, **options)).choices[0]
    assert kept.text == tokenizer().decode([300])
    assert kept.token_ids == (300,)


def test_output_ends_with_the_context() -> None:
    pipe = pipeline(FakeEngine(max_model_len=40))
    result = run_one(request("x", 30, max_tokens=None, ignore_eos=True), pipe)
    assert result.usage.completion_tokens == 10
    assert result.choices[0].finish_reason is FinishReason.LENGTH


def test_echo_begins_with_the_prompt() -> None:
    pipe = pipeline()
    prompt = "Once upon a time"
    ids = pipe.encode(GenerationRequest(prompt=prompt))
    plain = run_one(request("a", ids, prompt_text=prompt), pipe).choices[0]
    echoed = run_one(request("b", ids, prompt_text=prompt, echo=True), pipe).choices[0]
    assert echoed.text == prompt + plain.text
    assert run_one(request("c", ids, echo=True), pipe).choices[0].text.startswith(tokenizer().decode(ids))


def test_choices_differ_and_share_the_prompts_pages() -> None:
    engine = FakeEngine(page_size=4)
    pipe = pipeline(engine)
    pipe.add_request(request("x", 21, n=4, temperature=1.0, ignore_eos=True))
    collected = Collected(pipe)
    collected.step()
    collected.step()
    statistics = pipe.statistics().cache
    assert statistics.shared_pages == 5  # of 21 tokens, the five full pages
    assert statistics.copies == 0  # the sixth page held one token, which each computes itself
    assert engine.sizes == [21, 1 + 3]
    collected.run()
    assert len({choice.token_ids for choice in collected.results["x"].choices}) == 4


def test_choices_copy_the_page_they_write_to() -> None:
    engine = FakeEngine(page_size=8)
    pipe = pipeline(engine)
    pipe.add_request(request("x", 21, n=3, temperature=1.0, ignore_eos=True))
    Collected(pipe).run()
    assert pipe.statistics().cache.copies == 2
    assert engine.sizes[:2] == [21, 1 + 2]


def test_best_of_returns_the_likeliest_and_streams_nothing_before_the_end() -> None:
    everything = run_one(request("x", n=5, temperature=1.5, logprobs=0))
    pipe = pipeline()
    pipe.add_request(request("y", n=2, best_of=5, temperature=1.5))
    collected = Collected(pipe)
    while not collected.results:
        assert not collected.chunks
        collected.step()
    mean = {c.token_ids: sum(r.logprob for r in c.logprobs or ()) / len(c.token_ids) for c in everything.choices}
    best = sorted(mean, key=lambda tokens: -mean[tokens])[:2]
    assert [choice.token_ids for choice in collected.results["y"].choices] == best
    assert collected.results["y"].choices[0].logprobs is None
    assert collected.results["y"].usage.completion_tokens == sum(len(c.token_ids) for c in everything.choices)


def test_logprobs_come_with_each_token() -> None:
    pipe = pipeline()
    pipe.add_request(request("x", temperature=1.0, logprobs=2, ignore_eos=True))
    collected = Collected(pipe).run()
    for chunk in collected.chunks["x"]:
        assert chunk.logprobs is not None
        assert len(chunk.logprobs) == len(chunk.token_ids)
        assert all(len(record.top) == 2 for record in chunk.logprobs)
        for token, record in zip(chunk.token_ids, chunk.logprobs, strict=True):
            assert record.spelled == tuple(map(tokenizer().token_bytes, (token, *(other for other, _ in record.top))))
    assert collected.results["x"].choices[0].logprobs == tuple(
        record for chunk in collected.chunks["x"] for record in chunk.logprobs or ()
    )


def test_prompt_logprobs_cover_all_but_the_first_token_even_after_a_prefix_hit() -> None:
    pipe = pipeline(max_batch_tokens=8, max_num_sequences=4)
    run_one(request("warm", 22), pipe)
    result = run_one(request("x", 22, prompt_logprobs=1), pipe)
    assert result.prompt_logprobs is not None
    assert len(result.prompt_logprobs) == 22
    assert result.prompt_logprobs[0] is None
    assert all(
        record is not None and len(record.top) == 1 and len(record.spelled) == 2
        for record in result.prompt_logprobs[1:]
    )
    assert result.usage.cached_tokens == 0


def test_prompt_logprobs_are_there_after_every_token_was_resumed() -> None:
    options: dict[str, Any] = {"prompt_logprobs": 1, "logprobs": 1, "ignore_eos": True}
    whole = run_one(request("x", **options))
    choice = whole.choices[0]
    pipe = pipeline()
    pipe.add_request(
        request("x", resume=[ResumedChoice(0, choice.token_ids, choice.logprobs, choice.finish_reason)], **options)
    )
    collected = Collected(pipe).run()
    assert collected.results["x"].prompt_logprobs == whole.prompt_logprobs
    assert collected.results["x"].choices == whole.choices
    assert not collected.chunks["x"]


def test_grammar_ends_its_choice() -> None:
    result = run_one(request("x", temperature=1.0, response_format=ResponseFormat(choice=("yes", "no")), max_tokens=50))
    assert result.choices[0].text in ("yes", "no")
    assert result.choices[0].finish_reason is FinishReason.STOP
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    schema["additionalProperties"] = False  # type: ignore[assignment]
    text = (
        run_one(request("x", temperature=0.5, response_format=ResponseFormat(json_schema=schema), max_tokens=200))
        .choices[0]
        .text
    )
    assert set(json.loads(text)) == {"a"}


def test_resumed_output_that_breaks_its_grammar_fails_that_request_only() -> None:
    pipe = pipeline()
    bad = request("bad", response_format=ResponseFormat(regex="[0-9]+"), resume=[ResumedChoice(0, [300, 301])])
    pipe.add_request(bad)
    pipe.add_request(request("good"))
    results = Collected(pipe).run().results
    assert results["bad"].choices[0].finish_reason is FinishReason.ERROR
    assert "grammar" in (results["bad"].error or "")
    assert results["good"].error is None
    pipe.cache.check(idle=True)


def test_abort_delivers_what_there_is() -> None:
    pipe = pipeline(max_num_sequences=1)
    pipe.add_request(request("running", max_tokens=100, ignore_eos=True, n=2))
    pipe.add_request(request("waiting"))
    collected = Collected(pipe)
    for _ in range(4):
        collected.step()
    pipe.abort("running", FinishReason.CANCELLED)
    pipe.abort("waiting", FinishReason.CANCELLED)
    pipe.abort("unknown", FinishReason.CANCELLED)
    collected.run()
    running, waiting = collected.results["running"], collected.results["waiting"]
    assert len(running.choices[0].token_ids) == 4
    assert [choice.finish_reason for choice in running.choices] == [FinishReason.CANCELLED] * 2
    assert collected.text("running") == running.choices[0].text
    assert waiting.choices[0].token_ids == ()
    assert waiting.choices[0].finish_reason is FinishReason.CANCELLED
    pipe.cache.check(idle=True)


def test_text_held_back_for_a_stop_string_is_released_by_an_abort() -> None:
    text = tokenizer().decode([300, 300])
    pipe = pipeline()
    pipe.add_request(request("x", temperature=0.0, logit_bias={300: 90.0}, stop=(text * 20,), max_tokens=30))
    collected = Collected(pipe)
    for _ in range(6):
        collected.step()
    assert collected.text("x") == ""
    pipe.abort("x", FinishReason.CANCELLED)
    collected.run()
    assert collected.text("x") == collected.results["x"].choices[0].text == tokenizer().decode([300] * 6)


def test_deadlines_end_requests_that_wait_and_requests_that_run() -> None:
    clock = Clock()
    pipe = pipeline(clock=clock, max_num_sequences=1)
    pipe.add_request(request("running", max_tokens=100, ignore_eos=True, deadline_s=110.0))
    pipe.add_request(request("waiting", deadline_s=105.0))
    pipe.add_request(request("later"))
    collected = Collected(pipe)
    collected.step()
    clock.now = 106.0
    collected.step()
    assert collected.results["waiting"].choices[0].finish_reason is FinishReason.EXPIRED
    assert "running" not in collected.results
    clock.now = 110.0
    collected.run()
    assert collected.results["running"].choices[0].finish_reason is FinishReason.EXPIRED
    assert len(collected.results["running"].choices[0].token_ids) == 2
    assert collected.results["later"].choices[0].finish_reason in (FinishReason.STOP, FinishReason.LENGTH)


def test_failing_step_fails_its_requests_and_no_others() -> None:
    engine = FakeEngine()
    pipe = pipeline(engine, max_num_sequences=1)
    pipe.add_request(request("a", 20, n=2, ignore_eos=True))
    pipe.add_request(request("b", 20, ignore_eos=True))
    collected = Collected(pipe)
    collected.step()
    engine.explode = RuntimeError("out of memory")
    collected.step()
    assert "RuntimeError: out of memory" in (collected.results["a"].error or "")
    assert {choice.finish_reason for choice in collected.results["a"].choices} == {FinishReason.ERROR}
    collected.run()
    assert collected.results["b"].error is None
    pipe.cache.check(idle=True)


def test_pages_of_a_failed_step_are_never_found_again() -> None:
    engine = FakeEngine()
    pipe = pipeline(engine)
    engine.explode = RuntimeError("lost")
    pipe.add_request(request("a", 40))
    Collected(pipe).run()
    assert pipe.statistics().cache.cached_pages == 0
    assert run_one(request("a", 40), pipe).choices == run_one(request("a", 40)).choices


def test_logits_that_are_not_finite_are_an_error_not_a_token() -> None:
    engine = FakeEngine()
    engine.poison = True
    result = run_one(request("x", temperature=1.0), pipeline(engine))
    assert result.choices[0].finish_reason is FinishReason.ERROR
    assert result.choices[0].token_ids == ()
    assert "not finite" in (result.error or "")


def test_leaked_page_is_noticed_before_the_next_step() -> None:
    pipe = pipeline()
    run_one(request("a"), pipe)
    pipe.cache.allocate(1)
    pipe.add_request(request("b"))
    with pytest.raises(RuntimeError, match="1 pages are held although no sequence runs"):
        pipe.step()


def test_interrupt_leaves_a_pipeline_that_goes_on() -> None:
    engine = FakeEngine()
    pipe = pipeline(engine)
    pipe.add_request(request("a"))
    engine.explode = KeyboardInterrupt()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        pipe.step()
    collected = Collected(pipe).run()
    assert collected.results["a"].choices[0].finish_reason is FinishReason.ERROR
    assert run_one(request("b"), pipe).error is None


def test_resumed_choice_at_its_end_only_says_so() -> None:
    whole = run_one(request("x", ignore_eos=True, n=2, temperature=1.0))
    first, second = whole.choices
    pipe = pipeline()
    pipe.add_request(
        request(
            "x",
            ignore_eos=True,
            n=2,
            temperature=1.0,
            resume=[
                ResumedChoice(0, first.token_ids, None, first.finish_reason),
                ResumedChoice(1, second.token_ids),
            ],
        )
    )
    collected = Collected(pipe).run()
    assert collected.results["x"].choices == whole.choices
    (chunk,) = collected.chunks["x"]
    assert (chunk.index, chunk.offset, chunk.token_ids, chunk.pieces) == (1, 12, (), ("",))
    assert chunk.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"prompt": []}, "prompt_token_ids"),
        ({"prompt": 256}, "prompt"),
        ({"prompt": [5, 999_999]}, "prompt_token_ids"),
        ({"prompt": [-1]}, "prompt_token_ids"),
        ({"prompt": 250, "min_tokens": 10}, "sampling.min_tokens"),
        ({"logit_bias": {99_999: 1.0}}, "sampling.logit_bias"),
        ({"response_format": {"regex": "("}}, "sampling.response_format.regex"),
        ({"resume": [ResumedChoice(1, [5])]}, "resume"),
        ({"resume": [ResumedChoice(0, [5]), ResumedChoice(0, [5])]}, "resume"),
        ({"resume": [ResumedChoice(0, [5] * 13)]}, "resume"),
        ({"resume": [ResumedChoice(0, [99_999])]}, "resume"),
        ({"resume": [ResumedChoice(0, [5])], "logprobs": 1}, "resume"),
        ({"resume": [ResumedChoice(0, [5])], "best_of": 2}, "resume"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(options: dict[str, Any], field: str) -> None:
    pipe = pipeline()
    with pytest.raises(InvalidRequest) as refused:
        pipe.add_request(request("x", **options))
    assert refused.value.field == field
    assert not pipe.has_work


def test_encode_takes_text_messages_and_tokens_and_refuses_other_models() -> None:
    pipe = pipeline()
    assert pipe.encode(GenerationRequest(prompt_token_ids=(5, 6))) == [5, 6]
    assert pipe.encode(GenerationRequest(prompt="a fox")) == tokenizer().encode("a fox")
    with pytest.raises(InvalidRequest, match="not served here"):
        pipe.encode(GenerationRequest(prompt="a", model="other"))


def test_request_ids_are_unique_while_they_run() -> None:
    pipe = pipeline()
    pipe.add_request(request("x"))
    with pytest.raises(InvalidRequest, match="running already"):
        pipe.add_request(request("x"))
    Collected(pipe).run()
    pipe.add_request(request("x"))


def test_capacity_counts_what_was_promised() -> None:
    pipe = pipeline(FakeEngine(num_pages=100, page_size=4), max_num_sequences=4)
    assert pipe.capacity().free_tokens == pipe.capacity().total_tokens == 400
    pipe.add_request(request("x", 10, n=2, max_tokens=20))
    assert pipe.capacity().free_sequences == 2
    assert pipe.capacity().free_tokens == 400 - 2 * (10 + 20)
    Collected(pipe).run()
    assert pipe.capacity().free_sequences == 4
    assert pipe.capacity().free_tokens == 400


def test_capacity_counts_a_shared_page_once() -> None:
    pipe = pipeline(FakeEngine(num_pages=100, page_size=4), max_num_sequences=8)
    prompt = [20 + i for i in range(42)]
    pipe.add_request(request("first", prompt, max_tokens=20))
    collected = Collected(pipe)
    collected.step()
    pipe.add_request(request("second", prompt, max_tokens=20))
    pipe.add_request(request("choices", [5] * 21, n=3, max_tokens=20))
    collected.step()
    collected.step()
    shared_pages = pipe.statistics().cache.bytes_saved // pipe.cache.page_bytes
    assert shared_pages == 10 + 2 * 5
    assert pipe.capacity().free_tokens == 400 - 2 * (42 + 20) - 3 * (21 + 20) + 4 * shared_pages
    collected.run()
    assert pipe.capacity().free_tokens == 400


def test_timings_and_statistics_add_up() -> None:
    ticks = itertools.count(0.0, 0.001)
    pipe = pipeline(clock=lambda: next(ticks))
    results = []
    for i in range(3):
        results.append(run_one(request(f"{i}", 20, n=2, ignore_eos=True, arrival_s=0.0), pipe))
    statistics = pipe.statistics()
    assert statistics.requests == 3
    assert statistics.prompt_tokens == 60
    assert statistics.output_tokens == 3 * 2 * 12
    assert statistics.cached_tokens == sum(r.usage.cached_tokens for r in results) == 2 * 19
    assert statistics.finished[FinishReason.LENGTH] == 6
    assert statistics.ttft_ms == pytest.approx(statistics.queue_ms + statistics.prefill_ms)
    assert 0 < statistics.batch_fill < 1
    assert 0 < statistics.budget_fill < 1
    assert 0 < statistics.forward_ms < statistics.step_ms
    assert statistics.cache.hit_rate > 0.5
    assert statistics.mean_step_ms == statistics.step_ms / statistics.steps
    assert statistics.acceptance_rate == 0.0
    for result in results:
        assert result.timings.decode_ms > 0
        assert result.inter_token_ms == pytest.approx(result.timings.decode_ms / 11)
        assert result.tokens_per_s > 0


def test_tenants_share_no_pages() -> None:
    pipe = pipeline()
    run_one(request("a", 40, cache_salt="a"), pipe)
    assert run_one(request("b", 40, cache_salt="b"), pipe).usage.cached_tokens == 0
    assert run_one(request("c", 40, cache_salt="a"), pipe).usage.cached_tokens == 39


def test_prefix_cache_can_be_switched_off() -> None:
    pipe = pipeline(prefix_cache=False)
    run_one(request("a", 40), pipe)
    assert run_one(request("b", 40), pipe).usage.cached_tokens == 0
    assert pipe.statistics().cache.cached_pages == 0


def test_close_gives_every_page_back() -> None:
    pipe = pipeline()
    pipe.add_request(request("x", n=3))
    pipe.step()
    pipe.close()
    assert pipe.statistics().cache.used_pages == 0
    assert not pipe.has_work


@pytest.mark.parametrize("beyond", [[], [5], [EOS], [EOS, 5], [300, 301]])
def test_drafts_beyond_the_end_of_a_grammar_change_nothing(beyond: list[int]) -> None:
    options: dict[str, Any] = {"response_format": ResponseFormat(choice=("yes indeed", "no")), "temperature": 1.0}
    plain = run_one(request("x", **options)).choices
    right = list(plain[0].token_ids)
    for start in range(len(right)):
        pipe = pipeline()
        pipe.add_request(request("x", **options))
        collected = Collected(pipe)
        while pipe.has_work:
            for sequence in pipe.batcher.running:
                done = len(sequence.output_ids)
                if done == start:
                    sequence.propose(right[done:] + beyond)
            collected.step()
        assert collected.results["x"].choices == plain
        assert collected.results["x"].error is None


def test_failing_draft_model_costs_speed_and_no_request() -> None:
    class Broken:
        def due(self) -> bool:
            return True

        def propose(self, running: Any, waiting_tokens: int) -> None:
            raise RuntimeError("draft model lost")

    pipe = pipeline()
    pipe._speculator = Broken()  # type: ignore[assignment]
    assert run_one(request("x"), pipe).choices == run_one(request("x")).choices
    assert pipe._speculator is None


def test_drafts_that_the_pipeline_is_given_change_no_token() -> None:
    options: dict[str, Any] = {"temperature": 0.9, "max_tokens": 30, "ignore_eos": True, "frequency_penalty": 0.3}
    plain = run_one(request("x", logprobs=1, **options))
    right = list(plain.choices[0].token_ids)
    for wrong_every in (2, 3, 100):
        pipe = pipeline()
        pipe.add_request(request("x", logprobs=1, **options))
        collected = Collected(pipe)
        steps = 0
        while pipe.has_work:
            for sequence in pipe.batcher.running:
                done = len(sequence.output_ids)
                guess = [t if (done + i) % wrong_every else 0 for i, t in enumerate(right[done : done + 4])]
                sequence.propose(guess)
            collected.step()
            steps += 1
        result = collected.results["x"]
        assert result.choices == plain.choices
        assert result.timings.accepted_tokens == 30 - steps
        assert steps < 30
