"""A real gateway process in front of a real broker and a real worker on the bundled model."""

from __future__ import annotations

import json
import os
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
        with httpx.Client(transport=httpx.HTTPTransport(retries=0)) as client:
            for _ in range(600):
                assert self._process.poll() is None, self.log
                try:
                    client.get(f"{self.url}/v1/health", timeout=5)
                except httpx.TransportError:
                    _pause(self._process)
                    continue
                return
        raise AssertionError(f"the gateway did not start: {self.log}")

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
            self._process.wait(30)


def _pause(process: subprocess.Popen[bytes]) -> None:
    """Let the process get on, and notice at once when it ends."""
    try:
        process.wait(0.05)
    except subprocess.TimeoutExpired:
        return


@pytest.fixture(scope="module")
def story_redis(start_redis: Callable[..., RedisServer]) -> RedisServer:
    """A broker of this module's own."""
    return start_redis()


@pytest.fixture(scope="module")
def story_worker(story_redis: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A worker on the bundled model."""
    folder = tmp_path_factory.mktemp("worker")
    command = [sys.executable, "-m", "penstock_worker", "--redis-url", story_redis.url, "--threads", "1"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, "PENSTOCK_HEALTH_DIR": str(folder)}
        )
    with Client(story_redis.url, queue="penstock-story") as client:
        for _ in range(1200):
            if client.queue_snapshot().workers:
                break
            _pause(process)
    yield
    process.terminate()
    assert process.wait(60) == 0, (folder / "log").read_text()


@pytest.fixture(scope="module")
def gateway(
    story_redis: RedisServer, story_worker: None, tmp_path_factory: pytest.TempPathFactory
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
