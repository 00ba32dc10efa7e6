"""The one connection over which a process hears of its jobs, as a daemon thread; shared by all `Client`s of a broker.

The thread owns reading; whoever needs a channel sends SUBSCRIBE itself, under the lock. A lost connection is replaced
with backoff and everything is subscribed again; what was missed meanwhile is the inboxes' to fetch (`mark_lost`).
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from penstock.feed import Feed, FeedTable, Inbox
from penstock.subscriptions import Subscriptions, parse_reply
from penstock_core.protocol.errors import UndecodableRecord
from penstock_core.protocol.keys import QueueKeys

if TYPE_CHECKING:
    import redis
    from redis.connection import ConnectionInterface

PING_AFTER_S = 5.0  # of silence; a connection that stays silent for as long again is given up
CONFIRM_TIMEOUT_S = 5.0
NO_CONFIRMATION = (
    f"no answer to SUBSCRIBE within {CONFIRM_TIMEOUT_S:g} s (where a proxy breaks pub/sub, use Client(mode='poll'))"
)
_BACKOFF_FIRST_S, _BACKOFF_MAX_S = 0.05, 1.0
_CLOSE_TIMEOUT_S = 1.0

_log = logging.getLogger("penstock.client")


class WaitingInbox(Inbox):
    """An inbox a thread can wait at."""

    __slots__ = ("_event",)

    def __init__(self, *, chunks: bool) -> None:
        self._event = threading.Event()
        super().__init__(self._event.set, chunks=chunks)

    def wait(self, seconds: float) -> None:
        """Return when something was put, or the time is over."""
        self._event.clear()
        if self.is_quiet:
            self._event.wait(seconds)


class Reader:
    """The connection, its thread, and the feeds it fills.

    Args:
        broker: a client of the broker; the reader makes connections like its, and uses none of its.
    """

    def __init__(self, broker: redis.Redis) -> None:
        self.client_id = uuid.uuid4().hex
        self.users = 0  # clients that share it; counted by `shared_reader`
        self._broker = broker
        self._tables: dict[str, FeedTable] = {}
        self._subscriptions = Subscriptions()
        self._leaving: deque[tuple[QueueKeys, Feed, Inbox]] = deque()
        self._changed = threading.Condition(threading.Lock())  # guards everything below and the subscriptions
        self._connection: ConnectionInterface | None = None
        self._failures = 0
        self._failure: Exception | None = None
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def table(self, keys: QueueKeys) -> FeedTable:
        """Feeds of a queue. The first call for a queue subscribes to this process's channel."""
        with self._changed:
            table = self._tables.get(keys.queue)
            if table is None:
                table = self._tables[keys.queue] = FeedTable()
                self._add(keys.client(self.client_id), table.deliver_frame, table.mark_own_lost)
            return table

    def watch(self, keys: QueueKeys, job_id: str, feed: Feed | None, *, chunks: bool) -> tuple[Feed, WaitingInbox]:
        """Open an inbox for a job: at its feed if it was submitted here, else on the job's own channel."""
        self._let_go()
        table = self.table(keys)
        if feed is None:
            feed = table.obtain(job_id, keys.channel(job_id))
        inbox = WaitingInbox(chunks=chunks)
        table.open(feed, inbox)
        if feed.channel is not None:
            with self._changed:
                self._add(feed.channel, feed.deliver, feed.mark_lost)
        return feed, inbox

    def unwatch(self, keys: QueueKeys, feed: Feed, inbox: Inbox) -> None:
        """Close an inbox, now or soon.

        Waits for no lock: a stream that its user forgot is closed by the garbage collector, on whatever thread it runs
        and in the middle of whatever holds the lock there.
        """
        inbox.lost = True  # it takes no more
        self._leaving.append((keys, feed, inbox))
        self._let_go()

    def _let_go(self) -> None:
        """Close the inboxes that are left, as far as the locks are free."""
        while self._leaving and self._changed.acquire(blocking=False):
            try:
                keys, feed, inbox = self._leaving.popleft()
                if not self._tables[keys.queue].close(feed, inbox):
                    self._leaving.append((keys, feed, inbox))
                    return
                if feed.channel is not None and self._subscriptions.remove(feed.channel):
                    self._send("UNSUBSCRIBE", feed.channel)
            except IndexError:
                return  # another thread was faster
            finally:
                self._changed.release()

    def confirm(self, channel: str) -> None:
        """Wait until messages of a channel arrive; raises redis-py's or the system's error where that fails."""
        from redis import TimeoutError

        give_up = time.monotonic() + CONFIRM_TIMEOUT_S
        with self._changed:
            failures = self._failures
            while not self._subscriptions.is_confirmed(channel):
                if self._failures != failures:
                    assert self._failure is not None
                    raise self._failure
                if not self._changed.wait(give_up - time.monotonic()):
                    raise TimeoutError(NO_CONFIRMATION)

    def close(self) -> None:
        """End the thread and its connection."""
        self._closed.set()
        with self._changed:
            self._send("PING")  # its answer wakes the thread
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout=_CLOSE_TIMEOUT_S)

    def _add(self, channel: str, deliver: Callable[[bytes], None], interrupted: Callable[[], None]) -> None:
        if self._subscriptions.add(channel, deliver, interrupted):
            self._send("SUBSCRIBE", channel)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="penstock-reader", daemon=True)
            self._thread.start()

    def _send(self, command: str, *channels: str) -> None:
        """Send under the lock, if there is a connection; the thread subscribes to everything on a new one."""
        from redis import RedisError

        if self._connection is None:
            return
        if command == "SUBSCRIBE":
            for channel in channels:
                self._subscriptions.sent(channel)
        try:
            self._connection.send_command(command, *channels, check_health=False)  # type: ignore[no-untyped-call]
        except (RedisError, OSError):
            # redis-py has closed the connection, and would silently open it again, unsubscribed, for the next command.
            self._connection = None

    def _run(self) -> None:
        delay = _BACKOFF_FIRST_S
        while not self._closed.is_set():
            connection: ConnectionInterface | None = None
            try:
                connection = _open_connection(self._broker)
                self._serve(connection)
            except Exception as error:
                # Of any kind: a sender that fails closes the connection under this thread.
                with self._changed:
                    self._failures, self._failure = self._failures + 1, error
                    self._changed.notify_all()
                if connection is not None and not self._closed.is_set():
                    _log.info("connection for job events lost, reconnecting: %s", error or type(error).__name__)
            with self._changed:
                self._connection = None
                worked = self._subscriptions.disconnected()
            if connection is not None:
                connection.disconnect()  # type: ignore[no-untyped-call]
            delay = _BACKOFF_FIRST_S if worked else min(2 * delay, _BACKOFF_MAX_S)
            self._closed.wait(random.uniform(0, delay))

    def _serve(self, connection: ConnectionInterface) -> None:
        from redis import TimeoutError

        with self._changed:
            self._connection = connection
            if names := self._subscriptions.names:
                self._send("SUBSCRIBE", *names)
        pinged = False
        while self._connection is connection and not self._closed.is_set():
            self._let_go()
            if connection.can_read(timeout=PING_AFTER_S):
                pinged = False
                self._handle(connection.read_response(push_request=True))
            elif pinged:
                raise TimeoutError(f"no answer to PING within {PING_AFTER_S:g} s")
            else:
                pinged = True
                with self._changed:
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
            with self._changed:
                interrupted = self._subscriptions.acknowledged(message.channel)
                self._changed.notify_all()
            if interrupted is not None:
                interrupted()


