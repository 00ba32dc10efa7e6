"""Looking without touching: a queue's snapshot, a job's status and events, the dead letters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from penstock_core.protocol.codec import decode_event, decode_metadata
from penstock_core.protocol.errors import UndecodableRecord
from penstock_core.protocol.events import JobEnded
from penstock_core.protocol.jobs import JobFailure, JobState
from penstock_core.protocol.keys import QueueKeys
from penstock_core.protocol.script import Call, load_script
from penstock_core.protocol.transitions.replies import number, number_or_none, pairs, text, texts
from penstock_core.protocol.workers import WorkerRecord

COUNTERS = (
    "submitted", "duplicates", "refused", "claimed", "completed", "failed", "cancelled", "expired", "dead", "retried",
    "released", "reclaimed", "requeued", "promoted", "fenced", "gaps", "undecodable", "tokens_in", "tokens_out",
)  # fmt: skip
GAUGES = ("queued", "delayed", "running", "waiting_bytes")


@dataclass(frozen=True, slots=True)
class DepthLine:
    """Waiting jobs of one priority and tenant, and since when the oldest waits."""

    priority: int
    tenant: str
    depth: int
    oldest_ms: int


@dataclass(frozen=True, slots=True)
class WorkerView:
    """A worker's last heartbeat, and its record if it wrote a readable one."""

    worker_id: str
    heartbeat_ms: int
    record: WorkerRecord | None


@dataclass(frozen=True, slots=True)
class QueueSnapshot:
    """A queue at one moment.

    Attributes:
        now_ms: the server's clock at that moment.
        lines: most urgent priority first; of very many tenants only those waiting longest.
        stats: every counter of `COUNTERS` since the queue's beginning and every gauge of `GAUGES`, 0 where nothing
            happened yet.
    """

    now_ms: int
    lines: list[DepthLine]
    running: int
    delayed: int
    dead: int
    stats: dict[str, int]
    workers: list[WorkerView]

    @property
    def waiting(self) -> int:
        """Jobs ready to be claimed."""
        return self.stats["queued"]

    @property
    def oldest_wait_ms(self) -> int:
        """How long the oldest ready job has waited; 0 where none waits."""
        return max((self.now_ms - line.oldest_ms for line in self.lines), default=0)


def snapshot(keys: QueueKeys, *, max_tenants: int = 1000, now_ms: int = 0) -> Call[QueueSnapshot]:
    """Depths, waits, counters and workers of the queue, all of one moment."""
    return Call(load_script("snapshot"), (keys.prefix,), [now_ms, max_tenants], _snapshot)


def _snapshot(reply: Any) -> QueueSnapshot:
    now, stats, lines, running, delayed, dead, workers = reply
    found = pairs(stats)
    return QueueSnapshot(
        int(now),
        [
            DepthLine(int(lines[i]), text(lines[i + 1]), int(lines[i + 2]), int(lines[i + 3]))
            for i in range(0, len(lines), 4)
        ],
        int(running),
        int(delayed),
        int(dead),
        {name: number(found.get(name)) for name in COUNTERS + GAUGES},
        [
            WorkerView(text(workers[i]), int(workers[i + 1]), _worker_record(workers[i + 2]))
            for i in range(0, len(workers), 3)
        ],
    )


def _worker_record(data: bytes) -> WorkerRecord | None:
    try:
        return WorkerRecord.decode(data) if data else None
    except UndecodableRecord:
        return None


@dataclass(frozen=True, slots=True)
class JobStatus:
    """Where a job stands. Times are milliseconds of the server's clock.

    Attributes:
        attempt: attempts begun so far.
        owner: the worker that runs it, or that ended it; '' otherwise.
        submitted_ms, enqueued_ms: when it was accepted, and since when it waits or waited (later for a delayed job).
        crashes, losses: how often its worker was taken for gone, and in fact was gone; how often it was heard of again.
        tokens: output tokens published so far, over all choices.
        cancelling: it runs, and has been asked to stop.
        failure: why it ended, if not completed; of a delayed job, its last error.
    """

    job_id: str
    state: JobState
    priority: int
    tenant: str
    attempt: int
    crashes: int
    errors: int
    owner: str
    submitted_ms: int
    enqueued_ms: int
    started_ms: int | None
    finished_ms: int | None
    deadline_ms: int | None
    tokens: int
    cancelling: bool = False
    metadata: dict[str, str] = field(default_factory=dict)
    traceparent: str | None = None
    failure: JobFailure | None = None
    losses: int = 0


def read_job(keys: QueueKeys, job_id: str) -> Call[JobStatus | None]:
    """A job's status; None where there is no such job (or its retention time has passed)."""
    many = read_jobs(keys, [job_id])
    return Call(many.script, many.keys, many.args, lambda reply: many.parse(reply)[0])


def read_jobs(keys: QueueKeys, job_ids: Sequence[str]) -> Call[list[JobStatus | None]]:
    """The statuses of several jobs."""

    def parse(reply: Any) -> list[JobStatus | None]:
        return [_status(job_id, values) if values else None for job_id, values in zip(job_ids, reply, strict=True)]

    return Call(load_script("read_job"), (keys.prefix,), [0, *job_ids], parse)


