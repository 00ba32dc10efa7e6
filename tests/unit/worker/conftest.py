"""A worker's parts around a fakeredis, each role driven by hand."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import fakeredis
import pytest

from penstock_core.protocol import transitions
from penstock_core.protocol.keys import QueueKeys
from penstock_worker.claim import Claimer
from penstock_worker.held import HeldJob, HeldJobs
from penstock_worker.metrics import WorkerMetrics
from penstock_worker.publish import Publisher
from penstock_worker.writes import Writer
from tests.queue_driver import QueueDriver
from tests.unit.worker.doubles import Clock, FailingBroker, ScriptedEngine

WORKER = "w1"


@dataclass
class Bench:
    """One worker on the bench. `driver` is the rest of the world: producers, other workers, operators."""

    driver: QueueDriver
    broker: FailingBroker
    keys: QueueKeys
    engine: ScriptedEngine
    held: HeldJobs
    metrics: WorkerMetrics
    publisher: Publisher
    claimer: Claimer
    clock: Clock

    def submit(self, job_id: str | None = None, **options: Any) -> str:
        return self.driver.submit(job_id, **options)

    async def hold(self, count: int = 1) -> list[HeldJob]:
        """Submit jobs and have them claimed and running."""
        names = [self.submit() for _ in range(count)]
        await self.claimer.claim_once()
        return [job for name in names if (job := self.held.by_job(name))]

    async def step(self, count: int = 1) -> None:
        """Engine steps, collected and flushed."""
        self.engine.step(count)
        await self.publisher.flush_all()

    def counter(self, name: str, **labels: str) -> float:
        labels = {"queue": self.keys.queue, "model": "tiny", **labels}
        value = self.metrics.registry.get_sample_value(f"penstock_{name}_total", labels)
        assert value is not None, name
        return value


@pytest.fixture
async def bench(fake_redis: fakeredis.FakeRedis, keys: QueueKeys) -> AsyncIterator[Bench]:
    async with assembled(fake_redis, keys) as made:
        yield made


@asynccontextmanager
async def assembled(fake_redis: fakeredis.FakeRedis, keys: QueueKeys, worker_id: str = WORKER) -> AsyncIterator[Bench]:
    """A worker on the bench; a second one has another id."""
    clock = Clock()
    place = fake_redis.connection_pool.connection_kwargs
    client = fakeredis.FakeAsyncRedis(host=place["host"], port=place["port"], version=(7,), protocol=2)
    broker = FailingBroker(client, "redis://bench", clock=clock)
    engine = ScriptedEngine()
    held = HeldJobs(engine.abort)
    metrics = WorkerMetrics(keys.queue, "tiny")
    publisher = Publisher(
        broker,
        Writer(broker, keys, held, metrics, worker_id=worker_id, draw=lambda: 0.5),
        held,
        metrics,
        engine,
        worker_id=worker_id,
        served_name="tiny",
        interval_s=60.0,
        max_buffered_tokens=1000,
        on_freed=lambda: claimer.freed(),
        clock=clock,
    )
    claimer = Claimer(
        broker,
        keys,
        engine,
        held,
        publisher,
        metrics,
        worker_id=worker_id,
        served_name="tiny",
        lease_ms=15_000,
        clock=clock,
    )
    engine.start(publisher.on_outputs)
    driver = QueueDriver(fake_redis, keys)
    driver.now = 0  # the server's own clock, as the worker uses it
    yield Bench(driver, broker, keys, engine, held, metrics, publisher, claimer, clock)
    await claimer.shutdown()
    await publisher.shutdown()
    await client.aclose()


def settle(bench: Bench) -> None:
    """End what a test leaves running, for the leaked-key check."""
    for job in bench.held:
        bench.driver.run(transitions.release(bench.keys, WORKER, [(job.job_id, job.attempt)]))
