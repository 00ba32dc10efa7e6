"""Finding jobs: the queue keeps no index of them, so each state is looked up where its jobs are.

Ids of running, queued, delayed and dead jobs stand in sorted sets and streams. Ended jobs are found by scanning the
keys that are still retained, up to a bound. Ids made by the SDK begin with the time of submission, so they sort by age.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from penstock.cli.session import Queue
from penstock_core.protocol.transitions import JobStatus, dead_letters, read_jobs, snapshot

MAX_SCANNED = 50_000
_BATCH = 200
_ENDED = frozenset({"completed", "failed", "cancelled", "expired"})


@dataclass(frozen=True, slots=True)
class Listing:
    """Jobs, newest first; `complete` is false where the scan stopped at its bound."""

    jobs: list[JobStatus]
    complete: bool


def list_jobs(queue: Queue, states: Collection[str], tenant: str | None, limit: int) -> Listing:
    """At most `limit` jobs in any of `states` (all when empty), newest first."""
    ids: set[str] = set()
    complete = True
    if not states or _ENDED & set(states):
        found, complete = _scan(queue)
        ids |= found
    else:
        ids |= _standing(queue, states, limit)
    chosen: list[JobStatus] = []
    newest_first = sorted(ids, reverse=True)
    for start in range(0, len(newest_first), _BATCH):
        for status in queue.run(read_jobs(queue.keys, newest_first[start : start + _BATCH])):
            if status is None or (states and status.state not in states) or (tenant and status.tenant != tenant):
                continue
            chosen.append(status)
        if len(chosen) >= limit:
            break
    chosen.sort(key=lambda status: (status.submitted_ms, status.job_id), reverse=True)
    return Listing(chosen[:limit], complete)


def _scan(queue: Queue) -> tuple[set[str], bool]:
    prefix = queue.keys.job("")
    ids: set[str] = set()
    for key in queue.client.scan_iter(match=_literal(prefix) + "*", count=1000):
        ids.add(_text(key).removeprefix(prefix))
        if len(ids) >= MAX_SCANNED:
            return ids, False
    return ids, True


def _standing(queue: Queue, states: Collection[str], limit: int) -> set[str]:
    client: Any = queue.client
    keys = queue.keys
    ids: set[str] = set()
    if "running" in states:
        ids |= {_text(member) for member in client.zrange(keys.leases, 0, -1)}
    if "delayed" in states:
        ids |= {_text(member) for member in client.zrange(keys.delayed, 0, -1)}
    if "queued" in states:
        for line in queue.run(snapshot(keys)).lines:
            for stream in (keys.resume(line.priority, line.tenant), keys.ready(line.priority, line.tenant)):
                ids |= {_text(fields[b"id"]) for _, fields in client.xrevrange(stream, count=limit) if b"id" in fields}
    if "dead" in states:
        ids |= {letter.job_id for letter in queue.run(dead_letters(keys, limit=limit)) if letter.job_id}
    return ids


def _literal(prefix: str) -> str:
    """A key prefix as a glob that matches only itself."""
    return "".join(f"\\{character}" if character in "\\*?[]^" else character for character in prefix)


def _text(value: bytes | str) -> str:
    return value if isinstance(value, str) else value.decode()
