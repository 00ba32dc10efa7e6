"""Upkeep and the operator's transitions: reclaim, mend, requeue, purge_dead, configure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

from penstock_core.protocol import config
from penstock_core.protocol.codec import ended_opening
from penstock_core.protocol.config import QueueConfig, TenantLimits
from penstock_core.protocol.jobs import JobState
from penstock_core.protocol.keys import QueueKeys
from penstock_core.protocol.script import Argument, Call, load_script
from penstock_core.protocol.transitions.replies import CANCELLED, EXPIRED, POISON_CODE, pairs, texts

_POISON = ended_opening(JobState.DEAD, POISON_CODE)

RequeueOutcome = Literal["requeued", "not_dead", "unknown"]


@dataclass(frozen=True, slots=True)
class ReclaimOutcome:
    """What a round of upkeep did.

    Attributes:
        requeued, dead, ended: ids of jobs put back in line, dead-lettered, and ended as cancelled or expired.
        promoted: delayed jobs that became ready.
        reclaim_delay_ms: per job taken from a worker, the time since its lease ended (or the worker's last heartbeat).
        taken: jobs taken from workers, and the attempts that this ended.
    """

    requeued: list[str]
    dead: list[str]
    ended: list[str]
    promoted: int
    reclaim_delay_ms: list[int]
    taken: dict[str, int]


def reclaim(
    keys: QueueKeys,
    *,
    limit: int = 100,
    worker_id: str = "",
    heartbeat_ms: int = 0,
    sure: bool = False,
    now_ms: int = 0,
) -> Call[ReclaimOutcome]:
    """One round of upkeep, at most `limit` jobs of each kind. Any worker may run it at any time.

    Jobs whose lease ran out go back in line, or are dead after the queue's `max_crashes`. With `worker_id`, so do all
    of that worker's, unless it has beaten since `heartbeat_ms`, the heartbeat read before it was found gone. A crash is
    taken back when the worker is heard of again, except where its death is `sure`.
    """
    args: list[Argument] = [now_ms, limit, worker_id, heartbeat_ms, int(sure), *CANCELLED, *EXPIRED, *_POISON]
    return Call(load_script("reclaim"), (keys.prefix,), args, _reclaim_outcome)


def _reclaim_outcome(reply: Any) -> ReclaimOutcome:
    requeued, dead, ended, promoted, delays, taken = reply
    attempts = {job_id: int(attempt) for job_id, attempt in pairs(taken).items()}
    return ReclaimOutcome(
        texts(requeued), texts(dead), texts(ended), int(promoted), [int(ms) for ms in delays], attempts
    )


class Missing(NamedTuple):
    """How many fewer entries the indexes have than there are jobs in a state."""

    queued: int
    running: int
    delayed: int


def missing(keys: QueueKeys) -> Call[Missing]:
    """Whether every job can be found; all zero where the queue is whole."""
    return Call(load_script("mend"), (keys.prefix,), [0], lambda reply: Missing(*map(int, reply)))


def mend(keys: QueueKeys, job_ids: Sequence[str], now_ms: int = 0) -> Call[list[str]]:
    """Make the jobs' pointers, leases and due times anew where they are gone; the ids that needed it."""
    return Call(load_script("mend"), (keys.prefix,), [now_ms, *job_ids], texts)


def requeue(keys: QueueKeys, job_ids: Sequence[str], now_ms: int = 0) -> Call[list[RequeueOutcome]]:
    """Put dead jobs back in line, as new."""
    args: list[Argument] = [now_ms, *job_ids]
    return Call(load_script("requeue"), (keys.prefix,), args, lambda reply: cast("list[RequeueOutcome]", texts(reply)))


def purge_dead(
    keys: QueueKeys, job_ids: Sequence[str] | None = None, *, limit: int = 1000, now_ms: int = 0
) -> Call[int]:
    """Delete the named dead jobs, or (None) at most `limit` of the oldest dead letters; returns how many."""
    if job_ids is not None and not job_ids:
        limit = 0
    args: list[Argument] = [now_ms, limit, *(job_ids or ())]
    return Call(load_script("purge"), (keys.prefix,), args, int)


def configure(
    keys: QueueKeys,
    changes: Mapping[str, int | None] | None = None,
    tenants: Mapping[str, TenantLimits] | None = None,
) -> Call[tuple[QueueConfig, dict[str, TenantLimits]]]:
    """Change settings of the queue (None: back to the default) and limits of tenants; returns all that holds now.

    Without changes it only reads. Raises `InvalidRequest` for an unknown setting or a value out of range.
    """
    args: list[Argument] = [0]
    for pair in config.stored(changes or {}, tenants or {}):
        args += pair
    return Call(load_script("configure"), (keys.prefix,), args, lambda reply: config.read(pairs(reply)))
