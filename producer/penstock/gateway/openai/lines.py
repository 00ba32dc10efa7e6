"""The lines of a batch's files: reading requests, writing answers. Pure: no I/O."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from penstock.gateway.openai.errors import body as error_body
from penstock.gateway.openai.errors import error_object
from penstock.gateway.openai.requests import ChatBody, CompletionBody
from penstock_core.protocol.errors import InvalidRequest, JobError, PenstockError
from penstock_core.protocol.requests import invalid_request

MAX_LINES = 50_000
MAX_LINE_ERRORS = 100
ENDPOINTS: dict[str, type[ChatBody | CompletionBody]] = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
}


@dataclass(frozen=True, slots=True)
class Line:
    """One request of a batch."""

    custom_id: str
    body: dict[str, Any]

    def parsed(self, endpoint: str) -> ChatBody | CompletionBody:
        """The request. Raises `InvalidRequest`."""
        try:
            body = ENDPOINTS[endpoint].model_validate(self.body)
        except ValidationError as error:
            raise invalid_request(error) from None
        if body.stream:
            raise InvalidRequest("stream", "a batch has nobody to stream to; leave it out")
        if len(body.jobs()) != 1:
            raise InvalidRequest("prompt", f"{len(body.jobs())} prompts in one line; give each a line of its own")
        return body


def read_lines(data: bytes, endpoint: str) -> tuple[list[Line], list[dict[str, Any]]]:
    """The requests of an input file, and what is wrong with it (then the whole file is refused)."""
    lines: list[Line] = []
    errors: list[dict[str, Any]] = []
    seen: set[str] = set()

    def refuse(number: int | None, code: str, message: str, param: str | None = None) -> None:
        errors.append({"code": code, "line": number, "message": message, "param": param})

    for number, raw in enumerate(data.split(b"\n"), 1):
        if not raw.strip():
            continue
        if len(errors) >= MAX_LINE_ERRORS:
            break
        if len(lines) >= MAX_LINES:
            refuse(number, "too_many_lines", f"more than {MAX_LINES} requests; split the file")
            break
        try:
            loaded = json.loads(raw)
        except (ValueError, RecursionError):
            refuse(number, "invalid_json_line", "this line is not JSON in UTF-8")
            continue
        problem = _problem(loaded, endpoint, seen)
        if problem is not None:
            refuse(number, *problem)
            continue
        seen.add(loaded["custom_id"])
        lines.append(Line(loaded["custom_id"], loaded["body"]))
    if not lines and not errors:
        refuse(None, "empty_file", "the input file has no requests")
    return lines, errors


def _problem(loaded: Any, endpoint: str, seen: set[str]) -> tuple[str, str, str | None] | None:
    if not isinstance(loaded, dict):
        return "invalid_line", "this line is no JSON object", None
    unknown = sorted(set(loaded) - {"custom_id", "method", "url", "body"})
    if unknown:
        return "unknown_field", f"{unknown[0]!r} is unknown; a line has custom_id, method, url and body", unknown[0]
    custom_id = loaded.get("custom_id")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= 512:
        return "invalid_custom_id", "custom_id must be a string of 1 to 512 characters", "custom_id"
    if custom_id in seen:
        return "duplicate_custom_id", f"custom_id {custom_id!r} is used twice", "custom_id"
    if loaded.get("method") != "POST":
        return "invalid_method", "method must be POST", "method"
    if loaded.get("url") != endpoint:
        return "mismatched_endpoint", f"url must be the batch's endpoint {endpoint}", "url"
    if not isinstance(loaded.get("body"), dict):
        return "invalid_body", "body must be a JSON object", "body"
    return None


def answered(line: Line, job_id: str, body: dict[str, Any]) -> bytes:
    """The output line of a completed request."""
    return _line(line, job_id, {"status_code": 200, "request_id": job_id, "body": body}, None)


def refused(line: Line, error: PenstockError) -> bytes:
    """The error line of a request that was refused or failed."""
    status, shown = error_object(error)
    request_id = error.job_id if isinstance(error, JobError) else ""
    return _line(line, request_id, {"status_code": status, "request_id": request_id, "body": {"error": shown}}, None)


def given_up(line: Line, code: str, message: str) -> bytes:
    """The error line of a request that was not run to its end: `batch_expired` or `batch_cancelled`."""
    return _line(line, "", None, {"code": code, "message": message})


def broken(line: Line, error: Exception) -> bytes:
    """The error line of a request that met an error of ours."""
    body = {"error": error_body(f"{type(error).__name__}: {error}", "server_error", "internal_error")}
    return _line(line, "", {"status_code": 500, "request_id": "", "body": body}, None)


def _line(line: Line, request_id: str, response: dict[str, Any] | None, error: dict[str, Any] | None) -> bytes:
    record = {
        "id": f"batch_req_{request_id or line.custom_id}",
        "custom_id": line.custom_id,
        "response": response,
        "error": error,
    }
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"