def _status(job_id: str, values: Sequence[Any]) -> JobStatus:
    (
        state, priority, tenant, attempt, crashes, errors, owner, submitted, enqueued, started, finished, deadline,
        tokens, metadata, error_code, error_message, cancel, trace, losses, ended,
    ) = values  # fmt: skip
    failure = JobFailure(text(error_code), text(error_message)) if error_code else None
    job_state = JobState(text(state))
    if job_state.is_terminal:
        failure = None
        if ended:
            event = decode_event(ended)
            failure = event.failure if isinstance(event, JobEnded) else None
    return JobStatus(
        job_id,
        job_state,
        number(priority),
        text(tenant),
        number(attempt),
        number(crashes),
        number(errors),
        text(owner),
        number(submitted),
        number(enqueued) or number(submitted),
        number_or_none(started),
        number_or_none(finished),
        number_or_none(deadline),
        number(tokens),
        job_state is JobState.RUNNING and text(cancel) == "1",
        decode_metadata(metadata),
        text(trace).partition(" ")[0] or None,
        failure,
        number(losses),
    )


@dataclass(frozen=True, slots=True)
class EventPage:
    """A piece of a job's log: its state, the encoded events, and the entry id to continue after."""

    state: JobState
    events: list[bytes]
    last_id: str


def read_events(keys: QueueKeys, job_id: str, *, after: str = "", limit: int = 1000) -> Call[EventPage | None]:
    """The job's events after entry id `after`, oldest first, the terminal one last; None where there is no such job."""

    def parse(reply: Any) -> EventPage | None:
        if not reply:
            return None
        state, events = reply
        return EventPage(JobState(text(state)), list(events[1::2]), text(events[-2]) if events else after)

    return Call(load_script("read_events"), (keys.prefix,), [0, job_id, after, limit], parse)


@dataclass(frozen=True, slots=True)
class JobEnd:
    """A job's state, and once it has ended its terminal event, encoded; b'' before that."""

    state: JobState
    event: bytes


def read_end(keys: QueueKeys, job_id: str) -> Call[JobEnd | None]:
    """How the job ended, if it has; None where there is no such job."""

    def parse(reply: Any) -> JobEnd | None:
        return JobEnd(JobState(text(reply[0][0])), reply[0][1]) if reply[0] else None

    return Call(load_script("read_end"), (keys.prefix,), [0, job_id], parse)


def scan_jobs(keys: QueueKeys, cursor: str = "0", *, count: int = 1000) -> Call[tuple[str, list[str]]]:
    """One step of a walk over all retained jobs: the next cursor ("0" when done), and ids, some perhaps twice.

    Looks at about `count` keys of the server, whosever they are.
    """

    def parse(reply: Any) -> tuple[str, list[str]]:
        cursor, *ids = texts(reply)
        return cursor, ids

    return Call(load_script("scan_jobs"), (keys.prefix,), [0, cursor, count], parse)


def read_recent(keys: QueueKeys, *, tenant: str = "", limit: int = 100, before: str = "") -> Call[list[str] | None]:
    """Ids of the tenant's ('': all tenants') newest jobs, newest first; some may be gone. `before` goes on from there.

    The index keeps 1,000 of a tenant and 10,000 of all, for 31 days. None: it does not have `before`.
    """

    def parse(reply: Any) -> list[str] | None:
        return texts(reply[1:]) if int(reply[0]) else None

    return Call(load_script("recent"), (keys.prefix,), [0, tenant, limit, before], parse)


@dataclass(frozen=True, slots=True)
class TenantUsage:
    """What a tenant uses, and its limits; a limit of 0 is none.

    Attributes:
        queued, delayed, running: its jobs.
        tokens_charged: of `tokens_per_minute`, not refilled yet; above it where one job cost more than a minute's.
    """

    queued: int
    delayed: int
    running: int
    tokens_charged: int
    max_queued: int
    max_running: int
    tokens_per_minute: int


def read_usage(keys: QueueKeys, tenant: str, *, now_ms: int = 0) -> Call[TenantUsage]:
    """A tenant's jobs and tokens, with the limits that hold for it."""

    def parse(reply: Any) -> TenantUsage:
        return TenantUsage(*(int(value) for value in reply))

    return Call(load_script("usage"), (keys.prefix,), [now_ms, tenant], parse)


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """Why and when a job was dead-lettered. `job_id` is '' where a stray stream entry named none."""

    letter_id: str
    job_id: str
    code: str
    message: str
    at_ms: int


def dead_letters(keys: QueueKeys, *, limit: int = 100, before: str = "") -> Call[list[DeadLetter]]:
    """The newest dead letters; `before` (a letter id) goes on from there."""

    def parse(reply: Any) -> list[DeadLetter]:
        return [
            DeadLetter(text(reply[i]), text(reply[i + 1]), text(reply[i + 2]), text(reply[i + 3]), number(reply[i + 4]))
            for i in range(0, len(reply), 5)
        ]

    return Call(load_script("dead_letters"), (keys.prefix,), [0, limit, before], parse)
