"""`/v1/chat/completions`, `/v1/completions` and `/v1/models`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from penstock.gateway.access import Handler, Who
from penstock.gateway.connection import while_connected
from penstock.gateway.event_stream import EventStream
from penstock.gateway.handler import HEARTBEAT_GRACE_MS, RequestHandler
from penstock.gateway.native import IdempotencyKey, TraceParent
from penstock.gateway.openai.errors import NoSuchModel
from penstock.gateway.openai.generation import Body, Generation
from penstock.gateway.openai.requests import ChatBody, CompletionBody
from penstock.gateway.settings import GatewaySettings

ERROR = {
    "description": "OpenAI's error object",
    "content": {"application/json": {"schema": {"type": "object", "properties": {"error": {"type": "object"}}}}},
}
ERRORS: dict[int | str, dict[str, Any]] = dict.fromkeys((400, 401, 404, 413, 422, 429, 503, 504), ERROR)
ANSWERS = {**ERRORS, 200: {"content": {"application/json": {}, "text/event-stream": {}}}}

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/chat/completions", responses=ANSWERS, summary="Answer a conversation")
async def chat_completions(
    body: ChatBody,
    request: Request,
    caller: Who,
    handler: Handler,
    idempotency_key: IdempotencyKey = None,
    traceparent: TraceParent = None,
) -> Response:
    """OpenAI's chat completions, whole or streamed. Fields that are not honoured are refused by name."""
    return await _answer(body, request, caller.tenant, handler, idempotency_key, traceparent)


@router.post("/v1/completions", responses=ANSWERS, summary="Continue a prompt")
async def completions(
    body: CompletionBody,
    request: Request,
    caller: Who,
    handler: Handler,
    idempotency_key: IdempotencyKey = None,
    traceparent: TraceParent = None,
) -> Response:
    """OpenAI's plain completions, of one prompt or several, whole or streamed."""
    return await _answer(body, request, caller.tenant, handler, idempotency_key, traceparent)


@router.get("/v1/models", responses=ERRORS, summary="Models that live workers serve")
async def models(caller: Who, handler: Handler) -> dict[str, Any]:
    """A list with one entry per served name."""
    return {"object": "list", "data": [_model(name, since) for name, since in (await _served(handler)).items()]}


@router.get("/v1/models/{model:path}", responses=ERRORS, summary="One of them")
async def model(model: str, caller: Who, handler: Handler) -> dict[str, Any]:
    """404 where no live worker serves it."""
    served = await _served(handler)
    if model not in served:
        raise NoSuchModel("model", f"{model!r} is served by no live worker; GET /v1/models lists those that are")
    return _model(model, served[model])


async def _served(handler: RequestHandler) -> dict[str, int]:
    """Served names and the second since which the longest-serving worker of each lives."""
    seen = await handler.client.queue_snapshot()
    found: dict[str, int] = {}
    for view in seen.workers:
        if view.record is not None and view.record.model and seen.now_ms - view.heartbeat_ms < HEARTBEAT_GRACE_MS:
            since = view.record.started_ms // 1000
            found[view.record.model] = min(since, found.get(view.record.model, since))
    return found


def _model(name: str, since: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": since, "owned_by": "penstock"}


async def _answer(
    body: Body,
    request: Request,
    tenant: str,
    handler: RequestHandler,
    idempotency_key: str | None,
    traceparent: str | None,
) -> Response:
    settings: GatewaySettings = request.app.state.settings
    generation = await Generation.begin(
        handler, body, tenant, idempotency_key, traceparent, keep=not settings.cancel_on_disconnect
    )
    if not body.stream:
        return JSONResponse(await while_connected(request, generation.whole()))
    events = await while_connected(request, generation.opened(settings.keepalive_s))
    return EventStream(events, settings.keepalive_s)
