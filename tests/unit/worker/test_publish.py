"""The publish role: coalesced, fenced, patient while Redis is away, and never held up by one bad job."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from redis.exceptions import ResponseError

from penstock_core.protocol import transitions
from penstock_core.protocol.errors import BrokerUnavailable
from penstock_core.protocol.events import TokenChunk
from penstock_core.protocol.jobs import FinishReason, JobResult, JobState
from penstock_worker.outbox import Bury, Ending, Fail, Finish, HandBack
from tests.unit.worker.conftest import WORKER, Bench


async def test_one_round_trip_writes_the_step_of_every_job(bench: Bench) -> None:
    jobs = await bench.hold(5)
    bench.engine.step()
    calls = bench.broker.calls
    await bench.publisher.flush()
    assert bench.broker.calls == calls + 1
    assert [bench.driver.tokens(job.job_id) for job in jobs] == [[1000]] * 5


async def test_steps_that_arrive_during_a_round_trip_become_one_chunk(bench: Bench) -> None:
    (job,) = await bench.hold()
    await bench.step(7)
    (chunk,) = bench.driver.events(job.job_id)
    assert isinstance(chunk, TokenChunk)
    assert chunk.token_ids == tuple(range(1000, 1007))
    assert chunk.text == "".join(f" {token}" for token in chunk.token_ids)


async def test_last_tokens_and_result_are_one_write(bench: Bench) -> None:
    (job,) = await bench.hold()
    bench.engine.step(256)
    calls = bench.broker.calls
    await bench.publisher.flush()
    assert bench.broker.calls == calls + 1
    ended = bench.driver.ended(job.job_id)
    assert ended.state is JobState.COMPLETED
    assert ended.result is not None
    assert ended.result.token_ids == tuple(bench.driver.tokens(job.job_id))
    assert (ended.result.worker, ended.result.model) == (WORKER, "tiny")
    assert len(bench.held) == 0
    assert bench.counter("ended_jobs", state="completed") == 1


async def test_tokens_wait_for_the_interval_and_ends_do_not(bench: Bench) -> None:
    await bench.hold()
    await bench.step()
    bench.publisher.start()
    calls = bench.broker.calls
    bench.engine.step()
    await _turn_loop()
    assert bench.broker.calls == calls, "the interval has not passed on the injected clock"
    bench.engine.step(300)
    await asyncio.wait_for(bench.held.wait_empty(), 60)


async def test_a_lost_reply_is_repeated_as_it_was_and_appends_nothing_twice(bench: Bench) -> None:
    (job,) = await bench.hold()
    bench.engine.step(3)
    bench.broker.fail("after")
    with pytest.raises(BrokerUnavailable):
        await bench.publisher.flush()
    bench.engine.step(2)
    await bench.publisher.flush_all()
    assert bench.driver.tokens(job.job_id) == list(range(1000, 1005))


async def test_a_lost_reply_of_the_end_ends_the_job_once(bench: Bench) -> None:
    (job,) = await bench.hold()
    bench.engine.step(256)
    bench.broker.fail("after", "before")
    for _ in range(2):
        with pytest.raises(BrokerUnavailable):
            await bench.publisher.flush()
    await bench.publisher.flush_all()
    assert bench.driver.ended(job.job_id).state is JobState.COMPLETED
    assert bench.counter("ended_jobs", state="completed") == 1
    assert bench.held.fenced == 0


async def test_what_was_buffered_while_redis_was_away_is_published_on_return(bench: Bench) -> None:
    jobs = await bench.hold(2)
    for _ in range(50):
        bench.engine.step()
        bench.broker.fail("before")
        with pytest.raises(BrokerUnavailable):
            await bench.publisher.flush()
    await bench.publisher.flush_all()
    assert [len(bench.driver.tokens(job.job_id)) for job in jobs] == [50, 50]
    assert bench.broker.available
    assert bench.broker.outages == 1


async def test_a_zombie_that_returns_publishes_nothing_and_drops_the_sequence(bench: Bench) -> None:
    (job,) = await bench.hold()
    await bench.step(2)
    bench.driver.run(transitions.release(bench.keys, WORKER, [(job.job_id, job.attempt)]))
    other = bench.driver.take("w2")
    await bench.step(3)
    assert bench.driver.tokens(job.job_id) == [1000, 1001]
    assert job not in bench.held
    assert (job.request_id, FinishReason.CANCELLED) in bench.engine.aborted
    assert bench.counter("fenced_writes") == 1
    bench.driver.finish("w2", bench.driver.final(other.job_id, other.attempt))


async def test_over_its_bound_the_largest_job_is_handed_back(bench: Bench) -> None:
    (job,) = await bench.hold()
    await bench.step(1)
    bench.broker.fail("before")
    bench.engine.running[job.request_id].request = _endless(bench, job.request_id)
    bench.engine.step(1)
    with pytest.raises(BrokerUnavailable):
        await bench.publisher.flush()
    bench.engine.step(1200)
    bench.publisher.collect()
    assert (job.request_id, FinishReason.CANCELLED) in bench.engine.aborted
    await bench.publisher.flush_all()
    status = bench.driver.status(job.job_id)
    assert (status.state, status.crashes, status.errors) == (JobState.QUEUED, 0, 0)
    assert bench.driver.tokens(job.job_id) == [1000, 1001], "what was in flight is the checkpoint"
    assert len(bench.held) == 0


async def test_a_cancelled_job_ends_with_what_there_is(bench: Bench) -> None:
    (job,) = await bench.hold()
    await bench.step(4)
    assert bench.driver.cancel(job.job_id) == "cancelling"
    await bench.step()
    assert bench.engine.aborted == [(job.request_id, FinishReason.CANCELLED)], "publish answered `cancelled`"
    bench.engine.deliver_aborts()
    await bench.publisher.flush_all()
    ended = bench.driver.ended(job.job_id)
    assert ended.state is JobState.CANCELLED
    assert ended.failure is not None
    assert ended.failure.code == "cancelled"
    assert ended.result is not None
    assert len(ended.result.token_ids) == 5


async def test_an_expired_job_is_never_reported_as_length(bench: Bench) -> None:
    (job,) = await bench.hold()
    await bench.step(2)
    bench.engine.finish(job.request_id, FinishReason.EXPIRED)
    await bench.publisher.flush_all()
    ended = bench.driver.ended(job.job_id)
    assert ended.state is JobState.EXPIRED
    assert ended.result is not None
    assert ended.result.choices[0].finish_reason is FinishReason.EXPIRED


async def test_a_failed_step_sends_the_job_back_with_its_tokens(bench: Bench) -> None:
    (job,) = await bench.hold()
    await bench.step(3)
    bench.engine.finish(job.request_id, FinishReason.ERROR, "RuntimeError: out of memory")
    await bench.publisher.flush_all()
    status = bench.driver.status(job.job_id)
    assert (status.state, status.errors, status.crashes) == (JobState.DELAYED, 1, 0)
    assert status.failure is not None
    assert status.failure.code == "engine_error"
    assert "out of memory" in status.failure.message
    assert all(event.finish_reason is None for event in bench.driver.events(job.job_id)), "an error is not an end"
    assert bench.counter("retried_jobs") == 1
    bench.driver.cancel(job.job_id)


async def test_a_failed_step_without_retries_left_fails_the_job(bench: Bench) -> None:
    bench.submit("only", max_retries=0)
    await bench.claimer.claim_once()
    job = bench.held.by_job("only")
    assert job is not None
    bench.engine.finish(job.request_id, FinishReason.ERROR, "no luck")
    await bench.publisher.flush_all()
    ended = bench.driver.ended("only")
    assert ended.state is JobState.FAILED
    assert ended.failure is not None
    assert "no luck" in ended.failure.message


async def test_a_job_whose_write_redis_refuses_does_not_hold_up_the_others(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = await bench.hold(2)
    whole = bench.broker.run_many

    async def refuse_bad(calls: Any) -> Any:
        if any(bad.job_id in call.args for call in calls):
            raise ResponseError("WRONGTYPE Operation against a key holding the wrong kind of value")
        return await whole(calls)

    monkeypatch.setattr(bench.broker, "run_many", refuse_bad)
    await bench.step(2)
    assert bench.driver.tokens(good.job_id) == [1000, 1001]
    assert good in bench.held
    assert bad not in bench.held, "its lease runs out, and it is tried elsewhere"
    await bench.step(254)
    assert bench.driver.state(good.job_id) == "completed"


@pytest.mark.parametrize(
    "ending",
    [
        Fail("code", "why", retryable=True),
        Bury("code", "why"),
        HandBack("why"),
        Finish(JobState.COMPLETED, JobResult()),
    ],
)
async def test_no_end_of_a_job_that_belongs_to_another_attempt_is_written(bench: Bench, ending: Ending) -> None:
    (job,) = await bench.hold()
    bench.driver.release(WORKER, (job.job_id, job.attempt))
    bench.driver.take("w2")
    bench.publisher.end(job, ending)
    await bench.publisher.flush_all()
    status = bench.driver.status(job.job_id)
    assert (status.state, status.owner, status.attempt) == (JobState.RUNNING, "w2", 2)
    assert job not in bench.held
    assert bench.counter("fenced_writes") == 1


async def test_a_result_too_large_to_store_fails_the_job_and_says_what_to_lower(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock_core.protocol.codec.MAX_EVENT_BYTES", 1000)
    (job,) = await bench.hold()
    bench.engine.step(256)
    await bench.publisher.flush_all()
    monkeypatch.undo()
    ended = bench.driver.ended(job.job_id)
    assert (ended.state, ended.failure and ended.failure.code) == (JobState.FAILED, "result_too_large")
    assert ended.failure is not None
    assert "max_tokens" in ended.failure.message


async def test_backoff_grows_with_the_errors_and_is_jittered_and_capped(bench: Bench) -> None:
    delays = []
    bench.submit("unlucky", max_retries=10)
    for _ in range(8):
        bench.driver.client.zadd(bench.keys.delayed, {"unlucky": 1}, xx=True)
        bench.driver.reclaim()
        await bench.claimer.claim_once()
        job = bench.held.by_job("unlucky")
        assert job is not None
        bench.publisher.end(job, Fail("code", "why", retryable=True))
        await bench.publisher.flush_all()
        due = bench.driver.client.zscore(bench.keys.delayed, "unlucky")
        delays.append(round((due - await bench.broker.compare_clocks()) / 1000, 1))
        bench.engine.running.clear()
    assert delays == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0], "half of the bound: the drawn number is 0.5"
    bench.driver.cancel("unlucky")


async def test_nothing_is_taken_from_the_engine_after_the_end_is_decided(bench: Bench) -> None:
    (job,) = await bench.hold()
    bench.engine.step(2)
    bench.publisher.collect()
    bench.publisher.end(job, HandBack("test"))
    bench.engine.step(2)
    await bench.publisher.flush_all()
    assert bench.driver.tokens(job.job_id) == [1000, 1001]
    assert bench.driver.state(job.job_id) == "queued"
    assert bench.counter("released_jobs") == 1


async def test_what_a_dead_engine_says_is_no_verdict_on_its_jobs(bench: Bench) -> None:
    (job,) = await bench.hold()
    bench.engine.alive = False
    bench.engine.finish(job.request_id, FinishReason.ERROR, "the thread died")
    await bench.publisher.flush_all()
    assert bench.publisher.engine_died.is_set()
    assert job in bench.held
    assert bench.driver.state(job.job_id) == "running"


def _endless(bench: Bench, request_id: str) -> Any:
    request = bench.engine.running[request_id].request
    sampling = request.sampling.model_copy(update={"max_tokens": 10**6})
    return type(request)(request.request_id, request.prompt_token_ids, sampling)


async def _turn_loop(turns: int = 10) -> None:
    for _ in range(turns):
        await asyncio.sleep(0)
