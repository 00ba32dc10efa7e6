"""The producer's transitions: submit and cancel, and the count of a gateway's requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from penstock_core.protocol.codec import MAX_REQUEST_BYTES, encode_metadata
from penstock_core.protocol.errors import InvalidRequest
from penstock_core.protocol.keys import QueueKeys
from penstock_core.protocol.records import quick
from penstock_core.protocol.script import Argument, Call, load_script
from penstock_core.protocol.transitions.replies import CANCELLED, text, texts

if TYPE_CHECKING:
    from penstock_core.protocol.requests import JobOptions

MAX_JOBS_PER_CALL = 10_000
MAX_ID_LENGTH = 128

CancelOutcome = Literal["cancelled", "cancelling", "ended", "unknown"]


@quick
@dataclass(frozen=True, slots=True)
class NewJob:
    """One job to submit.

    Attributes:
        job_id: made by the client, at most 128 characters; submitting it again is answered `duplicate`.
        request: `codec.encode_request(...)`.
        input_tokens, output_tokens: estimates that claim by capacity and fairness go by.
        affinity: cache-affinity tag, '' for no preference.
    """

    job_id: str
    request: bytes
    options: JobOptions
    input_tokens: int
    output_tokens: int
    affinity: str = ""


@quick
@dataclass(frozen=True, slots=True)
class SubmitOutcome:
    """What became of one job of a `submit`.

    Attributes:
        job_id: the job's id; of a `duplicate` the existing job's.
        status: `full` means nothing was stored; try again after `retry_after_s`.
        message: for `full`, which bound is reached, its value and the remedy.
    """

    job_id: str
    status: Literal["accepted", "duplicate", "full"]
    retry_after_s: float = 0.0
    message: str = ""


_FULL_MESSAGES = {
    "max_waiting_jobs": "{queue}: {current} jobs wait, max_waiting_jobs is {limit}; add workers or raise it",
    "max_waiting_bytes": "{queue}: {current} bytes wait, max_waiting_bytes is {limit}; add workers or raise it",
    "max_queued": "{queue}: {current} jobs of tenant {tenant} wait, max_queued is {limit}; submit slower or raise it",
    "tokens_per_minute": (
        "{queue}: tenant {tenant} has used {current} of its tokens_per_minute {limit}; submit slower or raise it"
    ),
}


def submit(
    keys: QueueKeys, jobs: Sequence[NewJob], *, client_id: str = "", now_ms: int = 0
) -> Call[list[SubmitOutcome]]:
    """Accept jobs, each for itself; one outcome per job. Safe to repeat with the same ids.

    Raises `InvalidRequest` where a job exceeds a size bound.
    """
    if len(jobs) > MAX_JOBS_PER_CALL:
        raise InvalidRequest("jobs", f"{len(jobs)} in one call, limit {MAX_JOBS_PER_CALL}; submit in several calls")
    args: list[Argument] = [now_ms, client_id, len(jobs)]
    for job in jobs:
        options = job.options
        if not 0 < len(job.job_id) <= MAX_ID_LENGTH:
            raise InvalidRequest("job_id", f"{len(job.job_id)} characters, allowed are 1 to {MAX_ID_LENGTH}")
        if len(job.request) > MAX_REQUEST_BYTES:
            raise InvalidRequest("request", f"{len(job.request)} bytes, limit {MAX_REQUEST_BYTES}; shorten the prompt")
        args += (
            job.job_id,
            job.request,
            f"{options.priority} {options.tenant} {job.input_tokens} {job.output_tokens} "
            f"{_ms(options.deadline_s)} {_ms(options.delay_s)} {_ms(options.not_before)} "
            f"{options.max_retries} {max(1, _ms(options.result_ttl_s))}",
            job.affinity,
            options.idempotency_key or "",
            encode_metadata(options.metadata) if options.metadata else b"",
            options.traceparent or "",
        )

    def parse(reply: Any) -> list[SubmitOutcome]:
        return [
            SubmitOutcome(job.job_id, "accepted") if item[0] == b"accepted" else _outcome(keys.queue, job, item)
            for job, item in zip(jobs, reply, strict=True)
        ]

    return Call(load_script("submit"), (keys.prefix,), args, parse)


def _ms(seconds: float | None) -> int:
    return 0 if seconds is None else max(1, round(seconds * 1000)) if seconds > 0 else 0


def _outcome(queue: str, job: NewJob, reply: Sequence[Any]) -> SubmitOutcome:
    status = text(reply[0])
    if status == "accepted":
        return SubmitOutcome(job.job_id, "accepted")
    if status == "duplicate":
        return SubmitOutcome(text(reply[1]), "duplicate")
    limit_name = text(reply[1])
    message = _FULL_MESSAGES[limit_name].format(
        queue=f"queue {queue}", tenant=job.options.tenant, current=int(reply[2]), limit=int(reply[3])
    )
    return SubmitOutcome(job.job_id, "full", int(reply[4]) / 1000, message)


def cancel(
    keys: QueueKeys, job_ids: Sequence[str], *, tenant: str | None = None, now_ms: int = 0
) -> Call[list[CancelOutcome]]:
    """Cancel jobs; with `tenant`, only that tenant's. Safe to repeat."""
    args: list[Argument] = [now_ms, tenant or "", *CANCELLED, *job_ids]
    return Call(load_script("cancel"), (keys.prefix,), args, lambda reply: cast("list[CancelOutcome]", texts(reply)))


def charge_request(keys: QueueKeys, fingerprint: str, per_minute: int, *, now_ms: int = 0) -> Call[float]:
    """One more request of an API key. 0.0: it passes; else the seconds until one would, and nothing was charged."""
    args: list[Argument] = [now_ms, fingerprint, per_minute]
    return Call(load_script("charge_request"), (keys.prefix,), args, lambda reply: int(reply) / 1000)
