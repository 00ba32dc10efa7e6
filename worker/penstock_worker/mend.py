"""The mend role: now and then, see whether the queue's indexes are whole, and rebuild them from the jobs if not.

A job's hash is the truth; streams and sorted sets only point to it. Penstock never trims them, but somebody with a
command line can, and then jobs would wait for ever that nobody can find.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable

from penstock_core.protocol import transitions
from penstock_core.protocol.keys import QueueKeys
from penstock_core.protocol.transitions import Missing
from penstock_worker.broker import Broker
from penstock_worker.metrics import WorkerMetrics
from penstock_worker.role import RoleLoop

_logger = logging.getLogger(__name__)

EVERY_S = 30.0
_STEP_KEYS = 1_000


class Mender:
    """Looks after the indexes."""

    def __init__(
        self, broker: Broker, keys: QueueKeys, metrics: WorkerMetrics, draw: Callable[[], float] = random.random
    ) -> None:
        self._broker = broker
        self._keys = keys
        self._draw = draw
        self._hopeless: Missing | None = None
        self._role = RoleLoop("mend", self._iterate, metrics.role_failed)

    def start(self) -> None:
        """Begin looking."""
        self._role.start()

    async def shutdown(self) -> None:
        """Stop looking."""
        await self._role.shutdown()

    async def look(self) -> list[str]:
        """Look once; the ids of the jobs that were mended."""
        missing = await self._broker.run(transitions.missing(self._keys))
        if not any(missing) or missing == self._hopeless:
            return []
        mended: list[str] = []
        cursor, more = "0", True
        while more:
            cursor, ids = await self._broker.run(transitions.scan_jobs(self._keys, cursor, count=_STEP_KEYS))
            if ids:
                given = await self._broker.run(transitions.mend(self._keys, ids))
                mended += given
            more = cursor != "0"
        self._hopeless = None if mended else missing
        _logger.error(
            "the queue's indexes had lost jobs: does somebody trim or delete its keys?",
            extra={**missing._asdict(), "mended": len(mended), "jobs": mended[:100]},
        )
        return mended

    async def _iterate(self) -> None:
        await asyncio.sleep(EVERY_S * (0.5 + self._draw()))
        await self.look()
