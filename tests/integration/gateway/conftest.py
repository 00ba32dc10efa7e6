"""A real gateway process in front of a real broker and a real worker on the bundled model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from penstock import Client
from penstock.gateway.auth import digest_of
from tests.redis_server import RedisServer, free_port
from tests.worker_process import WorkerProcess, until

KEYS = {"key-of-the-mill-0001": "mill", "key-of-the-harbour-2": "harbour"}
OPERATOR_KEY = "key-of-the-operator-1"


class Gateway:
    """One gateway process."""

    def __init__(self, redis_url: str, folder: Path, *options: str) -> None:
        self.redis_url = redis_url
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [sys.executable, "-m", "penstock", "gateway", "--redis", redis_url, "--port", str(self.port)]
        self._command += ["--queue", "penstock-story", *options]
        self._log = folder / "gateway.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        with httpx.Client(transport=httpx.HTTPTransport(retries=0), timeout=30) as client:
            until(lambda: self._answers(client), "the gateway to answer")

    def _answers(self, client: httpx.Client) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log
        try:
            client.get(f"{self.url}/v1/health")
        except httpx.TransportError:
            return False
        return True

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    @property
    def log(self) -> str:
        """What it has said."""
        return self._log.read_text()

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait(120)


@pytest.fixture(scope="module")
def story_redis(start_redis: Callable[..., RedisServer]) -> RedisServer:
    """A broker of this module's own."""
    return start_redis()


@pytest.fixture(scope="module")
def story_worker(story_redis: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    """A worker on the bundled model."""
    worker = WorkerProcess(story_redis.url, tmp_path_factory.mktemp("worker"), "w1")
    try:
        with Client(story_redis.url, queue="penstock-story") as client:
            worker.wait_until_ready(client)
        yield worker
        worker.terminate()
        assert worker.wait() == 0, worker.log
    finally:
        worker.end()


@pytest.fixture(scope="module")
def gateway(
    story_redis: RedisServer, story_worker: WorkerProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    """A gateway that asks for API keys."""
    folder = tmp_path_factory.mktemp("gateway")
    entries: dict[str, Any] = {digest_of(key): tenant for key, tenant in KEYS.items()}
    (folder / "keys.json").write_text(json.dumps({**entries, digest_of(OPERATOR_KEY): {"role": "operator"}}))
    started = Gateway(story_redis.url, folder, "--api-keys", str(folder / "keys.json"), "--max-body-bytes", "65536")
    started.start()
    yield started
    started.stop()


@pytest.fixture
def http(gateway: Gateway) -> Iterator[httpx.Client]:
    """A client of tenant `mill`."""
    key = next(key for key, tenant in KEYS.items() if tenant == "mill")
    with httpx.Client(base_url=gateway.url, headers={"Authorization": f"Bearer {key}"}, timeout=60) as client:
        yield client


@pytest.fixture
def stranger(gateway: Gateway) -> Iterator[httpx.Client]:
    """A client of another tenant."""
    key = next(key for key, tenant in KEYS.items() if tenant == "harbour")
    with httpx.Client(base_url=gateway.url, headers={"Authorization": f"Bearer {key}"}, timeout=60) as client:
        yield client


@pytest.fixture
def operator(gateway: Gateway) -> Iterator[httpx.Client]:
    """A client with an operator's key."""
    headers = {"Authorization": f"Bearer {OPERATOR_KEY}"}
    with httpx.Client(base_url=gateway.url, headers=headers, timeout=60) as client:
        yield client
