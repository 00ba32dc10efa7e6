"""The lean way to Redis: replies reach who asked, whatever happens to callers, scripts and connections."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
import redis
from redis import exceptions

from penstock_core.protocol import transitions as t
from penstock_core.protocol.connection import connect_async
from penstock_core.protocol.keys import QueueKeys
from penstock_core.protocol.wire import Wire
from tests.queue_driver import QueueDriver
from tests.redis_server import RedisServer

pytestmark = pytest.mark.integration


@pytest.fixture
async def wire(redis_url: str) -> AsyncIterator[Wire]:
    async with connect_async(redis_url) as client:
        wire = Wire(client)
        yield wire
        wire.close()


async def test_calls_under_way_together_get_each_its_own_reply(
    wire: Wire, redis_client: redis.Redis, keys: QueueKeys
) -> None:
    driver = QueueDriver(redis_client, keys)
    ids = [outcome.job_id for outcome in driver.submit_all([driver.new_job() for _ in range(20)])]
    found = await asyncio.gather(*(wire.run(t.read_job(keys, job_id)) for job_id in ids))
    assert [status.job_id for status in found if status is not None] == ids
    statuses = await wire.run_many([t.read_job(keys, job_id) for job_id in reversed(ids)])
    assert [status.job_id for status in statuses if status is not None] == ids[::-1]


async def test_a_caller_that_gave_up_shifts_nobodys_reply(
    wire: Wire, redis_client: redis.Redis, keys: QueueKeys
) -> None:
    driver = QueueDriver(redis_client, keys)
    first, second = driver.submit(), driver.submit()
    await wire.run(t.read_job(keys, first))
    given_up = asyncio.ensure_future(wire.run(t.read_job(keys, first)))
    await asyncio.sleep(0)
    given_up.cancel()
    found = await wire.run(t.read_job(keys, second))
    assert found is not None
    assert found.job_id == second


async def test_a_script_the_server_forgot_is_sent_again(wire: Wire, redis_client: redis.Redis, keys: QueueKeys) -> None:
    calls = [t.snapshot(keys), t.snapshot(keys)]
    before = await wire.run_many(calls)
    redis_client.script_flush()
    after = await wire.run_many(calls)
    assert [snapshot.stats for snapshot in after] == [snapshot.stats for snapshot in before]


async def test_a_lost_connection_fails_what_was_under_way_and_the_next_call_makes_another(
    wire: Wire, redis_client: redis.Redis, keys: QueueKeys
) -> None:
    await wire.run(t.snapshot(keys))
    under_way = [asyncio.ensure_future(wire.run(t.snapshot(keys))) for _ in range(3)]
    await asyncio.sleep(0)  # they are sent
    wire.close()
    failures = await asyncio.gather(*under_way, return_exceptions=True)
    assert all(isinstance(failure, exceptions.ConnectionError) for failure in failures), failures
    await wire.run(t.snapshot(keys))
    redis_client.client_kill_filter(_type="normal", skipme=True)

    async def call_until_it_fails() -> None:
        while True:  # the end of the connection may not have arrived here yet
            await wire.run(t.snapshot(keys))

    with pytest.raises(exceptions.ConnectionError):
        await call_until_it_fails()
    assert (await wire.run(t.snapshot(keys))).waiting == 0


async def test_a_frozen_server_fails_the_call_in_bounded_time(
    start_redis: Callable[..., RedisServer], keys: QueueKeys
) -> None:
    server = start_redis()
    async with connect_async(server.url, timeout_s=0.2) as client:
        wire = Wire(client)
        await wire.run(t.snapshot(keys))
        server.freeze()
        with pytest.raises(exceptions.TimeoutError, match=r"no reply within 0\.2 s"):
            await wire.run(t.snapshot(keys))
        server.thaw()
        assert (await wire.run(t.snapshot(keys))).waiting == 0
        wire.close()
    server.stop()
