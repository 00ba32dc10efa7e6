"""The reader of `reader`, for asyncio: one connection and one task per event loop and broker.

Feeds and inboxes are filled and emptied on the loop's own thread. Only the reader's task sends, so that a caller that
is cancelled leaves no command half sent, and watching needs no await.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import uuid
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import redis
import redis.asyncio
from redis.asyncio.cluster import RedisCluster
from redis.asyncio.connection import AbstractConnection

from penstock.feed import Feed, FeedTable, Inbox
from penstock.reader import CONFIRM_TIMEOUT_S, NO_CONFIRMATION, PING_AFTER_S
from penstock.subscriptions import Subscriptions, parse_reply
from penstock_core.protocol.errors import UndecodableRecord
from penstock_core.protocol.keys import QueueKeys

_BACKOFF_FIRST_S, _BACKOFF_MAX_S = 0.05, 1.0

_log = logging.getLogger("penstock.client")


class AwaitedInbox(Inbox):
    """An inbox a coroutine can wait at."""

    __slots__ = ("_event",)

    def __init__(self, *, chunks: bool) -> None:
        self._event = asyncio.Event()
        super().__init__(self._event.set, chunks=chunks)

    async def wait(self, seconds: float) -> None:
        """Return when something was put, or the time is over."""
        self._event.clear()
        if self.is_quiet:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._event.wait()


class AsyncReader:
    """The connection, its task, and the feeds it fills.

    Args:
        broker: a client of the broker; the reader makes connections like its, and uses none of its.
    """

    def __init__(self, broker: redis.asyncio.Redis) -> None:
        self.client_id = uuid.uuid4().hex
        self.users = 0  # clients that share it; counted by `shared_reader`
        self._broker = broker
        self._tables: dict[str, FeedTable] = {}
        self._subscriptions = Subscriptions()
        self._outbox: asyncio.Queue[tuple[str, ...]] = asyncio.Queue()
        self._news: dict[str, asyncio.Event] = {}  # of channels somebody waits for: confirmed, or failed
        self._failures = 0
        self._failure: Exception | None = None
        self._task: asyncio.Task[None] | None = None

    def table(self, keys: QueueKeys) -> FeedTable:
        """Feeds of a queue. The first call for a queue subscribes to this process's channel."""
        table = self._tables.get(keys.queue)
        if table is None:
            table = self._tables[keys.queue] = FeedTable()
            self._add(keys.client(self.client_id), table.deliver_frame, table.mark_own_lost)
        return table

    def watch(self, keys: QueueKeys, job_id: str, feed: Feed | None, *, chunks: bool) -> tuple[Feed, AwaitedInbox]:
        """Open an inbox for a job: at its feed if it was submitted here, else on the job's own channel."""
        table = self.table(keys)
        if feed is None:
            feed = table.obtain(job_id, keys.channel(job_id))
        inbox = AwaitedInbox(chunks=chunks)
        table.open(feed, inbox)
        if feed.channel is not None:
            self._add(feed.channel, feed.deliver, feed.mark_lost)
        return feed, inbox

    def unwatch(self, keys: QueueKeys, feed: Feed, inbox: Inbox) -> None:
        """Close an inbox."""
        inbox.lost = True  # it takes no more, even where the table is busy
        self._tables[keys.queue].close(feed, inbox)
        if feed.channel is not None and self._subscriptions.remove(feed.channel):
            self._send("UNSUBSCRIBE", feed.channel)

    async def confirm(self, channel: str) -> None:
        """Wait until messages of a channel arrive; raises redis-py's or the system's error where that fails."""
        failures = self._failures
        try:
            async with asyncio.timeout(CONFIRM_TIMEOUT_S):
                while not self._subscriptions.is_confirmed(channel):
                    if self._failures != failures:
                        assert self._failure is not None
                        raise self._failure
                    await self._news.setdefault(channel, asyncio.Event()).wait()
        except TimeoutError as error:
            if error is self._failure:
                raise
            raise redis.TimeoutError(NO_CONFIRMATION) from None

    async def close(self) -> None:
        """End the task and its connection."""
        if self._task is not None:
            await _end(self._task)

    def _add(self, channel: str, deliver: Callable[[bytes], None], interrupted: Callable[[], None]) -> None:
        if self._subscriptions.add(channel, deliver, interrupted):
            self._send("SUBSCRIBE", channel)
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="penstock-reader")

    def _send(self, command: str, *channels: str) -> None:
        """Have it sent. What is still unsent when the connection is lost is covered by subscribing to everything."""
        if command == "SUBSCRIBE":
            for channel in channels:
                self._subscriptions.sent(channel)
        self._outbox.put_nowait((command, *channels))

    def _tell(self, channel: str | None = None) -> None:
        """Wake those who wait for a channel's confirmation, or (None) for any."""
        for name in list(self._news) if channel is None else [channel]:
            news = self._news.pop(name, None)
            if news is not None:
                news.set()

    async def _run(self) -> None:
        delay = _BACKOFF_FIRST_S
        while True:
            connection: AbstractConnection | None = None
            try:
                connection = await _open_connection(self._broker)
                await self._serve(connection)
            except Exception as error:
                # Of any kind: a sender that fails closes the connection under the receiver.
                self._failures, self._failure = self._failures + 1, error
                self._tell()
                if connection is not None:
                    _log.info("connection for job events lost, reconnecting: %s", error or type(error).__name__)
            worked = self._subscriptions.disconnected()
            delay = _BACKOFF_FIRST_S if worked else min(2 * delay, _BACKOFF_MAX_S)
            await asyncio.sleep(random.uniform(0, delay))

    async def _serve(self, connection: AbstractConnection) -> None:
        self._outbox = asyncio.Queue()
        self._subscriptions.disconnected()  # what was sent before went into no connection
        sender = asyncio.create_task(self._send_all(connection, self._outbox))
        try:
            await self._receive_all(connection)
        finally:
            await _end(sender)
            await connection.disconnect(nowait=True)

    async def _send_all(self, connection: AbstractConnection, outbox: asyncio.Queue[tuple[str, ...]]) -> None:
        while True:
            command = await outbox.get()
            try:
                await connection.send_command(*command, check_health=False)
            except (redis.RedisError, OSError):
                return  # redis-py has closed the connection, which ends the receiver

    async def _receive_all(self, connection: AbstractConnection) -> None:
        if names := self._subscriptions.names:
            self._send("SUBSCRIBE", *names)
        pinged = False
        while True:
            reply = await connection.read_response(timeout=PING_AFTER_S, push_request=True)
            if reply is not None:
                pinged = False
                self._handle(reply)
            elif pinged:
                raise redis.TimeoutError(f"no answer to PING within {PING_AFTER_S:g} s")
            else:
                pinged = True
                self._send("PING")

    def _handle(self, reply: Any) -> None:
        message = parse_reply(reply)
        if message is None:
            return
        if message.kind == "message":
            receiver = self._subscriptions.receiver(message.channel)
            if receiver is not None:
                try:
                    receiver(message.payload)
                except UndecodableRecord as error:
                    _log.warning("channel %s: %s", message.channel, error)
        elif message.kind == "subscribe":
            interrupted = self._subscriptions.acknowledged(message.channel)
            self._tell(message.channel)
            if interrupted is not None:
                interrupted()


