"""What one connection may cost: a bounded head, in bounded time, and no buffer that never drains."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from typing import Any

import pytest
import uvicorn

from penstock.gateway.settings import Limits
from penstock.gateway.wire import bounded

LIMITS = Limits(max_head_bytes=2048, head_timeout_s=0.2, stall_timeout_s=0.2)


@asynccontextmanager
async def serving(app: Any) -> AsyncIterator[int]:
    config = uvicorn.Config(app, port=0, http=bounded(LIMITS), ws="none", lifespan="off", log_level="critical")
    server = uvicorn.Server(config)
    server.capture_signals = nullcontext  # type: ignore[assignment,method-assign]  # pytest has the signals
    running = asyncio.ensure_future(server.serve())
    while not server.started:
        await asyncio.sleep(0)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    await running


async def hello(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


async def exchange(port: int, data: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    answer = await reader.read()
    writer.close()
    return answer


async def test_a_good_request_is_answered() -> None:
    async with serving(hello) as port:
        answer = await exchange(port, b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 4000 + b"\r\n\r\n", b"431"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX-Endless: " + b"a" * 4000, b"431"),
        (b"GET /" + b"a" * 4000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", b"431"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: ", b"408"),
        (b"", b"408"),
        (b"this is no HTTP\r\n\r\n", b"400"),
    ],
)
async def test_a_head_too_large_or_too_slow_is_refused_and_the_connection_closed(data: bytes, status: bytes) -> None:
    async with serving(hello) as port:
        assert (await exchange(port, data)).split(b" ")[1] == status


async def test_a_client_that_does_not_read_is_disconnected_and_its_stream_ended() -> None:
    ended = asyncio.Event()
    sent = 0

    async def endless(scope: Any, receive: Any, send: Any) -> None:
        nonlocal sent

        async def write() -> None:
            nonlocal sent
            await send({"type": "http.response.start", "status": 200, "headers": []})
            while True:
                await send({"type": "http.response.body", "body": b"x" * 65_536, "more_body": True})
                sent += 1

        writing = asyncio.ensure_future(write())
        while (await receive())["type"] != "http.disconnect":
            pass
        writing.cancel()
        ended.set()

    async with serving(endless) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await asyncio.wait_for(ended.wait(), 60)
        assert sent < 2000, "it was held back long before"
        last = b""
        while read := await reader.read(65_536):
            last = read
        assert not last.endswith(b"0\r\n\r\n"), "a stream cut off does not look like one that ended"
        writer.close()
