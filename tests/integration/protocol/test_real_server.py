"""What only a real server shows: crashes with AOF, lost replies, a full memory, a frozen process, its own clock."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest
import redis

from penstock_core.protocol import transitions as t
from penstock_core.protocol.connection import broker_errors, connect
from penstock_core.protocol.errors import BrokerUnavailable
from penstock_core.protocol.keys import QueueKeys
from tests.queue_driver import QueueDriver
from tests.redis_server import RedisServer, server_binaries
from tests.worker_process import until

pytestmark = pytest.mark.integration
VERSIONS = list(server_binaries())


@pytest.mark.parametrize("version", VERSIONS)
def test_everything_accepted_is_there_after_the_server_was_killed(start_redis, keys: QueueKeys, version: str) -> None:
    server: RedisServer = start_redis(version)
    with connect(server.url) as client:
        driver = QueueDriver(client, keys)
        driver.submit_all([driver.new_job() for _ in range(50)])
        running = driver.claim("w1", 10)
        for job in running:
            driver.publish("w1", driver.chunk(job.job_id, 1, 0, [1, 2]))
        driver.finish("w1", *(driver.final(job.job_id, 1) for job in running[:5]))
        before = driver.stats()
    server.kill()
    server.start()
    with connect(server.url) as client:
        driver.client = client
        assert driver.stats() == before
        assert driver.publish("w1", driver.chunk(running[5].job_id, 1, 2, [3])) == ["ok"]
        assert driver.tokens(running[5].job_id) == [1, 2, 3]
        driver.ended(running[0].job_id)
        assert len(driver.claim("w2", 100)) == 40
    server.stop()


class _Proxy:
    """A TCP proxy in front of the server that loses replies: forwards the command, then drops the connection."""

    def __init__(self, port: int) -> None:
        self._target = port
        self.lose_replies = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self._target)) as server, suppress(OSError):
            threading.Thread(target=self._replies, args=(server, client), daemon=True).start()
            while data := client.recv(65536):
                server.sendall(data)

    def _replies(self, server: socket.socket, client: socket.socket) -> None:
        with suppress(OSError):
            while data := server.recv(65536):
                if self.lose_replies > 0 and data[:1] not in b"+-":  # not the handshake's
                    self.lose_replies -= 1
                    client.shutdown(socket.SHUT_RDWR)
                    return
                client.sendall(data)


@contextmanager
def losing(proxy: _Proxy) -> Iterator[None]:
    """The reply to the command inside is lost."""
    proxy.lose_replies = 1
    with pytest.raises(redis.ConnectionError):
        yield
    assert proxy.lose_replies == 0


def test_no_reply_that_is_lost_loses_or_doubles_anything(redis_server, redis_client, keys: QueueKeys) -> None:
    # A client whose replies were dropped had its one XADD executed three times, by the transport's own retries.
    proxy = _Proxy(redis_server.port)
    with connect(proxy.url) as client:
        driver = QueueDriver(client, keys)
        driver.stats()
        job = driver.new_job(idempotency_key="once")
        with losing(proxy):
            driver.submit_all([job])
        assert driver.submit_all([job])[0].job_id == job.job_id
        with losing(proxy):
            driver.claim("w1", 5)
        assert driver.claim("w1", 5) == []
        assert driver.run(t.release_others(keys, "w1", [], driver.now)) == [job.job_id]
        (claimed,) = driver.claim("w1", 5)
        chunk = driver.chunk(job.job_id, claimed.attempt, 0, [1, 2])
        with losing(proxy):
            driver.publish("w1", chunk)
        assert driver.publish("w1", chunk) == ["ok"]
        final = driver.final(job.job_id, claimed.attempt)
        with losing(proxy):
            driver.finish("w1", final)
        assert driver.finish("w1", final) == ["ok"]
        assert driver.tokens(job.job_id) == [1, 2]
        driver.ended(job.job_id)
        stats = driver.stats()
        assert (stats["submitted"], stats["completed"], stats["tokens_out"]) == (1, 1, 2)
    proxy.close()


def test_a_full_memory_refuses_new_jobs_and_lets_running_ones_end(start_redis, keys: QueueKeys) -> None:
    server: RedisServer = start_redis()
    with connect(server.url) as client:
        driver = QueueDriver(client, keys)
        driver.submit_all([driver.new_job() for _ in range(3)])
        driver.claim("w1", 1)
        client.config_set("maxmemory", 1)
        with pytest.raises(BrokerUnavailable, match="raise maxmemory"), broker_errors(server.url):
            driver.submit()
        client.config_set("maxmemory", 0)
        assert driver.stats()["submitted"] == 3, "a refused script has written nothing"
        assert driver.finish("w1", driver.final("job00001", 1)) == ["ok"]
    server.stop()


def test_a_frozen_server_fails_the_call_in_bounded_time(
    start_redis: Callable[..., RedisServer], keys: QueueKeys
) -> None:
    server = start_redis()
    with connect(server.url, timeout_s=0.2) as client:
        driver = QueueDriver(client, keys)
        driver.submit()
        server.freeze()
        with pytest.raises(BrokerUnavailable, match="overloaded, frozen"), broker_errors(server.url):
            driver.claim()
        server.thaw()
        assert client.ping()
    server.stop()


def test_everything_a_finished_job_leaves_is_gone_after_its_time(redis_client, redis_server, keys: QueueKeys) -> None:
    driver = QueueDriver(redis_client, keys)
    job_id = driver.submit(result_ttl_s=0.05, idempotency_key="k")
    driver.take()
    driver.publish("w1", driver.chunk(job_id, 1, 0, [1]))
    driver.finish("w1", driver.final(job_id, 1))
    left = [keys.job(job_id), keys.events(job_id), keys.dedupe("default", "k")]
    until(lambda: not redis_client.exists(*left), "its keys to be gone")
    assert driver.run(t.read_job(keys, job_id)) is None
    driver.submit(job_id, idempotency_key="k")


@pytest.mark.parametrize("version", VERSIONS)
def test_a_refusal_inside_a_script_is_known_for_what_it_is(start_redis, keys: QueueKeys, version: str) -> None:
    """Redis 6 wraps it in words of its own: after a failover, workers took a demoted primary for a bug of theirs."""
    server: RedisServer = start_redis(version)

    def submit(driver: QueueDriver, url: str) -> None:
        with broker_errors(url):
            driver.submit_all([driver.new_job()])

    def refused_with(remedy: str, user: str = "") -> None:
        url = server.url.replace("//", f"//{user}")
        with connect(url) as client, pytest.raises(BrokerUnavailable, match=remedy):
            submit(QueueDriver(client, keys), url)

    with server.client() as operator:
        operator.config_set("min-replicas-to-write", 1)
        refused_with("NOREPLICAS.*until enough replicas")
        operator.config_set("min-replicas-to-write", 0)
        operator.config_set("maxmemory", 1)
        refused_with("raise maxmemory")
        operator.config_set("maxmemory", 0)
        operator.execute_command("ACL", "SETUSER", "bob", "on", ">pw", "~*", "&*", "+@all", "-hset")
        refused_with("allow the ACL user", "bob:pw@")
        operator.replicaof("127.0.0.1", server.port + 1)
        refused_with("point the URL at the primary")
