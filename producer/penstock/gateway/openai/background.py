"""`/v1/responses`: OpenAI's Responses, for background mode above all. A response is a job, and nothing else is kept.

An event's `sequence_number` is made from its place in the job's token log, so that a stream goes on behind
`starting_after` on any gateway. Numbers rise, and skip.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field, StringConstraints, ValidationError

from penstock.aio import AsyncJobHandle
from penstock.gateway.access import Handler, Who
from penstock.gateway.connection import while_connected
from penstock.gateway.event_stream import EventStream
from penstock.gateway.handler import RequestHandler
from penstock.gateway.intake import cancel_quietly
from penstock.gateway.native import IdempotencyKey
from penstock.gateway.openai.generation import item
from penstock.gateway.openai.objects import ResponseObject
from penstock.gateway.openai.requests import ChatBody, Label, Text, _Body
from penstock.gateway.openai.routes import answers
from penstock.gateway.settings import GatewaySettings
from penstock_core.protocol.errors import InvalidRequest, JobError, JobNotFound, PenstockError
from penstock_core.protocol.jobs import FinishReason, JobResult, JobState
from penstock_core.protocol.requests import MAX_MESSAGES, MAX_NEW_TOKENS, invalid_request
from penstock_core.protocol.transitions import JobStatus

_MODEL = "penstock.response.model"  # in the job's metadata: by it a job is known as a response
_OPENING = 4  # events before the first token's
_STATUS = {JobState.DELAYED: "queued", JobState.QUEUED: "queued", JobState.RUNNING: "in_progress"}
_ENDED = {JobState.COMPLETED: "completed", JobState.CANCELLED: "cancelled"}

ResponseId = Annotated[str, Path(pattern=r"^resp_[A-Za-z0-9_\-]{1,64}$")]

router = APIRouter(tags=["OpenAI"])


class InputPart(_Body):
    """A part of a message. Parts other than text are refused."""

    type: Literal["input_text", "output_text"]
    text: Text


class InputMessage(_Body):
    """One turn."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[InputPart], Field(min_length=1, max_length=1024)]


