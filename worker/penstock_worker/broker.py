"""The worker's side of the Redis connection: runs the protocol's calls and knows whether Redis can be reached.

Every role shares one `Broker`; all calls but the signs of life go over one connection, close behind one another.
Whatever makes Redis unusable for a while (a dropped connection, a failover, a full memory) becomes `BrokerUnavailable`,
is logged once when it begins and once when it ends, and is the roles' to wait out.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import redis.asyncio

from penstock_core.protocol import transitions
from penstock_core.protocol.connection import broker_errors
from penstock_core.protocol.errors import BrokerUnavailable
from penstock_core.protocol.wire import Wire

T = TypeVar("T")

_logger = logging.getLogger(__name__)

_OUTAGE_S = 0.25
"""Where one connection of several was lost, the next call succeeds sooner than this."""


class Broker:
    """Runs calls on Redis; raises `BrokerUnavailable` while it cannot.

    Attributes:
        client: for the few plain commands that no transition covers, to be awaited through `guard`.
        outages: how often Redis went away.
        back_since: this process's monotonic time when it last came back from an outage, and not from the loss of a
            single connection.
    """

    def __init__(self, client: redis.asyncio.Redis, url: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.client = client
        self.outages = 0
        self.back_since = float("-inf")
        self._wire = Wire(client)
        self._url = url
        self._clock = clock
        self._away_since: float | None = None
        self._server_ahead_ms = 0.0

    @property
    def available(self) -> bool:
        """Whether the last call was answered."""
        return self._away_since is None

    def server_now_ms(self) -> int:
        """The server's clock, as last compared with this process's monotonic one."""
        return round(self._clock() * 1000 + self._server_ahead_ms)

    async def compare_clocks(self) -> int:
        """Ask for the server's clock in milliseconds, and remember how far it is ahead.

        Redis tells it even while it loads its data and can do nothing else: the answer ends no outage.
        """
        seconds, microseconds = await self.guard(self.client.time(), ends_outage=False)
        now_ms = int(seconds) * 1000 + int(microseconds) // 1000
        self._server_ahead_ms = now_ms - self._clock() * 1000
        return now_ms

    async def run(self, call: transitions.Call[T]) -> T:
        """Run one transition."""
        return await self.guard(self._wire.run(call))

    async def run_apart(self, call: transitions.Call[T]) -> T:
        """Run one transition on another connection, so that it waits for no other's reply."""
        return await self.guard(transitions.run_async(self.client, call))

    async def run_many(self, calls: Sequence[transitions.Call[Any]]) -> list[Any]:
        """Run several transitions, in order, in one round trip."""
        return await self.guard(self._wire.run_many(calls))

    def close(self) -> None:
        """Give back the connection that is not the client's."""
        self._wire.close()

    async def guard(self, command: Awaitable[T], *, ends_outage: bool = True) -> T:
        """Await any command of the client, with its failures translated."""
        try:
            with broker_errors(self._url):
                answer = await command
        except BrokerUnavailable as error:
            if self._away_since is None:
                _logger.warning("holding on to the jobs while Redis is away", extra={"reason": str(error)})
                self._away_since = self._clock()
                self.outages += 1
            raise
        if self._away_since is not None and ends_outage:
            now = self._clock()
            away_s = now - self._away_since
            _logger.info("Redis is back", extra={"away_s": round(away_s, 3)})
            self._away_since = None
            if away_s >= _OUTAGE_S:
                self.back_since = now
        return answer
