"""A lean way to call scripts from asyncio: redis-py connects, and this takes its socket over.

redis-py's stream, pool, retry and timeout machinery costs several times what a call costs Redis. Here a command is
packed by hiredis and written at once, replies are parsed as bytes arrive and settle futures in order; any number of
calls may be under way. Where that cannot be had (a cluster, no hiredis, a test's fake) redis-py makes the calls.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import redis.asyncio
from redis import exceptions

from penstock_core.protocol.script import Call, run_async, run_many_async

try:
    import hiredis
    from redis._parsers.base import BaseParser  # private: what kind of error an error reply is
except ImportError:  # an interpreter without a wheel, or another redis-py
    hiredis = None  # type: ignore[assignment]

T = TypeVar("T")

_NO_REPLY = object()


class Line(asyncio.Protocol):
    """One socket: bytes out, parsed replies in.

    Args:
        connection: a connected redis-py connection that nobody uses; its socket is this line's from now on.
        on_reply: called with each reply; an error reply is an exception.
        on_lost: called once, when the socket is gone.
    """

    def __init__(
        self, connection: Any, on_reply: Callable[[Any], None], on_lost: Callable[[Exception | None], None]
    ) -> None:
        self._on_reply = on_reply
        self._on_lost = on_lost
        self._parser = hiredis.Reader(
            protocolError=exceptions.InvalidResponse, replyError=BaseParser.parse_error, notEnoughData=_NO_REPLY
        )
        self._owner = connection, connection._writer  # a writer that is collected closes its transport
        self._transport: Any = connection._writer.transport
        connection._reader = connection._writer = None
        self._transport.set_protocol(self)
        self._transport.resume_reading()

    @staticmethod
    def fits(connection: Any) -> bool:
        """Whether a redis-py connection has a socket to take over."""
        writer = getattr(connection, "_writer", None)
        return hiredis is not None and hasattr(getattr(writer, "transport", None), "set_protocol")

    def send(self, words: Sequence[Any]) -> None:
        """Write one command."""
        self._transport.write(hiredis.pack_command(tuple(words)))

    def close(self) -> None:
        """Give the socket up; `on_lost` follows."""
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        """Of asyncio: hand on every reply that is complete."""
        self._parser.feed(data)
        try:
            while (reply := self._parser.gets()) is not _NO_REPLY:
                self._on_reply(reply)
        except exceptions.InvalidResponse:
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        """Of asyncio."""
        self._on_lost(error)


class Wire:
    """Calls scripts over a line of its own, made when first used and made anew when it was lost.

    Raises what redis-py would: nothing is repeated here, except a call that the server refused to begin (NOSCRIPT).
    """

    def __init__(self, client: redis.asyncio.Redis) -> None:
        self._client = client
        self._lean = hiredis is not None and not isinstance(client, redis.asyncio.RedisCluster)
        self._timeout_s: float | None = None
        self._line: Line | None = None
        self._connecting = asyncio.Lock()
        self._under_way: deque[asyncio.Future[Any]] = deque()

    async def run(self, call: Call[T]) -> T:
        """As `run_async`."""
        line = self._line or await self._connect()
        if line is None:
            return await run_async(self._client, call)
        return (await self._run_all(line, (call,)))[0]

    async def run_many(self, calls: Sequence[Call[T]]) -> list[T]:
        """As `run_many_async`."""
        line = self._line or await self._connect()
        if line is None:
            return await run_many_async(self._client, calls)
        return await self._run_all(line, calls)

    async def _run_all(self, line: Line, calls: Sequence[Call[T]]) -> list[T]:
        replies = [self._send(line, _evalsha(call)) for call in calls]
        results: list[T] = []
        try:
            for call, reply in zip(calls, replies, strict=True):
                try:
                    answer = await reply
                except exceptions.NoScriptError:
                    answer = await self._send(line, ("EVAL", call.script.text, len(call.keys), *call.keys, *call.args))
                results.append(call.parse(answer))
        finally:
            for reply in replies:
                if not reply.cancel() and not reply.cancelled():
                    reply.exception()  # a failure that nobody awaits is no news: the first one says it all
        return results

    def close(self) -> None:
        """Give the line up; a later call makes another."""
        line, self._line = self._line, None
        if line is not None:
            line.close()

    def _send(self, line: Line, words: Sequence[Any]) -> asyncio.Future[Any]:
        loop = asyncio.get_running_loop()
        reply: asyncio.Future[Any] = loop.create_future()
        if line is not self._line:
            reply.set_exception(exceptions.ConnectionError("the connection was lost"))
            return reply
        line.send(words)
        self._under_way.append(reply)
        if self._timeout_s is not None:
            timer = loop.call_later(self._timeout_s, self._time_out, reply)
            reply.add_done_callback(lambda _: timer.cancel())
        return reply

    def _time_out(self, reply: asyncio.Future[Any]) -> None:
        if not reply.done():
            reply.set_exception(exceptions.TimeoutError(f"no reply within {self._timeout_s:g} s"))
            self.close()

    async def _connect(self) -> Line | None:
        """A line, or None where there cannot be one."""
        async with self._connecting:
            if self._line is None and self._lean:
                pool = self._client.connection_pool
                connection: Any = pool.make_connection()  # type: ignore[no-untyped-call]
                await connection.connect()
                if not Line.fits(connection):
                    self._lean = False
                    await connection.disconnect()
                    return None
                self._timeout_s = connection.socket_timeout
                self._under_way = under_way = deque[asyncio.Future[Any]]()

                def settle(reply: Any) -> None:
                    future = under_way.popleft()
                    if future.done():
                        return  # its caller was cancelled
                    if isinstance(reply, Exception):
                        future.set_exception(reply)
                        if isinstance(reply, exceptions.ReadOnlyError):
                            line.close()  # no longer the master: the next call asks who is
                    else:
                        future.set_result(reply)

                def lost(error: Exception | None) -> None:
                    if self._line is line:
                        self._line = None
                    for future in under_way:
                        if not future.done():
                            future.set_exception(exceptions.ConnectionError(str(error or "closed by the server")))
                    under_way.clear()

                line = self._line = Line(connection, settle, lost)
            return self._line


def _evalsha(call: Call[Any]) -> tuple[Any, ...]:
    return ("EVALSHA", call.script.sha1, len(call.keys), *call.keys, *call.args)