class ResponseBody(_Body):
    """`POST /v1/responses`.

    Attributes:
        background: answer at once, with the response's id; else the answer is waited for, and hanging up cancels it.
        store: every response is kept for an hour after its end, so only true is honoured.
        seed, priority, deadline_s, ignore_eos: this queue's own.
    """

    model: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    input: Text | Annotated[list[InputMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    instructions: Text | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    background: bool = False
    stream: bool = False
    store: Literal[True] = True
    metadata: Annotated[dict[Label, Annotated[str, StringConstraints(max_length=512)]], Field(max_length=16)] | None = (
        None
    )
    seed: int | None = None
    priority: int | None = None
    deadline_s: float | None = None
    ignore_eos: bool | None = None

    def chat(self) -> ChatBody:
        """The same as a chat, which says what its fields may be. Raises `InvalidRequest`."""
        turns: list[dict[str, Any]] = []
        if self.instructions:
            turns.append({"role": "system", "content": self.instructions})
        for message in [InputMessage(role="user", content=self.input)] if isinstance(self.input, str) else self.input:
            text = message.content if isinstance(message.content, str) else "".join(p.text for p in message.content)
            turns.append({"role": message.role, "content": text})
        same = ("model", "temperature", "top_p", "metadata", "seed", "priority", "deadline_s", "ignore_eos")
        values = {name: value for name in same if (value := getattr(self, name)) is not None}
        try:
            return ChatBody.model_validate({**values, "messages": turns, "max_tokens": self.max_output_tokens})
        except ValidationError as error:
            raise invalid_request(error) from None


@router.post(
    "/v1/responses",
    response_model=None,
    responses=answers(ResponseObject, streamed=True),
    summary="Answer, in the background if asked",
)
async def create(
    body: ResponseBody, request: Request, caller: Who, handler: Handler, idempotency_key: IdempotencyKey = None
) -> Response:
    """With `background: true` the response is stored and answered at once; GET it, or stream it, until it has ended."""
    chat = body.chat()
    marked = {**(body.metadata or {}), _MODEL: body.model}
    options = chat.delivery(caller.tenant, metadata=marked, idempotency_key=idempotency_key)
    outcome = (await handler.intake.submit([item(chat.jobs()[0], options)]))[0]
    if not isinstance(outcome, AsyncJobHandle):
        raise outcome
    settings: GatewaySettings = request.app.state.settings
    keep = body.background or outcome.duplicate or not settings.cancel_on_disconnect
    if body.stream:
        return _followed(_events(handler, outcome.id, caller.scope, -1, keep=keep), handler, settings, resumable=keep)
    if not body.background:
        await while_connected(request, _ended(handler, outcome, keep=keep))
    return JSONResponse(await _response(handler, outcome.id, caller.scope))


@router.get(
    "/v1/responses/{response_id}",
    response_model=None,
    responses=answers(ResponseObject, streamed=True),
    summary="Where a response stands",
)
async def retrieve(
    response_id: ResponseId,
    request: Request,
    caller: Who,
    handler: Handler,
    stream: bool = False,
    starting_after: Annotated[int | None, Query(ge=0, le=2**31, description="go on behind this event")] = None,
) -> Response:
    """The response as it is now, or with `stream=true` its events from the first, or from `starting_after`, on."""
    if starting_after is not None and not stream:
        raise InvalidRequest("starting_after", "has no meaning without stream=true")
    job_id = response_id.removeprefix("resp_")
    shown = await _response(handler, job_id, caller.scope)
    if not stream:
        return JSONResponse(shown)
    settings: GatewaySettings = request.app.state.settings
    after = -1 if starting_after is None else starting_after
    return _followed(_events(handler, job_id, caller.scope, after, keep=True), handler, settings, resumable=True)


@router.post(
    "/v1/responses/{response_id}/cancel",
    response_model=None,
    responses=answers(ResponseObject),
    summary="Cancel a response",
)
async def cancel(response_id: ResponseId, caller: Who, handler: Handler) -> Response:
    """A running one ends within a decode step; one that has ended stays as it is."""
    job_id = response_id.removeprefix("resp_")
    await _response(handler, job_id, caller.scope)
    await handler.cancel(job_id, caller.scope)
    return JSONResponse(await _response(handler, job_id, caller.scope))


def _followed(
    events: AsyncGenerator[str], handler: RequestHandler, settings: GatewaySettings, *, resumable: bool
) -> EventStream:
    # A comment: an event would need a number, and a client goes on behind the last number it saw.
    farewell = ": this gateway is stopping; the response goes on: go on behind your last event with starting_after\n\n"
    return EventStream(events, settings.keepalive_s, closing=handler.closing, farewell=farewell, resumable=resumable)


async def _ended(handler: RequestHandler, job: AsyncJobHandle, *, keep: bool) -> None:
    """Wait for the end.

    Raises `StillRunning`, `GatewayStopping`, and `JobError` for a request that the worker refused.
    """
    try:
        await handler.result(job, handler.longest_wait_s)
    except JobError as error:
        if error.code in ("invalid_request", "wrong_model"):
            raise
    except asyncio.CancelledError:
        if not keep and not handler.closing.begun:
            await asyncio.shield(cancel_quietly(job))
        raise


async def _response(handler: RequestHandler, job_id: str, scope: str | None) -> dict[str, Any]:
    """The response object as it is now. Raises `JobNotFound`, also for a job that is no response."""
    status = await handler.status(job_id, scope)
    if _MODEL not in status.metadata:
        raise JobNotFound(f"no response resp_{job_id}")
    result, failure = None, None
    if status.state.is_terminal:
        try:
            result = await handler.client.job(job_id).result(timeout=5.0)
        except JobError as error:
            result, failure = error.result, error
    return _object(status, result, failure)


def _object(status: JobStatus, result: JobResult | None, failure: JobError | None) -> dict[str, Any]:
    cut = result is not None and any(choice.finish_reason is FinishReason.LENGTH for choice in result.choices)
    state = _STATUS.get(status.state) or _ENDED.get(status.state, "failed")
    usage = None
    if result is not None:
        prompt, completion = result.usage.prompt_tokens, result.usage.completion_tokens
        usage = {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": result.usage.cached_tokens},
            "output_tokens": completion,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt + completion,
        }
    return {
        "id": f"resp_{status.job_id}",
        "object": "response",
        "created_at": status.submitted_ms // 1000,
        "status": "incomplete" if state == "completed" and cut else state,
        "model": status.metadata[_MODEL],
        "output": [_message(status.job_id, result.text, "incomplete" if cut else "completed")] if result else [],
        "error": {"code": "server_error", "message": failure.message} if failure and state == "failed" else None,
        "incomplete_details": {"reason": "max_output_tokens"} if state == "completed" and cut else None,
        "usage": usage,
        "metadata": {name: value for name, value in status.metadata.items() if name != _MODEL},
        "parallel_tool_calls": False,
        "tool_choice": "none",
        "tools": [],
    }


def _message(job_id: str, text: str | None, status: str) -> dict[str, Any]:
    content = [] if text is None else [{"type": "output_text", "text": text, "annotations": []}]
    return {"id": f"msg_{job_id}", "type": "message", "role": "assistant", "status": status, "content": content}


def _number(end: int, *, text_alone: bool) -> int:
    """The number of a chunk's event: after the opening, two for each place in the log, the odd one for text alone."""
    return _OPENING + 2 * end + text_alone


async def _events(
    handler: RequestHandler, job_id: str, scope: str | None, after: int, *, keep: bool
) -> AsyncGenerator[str]:
    """The events behind number `after`; leaving before the end cancels the job, unless it shall `keep`."""
    job = handler.client.job(job_id)
    place = {"item_id": f"msg_{job_id}", "output_index": 0, "content_index": 0}
    last, ended = after, False
    try:
        begun = {**await _response(handler, job_id, scope), "status": "in_progress", "output": [], "usage": None}
        part = {"type": "output_text", "text": "", "annotations": []}
        opening: list[tuple[str, dict[str, Any]]] = [
            ("response.created", {"response": {**begun, "status": "queued"}}),
            ("response.in_progress", {"response": begun}),
            ("response.output_item.added", {"output_index": 0, "item": _message(job_id, None, "in_progress")}),
            ("response.content_part.added", {**place, "part": part}),
        ]
        for number, (kind, data) in enumerate(opening):
            if number > after:
                yield _event(kind, number, data)
        last = max(after, _OPENING - 1)
        async with aclosing(job.stream(max(0, (after - _OPENING) // 2), 0)) as chunks:
            async for chunk in chunks:
                number = _number(chunk.end, text_alone=not chunk.token_ids)
                if chunk.text and number > last:
                    last = number
                    yield _event("response.output_text.delta", number, {**place, "delta": chunk.text, "logprobs": []})
        ended = True
        shown = await _response(handler, job_id, scope)
        message = shown["output"][0]
        text = message["content"][0]
        closing: list[tuple[str, dict[str, Any]]] = [
            ("response.output_text.done", {**place, "text": text["text"], "logprobs": []}),
            ("response.content_part.done", {**place, "part": text}),
            ("response.output_item.done", {"output_index": 0, "item": message}),
            (f"response.{shown['status']}", {"response": shown}),
        ]
        for number, (kind, data) in enumerate(closing, _number(shown["usage"]["output_tokens"] + 1, text_alone=False)):
            if number > after:
                yield _event(kind, number, data)
    except JobError:
        ended = True
        shown = await _response(handler, job_id, scope)
        kind = "response.failed" if shown["status"] == "failed" else "response.incomplete"
        yield _event(kind, last + 2, {"response": shown})
    except PenstockError as error:
        yield _event("error", last + 2, {"code": "server_error", "message": str(error), "param": None})
    finally:
        if not ended and not keep and not handler.closing.begun:
            await cancel_quietly(job)


def _event(kind: str, number: int, data: dict[str, Any]) -> str:
    shown = {"type": kind, "sequence_number": number, **data}
    return f"event: {kind}\ndata: {json.dumps(shown, ensure_ascii=False)}\n\n"
