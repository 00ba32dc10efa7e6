"""Listing the jobs of a queue: newest first, filtered, bounded. For people, not for the hot path."""

from __future__ import annotations

from heapq import nlargest

from penstock.effects import Flow
from penstock.flows import Surroundings, briefly
from penstock_core.protocol.errors import InvalidRequest
from penstock_core.protocol.jobs import JobState
from penstock_core.protocol.keys import QueueKeys
from penstock_core.protocol.transitions import JobStatus, read_jobs, scan_jobs

MAX_LISTED = 10_000
_MAX_SEEN = 200_000  # jobs looked at before the list is made of those
_STEP_KEYS = 2000
_PAGE_JOBS = 500


def list_jobs(
    around: Surroundings, keys: QueueKeys, *, limit: int, state: JobState | None, tenant: str | None
) -> Flow[list[JobStatus]]:
    """The newest `limit` jobs that match; ids made by this SDK sort by the time of submission."""
    if not 1 <= limit <= MAX_LISTED:
        raise InvalidRequest("limit", f"{limit} jobs, allowed are 1 to {MAX_LISTED}")
    seen: set[str] = set()
    cursor = "0"
    while True:
        cursor, ids = yield from briefly(around, scan_jobs(keys, cursor, count=_STEP_KEYS))
        seen.update(ids)
        if cursor == "0" or len(seen) >= _MAX_SEEN:
            break
    newest = nlargest(limit, seen) if state is None and tenant is None else sorted(seen, reverse=True)
    found: list[JobStatus] = []
    for start in range(0, len(newest), _PAGE_JOBS):
        page = yield from briefly(around, read_jobs(keys, newest[start : start + _PAGE_JOBS]))
        found += [
            status
            for status in page
            if status is not None
            and (state is None or status.state is state)
            and (tenant is None or status.tenant == tenant)
        ]
        if len(found) >= limit:
            break
    return found[:limit]
