"""The doorbell: one subscription through which Redis tells this worker of new jobs and of cancellations.

Only a wake-up: whoever misses a ring finds the job by asking, and the cancellation at the next renewal. Its connection
is also the worker's sign of life: Redis closes it the moment the process is gone, and the reclaim role of others sees
that.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable
from typing import Any

import redis.asyncio
from redis import exceptions
from redis.asyncio.client import PubSub

from penstock_core.protocol.errors import BrokerUnavailable
from penstock_core.protocol.wire import Line
from penstock_worker.metrics import WorkerMetrics
from penstock_worker.role import SIGN_OF_LIFE_BACKOFF_S, RoleLoop

_logger = logging.getLogger(__name__)

_PING_EVERY_S = 5.0
_SILENT_AFTER_S = 15.0
_RUN_ID = re.compile(rb"^run_id:(\w+)", re.MULTILINE)


def bell_name(worker_id: str) -> str:
    """What the doorbell's connection calls itself in CLIENT LIST."""
    return f"penstock-worker:{worker_id}"


class Doorbell:
    """Listens for rings. `client` is used by nobody else: a subscriber's connection can do nothing besides.

    Attributes:
        connected: it was up once.
        client_id: Redis' id of the connection while it is up, else None.
        server_since: this process's monotonic time when it first met this run of the server; a server that was
            restarted, or another that took over, is met anew.
    """

    def __init__(
        self,
        client: redis.asyncio.Redis,
        channel: str,
        worker_id: str,
        metrics: WorkerMetrics,
        *,
        on_job: Callable[[], None],
        on_cancel: Callable[[str], None],
        on_connected: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.connected = asyncio.Event()
        self.client_id: int | None = None
        self.server_since = 0.0
        self._server_run: str | None = None
        self._client = client
        self._channel = channel
        self._name = bell_name(worker_id)
        self._on_job = on_job
        self._on_cancel = on_cancel
        self._on_connected = on_connected
        self._clock = clock
        self._role = RoleLoop("doorbell", self._listen, metrics.role_failed, longest_backoff_s=SIGN_OF_LIFE_BACKOFF_S)

    def start(self) -> None:
        """Begin listening."""
        self._role.start()

    async def shutdown(self) -> None:
        """Stop listening."""
        await self._role.shutdown()

    def ring(self, message: bytes) -> None:
        """Act on one message of the channel; what this version does not know is a ring all the same."""
        word, _, rest = message.partition(b" ")
        if word == b"cancel":
            for job_id in rest.split():
                self._on_cancel(job_id.decode("ascii", "replace"))
        else:
            self._on_job()

    async def _listen(self) -> None:
        """Connect, then listen until the connection is lost."""
        client = await _one_server(self._client)
        pubsub = client.pubsub()
        try:
            self.client_id = await self._connect(pubsub)
            self.connected.set()
            self._on_connected()
            if Line.fits(pubsub.connection):
                await self._hear(pubsub.connection)
            else:
                await self._read(pubsub)
        except (exceptions.ConnectionError, exceptions.TimeoutError, OSError) as error:
            raise BrokerUnavailable(str(error)) from error
        finally:
            self.client_id = None
            await pubsub.aclose()  # type: ignore[no-untyped-call]
            if client is not self._client:
                await client.aclose()

    async def _connect(self, pubsub: PubSub) -> int | None:
        """Subscribe; the connection's id, or None where the server does not tell (a proxy, a restricted user)."""
        await pubsub.connect()  # type: ignore[no-untyped-call]
        connection = pubsub.connection
        assert connection is not None
        client_id: int | None = None
        try:
            await connection.send_command("CLIENT", "SETNAME", self._name)
            await connection.read_response()
            await connection.send_command("CLIENT", "ID")
            client_id = int(await connection.read_response())
        except exceptions.ResponseError as error:
            _logger.info("takeover waits for leases here: CLIENT is not permitted", extra={"reason": str(error)})
        await self._meet(connection)
        await pubsub.subscribe(self._channel)
        return client_id

    async def _meet(self, connection: Any) -> None:
        """Note whether this is the run of the server that was known; one that does not tell is always a new one."""
        run: str | None = None
        try:
            await connection.send_command("INFO", "server")
            found = _RUN_ID.search(bytes(await connection.read_response()))
            run = found[1].decode() if found else None
        except exceptions.ResponseError as error:
            _logger.info(
                "takeover is slow after a lost connection: INFO is not permitted", extra={"reason": str(error)}
            )
        if run is None or run != self._server_run:
            self.server_since = self._clock()
        self._server_run = run

    async def _hear(self, connection: Any) -> None:
        """As `_read`, with a ring heard the moment its bytes arrive."""
        heard = self._clock()
        lost: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()

        def on_reply(reply: Any) -> None:
            nonlocal heard
            heard = self._clock()
            if isinstance(reply, list) and len(reply) == 3 and reply[0] == b"message":
                self.ring(reply[2])

        line = Line(connection, on_reply, lambda error: None if lost.done() else lost.set_result(error))
        try:
            while not (await asyncio.wait({lost}, timeout=_PING_EVERY_S))[0]:
                if self._clock() - heard > _SILENT_AFTER_S:
                    raise BrokerUnavailable(f"the doorbell was silent for {_SILENT_AFTER_S:g} s, pings included")
                line.send(("PING",))
        finally:
            line.close()
        raise BrokerUnavailable(str(lost.result() or "the server closed the doorbell's connection"))

    async def _read(self, pubsub: PubSub) -> None:
        heard = pinged = self._clock()
        while True:
            message = await pubsub.get_message(timeout=_PING_EVERY_S)
            now = self._clock()
            if message is not None:
                heard = now
                if message["type"] == "message":
                    self.ring(message["data"])
            elif now - heard > _SILENT_AFTER_S:
                raise BrokerUnavailable(f"the doorbell was silent for {now - heard:.0f} s, pings included")
            if now - pinged >= _PING_EVERY_S:
                pinged = now
                await pubsub.ping()


async def _one_server(client: redis.asyncio.Redis | redis.asyncio.RedisCluster) -> redis.asyncio.Redis:
    """The client itself; of a cluster a client of any node, as every node hears every message."""
    if not isinstance(client, redis.asyncio.RedisCluster):
        return client
    try:
        await client.initialize()
        node: Any = client.get_random_node()
    except (exceptions.RedisError, OSError) as error:
        raise BrokerUnavailable(str(error)) from error
    pool = redis.asyncio.ConnectionPool(connection_class=node.connection_class, **node.connection_kwargs)
    return redis.asyncio.Redis.from_pool(pool)
