"""Jobs and their tokens over every kind of connection a URL can name; and refusals that say what is wrong with one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis.crc import key_slot

from penstock import BrokerUnavailable, Client, InvalidConfiguration
from penstock_core.protocol.connection import check_broker, connect
from penstock_core.protocol.keys import QueueKeys
from penstock_core.protocol.transitions import run, snapshot
from tests.integration.producer.conftest import FACES, BlockingClient
from tests.integration.producer.scripted import BusyWorker, ScriptedWorker
from tests.integration.protocol.brokers import BROKERS, SLOTS_PER_NODE, SentinelPair, StartRedis, acl_user, tls
from tests.worker_process import WorkerProcess, end_leases, until

pytestmark = pytest.mark.integration


def queue_on_node(node: int, name: str) -> str:
    """The name of a queue whose slot is on this node of a cluster of three."""
    names = (f"{name}-{number}" for number in range(1000))
    return next(queue for queue in names if key_slot(queue.encode()) // SLOTS_PER_NODE == node)


@pytest.fixture(scope="module", params=BROKERS.values(), ids=BROKERS.keys())
def url(request: pytest.FixtureRequest, start_redis: StartRedis) -> Iterator[str]:
    """A broker of each kind in turn."""
    with request.param(start_redis) as started:
        yield started


@pytest.mark.parametrize("face", FACES[::2], ids=lambda face: face[0])
def test_jobs_and_their_tokens_pass_over_every_connection(url: str, face: tuple[str, Callable[..., Any], str]) -> None:
    name, kind, mode = face
    for node in range(3):
        queue = queue_on_node(node, name)
        with BusyWorker(lambda: connect(url), QueueKeys(queue)), kind(url, queue=queue, mode=mode) as sdk:
            job = sdk.submit("story", max_tokens=20)
            assert [token for chunk in job.stream(timeout=30) for token in chunk.token_ids] == list(range(20))
            assert job.result(timeout=30).token_ids == tuple(range(20))
            assert len(list(sdk.job(job.id).stream(from_offset=18, timeout=30))) == 2
            assert sdk.queue_snapshot().stats["submitted"] == 1
        if isinstance(sdk, BlockingClient):
            sdk.end_loop()


def test_a_real_worker_serves_over_every_connection(url: str, tmp_path: Path) -> None:
    with Client(url, queue="real") as client:
        worker = WorkerProcess(url, tmp_path, "w1", "--queue", "real")
        try:
            worker.wait_until_ready(client)
            job = client.submit("Once upon a time", seed=1, max_tokens=24, ignore_eos=True)
            assert len([token for chunk in job.stream(timeout=60) for token in chunk.token_ids]) == 24
            running = client.submit("Once upon a time", seed=1, max_tokens=900, ignore_eos=True)
            next(running.stream(timeout=60))
            assert running.cancel() in ("cancelling", "ended")
            until(lambda: running.status().state.is_terminal, "the cancellation to ring")
            worker.terminate()
            assert worker.wait() == 0, worker.log
        finally:
            worker.end()


def test_a_job_is_taken_over_over_every_connection(url: str, tmp_path: Path) -> None:
    """Long before its lease ends, except where the user may not list connections."""
    with Client(url, queue="takeover") as client:
        workers = [WorkerProcess(url, tmp_path, f"w{n}", "--queue", "takeover", "--lease-s", "600") for n in (1, 2)]
        try:
            for worker in workers:
                worker.wait_until_ready(client)
            job = client.submit("Once upon a time", seed=1, max_tokens=700, ignore_eos=True)
            stream = job.stream(timeout=90)
            tokens = list(next(stream).token_ids)
            owner = job.status().owner
            next(worker for worker in workers if worker.worker_id == owner).kill()
            if "miller:" in url:
                end_leases(client, owner)
            for chunk in stream:
                tokens += chunk.token_ids
            assert tokens == list(job.result(timeout=60).token_ids)
            assert job.status().attempt == 2
            assert client.queue_snapshot().stats["reclaimed"] == 1
        finally:
            for worker in workers:
                worker.end()


def test_the_check_of_a_broker_works_over_every_connection(url: str) -> None:
    with connect(url) as client:
        assert [warning for warning in check_broker(client) if warning.severity == "error"] == []


@pytest.mark.parametrize("face", FACES[::2], ids=lambda face: face[0])
def test_a_stream_goes_on_after_the_sentinels_promote_the_replica(
    start_redis: StartRedis, tmp_path: Path, face: tuple[str, Callable[..., Any], str]
) -> None:
    _, kind, mode = face
    pair = SentinelPair(start_redis, tmp_path)
    keys = QueueKeys("failover")
    try:
        with connect(pair.url) as broker, kind(pair.url, queue="failover", mode=mode, patience_s=90.0) as sdk:
            worker = ScriptedWorker(broker, keys, lease_ms=600_000)
            job = sdk.submit("story", max_tokens=8)
            held = worker.claim_one(job.id)
            worker.say(held, 3)
            tokens = job.stream()
            assert next(tokens).token_ids == (0, 1, 2)
            assert broker.wait(1, 30_000) == 1, "the replica to have it all"
            pair.kill_primary()
            until(pair.has_promoted, "the replica to be promoted")
            with connect(pair.url) as anew:
                worker.use(anew)
                worker.say(held, 5)
                worker.end(held)
                assert [token for chunk in tokens for token in chunk.token_ids] == [3, 4, 5, 6, 7]
                assert job.result(timeout=30).token_ids == tuple(range(8))
                assert run(anew, snapshot(keys)).stats["completed"] == 1
        if isinstance(sdk, BlockingClient):
            sdk.end_loop()
    finally:
        pair.end()


def test_a_wrong_password_is_refused_with_the_remedy(start_redis: StartRedis) -> None:
    with (
        acl_user(start_redis) as url,
        Client(url.replace("flour", "bran"), queue="refused") as client,
        pytest.raises(BrokerUnavailable, match="check user and password") as caught,
    ):
        client.submit("story")
    assert "bran" not in str(caught.value)


def test_a_certificate_nobody_vouches_for_is_refused_with_the_remedy(start_redis: StartRedis) -> None:
    with (
        tls(start_redis) as url,
        Client(url.partition("?")[0], queue="refused") as client,
        pytest.raises(BrokerUnavailable, match="certificate options"),
    ):
        client.submit("story")


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://127.0.0.1:6379", "begins with none of"),
        ("redis+sentinel://127.0.0.1:26379", "names no service"),
        ("redis+sentinel://127.0.0.1:26379/mill/one", "is no number"),
        ("redis+cluster://127.0.0.1:6379/1", "a cluster has one database"),
        ("redis+cluster://127.0.0.1:6379?colour=blue", "unknown option colour"),
        ("redis://127.0.0.1:6379?colour=blue", "colour"),
        ("redis+sentinel://127.0.0.1:port/mill", "is no host:port"),
    ],
)
def test_a_url_that_says_nothing_sensible_is_refused_by_name(url: str, reason: str) -> None:
    with pytest.raises(InvalidConfiguration, match=reason):
        connect(url)
