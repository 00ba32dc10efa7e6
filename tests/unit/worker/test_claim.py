"""The claim role: never beyond capacity, awake when something changed, and a verdict for every job it takes."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable

import msgpack
import pytest

from penstock_core.protocol import transitions
from penstock_core.protocol.codec import encode_request
from penstock_core.protocol.errors import BrokerUnavailable
from penstock_core.protocol.jobs import FinishReason, JobState
from penstock_core.protocol.requests import GenerationRequest, JobOptions
from penstock_worker.admit import INLINE_BYTES
from tests.unit.worker.conftest import WORKER, Bench
from tests.unit.worker.doubles import ScriptedEngine


def submit_raw(bench: Bench, job_id: str, request: bytes) -> None:
    job = transitions.NewJob(job_id, request, JobOptions(), 10, 20)
    (outcome,) = bench.driver.run(transitions.submit(bench.keys, [job]))
    assert outcome.status == "accepted"


def submit_request(bench: Bench, job_id: str, **fields: object) -> None:
    submit_raw(bench, job_id, encode_request(GenerationRequest.parse({"prompt": "Once upon a time", **fields})))


async def test_never_claims_beyond_the_free_sequences(bench: Bench) -> None:
    for _ in range(20):
        bench.submit()
    for _ in range(3):
        await bench.claimer.claim_once()
    assert len(bench.engine.running) == 8
    assert bench.driver.snapshot().waiting == 12


async def test_a_burst_is_claimed_in_slices_that_leave_others_their_share(bench: Bench) -> None:
    bench.engine.room = type(bench.engine.room)(64, 10_000, 10_000)
    for _ in range(40):
        bench.submit()
    slices = []
    while await bench.claimer.claim_once():
        slices.append(len(bench.engine.running))
    assert slices == [8, 16, 24, 32]
    assert len(bench.engine.running) == 40


async def test_never_claims_beyond_the_free_tokens(bench: Bench) -> None:
    bench.engine.room = type(bench.engine.room)(8, 70, 70)
    for _ in range(5):
        bench.submit()  # 30 tokens each
    await bench.claimer.claim_once()
    assert len(bench.engine.running) == 2


async def test_an_idle_worker_takes_even_a_job_larger_than_its_estimate_of_room(bench: Bench) -> None:
    bench.engine.room = type(bench.engine.room)(8, 5, 5)
    bench.submit()
    await bench.claimer.claim_once()
    assert len(bench.engine.running) == 1


async def test_freed_room_wakes_it_while_jobs_wait(bench: Bench) -> None:
    for _ in range(12):
        bench.submit()
    bench.claimer.start()
    bench.publisher.start()
    await _until(lambda: len(bench.engine.running) == 8)
    bench.engine.step(256)
    await _until(lambda: len(bench.engine.running) == 4)


async def test_a_ring_wakes_it(bench: Bench) -> None:
    bench.claimer.start()
    await _until(lambda: bench.broker.calls > 0)
    bench.submit("late")
    bench.claimer.rung()
    await _until(lambda: len(bench.engine.running) == 1)


async def test_it_wakes_when_a_delayed_job_becomes_due(bench: Bench) -> None:
    bench.submit("later", delay_s=2.0)
    await bench.broker.compare_clocks()
    await bench.claimer.claim_once()
    assert 0.0 < bench.claimer.sleep_s <= 2.0
    bench.driver.cancel("later")


async def test_a_claim_whose_reply_was_lost_is_handed_back_before_the_next(bench: Bench) -> None:
    bench.submit("stray")
    bench.broker.fail("after")
    with pytest.raises(BrokerUnavailable):
        await bench.claimer.claim_once()
    assert bench.driver.state("stray") == "running"
    await bench.claimer.claim_once()
    job = bench.held.by_job("stray")
    assert job is not None
    assert (job.attempt, job.claimed.crashes) == (2, 0)


async def test_an_undecodable_request_is_dead_lettered_with_its_reason(bench: Bench) -> None:
    submit_raw(bench, "junk", b"\xc1 this is not msgpack")
    await bench.claimer.claim_once()
    await bench.publisher.flush_all()
    ended = bench.driver.ended("junk")
    assert ended.state is JobState.DEAD
    assert ended.failure is not None
    assert ended.failure.code == "undecodable"
    (letter,) = bench.driver.run(transitions.dead_letters(bench.keys))
    assert letter.job_id == "junk"
    assert bench.counter("dead_letters") == 1


@pytest.mark.parametrize(
    ("sampling", "field"),
    [
        ({"temprature": 1.0}, "sampling.temprature"),
        ({"temperature": float("nan")}, "sampling.temperature"),
        ({"top_p": 3.0}, "sampling.top_p"),
    ],
)
async def test_a_raw_request_with_a_wrong_option_fails_and_names_it(
    bench: Bench, sampling: dict[str, object], field: str
) -> None:
    submit_raw(bench, "wrong", msgpack.packb((1, {"prompt": "x", "sampling": sampling})))
    await bench.claimer.claim_once()
    await bench.publisher.flush_all()
    ended = bench.driver.ended("wrong")
    assert (ended.state, ended.failure and ended.failure.code) == (JobState.FAILED, "invalid_request")
    assert ended.failure is not None
    assert field in ended.failure.message


async def test_an_over_long_prompt_fails_at_once_and_spends_no_retry(bench: Bench) -> None:
    submit_request(bench, "long", prompt="word " * 500)
    await bench.claimer.claim_once()
    await bench.publisher.flush_all()
    ended = bench.driver.ended("long")
    assert ended.state is JobState.FAILED
    assert ended.failure is not None
    assert "500 tokens, limit 100" in ended.failure.message
    assert bench.driver.status("long").attempt == 1


async def test_a_request_for_another_model_says_which_is_served(bench: Bench) -> None:
    submit_request(bench, "lost", model="enormous")
    await bench.claimer.claim_once()
    await bench.publisher.flush_all()
    failure = bench.driver.ended("lost").failure
    assert failure is not None
    assert failure.code == "wrong_model"
    assert "'enormous'" in failure.message
    assert "'tiny'" in failure.message


async def test_a_request_that_breaks_the_tokenizer_fails_alone(bench: Bench) -> None:
    class Panic(BaseException):
        """What a native extension raises when it panics."""

    bench.engine.refusal = Panic("index out of bounds")  # type: ignore[assignment]
    bench.submit("panic", max_retries=0)
    await bench.claimer.claim_once()
    bench.engine.refusal = None
    bench.submit("fine")
    await bench.claimer.claim_once()
    await bench.publisher.flush_all()
    failure = bench.driver.ended("panic").failure
    assert failure is not None
    assert (failure.code, "index out of bounds" in failure.message) == ("worker_error", True)
    assert bench.held.by_job("fine") is not None


async def test_a_long_prompt_is_prepared_beside_the_loop_and_runs(bench: Bench) -> None:
    submit_request(bench, "big", prompt="x" * (INLINE_BYTES + 1))
    await bench.claimer.claim_once()
    await _until(lambda: len(bench.engine.running) == 1)


async def test_a_job_cancelled_while_it_was_prepared_never_reaches_the_engine(bench: Bench) -> None:
    submit_request(bench, "big", prompt="x" * (INLINE_BYTES + 1))
    await bench.claimer.claim_once()
    job = bench.held.by_job("big")
    assert job is not None
    bench.held.stop(job, FinishReason.CANCELLED)
    await _until(lambda: job.ended)
    await bench.publisher.flush_all()
    assert bench.driver.ended("big").state is JobState.CANCELLED
    assert not bench.engine.running


async def test_a_deadline_is_carried_over_without_comparing_two_clocks(bench: Bench) -> None:
    bench.submit("soon", deadline_s=3000.0)
    await bench.claimer.claim_once()
    (running,) = bench.engine.running.values()
    assert running.request.deadline_s is not None
    assert bench.clock.now + 2900.0 < running.request.deadline_s <= bench.clock.now + 3000.0


async def test_every_attempt_derives_the_same_seed_for_a_job_without_one(bench: Bench) -> None:
    bench.submit("job")
    await bench.claimer.claim_once()
    (first,) = bench.engine.running.values()
    expected = int.from_bytes(hashlib.sha256(b"job").digest()[:8], "big") % 2**63
    assert first.request.sampling.seed == expected


async def test_a_resumed_job_goes_on_behind_the_published_tokens(bench: Bench) -> None:
    (job,) = await bench.hold()
    await bench.step(5)
    bench.driver.run(transitions.release(bench.keys, WORKER, [(job.job_id, job.attempt)]))
    bench.held.lose(job)
    bench.engine.running.clear()
    await bench.claimer.claim_once()
    (running,) = bench.engine.running.values()
    assert running.request.resume[0].token_ids == tuple(range(1000, 1005))
    await bench.step(2)
    assert bench.driver.tokens(job.job_id) == list(range(1000, 1007))
    assert bench.counter("redelivered_jobs") == 1
    assert bench.counter("resumed_tokens") == 5


async def test_a_job_whose_log_is_complete_is_only_finished(bench: Bench) -> None:
    submit_request(bench, "done", prompt="one two three")
    first = bench.driver.take("w0")
    last = bench.driver.chunk("done", first.attempt, 0, [1, 2, 3], finish_reason=FinishReason.STOP)
    bench.driver.publish("w0", last)
    bench.driver.release("w0", ("done", first.attempt))
    await bench.claimer.claim_once()
    assert not bench.engine.running
    await bench.publisher.flush_all()
    ended = bench.driver.ended("done")
    assert ended.state is JobState.COMPLETED
    assert ended.result is not None
    assert (ended.result.text, ended.result.token_ids) == (" 1 2 3", (1, 2, 3))
    assert (ended.result.usage.prompt_tokens, ended.result.usage.completion_tokens) == (3, 3)


async def test_a_log_that_cannot_be_continued_says_so_and_why(bench: Bench) -> None:
    bench.submit("torn")
    first = bench.driver.take("w0")
    bench.driver.publish("w0", transitions.PublishRecord("torn", first.attempt, 0, 0, 1, b"\xc1"))
    bench.driver.release("w0", ("torn", first.attempt))
    await bench.claimer.claim_once()
    await bench.publisher.flush_all()
    status = bench.driver.status("torn")
    assert status.state is JobState.FAILED
    assert status.failure is not None
    assert (status.failure.code, "record 0" in status.failure.message) == ("unresumable", True)


async def test_jobs_of_an_engine_without_room_stay_in_the_queue(bench: Bench) -> None:
    bench.engine.room = ScriptedEngine(sequences=0).room
    bench.submit("waits")
    calls = bench.broker.calls
    await bench.claimer.claim_once()
    assert bench.broker.calls == calls
    assert bench.driver.state("waits") == "queued"


async def _until(condition: Callable[[], bool]) -> None:
    """Turn the loop until the condition holds; other threads get their time in between."""
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.001)


async def test_one_job_on_its_last_life_is_held_at_a_time(bench: Bench) -> None:
    bench.driver.set_config(max_crashes=2)
    names = [bench.submit() for _ in range(2)]
    bench.driver.claim("gone", 2)
    bench.driver.client.zadd(bench.keys.leases, dict.fromkeys(names, 1))
    assert sorted(bench.driver.reclaim().requeued) == names
    assert not await bench.claimer.claim_once()
    (held,) = bench.held
    assert held.claimed.last_life
    await bench.claimer.claim_once()
    assert len(bench.held) == 1
    bench.engine.finish(held.request_id, FinishReason.STOP)
    await bench.step()
    await bench.claimer.claim_once()
    (other,) = bench.held
    assert {held.job_id, other.job_id} == set(names)
    bench.held.lose(other)
    assert bench.held.last_lives == 0
