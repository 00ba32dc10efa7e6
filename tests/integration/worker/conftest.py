"""One broker, one worker on the bundled model and one client for this folder's tests."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator

import pytest

from penstock import Client
from tests.redis_server import RedisServer
from tests.worker_process import WorkerProcess


@pytest.fixture(scope="module")
def server(start_redis: Callable[..., RedisServer]) -> RedisServer:
    """A broker of this module's own."""
    return start_redis()


@pytest.fixture(scope="module")
def client(server: RedisServer) -> Iterator[Client]:
    """A client of this module's queue."""
    with Client(server.url, queue=f"test-{uuid.uuid4().hex[:12]}") as made:
        yield made


@pytest.fixture(scope="module")
def worker(server: RedisServer, client: Client, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    """The worker; it must outlive every test of the module, and then drain cleanly."""
    started = WorkerProcess(server.url, tmp_path_factory.mktemp("worker"), "w1", "--queue", client.settings.queue)
    started.wait_until_ready(client)
    yield started
    assert started.is_running, started.log
    started.terminate()
    assert started.wait() == 0, started.log
