"""The native routes: generate and batch, jobs with their event streams, health and metrics."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from fastapi.responses import StreamingResponse

from penstock.aio import AsyncJobHandle
from penstock.gateway.connection import while_connected, with_keepalive
from penstock.gateway.handler import RequestHandler, error_body
from penstock.gateway.metrics import CONTENT_TYPE, exposition
from penstock.gateway.models import (
    BatchRequest,
    BatchResponse,
    ErrorBody,
    GenerateRequest,
    GenerateResponse,
    HealthResponse,
    JobAccepted,
    JobView,
    MetricsResponse,
)
from penstock.gateway.settings import GatewaySettings
from penstock_core.protocol.errors import InvalidRequest, JobError, PenstockError
from penstock_core.protocol.jobs import JobState

ERRORS: dict[int | str, dict[str, Any]] = {
    401: {"model": ErrorBody, "description": "no API key, or one that nobody has"},
    422: {"model": ErrorBody, "description": "a field is wrong; the body names it"},
    429: {"model": ErrorBody, "description": "the queue or the tenant is at its bound; see Retry-After"},
    503: {"model": ErrorBody, "description": "Redis cannot be reached"},
}

JobId = Annotated[str, Path(pattern=r"^[A-Za-z0-9_\-]{1,64}$")]
IdempotencyKey = Annotated[str | None, Header(alias="Idempotency-Key", min_length=1, max_length=256)]
TraceParent = Annotated[str | None, Header(pattern=r"^[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$")]


def tenant_of(request: Request, authorization: Annotated[str | None, Header()] = None) -> str:
    """Dependency: the tenant whose key came with the request."""
    settings: GatewaySettings = request.app.state.settings
    return settings.keys.tenant_of(authorization)


def handler_of(request: Request) -> RequestHandler:
    """Dependency: the process's handler."""
    handler: RequestHandler = request.app.state.handler
    return handler


Tenant = Annotated[str, Depends(tenant_of)]
Handler = Annotated[RequestHandler, Depends(handler_of)]

router = APIRouter()


@router.post("/v1/generate", responses=ERRORS, summary="Generate, and wait for the answer")
async def generate(
    body: GenerateRequest,
    request: Request,
    tenant: Tenant,
    handler: Handler,
    idempotency_key: IdempotencyKey = None,
    traceparent: TraceParent = None,
) -> GenerateResponse:
    """Submit one prompt and wait for its result; a client that hangs up cancels it (unless configured otherwise)."""
    work = handler.generate(body, tenant, idempotency_key=idempotency_key, traceparent=traceparent)
    return await while_connected(request, work)


@router.post("/v1/batch", responses=ERRORS, summary="Generate several at once")
async def batch(body: BatchRequest, request: Request, tenant: Tenant, handler: Handler) -> BatchResponse:
    """Submit all in one round trip and wait for all. An item that fails has an error in its place."""
    return await while_connected(request, handler.generate_batch(body, tenant))


@router.post("/v1/jobs", status_code=202, responses=ERRORS, summary="Submit a job")
async def submit(
    body: GenerateRequest,
    response: Response,
    tenant: Tenant,
    handler: Handler,
    idempotency_key: IdempotencyKey = None,
    traceparent: TraceParent = None,
) -> JobAccepted:
    """Store a job and return its id; it runs whatever becomes of this gateway."""
    job = await handler.submit(body, tenant, idempotency_key=idempotency_key, traceparent=traceparent)
    status = await job.status()
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return JobAccepted(
        id=job.id, state=status.state, status_url=f"/v1/jobs/{job.id}", stream_url=f"/v1/jobs/{job.id}/stream"
    )


@router.get("/v1/jobs", responses=ERRORS, summary="The newest jobs")
async def jobs(
    tenant: Tenant,
    handler: Handler,
    limit: Annotated[int, Query(ge=1, le=1000)] = 50,
    state: Annotated[JobState | None, Query()] = None,
) -> list[JobView]:
    """Of the caller's tenant, newest first, without their results. Walks over all retained jobs: for people."""
    return await handler.jobs(tenant, limit, state)


@router.get("/v1/jobs/{job_id}", responses={**ERRORS, 404: {"model": ErrorBody}}, summary="Where a job stands")
async def view(job_id: JobId, tenant: Tenant, handler: Handler) -> JobView:
    """Status of a job, with its result or failure once it has ended."""
    return await handler.view(job_id, tenant)


@router.delete("/v1/jobs/{job_id}", responses={**ERRORS, 404: {"model": ErrorBody}}, summary="Cancel a job")
async def cancel(job_id: JobId, tenant: Tenant, handler: Handler) -> dict[str, str]:
    """A queued job ends at once, a running one within a decode step; one that has ended stays as it is."""
    return {"id": job_id, "outcome": await handler.cancel(job_id, tenant)}


