"""Presence: which workers are shown to be gone before their leases run out.

A worker's doorbell is connected for as long as its process lives; Redis sees the connection end the moment the process
is killed. So a worker whose heartbeat is overdue and whose doorbell is nowhere to be found is gone. Nobody is judged
while the others may still be on their way back: after Redis itself came back (another run of the server), or after it
could not be reached from here. The reclaim role makes a compare-and-set of it: whoever speaks up in between keeps its
jobs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from redis import exceptions
from redis.asyncio import RedisCluster

from penstock_core.protocol.errors import UndecodableRecord
from penstock_core.protocol.keys import QueueKeys
from penstock_core.protocol.workers import WorkerRecord
from penstock_worker.broker import Broker
from penstock_worker.doorbell import Doorbell, bell_name
from penstock_worker.role import SIGN_OF_LIFE_BACKOFF_S

_logger = logging.getLogger(__name__)

SETTLE_S = SIGN_OF_LIFE_BACKOFF_S + 0.5
"""How long the others may need to come back once Redis has."""
_SUSPECTS = 32


@dataclass(frozen=True, slots=True)
class GoneWorker:
    """A worker shown to be gone, and the heartbeat that was read before that was found out."""

    worker_id: str
    heartbeat_ms: int


class Presence:
    """Looks for workers that are gone."""

    def __init__(
        self,
        broker: Broker,
        keys: QueueKeys,
        doorbell: Doorbell,
        *,
        worker_id: str,
        heartbeat_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._broker = broker
        self._keys = keys
        self._doorbell = doorbell
        self._worker_id = worker_id
        self._overdue_ms = max(500, round(heartbeat_s * 1_200))
        self._clock = clock
        self._may_list_clients = True

    async def gone(self) -> list[GoneWorker]:
        """Workers whose heartbeat is overdue and whose doorbell is no longer connected."""
        if not self._may_list_clients:
            return []
        client = self._broker.client
        now_ms = await self._broker.compare_clocks()
        beats = await self._broker.guard(client.zrange(self._keys.heartbeats, 0, _SUSPECTS - 1, withscores=True))
        if not self._is_settled:  # asked after a call that may have ended an outage
            return []
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
        missing = await self._missing(connections)
        return [GoneWorker(worker, overdue[worker]) for worker in missing]

    @property
    def _is_settled(self) -> bool:
        now = self._clock()
        if self._doorbell.client_id is None:
            return False
        return now - self._doorbell.server_since >= SETTLE_S and now - self._broker.back_since >= SETTLE_S

    async def _missing(self, connections: Mapping[str, int]) -> list[str]:
        """Those of the workers that have no doorbell connected; none where asking is not allowed."""
        if not connections:
            return []
        by_id = await self._clients(client_id=sorted(connections.values()))
        known = {(int(one["id"]), one["name"]) for one in by_id}
        missing = [worker for worker, one in connections.items() if (one, bell_name(worker)) not in known]
        if missing and self._may_list_clients:
            # It may have connected anew, and its heartbeat, which would say so, be stuck on another connection.
            names = {one["name"] for one in await self._clients(_type="pubsub")}
            missing = [worker for worker in missing if bell_name(worker) not in names]
        return missing if self._may_list_clients else []

    async def _clients(self, **which: Any) -> Sequence[Mapping[str, str]]:
        return await self._broker.guard(self._list_clients(which))

    async def _list_clients(self, which: dict[str, Any]) -> Sequence[Mapping[str, str]]:
        client: Any = self._broker.client
        try:
            if not isinstance(client, RedisCluster):
                return cast("Sequence[Mapping[str, str]]", await client.client_list(**which))
            # A doorbell hangs on any node, and every node numbers its connections for itself.
            nodes: Any = await client.client_list(**which, target_nodes=RedisCluster.ALL_NODES)
            return [one for listed in nodes.values() for one in listed]
        except exceptions.ResponseError as error:
            _logger.info("takeover waits for leases here: CLIENT LIST is not permitted", extra={"reason": str(error)})
            self._may_list_clients = False
            return ()


def _connection_of(record: bytes | None) -> int:
    """Id of the doorbell's connection, 0 where it is unknown."""
    if record is None:
        return 0
    try:
        return WorkerRecord.decode(record).connection_id
    except UndecodableRecord:
        return 0
