"""Listing the jobs of a queue, newest first, filtered, bounded: all that are retained (`list_jobs`, a walk over every
key, for people), or the newest by an index, page by page (`recent_jobs`, for the gateway)."""

from __future__ import annotations

from heapq import nlargest

from penstock.effects import Flow
from penstock.flows import Surroundings, briefly
from penstock_core.protocol.errors import InvalidRequest
from penstock_core.protocol.jobs import JobState
from penstock_core.protocol.keys import QueueKeys
from penstock_core.protocol.transitions import JobStatus, dead_letters, read_jobs, read_recent, scan_jobs

MAX_LISTED = 10_000
_MAX_SEEN = 200_000  # jobs looked at before the list is made of those
_STEP_KEYS = 2000
_PAGE_JOBS = 500
_INDEX_PAGE = 200
_MAX_LETTERS = 1000  # looked at for a list of dead jobs


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


def recent_jobs(
    around: Surroundings,
    keys: QueueKeys,
    *,
    limit: int,
    state: JobState | None,
    tenant: str | None,
    before: str | None,
) -> Flow[list[JobStatus]]:
    """The tenant's (None: everybody's) newest jobs that match, of those the index keeps; `before` a job goes on there.

    Costs a few short script calls, whatever the queue holds. Raises `InvalidRequest` where `before` is unknown.
    """
    found: list[JobStatus] = []
    last = before or ""
    while len(found) < limit:
        ids = yield from briefly(around, read_recent(keys, tenant=tenant or "", limit=_INDEX_PAGE, before=last))
        if ids is None and last == before:
            raise InvalidRequest("before", f"{before!r} is none of the newest jobs any more; begin without it")
        if not ids:
            break
        page = yield from briefly(around, read_jobs(keys, ids))
        found += [status for status in page if status is not None and state in (None, status.state)]
        last = ids[-1]
    return found[:limit]


def dead_jobs(around: Surroundings, keys: QueueKeys, *, limit: int, tenant: str | None) -> Flow[list[JobStatus]]:
    """The jobs (of a tenant) that the newest dead letters name and that have not been put back in line since."""
    letters = yield from briefly(around, dead_letters(keys, limit=_MAX_LETTERS))
    ids = list(dict.fromkeys(letter.job_id for letter in letters if letter.job_id))
    page = yield from briefly(around, read_jobs(keys, ids))
    found = [status for status in page if status is not None and status.state is JobState.DEAD]
    return [status for status in found if tenant in (None, status.tenant)][:limit]
