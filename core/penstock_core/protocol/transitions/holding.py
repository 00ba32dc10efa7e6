"""The worker's transitions: claim, and everything only the holder of a job may do.

A hold is (job id, attempt). Every call is answered per hold: `ok`; `cancelled` or `expired` (the hold stands, the write
was done; stop the sequence and finish it so); or `fenced` (it is not yours any more: drop the sequence, write nothing).
All but `claim` may be repeated as they were after a lost reply. After a lost reply of `claim` call `release_others`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from penstock_core.protocol.codec import ended_template
from penstock_core.protocol.errors import InvalidRequest
from penstock_core.protocol.jobs import JobState
from penstock_core.protocol.keys import QueueKeys
from penstock_core.protocol.script import Argument, Call, load_script
from penstock_core.protocol.transitions.replies import (
    CANCELLED,
    EXPIRED,
    LOG_FULL_CODE,
    UNDECODABLE_CODE,
    HoldStatus,
    hold_statuses,
    number_or_none,
    text,
    texts,
)

MAX_JOBS_PER_CLAIM = 1000
_NO_REQUEST = "its request is missing from the job hash"
_UNDECODABLE = ended_template(JobState.DEAD, UNDECODABLE_CODE, _NO_REQUEST)
_LOG_FULL = ended_template(
    JobState.FAILED,
    LOG_FULL_CODE,
    "its token log reached max_log_bytes; lower max_tokens or logprobs, or raise the limit",
)

Hold = tuple[str, int]
FailOutcome = Literal["delayed", "failed", "cancelled", "expired", "fenced"]


@dataclass(slots=True)  # not frozen: one is made for every job, and a frozen one costs three times as much
class ClaimedJob:
    """A job now running on the worker that claimed it.

    Attributes:
        attempt: the fencing token; every later call names it.
        enqueued_ms: since when it waited; `claimed_ms` is the same clock's time of the claim.
        crashes, errors: how often its workers died, and how often it failed.
        traceparent: W3C trace context of the submitter.
        log: encoded chunks published by earlier attempts, in order: the checkpoint to resume from.
        previous_span: trace context of the attempt before this one, where it was traced.
        last_life: one more crash makes it dead. A worker runs one such job at a time, so that only the one that kills
            it is buried, and not those that were near.
    """

    job_id: str
    attempt: int
    request: bytes
    priority: int
    tenant: str
    client_id: str
    enqueued_ms: int
    claimed_ms: int
    deadline_ms: int | None
    crashes: int
    errors: int
    max_retries: int
    traceparent: str | None
    log: list[bytes]
    previous_span: str | None = None
    last_life: bool = False


@dataclass(frozen=True, slots=True)
class ClaimOutcome:
    """What a claim gave.

    Attributes:
        next_due_ms: when something not claimable now becomes so without the bell ringing (a delay or a patience ends).
        waiting: jobs still queued.
    """

    jobs: list[ClaimedJob]
    next_due_ms: int | None
    waiting: int


@dataclass(slots=True)  # as ClaimedJob
class PublishRecord:
    """A chunk for the log: `count` tokens of choice `index` from `offset`; `payload` is the encoded `TokenChunk`."""

    job_id: str
    attempt: int
    index: int
    offset: int
    count: int
    payload: bytes


@dataclass(slots=True)  # as ClaimedJob
class FinishRecord:
    """The end of a running job: its last chunks, and `ended`, the encoded `JobEnded`."""

    job_id: str
    attempt: int
    state: JobState
    chunks: Sequence[PublishRecord]
    ended: bytes
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class FailRecord:
    """An error met by a running job. `ended` (encoded `JobEnded`) is stored if it is the end; else a retry is due
    after `backoff_ms`."""

    job_id: str
    attempt: int
    code: str
    message: str
    retryable: bool
    ended: bytes
    backoff_ms: int


@dataclass(frozen=True, slots=True)
class BuryRecord:
    """A running job that can never run: `code` and `message` say why, `ended` is the encoded `JobEnded`."""

    job_id: str
    attempt: int
    code: str
    message: str
    ended: bytes


def claim(
    keys: QueueKeys,
    worker_id: str,
    *,
    max_jobs: int,
    free_sequences: int,
    free_tokens: int,
    lease_ms: int,
    idle: bool,
    may_take_last: bool = True,
    now_ms: int = 0,
) -> Call[ClaimOutcome]:
    """Take the jobs that are next and fit; `idle` (nothing held) takes the first one whatever its size.

    `may_take_last`: the worker holds no job on its last life, see `ClaimedJob.last_life`.
    """
    args: list[Argument] = [
        now_ms,
        worker_id,
        min(max_jobs, MAX_JOBS_PER_CLAIM),
        free_sequences,
        free_tokens,
        lease_ms,
        int(idle),
        *EXPIRED,
        *_UNDECODABLE,
        _NO_REQUEST,
        int(may_take_last),
    ]
    return Call(load_script("claim"), (keys.prefix,), args, _claim_outcome)


def _claim_outcome(reply: Any) -> ClaimOutcome:
    return ClaimOutcome([_claimed_job(item) for item in reply[2:]], number_or_none(reply[0]), int(reply[1]))


def _claimed_job(item: Sequence[Any]) -> ClaimedJob:
    job_id, head, request, tenant, client_id, trace, log = item
    attempt, priority, enqueued, claimed, deadline, crashes, errors, retries, last_life = map(int, head.split())
    submitter, _, previous = text(trace).partition(" ")
    return ClaimedJob(
        text(job_id),
        attempt,
        request,
        priority,
        text(tenant),
        text(client_id),
        enqueued,
        claimed,
        deadline or None,
        crashes,
        errors,
        retries,
        submitter or None,
        log,
        previous or None,
        last_life == 1,
    )


def renew(
    keys: QueueKeys,
    worker_id: str,
    holds: Sequence[Hold],
    *,
    lease_ms: int,
    record: bytes | None,
    now_ms: int = 0,
) -> Call[list[HoldStatus]]:
    """Prolong the leases of all holds and store the worker's heartbeat (and record, if given)."""
    args: list[Argument] = [now_ms, worker_id, lease_ms, record or b""]
    for hold in holds:
        args += hold
    return Call(load_script("renew"), (keys.prefix,), args, hold_statuses)


