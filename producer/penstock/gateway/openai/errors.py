"""Errors as OpenAI's clients know them: `{"error": {"message", "type", "param", "code"}}`, and the status to each."""

from __future__ import annotations

from typing import Any

from penstock.gateway.auth import Forbidden, Unauthorized
from penstock.gateway.closing import GatewayStopping
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


class NoSuchModel(InvalidRequest):
    """No worker of this queue serves the model."""


_KINDS: tuple[tuple[type[PenstockError], int, str, str | None], ...] = (
    (NoSuchModel, 404, "invalid_request_error", "model_not_found"),
    (InvalidRequest, 400, "invalid_request_error", None),
    (Unauthorized, 401, "invalid_request_error", "invalid_api_key"),
    (Forbidden, 403, "invalid_request_error", "forbidden"),
    (JobNotFound, 404, "invalid_request_error", "not_found"),
    (QueueFull, 429, "rate_limit_error", "rate_limit_exceeded"),
    (JobCancelled, 409, "server_error", "cancelled"),
    (JobExpired, 504, "server_error", "deadline"),
    (ResultTimeout, 504, "server_error", "timeout"),
    (BrokerUnavailable, 503, "server_error", "broker_unavailable"),
    (GatewayStopping, 503, "server_error", "gateway_stopping"),
)


def error_object(error: PenstockError) -> tuple[int, dict[str, Any]]:
    """The HTTP status, and the object that stands under `error`."""
    message, param = str(error), error.field if isinstance(error, InvalidRequest) else None
    if isinstance(error, JobError) and error.code == "wrong_model":
        return 404, body(error.message, "invalid_request_error", "model_not_found", "model")
    if isinstance(error, JobError) and error.code == "invalid_request":
        return 400, body(error.message, "invalid_request_error", None, error.message.partition(":")[0])
    for kind, status, name, code in _KINDS:
        if isinstance(error, kind):
            return status, body(message, name, code, param)
    return 500, body(message, "server_error", error.code if isinstance(error, JobError) else None, None)


def body(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """One error object."""
    return {"message": message, "type": kind, "param": param, "code": code}
