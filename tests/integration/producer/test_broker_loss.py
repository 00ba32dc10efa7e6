"""A broker that goes away: waiting goes on when it returns, and ends with a remedy when it does not."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from penstock import BrokerUnavailable, Client, InvalidConfiguration, JobState
from penstock_core.protocol.connection import connect
from penstock_core.protocol.keys import QueueKeys
from tests.integration.producer.conftest import FACES, BlockingClient
from tests.integration.producer.scripted import ScriptedWorker
from tests.redis_server import RedisServer, free_port
from tests.worker_process import until

pytestmark = pytest.mark.integration


@pytest.fixture
def mortal(start_redis: Callable[..., RedisServer]) -> Iterator[RedisServer]:
    """A server of the test's own, to be killed. Not `everysec`, under which Redis puts off writing while an fsync is
    under way, and a SIGKILL at that moment loses acknowledged writes: what is tested here is the client."""
    server = start_redis(None, "--appendfsync", "always")
    yield server
    server.stop()


@pytest.fixture(params=FACES, ids=lambda face: face[0])
def make_sdk(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """Make clients of one face for the queue `q` of any server."""
    _, kind, mode = request.param
    clients = []

    def make(url: str, **options: Any) -> Any:
        clients.append(kind(url, queue="q", mode=mode, **options))
        return clients[-1]

    yield make
    for client in clients:
        client.close()
        if isinstance(client, BlockingClient):
            client.end_loop()


def test_waiting_survives_a_broker_that_was_killed(make_sdk: Callable[..., Any], mortal: RedisServer) -> None:
    sdk = make_sdk(mortal.url)
    job = sdk.submit("story")
    with connect(mortal.url) as first:
        worker = ScriptedWorker(first, QueueKeys("q"))
        held = worker.claim_one(job.id)
        worker.say(held, 3)
    stream = job.stream(timeout=60)
    seen = [next(stream)]
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(job.result(timeout=60)))
    thread.start()
    mortal.kill()
    mortal.start()
    with connect(mortal.url) as second:
        worker.use(second)
        worker.say(held, 3)
        worker.end(held)
    seen += stream
    thread.join(60)
    assert [token for chunk in seen for token in chunk.token_ids] == list(range(6)) == list(results[0].token_ids)


def test_waiting_ends_with_a_remedy_where_the_broker_stays_away(
    make_sdk: Callable[..., Any], mortal: RedisServer
) -> None:
    sdk = make_sdk(mortal.url, patience_s=0.3)
    job = sdk.submit("story")
    client = getattr(sdk, "_client", sdk)
    client._around = dataclasses.replace(
        client._around, settings=dataclasses.replace(client.settings, backstop_s=0.05, submit_patience_s=0.1)
    )
    mortal.kill()
    for ask in (
        job.result,
        lambda: job.result(timeout=0.5),
        lambda: list(job.stream()),
        lambda: sdk.job(job.id).result(),
        lambda: sdk.submit("story"),
        lambda: sdk.submit_many(["story"]),
        job.status,
        job.cancel,
        sdk.jobs,
        sdk.queue_snapshot,
    ):
        with pytest.raises(BrokerUnavailable, match=r"Redis at redis://127\.0\.0\.1:\d+: .*; .+"):
            ask()


def test_no_broker_at_all_is_an_error_with_a_remedy(make_sdk: Callable[..., Any]) -> None:
    sdk = make_sdk(f"redis://:secret@127.0.0.1:{free_port()}")
    with pytest.raises(BrokerUnavailable, match="start Redis there, or correct the URL") as caught:
        sdk.submit("story")
    assert "secret" not in str(caught.value)


def test_a_wrong_password_is_not_retried(
    make_sdk: Callable[..., Any], start_redis: Callable[..., RedisServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    from penstock.embedded import EmbeddedBroker

    with EmbeddedBroker(password="right") as broker:
        sdk = make_sdk(broker.url.replace("right", "wrong"), patience_s=3600)
        with pytest.raises(BrokerUnavailable, match="check user and password"):
            sdk.job("x").result()
        with pytest.raises(BrokerUnavailable, match="check user and password"):
            sdk.submit("story")


def test_a_broker_restarted_between_calls_is_not_noticed(make_sdk: Callable[..., Any], mortal: RedisServer) -> None:
    sdk = make_sdk(mortal.url)
    sdk.submit("story")
    mortal.kill()
    mortal.start()
    assert sdk.submit("story").status().state is JobState.QUEUED
    assert [status.state for status in sdk.jobs()] == [JobState.QUEUED] * 2


def test_a_frozen_broker_does_not_hang_a_caller_with_a_timeout(
    make_sdk: Callable[..., Any], mortal: RedisServer
) -> None:
    sdk = make_sdk(mortal.url)
    job = sdk.submit("story")
    mortal.freeze()
    try:
        with pytest.raises(BrokerUnavailable, match="overloaded, frozen"):
            job.result(timeout=0.2)
    finally:
        mortal.thaw()
    assert job.status().state is JobState.QUEUED


@pytest.mark.parametrize("url", ["localhost:6379", "http://localhost", "redis://host:notaport"])
def test_a_url_that_is_none_is_refused_at_once(url: str) -> None:
    with pytest.raises(InvalidConfiguration):
        Client(url)


@pytest.mark.parametrize("kind", [Client, BlockingClient])
def test_a_user_who_may_not_subscribe_is_told_so(kind: Callable[..., Any], mortal: RedisServer) -> None:
    with mortal.client() as admin:
        admin.execute_command("ACL SETUSER", "app", "on", ">pw", "~penstock:*", "+@all", "resetchannels")
    with (
        kind(mortal.url.replace("redis://", "redis://app:pw@"), queue="q") as sdk,
        pytest.raises(BrokerUnavailable, match=r"NOPERM .* channels .*; allow the ACL user"),
    ):
        sdk.submit("story")
    if isinstance(sdk, BlockingClient):
        sdk.end_loop()


def test_a_broker_out_of_memory_refuses_with_a_remedy(make_sdk: Callable[..., Any], mortal: RedisServer) -> None:
    sdk = make_sdk(mortal.url)
    job = sdk.submit("story")
    with mortal.client() as admin:
        admin.config_set("maxmemory", 1)
        with pytest.raises(BrokerUnavailable, match=r"OOM .*; raise maxmemory, or add workers"):
            sdk.submit("story")
        admin.config_set("maxmemory", 0)
    assert job.status().state is JobState.QUEUED


def pings_seen(admin: redis.Redis) -> int:
    return int(admin.info("commandstats").get("cmdstat_ping", {}).get("calls", 0))


def reader_of(sdk: Any) -> Any:
    return getattr(sdk, "_client", sdk)._shared


@pytest.mark.parametrize("kind", [Client, BlockingClient])
def test_a_connection_that_went_silent_is_replaced(
    kind: Callable[..., Any], mortal: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.reader.PING_AFTER_S", 0.1)
    monkeypatch.setattr("penstock.aio_reader.PING_AFTER_S", 0.1)
    with kind(mortal.url, queue="q") as sdk, mortal.client() as other:
        job = sdk.submit("story")
        worker = ScriptedWorker(other, QueueKeys("q"))
        held = worker.claim_one(job.id)
        stream = job.stream(timeout=60)
        worker.say(held, 1)
        seen = [next(stream)]
        reader = reader_of(sdk)
        failures = reader._failures
        mortal.freeze()
        until(lambda: reader._failures > failures, "the reader gives the silent connection up")
        mortal.thaw()
        worker.say(held, 2)
        worker.end(held)
        assert [token for chunk in [*seen, *stream] for token in chunk.token_ids] == [0, 1, 2]

        def kept_through_three_pings() -> bool:
            """A machine that stops for a moment may cost a connection; three answered pings in a row never do."""
            failures, pings = reader._failures, pings_seen(other)
            until(lambda: pings_seen(other) > pings + 2, "pings are sent")
            return bool(reader._failures == failures)

        until(kept_through_three_pings, "an answered ping keeps a silent connection")
    if isinstance(sdk, BlockingClient):
        sdk.end_loop()


@pytest.mark.parametrize("kind", [Client, BlockingClient])
def test_garbage_on_a_channel_harms_nobody(
    kind: Callable[..., Any], redis_url: str, redis_client: redis.Redis, queue: str
) -> None:
    keys = QueueKeys(queue)
    with kind(redis_url, queue=queue) as sdk:
        job = sdk.submit("story")
        for garbage in (b"", b"\xc1", b"\x93\x01\x02\x03"):
            assert redis_client.publish(keys.client(reader_of(sdk).client_id), garbage) == 1
        worker = ScriptedWorker(redis_client, keys)
        held = worker.claim_one(job.id)
        worker.say(held, 3)
        worker.end(held)
        assert job.result(timeout=30).token_ids == (0, 1, 2)
        assert reader_of(sdk)._failures == 0
    if isinstance(sdk, BlockingClient):
        sdk.end_loop()
