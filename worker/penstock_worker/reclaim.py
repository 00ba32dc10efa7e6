"""The reclaim role: takes back the jobs of workers that are gone, and moves what has become due.

Every worker runs it, at jittered moments, one script call a tick. Two things prove a worker gone: its job's lease has
expired; or it is absent, see `presence`, which is known the moment a process is killed.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable

from penstock_core.protocol import transitions
from penstock_core.protocol.keys import QueueKeys
from penstock_core.protocol.transitions import ReclaimOutcome
from penstock_worker.broker import Broker
from penstock_worker.metrics import WorkerMetrics
from penstock_worker.presence import GoneWorker, Presence
from penstock_worker.role import RoleLoop
from penstock_worker.structured_log import JobLog

_logger = logging.getLogger(__name__)

_LIMIT = 256  # jobs taken back in one call
_ALL = 100_000


class Reclaimer:
    """The queue's upkeep."""

    def __init__(
        self,
        broker: Broker,
        keys: QueueKeys,
        presence: Presence,
        metrics: WorkerMetrics,
        *,
        tick_s: float,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._broker = broker
        self._keys = keys
        self._presence = presence
        self._metrics = metrics
        self._tick_s = tick_s
        self._draw = draw
        self._role = RoleLoop("reclaim", self._iterate, metrics.role_failed)

    def start(self) -> None:
        """Begin ticking."""
        self._role.start()

    async def shutdown(self) -> None:
        """Stop ticking."""
        await self._role.shutdown()

    async def tick(self) -> bool:
        """One round of upkeep. Returns whether more is to be taken back."""
        gone = await self._presence.gone()
        first = gone[0] if gone else GoneWorker("", 0)
        outcome = await self._broker.run(
            transitions.reclaim(self._keys, worker_id=first.worker_id, heartbeat_ms=first.heartbeat_ms, limit=_LIMIT)
        )
        self._metrics.reclaimed.inc(len(outcome.reclaim_delay_ms))
        self._metrics.promoted.inc(outcome.promoted)
        self._metrics.dead.inc(len(outcome.dead))
        for delay_ms in outcome.reclaim_delay_ms:
            self._metrics.reclaim_latency.observe(delay_ms / 1000)
        if outcome.taken:
            _logger.warning(
                "took jobs back from workers that are gone",
                extra={
                    "gone": first.worker_id or "lease expired",
                    "requeued": len(outcome.requeued),
                    "dead": len(outcome.dead),
                    "after_ms": max(outcome.reclaim_delay_ms, default=0),
                },
            )
        log_taken(outcome)
        return len(gone) > 1 or len(outcome.reclaim_delay_ms) >= _LIMIT

    async def _iterate(self) -> None:
        while await self.tick():
            pass
        await asyncio.sleep(self._tick_s * (0.75 + 0.5 * self._draw()))


def log_taken(outcome: ReclaimOutcome) -> None:
    """A line for each job that was taken from a worker, so that its id finds it."""
    dead = set(outcome.dead)
    for job_id, attempt in outcome.taken.items():
        log = JobLog(_logger, job_id, attempt)
        if job_id in dead:
            log.error("dead-lettered: it took down too many workers")
        else:
            log.info("taken back from a worker that is gone")


async def take_back_from(broker: Broker, keys: QueueKeys, worker_id: str) -> ReclaimOutcome:
    """Take back at once everything held by a worker that is dead for sure; each job counts a crash.

    For those who know it from better sources than heartbeats: the supervisor of its process, or the worker itself when
    its engine died. Raises `BrokerUnavailable`.
    """
    heartbeat = await broker.guard(broker.client.zscore(keys.heartbeats, worker_id))
    call = transitions.reclaim(keys, worker_id=worker_id, heartbeat_ms=int(heartbeat or 0), limit=_ALL, sure=True)
    outcome = await broker.run(call)
    log_taken(outcome)
    return outcome