def _open_connection(broker: redis.Redis) -> ConnectionInterface:
    """A connection of its own to the broker; of a cluster to any node, as every node hears every message."""
    from redis.cluster import RedisCluster

    if isinstance(broker, RedisCluster):
        broker = broker.get_redis_connection(broker.get_random_node())
    connection: ConnectionInterface = broker.connection_pool.make_connection()
    connection.connect()  # type: ignore[no-untyped-call]
    return connection


_readers: dict[object, Reader] = {}
_readers_lock = threading.Lock()


def shared_reader(identity: object, broker: redis.Redis) -> Reader:
    """The process's reader for a broker, made on first use. Each call is to be matched by `release_reader`."""
    with _readers_lock:
        reader = _readers.get(identity)
        if reader is None:
            reader = _readers[identity] = Reader(broker)
        reader.users += 1
        return reader


def release_reader(identity: object, reader: Reader) -> None:
    """One client less; the last one closes the reader."""
    with _readers_lock:
        reader.users -= 1
        last = reader.users == 0
        if last and _readers.get(identity) is reader:
            del _readers[identity]
    if last:
        reader.close()


def _forget_readers() -> None:
    """In a forked child: the parent's readers have no thread here, and their locks may be held for ever."""
    global _readers_lock
    _readers.clear()
    _readers_lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_readers)
