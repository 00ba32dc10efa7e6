"""Many jobs over one connection, across threads, tasks, processes and loops, in bounded memory."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from penstock import AsyncClient, AsyncJobHandle, Client, JobHandle
from penstock_core.protocol.connection import connect
from penstock_core.protocol.keys import QueueKeys
from penstock_core.protocol.transitions import run
from tests.integration.producer.scripted import BusyWorker
from tests.worker_process import until

pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True)
def nobody_listens(redis_client: redis.Redis) -> None:
    """The connections of tests before this one are gone, so that a test can count its own."""
    until(lambda: pubsub_connections(redis_client) == 0, "connections of earlier tests to end")


@pytest.fixture
def busy(redis_url: str, keys: QueueKeys) -> Iterator[BusyWorker]:
    """A worker that completes every job."""
    with BusyWorker(lambda: connect(redis_url), keys, batch=250) as worker:
        yield worker


def pubsub_connections(client: redis.Redis) -> int:
    return len(client.client_list(_type="pubsub"))


def test_a_thousand_streams_share_one_connection(
    redis_url: str, redis_client: redis.Redis, queue: str, busy: BusyWorker
) -> None:
    async def main() -> None:
        async with AsyncClient(redis_url, queue=queue) as client, AsyncClient(redis_url, queue=queue) as second:
            jobs = await client.submit_many([{"prompt": "x", "max_tokens": 40}] * 990)
            jobs += await second.submit_many([{"prompt": "x", "max_tokens": 40}] * 10)

            async def follow(job: AsyncJobHandle) -> list[int]:
                return [token async for chunk in job.stream(timeout=60) for token in chunk.token_ids]

            tasks = [asyncio.create_task(follow(job)) for job in jobs if isinstance(job, AsyncJobHandle)]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            assert pubsub_connections(redis_client) == 1
            assert await asyncio.gather(*tasks) == [list(range(40))] * 1000

    asyncio.run(main())


def test_a_thousand_results_arrive_over_one_connection_without_asking(
    redis_url: str, redis_client: redis.Redis, queue: str, busy: BusyWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the backstop out of the way: on a slow machine it would look by itself, and rightly so."""
    with Client(redis_url, queue=queue) as client:
        patient = dataclasses.replace(client.settings, backstop_s=600)
        client._around = dataclasses.replace(client._around, settings=patient)
        jobs = client.submit_many([{"prompt": "x", "max_tokens": 8}] * 1000)
        calls: list[object] = []

        def counted(*call: Any) -> object:
            calls.append(call)
            return run(*call)

        monkeypatch.setattr("penstock.client.run", counted)
        for job in jobs:
            assert isinstance(job, JobHandle)
            assert job.result(timeout=60).token_ids == tuple(range(8))
        assert pubsub_connections(redis_client) == 1
        assert calls == [], "every result was pushed"


def test_ten_thousand_jobs_go_in_with_bounded_memory(redis_url: str, redis_client: redis.Redis, queue: str) -> None:
    """The bound: the requests themselves, a handle per job, and one round trip's worth of packed commands."""
    count, prompt = 10_000, "once upon a time " * 12
    with Client(redis_url, queue=queue) as client:
        client.submit("warm up").cancel()
        gc.collect()
        tracemalloc.start()
        jobs = client.submit_many([prompt] * count)
        kept, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len({job.id for job in jobs if isinstance(job, JobHandle)}) == count
        assert kept < count * 1500
        assert peak < count * (4 * len(prompt) + 5000)
        assert client.queue_snapshot().waiting == count


def test_finished_handles_leave_nothing_behind(redis_url: str, queue: str, busy: BusyWorker) -> None:
    with Client(redis_url, queue=queue) as client:
        reader = client._reader()
        assert reader is not None
        for _ in range(3):
            for job in client.submit_many([{"prompt": "x", "max_tokens": 4}] * 100):
                assert isinstance(job, JobHandle)
                job.result(timeout=60)
                assert len(list(job.stream(timeout=60))) == 2
        del job
        gc.collect()
        assert len(reader.table(client.settings.keys)) == 0


def test_a_forked_child_has_a_connection_of_its_own(redis_url: str, queue: str, busy: BusyWorker) -> None:
    code = """
import os, sys
from penstock import Client
client = Client(sys.argv[1], queue=sys.argv[2])
before = client.submit("x", max_tokens=30)
before.result(60)
stream = before.stream(timeout=60)
next(stream)
child = os.fork()
inherited = [token for chunk in before.stream(timeout=60) for token in chunk.token_ids]
own = client.submit("x", max_tokens=30)
assert inherited == [token for chunk in own.stream(timeout=60) for token in chunk.token_ids] == list(range(30))
assert own.result(60).token_ids == before.result(60).token_ids
client.close()
if child == 0:
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print("both")
"""
    done = subprocess.run([sys.executable, "-c", code, redis_url, queue], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "both", done.stderr


def test_an_async_client_serves_one_loop_after_another(redis_url: str, queue: str, busy: BusyWorker) -> None:
    client = AsyncClient(redis_url, queue=queue)

    async def once() -> tuple[int, ...]:
        job = await client.submit("x", max_tokens=5)
        return (await job.result(timeout=60)).token_ids

    assert asyncio.run(once()) == asyncio.run(once()) == tuple(range(5))


def test_a_cancelled_task_leaves_the_client_working(redis_url: str, queue: str, busy: BusyWorker) -> None:
    async def main() -> None:
        async with AsyncClient(redis_url, queue=queue) as client:
            for delay in (0, 0, 0.001, 0.002, 0.005, 0.01):
                task = asyncio.create_task(client.submit("x", max_tokens=20))
                await asyncio.sleep(delay)
                task.cancel()
                await asyncio.wait([task])
            reader = client._reader()
            assert reader is not None
            job = await client.submit("x", max_tokens=20)
            stream = client.job(job.id).stream(timeout=60)
            await anext(stream)
            await stream.aclose()
            assert (await job.result(timeout=60)).token_ids == tuple(range(20))
            assert reader._subscriptions.names == [client.settings.keys.client(reader.client_id)]

    asyncio.run(main())


def test_the_reader_thread_ends_with_the_last_client(redis_url: str, redis_client: redis.Redis, queue: str) -> None:
    first, second = Client(redis_url, queue=queue), Client(redis_url, queue=queue)
    first.submit("x").cancel()
    second.submit("x").cancel()
    reader = second._reader()
    assert reader is not None
    assert reader is first._reader()
    assert reader._thread is not None
    first.close()
    assert reader._thread.is_alive()
    second.close()
    reader._thread.join(60)
    assert not reader._thread.is_alive()
    until(lambda: pubsub_connections(redis_client) == 0, "its connection to be gone")
