"""A broker, a client and as many workers as a test asks for; whatever is left of them ends with the test."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from penstock import Client
from tests.redis_server import RedisServer
from tests.worker_process import WorkerProcess

StartWorker = Callable[..., WorkerProcess]


@pytest.fixture(scope="module")
def server(start_redis: Callable[..., RedisServer]) -> RedisServer:
    """A broker of this module's own, with AOF."""
    return start_redis()


@pytest.fixture
def client(server: RedisServer, queue: str) -> Iterator[Client]:
    """A client of a queue nobody else uses."""
    with Client(server.url, queue=queue) as made:
        yield made


@pytest.fixture
def start_worker(server: RedisServer, queue: str, client: Client, tmp_path: Path) -> Iterator[StartWorker]:
    """`start_worker(*options)`: a worker of the test's queue, ready to claim."""
    started: list[WorkerProcess] = []
    numbers = itertools.count(1)

    def start(*options: str, ready: bool = True) -> WorkerProcess:
        worker = WorkerProcess(server.url, tmp_path, f"w{next(numbers)}", "--queue", queue, *options)
        started.append(worker)
        if ready:
            worker.wait_until_ready(client)
        return worker

    yield start
    for worker in started:
        worker.end()
