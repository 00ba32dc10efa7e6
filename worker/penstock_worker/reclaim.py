"""The reclaim role: takes back the jobs of workers that are gone, and moves what has become due.

Every worker runs it, at jittered moments, one script call a tick. Two things prove a worker gone: its job's lease has
expired; or its heartbeat is overdue and its doorbell's connection no longer exists, which Redis knows the moment a
process is killed. The second is a compare-and-set on the heartbeat: a worker that speaks up in between keeps its jobs.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from redis import exceptions
from redis.asyncio import RedisCluster

from penstock_core.protocol import transitions
from penstock_core.protocol.errors import UndecodableRecord
from penstock_core.protocol.keys import QueueKeys
from penstock_core.protocol.transitions import ReclaimOutcome
from penstock_core.protocol.workers import WorkerRecord
from penstock_worker.broker import Broker
from penstock_worker.doorbell import Doorbell, bell_name
from penstock_worker.metrics import WorkerMetrics
from penstock_worker.role import RoleLoop

_logger = logging.getLogger(__name__)

_SETTLED_AFTER_S = 5.0
"""After Redis came back every heartbeat is old and every connection new: look for the gone only after this long."""
_SUSPECTS = 32
_LIMIT = 256  # jobs taken back in one call
_ALL = 100_000


@dataclass(frozen=True, slots=True)
class GoneWorker:
    """A worker shown to be gone, and the heartbeat that was read before that was found out."""

    worker_id: str
    heartbeat_ms: int


class Reclaimer:
    """The queue's upkeep."""

    def __init__(
        self,
        broker: Broker,
        keys: QueueKeys,
        doorbell: Doorbell,
        metrics: WorkerMetrics,
        *,
        worker_id: str,
        tick_s: float,
        heartbeat_s: float,
        max_crashes: int,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._broker = broker
        self._keys = keys
        self._doorbell = doorbell
        self._metrics = metrics
        self._worker_id = worker_id
        self._tick_s = tick_s
        self._overdue_ms = max(1_000, round(heartbeat_s * 1_200))
        self._max_crashes = max_crashes
        self._clock = clock
        self._draw = draw
        self._may_list_clients = True
        self._role = RoleLoop("reclaim", self._iterate, metrics.role_failed)

    def start(self) -> None:
        """Begin ticking."""
        self._role.start()

    async def shutdown(self) -> None:
        """Stop ticking."""
        await self._role.shutdown()

    async def tick(self) -> bool:
        """One round of upkeep. Returns whether more is to be taken back."""
        gone = await self._gone_workers()
        first = gone[0] if gone else GoneWorker("", 0)
        outcome = await self._broker.run(
            transitions.reclaim(
                self._keys,
                worker_id=first.worker_id,
                heartbeat_ms=first.heartbeat_ms,
                limit=_LIMIT,
                max_crashes=self._max_crashes,
            )
        )
        self._metrics.reclaimed.inc(len(outcome.reclaim_delay_ms))
        self._metrics.promoted.inc(outcome.promoted)
        self._metrics.dead.inc(len(outcome.dead))
        for delay_ms in outcome.reclaim_delay_ms:
            self._metrics.reclaim_latency.observe(delay_ms / 1000)
        if outcome.requeued or outcome.dead:
            _logger.warning(
                "took jobs back from workers that are gone",
                extra={
                    "gone": first.worker_id or "lease expired",
                    "requeued": len(outcome.requeued),
                    "dead": outcome.dead,
                    "after_ms": max(outcome.reclaim_delay_ms, default=0),
                },
            )
        return len(gone) > 1 or len(outcome.reclaim_delay_ms) >= _LIMIT

    async def _iterate(self) -> None:
        while await self.tick():
            pass
        await asyncio.sleep(self._tick_s * (0.75 + 0.5 * self._draw()))

    async def _gone_workers(self) -> list[GoneWorker]:
        """Workers whose heartbeat is overdue and whose doorbell is no longer connected."""
        if not self._may_list_clients or self._doorbell.client_id is None:
            return []
        if self._clock() - self._doorbell.up_since < _SETTLED_AFTER_S:
            return []
        client = self._broker.client
        now_ms = await self._broker.compare_clocks()
        beats = await self._broker.guard(client.zrange(self._keys.heartbeats, 0, _SUSPECTS - 1, withscores=True))
        overdue = {
            worker.decode(): int(beat)
            for worker, beat in cast("list[tuple[bytes, float]]", beats)
            if now_ms - beat > self._overdue_ms and worker.decode() != self._worker_id
        }
        if not overdue:
            return []
        records = await self._broker.guard(client.hmget(self._keys.workers, list(overdue)))
        connections = {
            worker: connection
            for worker, record in zip(overdue, cast("list[bytes | None]", records), strict=True)
            if (connection := _connection_of(record))
        }
        alive = await self._connected(sorted(connections.values()))
        if not self._may_list_clients:
            return []
        return [
            GoneWorker(worker, overdue[worker])
            for worker, connection in connections.items()
            if (connection, bell_name(worker)) not in alive
        ]

    async def _connected(self, connections: Sequence[int]) -> set[tuple[int, str]]:
        """Id and name of those of `connections` that exist. Empty where asking is not allowed."""
        if not connections:
            return set()
        found = await self._broker.guard(self._list_clients(connections))
        return {(int(one["id"]), str(one["name"])) for one in found}

    async def _list_clients(self, connections: Sequence[int]) -> Sequence[Mapping[str, str]]:
        client: Any = self._broker.client
        try:
            if not isinstance(client, RedisCluster):
                return cast("Sequence[Mapping[str, str]]", await client.client_list(client_id=list(connections)))
            # A doorbell hangs on any node, and every node numbers its connections for itself.
            everywhere = {"target_nodes": RedisCluster.ALL_NODES}
            nodes: Any = await client.client_list(client_id=list(connections), **everywhere)
            return [one for listed in nodes.values() for one in listed]
        except exceptions.ResponseError as error:
            _logger.info("takeover waits for leases here: CLIENT LIST is not permitted", extra={"reason": str(error)})
            self._may_list_clients = False
            return ()


async def take_back_from(broker: Broker, keys: QueueKeys, worker_id: str, max_crashes: int) -> ReclaimOutcome:
    """Take back at once everything held by a worker that is dead for sure; each job counts a crash.

    For those who know it from better sources than heartbeats: the supervisor of its process, or the worker itself when
    its engine died. Raises `BrokerUnavailable`.
    """
    heartbeat = await broker.guard(broker.client.zscore(keys.heartbeats, worker_id))
    call = transitions.reclaim(
        keys, worker_id=worker_id, heartbeat_ms=int(heartbeat or 0), limit=_ALL, max_crashes=max_crashes
    )
    return await broker.run(call)


def _connection_of(record: bytes | None) -> int:
    """Id of the doorbell's connection, 0 where it is unknown."""
    if record is None:
        return 0
    try:
        return WorkerRecord.decode(record).connection_id
    except UndecodableRecord:
        return 0
