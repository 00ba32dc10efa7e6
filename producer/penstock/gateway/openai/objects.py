"""OpenAI's answer objects, for `/openapi.json`. Answers are built as plain dicts and not validated again."""

from __future__ import annotations

from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel

T = TypeVar("T")


class ErrorObject(BaseModel):
    """What went wrong: `param` names the field, `code` the reason where there is a stable one."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(BaseModel):
    """The body of every answer that is none of the good ones."""

    error: ErrorObject


class TokenCounts(BaseModel):
    """Tokens of a request, all its choices together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]


class AssistantMessage(BaseModel):
    """The model's turn."""

    role: Literal["assistant"]
    content: str


class ChatChoice(BaseModel):
    """One of the answers."""

    index: int
    message: AssistantMessage
    finish_reason: str
    logprobs: dict[str, Any] | None


class ChatCompletion(BaseModel):
    """A whole answer; with `stream: true` it comes as chat.completion.chunk events instead."""

    id: str
    created: int
    object: Literal["chat.completion"]
    model: str
    choices: list[ChatChoice]
    usage: TokenCounts


class TextChoice(BaseModel):
    """One of the continuations."""

    index: int
    text: str
    finish_reason: str
    logprobs: dict[str, Any] | None


class TextCompletion(BaseModel):
    """A whole continuation; with `stream: true` it comes in events of the same shape."""

    id: str
    created: int
    object: Literal["text_completion"]
    model: str
    choices: list[TextChoice]
    usage: TokenCounts


class ModelObject(BaseModel):
    """A served name."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    """All of them."""

    object: Literal["list"]
    data: list[ModelObject]


class FileObject(BaseModel):
    """What is known of a file."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: str


class DeletedFile(BaseModel):
    """It is gone."""

    id: str
    object: Literal["file"]
    deleted: bool


class RequestCounts(BaseModel):
    """How far a batch has come."""

    total: int
    completed: int
    failed: int


class BatchObject(BaseModel):
    """Where a batch stands; the `_at` are the seconds at which it got there."""

    id: str
    object: Literal["batch"]
    endpoint: str
    errors: dict[str, Any] | None
    input_file_id: str
    completion_window: str
    status: str
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    expires_at: int
    in_progress_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    metadata: dict[str, str] | None


class Page(BaseModel, Generic[T]):
    """A part of a list; for the next give `last_id` as `after`."""

    object: Literal["list"]
    data: list[T]
    first_id: str | None
    last_id: str | None
    has_more: bool


class ResponseObject(BaseModel):
    """A response; `incomplete` where it was cut at its limit."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
    model: str
    output: list[dict[str, Any]]
    error: dict[str, str] | None
    incomplete_details: dict[str, str] | None
    usage: dict[str, Any] | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    tool_choice: str
    tools: list[dict[str, Any]]
