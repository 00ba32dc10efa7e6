"""The SDK's four faces behind one: `Client` and `AsyncClient`, each pushed to and polling, driven by the same tests."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

import pytest
import redis

from penstock import AsyncClient, AsyncJobHandle, Client, QueueFull
from penstock_core.protocol.keys import QueueKeys
from tests.integration.producer.scripted import ScriptedWorker

T = TypeVar("T")


class BlockingHandle:
    """An `AsyncJobHandle` for a test that is no coroutine."""

    def __init__(self, run: Callable[[Coroutine[Any, Any, Any]], Any], handle: AsyncJobHandle) -> None:
        self._run = run
        self._handle = handle
        self.id = handle.id
        self.duplicate = handle.duplicate

    def status(self) -> Any:
        return self._run(self._handle.status())

    def result(self, timeout: float | None = None) -> Any:
        return self._run(self._handle.result(timeout))

    def cancel(self) -> Any:
        return self._run(self._handle.cancel())

    def stream(self, *args: Any, **options: Any) -> Iterator[Any]:
        return self._iterate(self._handle.stream(*args, **options))

    def text_stream(self, *args: Any, **options: Any) -> Iterator[str]:
        return self._iterate(self._handle.text_stream(*args, **options))

    def _iterate(self, items: Any) -> Iterator[Any]:
        try:
            while True:
                try:
                    yield self._run(anext(items))
                except StopAsyncIteration:
                    return
        finally:
            self._run(items.aclose())


class BlockingClient:
    """An `AsyncClient` on a loop in a thread of its own, with the surface of `Client`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._client = AsyncClient(*args, **options)
        self.settings = self._client.settings

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        async def outcome() -> tuple[T | None, BaseException | None]:
            try:
                return await coroutine, None
            except (Exception, StopAsyncIteration) as error:
                return None, error

        value, error = asyncio.run_coroutine_threadsafe(outcome(), self._loop).result(60)
        if error is not None:
            raise error
        return value  # type: ignore[return-value]

    def submit(self, *args: Any, **options: Any) -> BlockingHandle:
        return BlockingHandle(self._run, self._run(self._client.submit(*args, **options)))

    def submit_many(self, items: Any) -> list[Any]:
        return [
            handle if isinstance(handle, QueueFull) else BlockingHandle(self._run, handle)
            for handle in self._run(self._client.submit_many(items))
        ]

    def job(self, job_id: str) -> BlockingHandle:
        return BlockingHandle(self._run, self._client.job(job_id))

    def jobs(self, **options: Any) -> Any:
        return self._run(self._client.jobs(**options))

    def queue_snapshot(self) -> Any:
        return self._run(self._client.queue_snapshot())

    def close(self) -> None:
        self._run(self._client.close())

    def end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> BlockingClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


FACES: list[tuple[str, Callable[..., Any], str]] = [
    ("threads-push", Client, "push"),
    ("threads-poll", Client, "poll"),
    ("asyncio-push", BlockingClient, "push"),
    ("asyncio-poll", BlockingClient, "poll"),
]


@pytest.fixture(params=FACES, ids=lambda face: face[0])
def connect_sdk(request: pytest.FixtureRequest, redis_url: str, queue: str) -> Iterator[Callable[..., Any]]:
    """Make clients of one face for the test's queue."""
    _, kind, mode = request.param
    clients = []

    def connect(**options: Any) -> Any:
        clients.append(kind(options.pop("url", redis_url), **{"queue": queue, "mode": mode, **options}))
        return clients[-1]

    yield connect
    for client in clients:
        client.close()
        if isinstance(client, BlockingClient):
            client.end_loop()


@pytest.fixture
def sdk(connect_sdk: Callable[..., Any]) -> Any:
    """A client of one face for the test's queue."""
    return connect_sdk()


@pytest.fixture
def worker(redis_client: redis.Redis, keys: QueueKeys) -> ScriptedWorker:
    """A worker that does as the test says."""
    return ScriptedWorker(redis_client, keys)
