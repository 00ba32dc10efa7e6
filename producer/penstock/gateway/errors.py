"""From an exception to an HTTP answer: one status per kind of error, one body for all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from penstock.gateway.auth import Forbidden, Unauthorized
from penstock.gateway.closing import RETRY_AFTER_S, GatewayStopping
from penstock.gateway.handler import error_body
from penstock.gateway.models import ErrorBody
from penstock.gateway.openai import errors as openai
from penstock.gateway.openai.requests import UNSUPPORTED
from penstock_core.protocol.errors import (
    BrokerUnavailable,
    InvalidRequest,
    JobCancelled,
    JobError,
    JobExpired,
    JobNotFound,
    PenstockError,
    QueueFull,
    ResultTimeout,
)
from penstock_core.protocol.refusals import first_problem, place_of, refusal

_STATUS: tuple[tuple[type[PenstockError], int], ...] = (
    (InvalidRequest, 422),
    (Unauthorized, 401),
    (Forbidden, 403),
    (JobNotFound, 404),
    (QueueFull, 429),
    (JobCancelled, 409),
    (JobExpired, 504),
    (ResultTimeout, 504),
    (BrokerUnavailable, 503),
    (GatewayStopping, 503),
)
_OPENAI = ("/v1/chat/", "/v1/completions", "/v1/models", "/v1/files", "/v1/batches", "/v1/responses")


def status_of(error: PenstockError) -> int:
    """The HTTP status that says what kind of error this is."""
    if isinstance(error, JobError) and error.code in ("invalid_request", "wrong_model"):
        return 422
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 500)


def install(app: FastAPI) -> None:
    """Answer every error of this house with an `ErrorBody`, and on OpenAI's routes with OpenAI's error object."""

    @app.exception_handler(PenstockError)
    async def on_penstock_error(request: Request, error: PenstockError) -> JSONResponse:
        headers = {}
        if isinstance(error, QueueFull):
            headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
        if isinstance(error, GatewayStopping):
            headers["Retry-After"] = str(RETRY_AFTER_S)
        if isinstance(error, Unauthorized):
            headers["WWW-Authenticate"] = "Bearer"
        if _is_openai(request):
            status, body = openai.error_object(error)
            return JSONResponse({"error": body}, status, headers)
        return _answer(status_of(error), error_body(error), headers)

    @app.exception_handler(RequestValidationError)
    async def on_validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        field, message = _explained(request, first_problem(error.errors()))
        if _is_openai(request):
            body = openai.body(f"{field}: {message}", "invalid_request_error", None, field)
            return JSONResponse({"error": body}, 400)
        return _answer(422, ErrorBody(code="invalid_request", message=f"{field}: {message}", field=field))

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        codes = {404: "not_found", 405: "method_not_allowed", 408: "too_slow", 413: "too_large"}
        code = codes.get(error.status_code, "http_error")
        if _is_openai(request):
            shown = openai.body(str(error.detail), "invalid_request_error", code)
            return JSONResponse({"error": shown}, error.status_code, error.headers)
        body = ErrorBody(code=code, message=str(error.detail))
        return _answer(error.status_code, body, dict(error.headers or {}))


def _explained(request: Request, problem: Mapping[str, Any]) -> tuple[str, str]:
    """Which field, and what is wrong with it."""
    kind, place = problem["type"], problem["loc"][1:]
    if kind == "json_invalid":
        return "request", f"the body is no JSON: {problem['ctx']['error']} at character {place[0]}"
    if not place and problem["loc"][0] == "body" and kind != "value_error":
        if "json" not in request.headers.get("content-type", ""):
            return "request", "the body is not read as JSON; send it with the header Content-Type: application/json"
        return "request", "the body is no JSON object; send one with the fields that /openapi.json describes"
    field = place_of(place) or "request"
    not_honoured = kind == "extra_forbidden" and len(place) == 1 and place[0] in UNSUPPORTED and _is_openai(request)
    return field, "is not honoured by this gateway; leave it out" if not_honoured else refusal(problem)


def _is_openai(request: Request) -> bool:
    return request.url.path.startswith(_OPENAI)


def _answer(status: int, body: ErrorBody, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": body.model_dump(exclude_none=True)}, status, headers)
