"""The native routes: generate and batch, jobs with their event streams, health and metrics."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Query, Request, Response

from penstock.aio import AsyncJobHandle
from penstock.gateway.access import Handler, Operator, Who
from penstock.gateway.auth import Forbidden
from penstock.gateway.closing import RETRY_AFTER_S, GatewayStopping
from penstock.gateway.connection import while_connected
from penstock.gateway.event_stream import EventStream
from penstock.gateway.handler import error_body
from penstock.gateway.metrics import CONTENT_TYPE, exposition
from penstock.gateway.models import (
    BatchRequest,
    BatchResponse,
    CancelAnswer,
    ErrorAnswer,
    GenerateRequest,
    GenerateResponse,
    HealthResponse,
    JobAccepted,
    JobView,
    MetricsResponse,
    QuotaLimits,
    RequeueAnswer,
    TenantQuota,
    TokenScore,
)
from penstock.gateway.settings import GatewaySettings
from penstock_core.protocol.config import TenantLimits
from penstock_core.protocol.errors import InvalidRequest, JobError, PenstockError
from penstock_core.protocol.jobs import JobState
from penstock_core.protocol.requests import MAX_CHOICES

ERRORS: dict[int | str, dict[str, Any]] = {
    401: {"model": ErrorAnswer, "description": "no API key, or one that nobody has"},
    422: {"model": ErrorAnswer, "description": "a field is wrong; the body names it"},
    429: {"model": ErrorAnswer, "description": "the queue, the tenant or the key is at its bound; see Retry-After"},
    503: {"model": ErrorAnswer, "description": "Redis cannot be reached"},
}
NOT_FOUND: dict[int | str, dict[str, Any]] = {
    404: {"model": ErrorAnswer, "description": "no such job: it expired, never was, or is another tenant's"}
}
FORBIDDEN: dict[int | str, dict[str, Any]] = {
    403: {"model": ErrorAnswer, "description": "this needs an operator's key"}
}
WAITS: dict[int | str, dict[str, Any]] = {
    **ERRORS,
    409: {"model": ErrorAnswer, "description": "the job was cancelled"},
    500: {"model": ErrorAnswer, "description": "the job failed"},
    504: {"model": ErrorAnswer, "description": "the job's deadline passed, or it takes longer; the body has its id"},
}

JobId = Annotated[str, Path(pattern=r"^[A-Za-z0-9_\-]{1,64}$")]
TenantName = Annotated[str, Path(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-]{0,63}$")]
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=256,
        description="The same key of the same tenant names the same job for as long as that job is kept.",
    ),
]
TraceParent = Annotated[
    str | None,
    Header(pattern=r"^[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$", description="W3C trace context."),
]

router = APIRouter(tags=["native"])


@router.post("/v1/generate", responses=WAITS, summary="Generate, and wait for the answer")
async def generate(
    body: GenerateRequest,
    request: Request,
    caller: Who,
    handler: Handler,
    idempotency_key: IdempotencyKey = None,
    traceparent: TraceParent = None,
) -> GenerateResponse:
    """Submit one prompt and wait for its result; a client that hangs up cancels it (unless configured otherwise)."""
    work = handler.generate(body, caller.tenant, idempotency_key=idempotency_key, traceparent=traceparent)
    return await while_connected(request, work)


@router.post("/v1/batch", responses=WAITS, summary="Generate several at once")
async def batch(body: BatchRequest, request: Request, caller: Who, handler: Handler) -> BatchResponse:
    """Submit all in one round trip and wait for all. An item that fails has an error in its place."""
    return await while_connected(request, handler.generate_batch(body, caller.tenant))


@router.post("/v1/jobs", status_code=202, responses=ERRORS, summary="Submit a job")
async def submit(
    body: GenerateRequest,
    response: Response,
    caller: Who,
    handler: Handler,
    idempotency_key: IdempotencyKey = None,
    traceparent: TraceParent = None,
) -> JobAccepted:
    """Store a job and return its id; it runs whatever becomes of this gateway."""
    job = await handler.submit(body, caller.tenant, idempotency_key=idempotency_key, traceparent=traceparent)
    at_once = not job.duplicate and not body.delay_s and body.not_before is None
    state = JobState.QUEUED if at_once else (await job.status()).state
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return JobAccepted(id=job.id, state=state, status_url=f"/v1/jobs/{job.id}", stream_url=f"/v1/jobs/{job.id}/stream")


@router.get("/v1/jobs", responses={**ERRORS, **FORBIDDEN}, summary="The newest jobs")
async def jobs(
    caller: Who,
    handler: Handler,
    limit: Annotated[int, Query(ge=1, le=1000)] = 50,
    state: Annotated[JobState | None, Query()] = None,
    before: Annotated[str | None, Query(pattern=r"^[A-Za-z0-9_\-]{1,64}$", description="go on behind this job")] = None,
    tenant: Annotated[str | None, Query(max_length=64, description="of one tenant; asked by an operator")] = None,
) -> list[JobView]:
    """Newest first, without their results: of the caller's tenant, or for an operator of all tenants.

    Bounded: of a tenant's newest 1,000 and of everybody's newest 10,000. For the next page give the last one's id as
    `before`.
    """
    scope = caller.scope
    if tenant is not None:
        if scope not in (None, tenant):
            raise Forbidden("jobs of another tenant: this needs an operator's key")
        scope = tenant
    return await handler.jobs(scope, limit, state, before)


@router.get("/v1/jobs/{job_id}", responses={**ERRORS, **NOT_FOUND}, summary="Where a job stands")
async def view(job_id: JobId, caller: Who, handler: Handler) -> JobView:
    """Status of a job, with its result or failure once it has ended."""
    return await handler.view(job_id, caller.scope)


@router.delete("/v1/jobs/{job_id}", responses={**ERRORS, **NOT_FOUND}, summary="Cancel a job")
async def cancel(job_id: JobId, caller: Who, handler: Handler) -> CancelAnswer:
    """A queued job ends at once, a running one within a decode step; one that has ended stays as it is."""
    outcome = await handler.cancel(job_id, caller.scope)
    return CancelAnswer.model_validate({"id": job_id, "outcome": outcome})


@router.post(
    "/v1/jobs/{job_id}/requeue",
    responses={**ERRORS, **FORBIDDEN, **NOT_FOUND},
    summary="Put a dead job back in line",
    tags=["operator"],
)
async def put_back(job_id: JobId, operator: Operator, handler: Handler) -> RequeueAnswer:
    """As new: crashes, errors and tokens are forgotten. The queue's bounds do not apply."""
    await handler.status(job_id, operator.scope)
    return RequeueAnswer(id=job_id, outcome=await handler.books.requeue(job_id))


