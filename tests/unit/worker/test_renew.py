"""The renew role: leases last while the worker lives, and the answers are acted on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from penstock_core.protocol import transitions
from penstock_core.protocol.errors import BrokerUnavailable
from penstock_core.protocol.jobs import FinishReason
from penstock_core.protocol.workers import WorkerRecord
from penstock_worker.outbox import HandBack
from penstock_worker.renew import Renewer
from tests.unit.worker.conftest import WORKER, Bench


@pytest.fixture
def renewer(bench: Bench) -> Renewer:
    return Renewer(
        bench.broker,
        bench.keys,
        bench.held,
        bench.metrics,
        worker_id=WORKER,
        lease_ms=15_000,
        heartbeat_s=1.0,
        describe=lambda: WorkerRecord(WORKER, model="tiny"),
        clock=bench.clock,
    )


def leases(bench: Bench) -> dict[str, float]:
    return {
        name.decode(): score for name, score in bench.driver.client.zrange(bench.keys.leases, 0, -1, withscores=True)
    }


async def test_a_heartbeat_shows_the_worker_and_its_record(bench: Bench, renewer: Renewer) -> None:
    await renewer.beat()
    (worker,) = bench.driver.snapshot().workers
    assert worker.worker_id == WORKER
    assert worker.record is not None
    assert worker.record.model == "tiny"


async def test_leases_are_prolonged_every_third_of_their_length(bench: Bench, renewer: Renewer) -> None:
    (job,) = await bench.hold()
    await renewer.beat()
    bench.driver.client.zadd(bench.keys.leases, {job.job_id: 1})
    renewed_at = []
    for second in range(1, 16):
        bench.clock.tick(1.0)
        await renewer.beat()
        if leases(bench)[job.job_id] > 1:
            renewed_at.append(second)
            bench.driver.client.zadd(bench.keys.leases, {job.job_id: 1})
    assert renewed_at == [5, 10, 15]


async def test_a_fenced_job_is_dropped(bench: Bench, renewer: Renewer) -> None:
    kept, lost = await bench.hold(2)
    bench.driver.run(transitions.release(bench.keys, WORKER, [(lost.job_id, lost.attempt)]))
    await renewer.beat()
    assert lost not in bench.held
    assert kept in bench.held
    assert bench.engine.aborted == [(lost.request_id, FinishReason.CANCELLED)]
    assert bench.counter("fenced_writes") == 1


async def test_a_missed_cancellation_is_found_at_the_renewal(bench: Bench, renewer: Renewer) -> None:
    (job,) = await bench.hold()
    bench.driver.cancel(job.job_id)
    await renewer.beat()
    assert bench.engine.aborted == [(job.request_id, FinishReason.CANCELLED)]
    assert job in bench.held, "its result is still to come"


async def test_a_job_past_its_deadline_is_stopped(bench: Bench, renewer: Renewer) -> None:
    bench.submit("late", deadline_s=60.0)
    await bench.claimer.claim_once()
    job = bench.held.by_job("late")
    assert job is not None
    bench.driver.client.hset(bench.keys.job("late"), "deadline", 1)
    await renewer.beat()
    assert bench.engine.aborted == [(job.request_id, FinishReason.EXPIRED)]


async def test_a_job_whose_end_is_decided_is_left_to_the_publisher(bench: Bench, renewer: Renewer) -> None:
    (job,) = await bench.hold()
    bench.publisher.end(job, HandBack("test"))
    bench.driver.cancel(job.job_id)
    await renewer.beat()
    assert bench.engine.aborted == []
    assert bench.counter("fenced_writes") == 0


async def test_after_redis_was_away_the_next_beat_renews(bench: Bench, renewer: Renewer) -> None:
    (job,) = await bench.hold()
    bench.broker.fail("before")
    with pytest.raises(BrokerUnavailable):
        await renewer.beat()
    bench.driver.client.zadd(bench.keys.leases, {job.job_id: 1})
    await renewer.beat()
    assert leases(bench)[job.job_id] > 1


async def test_it_beats_by_itself_and_at_once_where_it_is_hurried(bench: Bench, renewer: Renewer) -> None:
    (job,) = await bench.hold()
    bench.driver.client.zadd(bench.keys.leases, {job.job_id: 1})
    renewer.start()
    await _until(lambda: leases(bench)[job.job_id] > 1)
    bench.driver.client.zadd(bench.keys.leases, {job.job_id: 1})
    renewer.hurry()
    await _until(lambda: leases(bench)[job.job_id] > 1)
    await renewer.shutdown()


async def test_hurry_renews_before_the_third_has_passed(bench: Bench, renewer: Renewer) -> None:
    (job,) = await bench.hold()
    await renewer.beat()
    bench.driver.client.zadd(bench.keys.leases, {job.job_id: 1})
    renewer.hurry()
    await renewer.beat()
    assert leases(bench)[job.job_id] > 1


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.001)
