"""The renew role: every heartbeat says that the worker lives, and every third of the lease prolongs what it holds.

The answers tell what to stop: a job asked to be cancelled or past its deadline ends with what there is; a fenced one
belongs to another attempt now, and is dropped. A job whose end is already decided is left to the publish role.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from penstock_core.protocol import transitions
from penstock_core.protocol.jobs import FinishReason
from penstock_core.protocol.keys import QueueKeys
from penstock_core.protocol.workers import WorkerRecord
from penstock_worker.broker import Broker
from penstock_worker.held import HeldJob, HeldJobs
from penstock_worker.metrics import WorkerMetrics
from penstock_worker.role import SIGN_OF_LIFE_BACKOFF_S, RoleLoop


class Renewer:
    """Keeps the worker and its leases alive. `describe` makes the worker's record of the moment.

    Attributes:
        registered: Redis has heard of this worker; before that it must hold nothing, or nobody could miss it.
    """

    def __init__(
        self,
        broker: Broker,
        keys: QueueKeys,
        held: HeldJobs,
        metrics: WorkerMetrics,
        *,
        worker_id: str,
        lease_ms: int,
        heartbeat_s: float,
        describe: Callable[[], WorkerRecord],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.registered = asyncio.Event()
        self._broker = broker
        self._keys = keys
        self._held = held
        self._metrics = metrics
        self._worker_id = worker_id
        self._lease_ms = lease_ms
        self._renew_every_s = lease_ms / 3000
        self._beat_every_s = min(heartbeat_s, self._renew_every_s)
        self._describe = describe
        self._clock = clock
        self._renewed_at = float("-inf")
        self._now = asyncio.Event()
        self._role = RoleLoop("renew", self._iterate, metrics.role_failed, longest_backoff_s=SIGN_OF_LIFE_BACKOFF_S)

    def start(self) -> None:
        """Begin beating."""
        self._role.start()

    async def shutdown(self) -> None:
        """Stop beating."""
        await self._role.shutdown()

    def hurry(self) -> None:
        """Renew at once: a ring of the bell may have been missed."""
        self._renewed_at = float("-inf")
        self._now.set()

    async def beat(self) -> None:
        """One heartbeat, with the leases where they are due."""
        now = self._clock()
        # Half a beat of tolerance: a beat that comes a moment early renews rather than wait for the next.
        due = now - self._renewed_at >= self._renew_every_s - self._beat_every_s / 2
        jobs = [job for job in self._held if not job.ended] if due else []
        holds = [(job.job_id, job.attempt) for job in jobs]
        call = transitions.renew(
            self._keys, self._worker_id, holds, lease_ms=self._lease_ms, record=self._describe().encode()
        )
        statuses = await self._broker.run_apart(call)
        self.registered.set()
        if due:
            self._renewed_at = now
        for job, status in zip(jobs, statuses, strict=True):
            self._answer(job, status)

    async def _iterate(self) -> None:
        await self.beat()
        try:
            async with asyncio.timeout(self._beat_every_s):
                await self._now.wait()
        except TimeoutError:
            pass
        self._now.clear()

    def _answer(self, job: HeldJob, status: str) -> None:
        if job not in self._held or job.ended:
            return
        if status == "fenced":
            job.log.warning("the lease was lost; dropping the job")
            self._metrics.fenced.inc()
            self._held.lose(job)
        elif status == "cancelled":
            self._held.stop(job, FinishReason.CANCELLED)
        elif status == "expired":
            self._held.stop(job, FinishReason.EXPIRED)
