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
from penstock.gateway.openai.objects import ChatCompletion, ModelList, ModelObject, OpenAIError, TextCompletion
from penstock.gateway.openai.requests import ChatBody, CompletionBody
from penstock.gateway.settings import GatewaySettings

_MEANINGS = {
    400: "a field is wrong or not honoured; `param` names it",
    401: "no API key, or one that nobody has",
    404: "no such model or object, or another tenant's",
    413: "the body is too large",
    429: "the queue, the tenant or the key is at its bound; see Retry-After",
    503: "Redis cannot be reached",
    504: "the deadline passed, or it takes longer; the message names the job",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": OpenAIError, "description": meaning} for status, meaning in _MEANINGS.items()
}
ERRORS[422] = {"model": OpenAIError, "description": "never: what is wrong with a request is answered 400"}


def answers(model: Any, *, streamed: bool = False) -> dict[int | str, dict[str, Any]]:
    """The answers of a route, for its description."""
    good: dict[str, Any] = {"model": model}
    if streamed:
        good["content"] = {"text/event-stream": {"schema": {"type": "string"}}}
    return {**ERRORS, 200: good}


router = APIRouter(tags=["OpenAI"])


@router.post(
    "/v1/chat/completions",
    response_model=None,
    responses=answers(ChatCompletion, streamed=True),
    summary="Answer a conversation",
)
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


@router.post(
    "/v1/completions",
    response_model=None,
    responses=answers(TextCompletion, streamed=True),
    summary="Continue a prompt",
)
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


@router.get("/v1/models", response_model=None, responses=answers(ModelList), summary="Models that live workers serve")
async def models(caller: Who, handler: Handler) -> dict[str, Any]:
    """A list with one entry per served name."""
    return {"object": "list", "data": [_model(name, since) for name, since in (await _served(handler)).items()]}


@router.get("/v1/models/{model:path}", response_model=None, responses=answers(ModelObject), summary="One of them")
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
    return EventStream(
        events, settings.keepalive_s, closing=handler.closing, farewell=generation.farewell(), resumable=False
    )