async def _end(task: asyncio.Task[None]) -> None:
    """Cancel a task until it ends: before Python 3.12 `wait_for`, which redis-py sends with, can swallow one cancel."""
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=0.05)


async def _open_connection(broker: redis.asyncio.Redis) -> AbstractConnection:
    """A connection of its own to the broker; of a cluster to any node, as every node hears every message."""
    connection: AbstractConnection
    if isinstance(broker, RedisCluster):
        await broker.initialize()
        node = broker.get_random_node()
        connection = node.connection_class(**node.connection_kwargs)
    else:
        connection = broker.connection_pool.make_connection()  # type: ignore[no-untyped-call]
    await connection.connect()  # type: ignore[no-untyped-call]
    return connection


_readers: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[object, AsyncReader]] = WeakKeyDictionary()


def shared_reader(identity: object, broker: redis.asyncio.Redis) -> AsyncReader:
    """The running loop's reader for a broker, made on first use. Each call is to be matched by `release_reader`."""
    readers = _readers.setdefault(asyncio.get_running_loop(), {})
    reader = readers.get(identity)
    if reader is None:
        reader = readers[identity] = AsyncReader(broker)
    reader.users += 1
    return reader


async def release_reader(identity: object, reader: AsyncReader) -> None:
    """One client less; the last one closes the reader."""
    reader.users -= 1
    if reader.users == 0:
        readers = _readers.get(asyncio.get_running_loop(), {})
        if readers.get(identity) is reader:
            del readers[identity]
        await reader.close()
