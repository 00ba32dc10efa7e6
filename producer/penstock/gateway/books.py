"""The queue's books: lists of jobs, what tenants use and may use, dead jobs. What the SDK's client does not offer.

Everything here costs a few short script calls, whatever the queue holds.
"""

from __future__ import annotations

from typing import Any, TypeVar

from penstock.gateway.auth import Caller, TooManyRequests
from penstock_core.protocol.config import TenantLimits
from penstock_core.protocol.connection import broker_errors
from penstock_core.protocol.errors import InvalidRequest
from penstock_core.protocol.jobs import JobState
from penstock_core.protocol.keys import QueueKeys
from penstock_core.protocol.transitions import (
    Call,
    JobStatus,
    RequeueOutcome,
    TenantUsage,
    charge_request,
    configure,
    dead_letters,
    read_jobs,
    read_recent,
    read_usage,
    requeue,
    run_async,
)

T = TypeVar("T")

_PAGE = 200
_MAX_LETTERS = 1000  # looked at for a list of dead jobs


class Books:
    """The books of one queue.

    Args:
        redis: connections to the broker, which are not closed here.
        url, keys: the broker, for messages, and the queue.
    """

    def __init__(self, redis: Any, url: str, keys: QueueKeys) -> None:
        self.redis = redis  # untyped: redis-py's types of the asynchronous commands are wrong in places
        self.url = url
        self.keys = keys

    async def recent_jobs(
        self, scope: str | None, *, limit: int, state: JobState | None, before: str | None
    ) -> list[JobStatus]:
        """The newest jobs in scope (None: everybody's) that match; `before` a job goes on there.

        Knows a tenant's newest 1,000 and everybody's newest 10,000. Raises `InvalidRequest` where `before` is none of
        them.
        """
        if state is JobState.DEAD and before is None:
            return (await self._dead_jobs(scope))[:limit]
        found: list[JobStatus] = []
        last = before or ""
        while len(found) < limit:
            page = min(_PAGE, limit) if state is None else _PAGE
            ids = await self._run(read_recent(self.keys, tenant=scope or "", limit=page, before=last))
            if ids is None and last == before:
                raise InvalidRequest("before", f"{before!r} is none of the newest jobs (any more); begin without it")
            if not ids:
                break
            statuses = await self._run(read_jobs(self.keys, ids))
            found += [status for status in statuses if status is not None and state in (None, status.state)]
            last = ids[-1]
        return found[:limit]

    async def _dead_jobs(self, scope: str | None) -> list[JobStatus]:
        """The jobs that the newest dead letters name and that are dead still."""
        letters = await self._run(dead_letters(self.keys, limit=_MAX_LETTERS))
        ids = list(dict.fromkeys(letter.job_id for letter in letters if letter.job_id))
        statuses = await self._run(read_jobs(self.keys, ids))
        dead = [status for status in statuses if status is not None and status.state is JobState.DEAD]
        return [status for status in dead if scope in (None, status.tenant)]

    async def requeue(self, job_id: str) -> RequeueOutcome:
        """Put a dead job back in line, as new."""
        return (await self._run(requeue(self.keys, [job_id])))[0]

    async def usage(self, tenant: str) -> TenantUsage:
        """What a tenant uses, and the limits that hold for it."""
        return await self._run(read_usage(self.keys, tenant))

    async def limit(self, tenant: str, limits: TenantLimits) -> None:
        """Give a tenant limits of its own; None takes one back to the queue's general one. Holds at once."""
        await self._run(configure(self.keys, tenants={tenant: limits}))

    async def charge(self, caller: Caller) -> None:
        """One request of a caller whose requests are counted. Raises `TooManyRequests`."""
        wait_s = await self._run(charge_request(self.keys, caller.fingerprint, caller.requests_per_minute))
        if wait_s:
            allowed = f"{caller.requests_per_minute} times a minute (requests_per_minute)"
            raise TooManyRequests(f"this key may ask {allowed}; ask slower", wait_s)

    async def _run(self, call: Call[T]) -> T:
        with broker_errors(self.url):
            return await run_async(self.redis, call)