def note_spans(
    keys: QueueKeys, worker_id: str, spans: Sequence[tuple[str, int, str]], now_ms: int = 0
) -> Call[list[HoldStatus]]:
    """Remember the spans of running attempts, as (job id, attempt, traceparent), for later attempts to link to."""
    args: list[Argument] = [now_ms, worker_id]
    for span in spans:
        args += span
    return Call(load_script("trace"), (keys.prefix,), args, hold_statuses)


def publish(
    keys: QueueKeys, worker_id: str, records: Sequence[PublishRecord], now_ms: int = 0
) -> Call[list[HoldStatus]]:
    """Append chunks to the logs, each at exactly the next offset of its choice, and push them to subscribers."""
    args: list[Argument] = [now_ms, worker_id, *_LOG_FULL]
    for record in records:
        head = f"{record.attempt} {record.index} {record.offset} {record.count}"
        args += (record.job_id, head, record.payload)
    return Call(load_script("publish"), (keys.prefix,), args, hold_statuses)


_FINISHED = frozenset({JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED})


def finish(keys: QueueKeys, worker_id: str, records: Sequence[FinishRecord], now_ms: int = 0) -> Call[list[HoldStatus]]:
    """End running jobs with their results: `ok` or `fenced` for each."""
    args: list[Argument] = [now_ms, worker_id]
    for record in records:
        if record.state not in _FINISHED:
            raise InvalidRequest("state", f"a job does not finish as {record.state}; use {sorted(_FINISHED)}")
        args += (
            record.job_id,
            f"{record.attempt} {record.state} {record.prompt_tokens} {record.completion_tokens} {len(record.chunks)}",
            record.ended,
        )
        for chunk in record.chunks:
            args += (f"{chunk.index} {chunk.offset} {chunk.count}", chunk.payload)
    return Call(load_script("finish"), (keys.prefix,), args, hold_statuses)


def fail(keys: QueueKeys, worker_id: str, records: Sequence[FailRecord], now_ms: int = 0) -> Call[list[FailOutcome]]:
    """Report errors: each job is delayed for a retry, or has failed."""
    args: list[Argument] = [now_ms, worker_id, *CANCELLED, *EXPIRED]
    for record in records:
        args += (
            record.job_id,
            record.attempt,
            record.code,
            record.message,
            int(record.retryable),
            record.ended,
            record.backoff_ms,
        )
    return Call(load_script("fail"), (keys.prefix,), args, lambda reply: cast("list[FailOutcome]", texts(reply)))


def release(keys: QueueKeys, worker_id: str, holds: Sequence[Hold], now_ms: int = 0) -> Call[list[HoldStatus]]:
    """Give jobs back with their checkpoint; they are next in line. `cancelled` and `expired` ones have ended so."""
    return Call(load_script("release"), (keys.prefix,), _release_args(worker_id, "these", holds, now_ms), hold_statuses)


def release_others(keys: QueueKeys, worker_id: str, holds: Sequence[Hold], now_ms: int = 0) -> Call[list[str]]:
    """Give back all the worker is on record for except `holds`: what a claim gave whose reply was lost.

    Never call it while a claim of the same worker is under way.
    """
    return Call(load_script("release"), (keys.prefix,), _release_args(worker_id, "others", holds, now_ms), texts)


def _release_args(worker_id: str, which: str, holds: Sequence[Hold], now_ms: int) -> list[Argument]:
    args: list[Argument] = [now_ms, worker_id, which, *CANCELLED, *EXPIRED]
    for hold in holds:
        args += hold
    return args


def bury(keys: QueueKeys, worker_id: str, records: Sequence[BuryRecord], now_ms: int = 0) -> Call[list[HoldStatus]]:
    """Dead-letter running jobs that can never run: `ok` or `fenced` for each."""
    args: list[Argument] = [now_ms, worker_id]
    for record in records:
        args += (record.job_id, record.attempt, record.code, record.message, record.ended)
    return Call(load_script("bury"), (keys.prefix,), args, hold_statuses)


def deregister(keys: QueueKeys, worker_id: str, now_ms: int = 0) -> Call[list[str]]:
    """Forget a worker that leaves; what it still holds goes back in line (ids returned)."""
    return Call(load_script("deregister"), (keys.prefix,), [now_ms, worker_id, *CANCELLED], texts)