@router.get(
    "/v1/jobs/{job_id}/stream",
    responses={**ERRORS, **NOT_FOUND, 200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
    response_class=Response,
    summary="Follow a job's tokens",
)
async def stream(
    job_id: JobId,
    request: Request,
    caller: Who,
    handler: Handler,
    from_offset: Annotated[int, Query(ge=0, description="first token wanted, of every choice")] = 0,
    index: Annotated[int | None, Query(ge=0, description="the only choice wanted")] = None,
    last_event_id: Annotated[str | None, Header(pattern=r"^\d{1,10}e?(\.\d{1,10}e?)*$")] = None,
) -> EventStream:
    """Server-sent events: `tokens` with index, offset, token_ids, text, finish_reason; then one `end`.

    `tokens` has logprobs where the job asked for them.
    The id of an event is the reader's position; sent back as `Last-Event-ID` it resumes exactly there, on any gateway.
    A gateway that stops says `interrupted` instead of `end`.
    """
    await handler.status(job_id, caller.scope)
    position = _Position.parse(last_event_id, from_offset)
    job = handler.client.job(job_id)
    settings: GatewaySettings = request.app.state.settings
    farewell = _event("interrupted", error_body(GatewayStopping(job_id)).model_dump(exclude_none=True))
    return EventStream(
        _events(job, position, index),
        settings.keepalive_s,
        closing=handler.closing,
        farewell=f"retry: {1000 * RETRY_AFTER_S}\n{farewell}",
        resumable=True,
    )


@router.get("/v1/health", summary="Is the service alive?", responses={503: {"model": HealthResponse}})
async def health(response: Response, handler: Handler) -> HealthResponse:
    """503 where jobs cannot be stored or nobody works on them."""
    condition = await handler.health()
    if condition.status != "ok":
        response.status_code = 503
    return condition


@router.get("/v1/quota", responses=ERRORS, summary="What the caller uses and may use")
async def quota(caller: Who, handler: Handler) -> TenantQuota:
    """Jobs, tokens of the last minute, and the limits. Beyond a limit submissions are answered 429."""
    return await handler.quota(caller.tenant, caller.requests_per_minute)


@router.get(
    "/v1/tenants/{name}/quota",
    responses={**ERRORS, **FORBIDDEN},
    summary="What a tenant uses and may use",
    tags=["operator"],
)
async def quota_of(name: TenantName, operator: Operator, handler: Handler) -> TenantQuota:
    """As `/v1/quota`, of any tenant."""
    return await handler.quota(name)


@router.put("/v1/tenants/{name}/quota", responses={**ERRORS, **FORBIDDEN}, summary="Limit a tenant", tags=["operator"])
async def limit(name: TenantName, body: QuotaLimits, operator: Operator, handler: Handler) -> TenantQuota:
    """Replaces the tenant's own limits; what is left out or null is the queue's general one. Holds at once."""
    await handler.books.limit(name, TenantLimits(body.max_queued, body.max_running, body.tokens_per_minute))
    return await handler.quota(name)


@router.get("/v1/metrics", responses=ERRORS, summary="The queue and its workers")
async def metrics(caller: Who, handler: Handler) -> MetricsResponse:
    """Depths, counters and workers for an operator; the caller's own jobs for a tenant."""
    return await handler.metrics(caller)


@router.get(
    "/metrics",
    responses={**ERRORS, **FORBIDDEN, 200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    response_class=Response,
    summary="The same for Prometheus",
    tags=["operator"],
)
async def prometheus(request: Request, operator: Operator, handler: Handler) -> Response:
    """Prometheus text. Where API keys are in use it needs an operator's: give the scraper one as its bearer token."""
    seen = await handler.client.queue_snapshot()
    text = exposition(request.app.state.meters, seen, handler.client.settings.queue)
    return Response(text, media_type=CONTENT_TYPE)


class _Position:
    """How far a reader has come, per choice: `5` or, with several choices, `5.7e.3`; the `e` says it has ended.

    Choices behind the last one named have not been heard of yet: nothing tells how many there are.
    """

    def __init__(self, offsets: list[int], start: int, ended: set[int]) -> None:
        self._offsets = offsets
        self.start = start
        self.ended = ended

    @classmethod
    def parse(cls, text: str | None, start: int) -> _Position:
        if text is None:
            return cls([], start, set())
        parts = text.split(".")
        if len(parts) > MAX_CHOICES:
            raise InvalidRequest("Last-Event-ID", f"{len(parts)} choices, allowed are {MAX_CHOICES}")
        ended = {index for index, part in enumerate(parts) if part.endswith("e")}
        return cls([int(part.removesuffix("e")) for part in parts], 0, ended)

    def of(self, index: int) -> int:
        return self._offsets[index] if index < len(self._offsets) else self.start

    def advance(self, index: int, end: int, *, ended: bool) -> str:
        while len(self._offsets) <= index:
            self._offsets.append(self.start)
        self._offsets[index] = max(self._offsets[index], end)
        if ended:
            self.ended.add(index)
        return ".".join(f"{offset}{'e' * (at in self.ended)}" for at, offset in enumerate(self._offsets))


async def _events(job: AsyncJobHandle, position: _Position, index: int | None) -> AsyncGenerator[str]:
    try:
        async with aclosing(job.stream(position.start, index)) as chunks:
            async for chunk in chunks:
                skip = max(0, position.of(chunk.index) - chunk.offset)
                if chunk.index in position.ended or (
                    skip and skip >= len(chunk.token_ids) and chunk.finish_reason is None
                ):
                    continue
                data = {
                    "index": chunk.index,
                    "offset": chunk.offset + skip,
                    "token_ids": chunk.token_ids[skip:],
                    "text": "".join(chunk.pieces[skip:]),
                    "finish_reason": chunk.finish_reason,
                }
                if chunk.logprobs is not None:
                    data["logprobs"] = [TokenScore.of(entry).model_dump() for entry in chunk.logprobs[skip:]]
                ended = chunk.finish_reason is not None
                yield _event("tokens", data, position.advance(chunk.index, chunk.end, ended=ended))
        result = await job.result(timeout=30.0)
        last: dict[str, Any] = {"state": JobState.COMPLETED, "usage": asdict(result.usage)}
    except JobError as error:
        usage = None if error.result is None else asdict(error.result.usage)
        last = {"state": error.code, "usage": usage, "error": error_body(error).model_dump(exclude_none=True)}
    except PenstockError as error:
        yield _event("error", error_body(error).model_dump(exclude_none=True))
        return
    yield _event("end", last)


def _event(kind: str, data: dict[str, Any], event_id: str | None = None) -> str:
    head = f"event: {kind}\n" + (f"id: {event_id}\n" if event_id is not None else "")
    return f"{head}data: {json.dumps(data, ensure_ascii=False)}\n\n"
