"""Brokers of every kind a URL can name, started for a test: TLS, unix socket, ACL user, Sentinel, Cluster."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import ssl
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis

from tests.redis_server import RedisServer, free_port, server_binaries
from tests.worker_process import until

StartRedis = Callable[..., RedisServer]

SERVICE = "mill"
SLOTS_PER_NODE = 5462
ACL_RULES = (
    "resetchannels",
    "~penstock:*",
    "&penstock:*",
    "+@all",
    "-@dangerous",
    "+info",
    "+client|setname",
    "+client|id",
)
"""What the message for NOPERM tells an operator to allow."""


@contextmanager
def password(start_redis: StartRedis) -> Iterator[str]:
    """A server with a password for everybody; one that a URL has to escape."""
    server = start_redis()
    with server.client() as admin:
        admin.config_set("requirepass", "p@ss/word:1")
        yield f"redis://:p%40ss%2Fword%3A1@127.0.0.1:{server.port}"


@contextmanager
def acl_user(start_redis: StartRedis) -> Iterator[str]:
    """A server with a user who may do no more than Penstock needs; nobody else may do anything."""
    server = start_redis()
    with server.client() as admin:
        admin.execute_command("ACL SETUSER", "miller", "on", ">flour", *ACL_RULES)
        admin.execute_command("ACL SETUSER", "default", "off")
        yield f"redis://miller:flour@127.0.0.1:{server.port}"


@contextmanager
def tls(start_redis: StartRedis) -> Iterator[str]:
    """A server with a certificate that only its own CA vouches for."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    with tempfile.TemporaryDirectory() as folder:
        key, certificate, port = f"{folder}/key.pem", f"{folder}/certificate.pem", free_port()
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
        command += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", key, "-out", certificate]
        subprocess.run(command, check=True, capture_output=True)
        options = ["--tls-port", str(port), "--tls-cert-file", certificate, "--tls-key-file", key]
        options += ["--tls-ca-cert-file", certificate, "--tls-auth-clients", "no"]
        with contextlib.ExitStack() as stack:
            if not any(_starts(start_redis, version, *options) for version in server_binaries()):
                port = stack.enter_context(_tls_in_front_of(start_redis().port, certificate, key))
            yield f"rediss://127.0.0.1:{port}?ssl_ca_certs={certificate}"


def _starts(start_redis: StartRedis, version: str, *options: str) -> bool:
    try:
        start_redis(version, *options)
    except RuntimeError:  # it was built without TLS
        return False
    return True


@contextmanager
def _tls_in_front_of(port: int, certificate: str, key: str) -> Iterator[int]:
    """A port where TLS ends in front of a server that has none."""
    loop = asyncio.new_event_loop()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)

    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()
        sink.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream, server = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(pump(reader, server), pump(upstream, writer))

    async def end_tasks() -> None:
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    listening = loop.run_until_complete(asyncio.start_server(accept, "127.0.0.1", 0, ssl=context))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield int(listening.sockets[0].getsockname()[1])
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.run_until_complete(end_tasks())
    loop.close()


@contextmanager
def unix_socket(start_redis: StartRedis) -> Iterator[str]:
    """A server on a socket in the file system."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/redis.sock"
        start_redis(None, "--unixsocket", path)
        yield f"unix://{path}"


class SentinelPair:
    """A primary, its replica, and two sentinels that watch them."""

    def __init__(self, start_redis: StartRedis, folder: Path) -> None:
        self.primary = start_redis()
        self.replica = start_redis(None, "--replicaof", "127.0.0.1", str(self.primary.port))
        self.ports = [free_port(), free_port()]
        self._processes = [self._start_sentinel(port, folder) for port in self.ports]
        places = ",".join(f"127.0.0.1:{port}" for port in self.ports)
        self.url = f"redis+sentinel://{places}/{SERVICE}"
        until(self._is_settled, "both sentinels to know each other and the replica")

    def kill_primary(self) -> None:
        """One sentinel is told to miss it soon. Until now both had patience, as on a machine that stops for a moment a
        failover would begin by itself; and two that begin one at the same moment wait for each other for seconds."""
        self.primary.kill()
        with redis.Redis(port=self.ports[0], protocol=2) as sentinel:
            sentinel.execute_command("SENTINEL SET", SERVICE, "down-after-milliseconds", 500)

    def _start_sentinel(self, port: int, folder: Path) -> subprocess.Popen[bytes]:
        configuration = folder / f"sentinel-{port}.conf"
        configuration.write_text(
            f"port {port}\nbind 127.0.0.1\ndir {folder}\n"
            f"sentinel monitor {SERVICE} 127.0.0.1 {self.primary.port} 1\n"
            f"sentinel down-after-milliseconds {SERVICE} 60000\nsentinel failover-timeout {SERVICE} 5000\n"
        )
        with (folder / f"sentinel-{port}.log").open("wb") as log:
            command = [self.primary.binary, str(configuration), "--sentinel"]
            return subprocess.Popen(command, stdout=log, stderr=log)

    def _is_settled(self) -> bool:
        return all(self._sees_everybody(port) for port in self.ports)

    def _sees_everybody(self, port: int) -> bool:
        with redis.Redis(port=port, protocol=2) as sentinel:
            try:
                state = sentinel.sentinel_master(SERVICE)
                replicas = sentinel.sentinel_slaves(SERVICE)
            except redis.RedisError:
                return False
        linked = [replica for replica in replicas if replica["master-link-status"] == "ok"]
        return bool(state["num-other-sentinels"] == 1 and len(linked) == 1)

    def has_promoted(self) -> bool:
        """Whether both sentinels hold the replica for the primary, and it is up."""
        for port in self.ports:
            with redis.Redis(port=port, protocol=2) as sentinel:
                state = sentinel.sentinel_master(SERVICE)
            if state["port"] != self.replica.port or state["is_sdown"] or state["is_odown"]:
                return False
        with self.replica.client() as client:
            return bool(client.info("replication")["role"] == "master")

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()


@contextmanager
def sentinel(start_redis: StartRedis) -> Iterator[str]:
    """A primary found through its sentinels."""
    with tempfile.TemporaryDirectory() as folder:
        pair = SentinelPair(start_redis, Path(folder))
        try:
            yield pair.url
        finally:
            pair.end()


@contextmanager
def cluster(start_redis: StartRedis) -> Iterator[str]:
    """Three nodes that share the slots."""
    nodes = [start_redis(None, "--cluster-enabled", "yes", "--cluster-node-timeout", "30000") for _ in range(3)]
    clients = [node.client() for node in nodes]
    for number, client in enumerate(clients):
        client.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
        client.execute_command(
            "CLUSTER ADDSLOTS", *range(number * SLOTS_PER_NODE, min(16384, (number + 1) * SLOTS_PER_NODE))
        )
        client.execute_command("CLUSTER MEET", "127.0.0.1", nodes[0].port)

    def is_whole(client: redis.Redis) -> bool:
        info = client.execute_command("CLUSTER INFO")
        return bool(
            info["cluster_state"] == "ok"
            and int(info["cluster_known_nodes"]) == 3
            and int(info["cluster_slots_assigned"]) == 16384
        )

    until(lambda: all(is_whole(client) for client in clients), "the cluster to be whole")
    yield "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in nodes)
    for client in clients:
        client.close()


BROKERS: dict[str, Callable[[StartRedis], object]] = {
    "password": password,
    "ACL user": acl_user,
    "TLS": tls,
    "unix socket": unix_socket,
    "sentinel": sentinel,
    "cluster of three": cluster,
}