@router.get(
    "/v1/jobs/{job_id}/stream",
    responses={**ERRORS, 200: {"content": {"text/event-stream": {}}}, 404: {"model": ErrorBody}},
    response_class=StreamingResponse,
    summary="Follow a job's tokens",
)
async def stream(
    job_id: JobId,
    request: Request,
    tenant: Tenant,
    handler: Handler,
    from_offset: Annotated[int, Query(ge=0, description="first token wanted, of every choice")] = 0,
    index: Annotated[int | None, Query(ge=0, description="the only choice wanted")] = None,
    last_event_id: Annotated[str | None, Header(pattern=r"^\d{1,10}(\.\d{1,10})*$")] = None,
) -> StreamingResponse:
    """Server-sent events: `tokens` with index, offset, token_ids, text and finish_reason; then one `end`.

    The id of an event is the reader's position; sent back as `Last-Event-ID` it resumes exactly there, on any gateway.
    """
    await handler.status(job_id, tenant)
    position = _Position.parse(last_event_id, from_offset)
    job = handler.client.job(job_id)
    settings: GatewaySettings = request.app.state.settings
    return StreamingResponse(
        with_keepalive(_events(job, position, index), settings.keepalive_s),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


@router.get("/v1/health", summary="Is the service alive?", responses={503: {"model": HealthResponse}})
async def health(response: Response, handler: Handler) -> HealthResponse:
    """503 where jobs cannot be stored or nobody works on them."""
    condition = await handler.health()
    if condition.status != "ok":
        response.status_code = 503
    return condition


@router.get("/v1/metrics", responses=ERRORS, summary="The queue and its workers")
async def metrics(request: Request, tenant: Tenant, handler: Handler) -> MetricsResponse:
    """Depths, counters and workers; where API keys are in use, depths of the caller's tenant only."""
    settings: GatewaySettings = request.app.state.settings
    return await handler.metrics(tenant if settings.keys.required else None)


@router.get(
    "/metrics",
    responses={**ERRORS, 200: {"content": {"text/plain": {}}}},
    response_class=Response,
    summary="The same for Prometheus",
)
async def prometheus(request: Request, tenant: Tenant, handler: Handler) -> Response:
    """Prometheus text; where API keys are in use, depths of the caller's tenant only."""
    settings: GatewaySettings = request.app.state.settings
    seen = await handler.client.queue_snapshot()
    text = exposition(
        request.app.state.meters, seen, handler.client.settings.queue, tenant if settings.keys.required else None
    )
    return Response(text, media_type=CONTENT_TYPE)


class _Position:
    """How far a reader has come, per choice: `5` or, with several choices, `5.7.3`."""

    def __init__(self, offsets: list[int], start: int) -> None:
        self._offsets = offsets
        self._start = start

    @classmethod
    def parse(cls, text: str | None, start: int) -> _Position:
        if text is None:
            return cls([], start)
        offsets = [int(part) for part in text.split(".")]
        if len(offsets) > 64:
            raise InvalidRequest("Last-Event-ID", f"{len(offsets)} choices, allowed are 64")
        return cls(offsets, 0)

    def of(self, index: int) -> int:
        return self._offsets[index] if index < len(self._offsets) else self._start

    @property
    def least(self) -> int:
        return min(self._offsets, default=self._start)

    def advance(self, index: int, end: int) -> str:
        while len(self._offsets) <= index:
            self._offsets.append(self._start)
        self._offsets[index] = max(self._offsets[index], end)
        return ".".join(map(str, self._offsets))


async def _events(job: AsyncJobHandle, position: _Position, index: int | None) -> AsyncIterator[str]:
    try:
        async for chunk in job.stream(position.least, index):
            skip = max(0, position.of(chunk.index) - chunk.offset)
            if skip and skip >= len(chunk.token_ids) and chunk.finish_reason is None:
                continue
            data = {
                "index": chunk.index,
                "offset": chunk.offset + skip,
                "token_ids": chunk.token_ids[skip:],
                "text": "".join(chunk.pieces[skip:]),
                "finish_reason": chunk.finish_reason,
            }
            yield _event("tokens", data, position.advance(chunk.index, chunk.end))
        result = await job.result(timeout=30.0)
        ended: dict[str, Any] = {"state": JobState.COMPLETED, "usage": asdict(result.usage)}
    except JobError as error:
        usage = None if error.result is None else asdict(error.result.usage)
        ended = {"state": error.code, "usage": usage, "error": error_body(error).model_dump(exclude_none=True)}
    except PenstockError as error:
        yield _event("error", error_body(error).model_dump(exclude_none=True))
        return
    yield _event("end", ended)


def _event(kind: str, data: dict[str, Any], event_id: str | None = None) -> str:
    head = f"event: {kind}\n" + (f"id: {event_id}\n" if event_id is not None else "")
    return f"{head}data: {json.dumps(data, ensure_ascii=False)}\n\n"
