"""The doorbell: rings are told apart, and a lost connection is made again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from penstock_core.protocol.connection import connect_async
from penstock_worker.doorbell import Doorbell
from penstock_worker.metrics import WorkerMetrics
from tests.redis_server import RedisServer


@dataclass
class Heard:
    jobs: int = 0
    cancels: list[str] = field(default_factory=list)
    connected: int = 0
    something: asyncio.Event = field(default_factory=asyncio.Event)

    def job(self) -> None:
        self.jobs += 1
        self.something.set()

    def cancel(self, job_id: str) -> None:
        self.cancels.append(job_id)
        self.something.set()

    def up(self) -> None:
        self.connected += 1
        self.something.set()

    async def wait(self) -> None:
        await asyncio.wait_for(self.something.wait(), 60)
        self.something.clear()


def doorbell(heard: Heard, url: str = "redis://127.0.0.1:1", channel: str = "bell") -> Doorbell:
    client = connect_async(url)
    return Doorbell(
        client,
        channel,
        "w1",
        WorkerMetrics("q", "m"),
        on_job=heard.job,
        on_cancel=heard.cancel,
        on_connected=heard.up,
    )


@pytest.mark.parametrize(
    ("message", "jobs", "cancels"),
    [
        (b"job", 1, []),
        (b"cancel j1", 0, ["j1"]),
        (b"cancel j1 j2", 0, ["j1", "j2"]),
        (b"a word of a later version", 1, []),
        (b"", 1, []),
        (b"cancel \xff\xfe", 0, ["\ufffd\ufffd"]),
    ],
)
async def test_rings_are_told_apart(message: bytes, jobs: int, cancels: list[str]) -> None:
    heard = Heard()
    doorbell(heard).ring(message)
    assert (heard.jobs, heard.cancels) == (jobs, cancels)


@pytest.mark.integration
async def test_a_killed_connection_is_made_again_and_said_to_be(redis_server: RedisServer, queue: str) -> None:
    heard = Heard()
    bell = doorbell(heard, redis_server.url, queue)
    bell.start()
    await heard.wait()
    first = bell.client_id
    with redis_server.client() as client:
        listed = client.client_list(client_id=[str(first)])
        assert [one["name"] for one in listed] == ["penstock-worker:w1"]
        client.client_kill_filter(_id=str(first))
        await heard.wait()
        assert heard.connected == 2
        assert bell.client_id not in (None, first)
        client.publish(queue, "cancel j1")
    await heard.wait()
    assert heard.cancels == ["j1"]
    await bell.shutdown()
    assert bell.client_id is None


@pytest.mark.integration
async def test_a_server_is_met_anew_only_when_it_was_restarted(start_redis: Callable[..., RedisServer]) -> None:
    """Whoever lost a connection knows the others are still there; whoever met a new server does not."""
    server = start_redis()
    heard = Heard()
    bell = doorbell(heard, server.url)
    bell.start()
    await heard.wait()
    first = bell.server_since
    assert first > 0
    with server.client() as client:
        client.client_kill_filter(_id=str(bell.client_id))
    await heard.wait()
    assert bell.server_since == first
    server.kill()
    server.start()
    await heard.wait()
    assert bell.server_since > first
    await bell.shutdown()
    server.stop()


@pytest.mark.integration
async def test_it_listens_where_client_commands_are_forbidden(redis_server: RedisServer, queue: str) -> None:
    with redis_server.client() as client:
        client.execute_command("ACL", "SETUSER", queue, "on", ">pass", "~*", "&*", "+@all", "-client")
        heard = Heard()
        bell = doorbell(heard, redis_server.url.replace("//", f"//{queue}:pass@"), queue)
        bell.start()
        await heard.wait()
        assert bell.client_id is None
        client.publish(queue, "job")
        await heard.wait()
        assert heard.jobs == 1
        await bell.shutdown()
        client.execute_command("ACL", "DELUSER", queue)
