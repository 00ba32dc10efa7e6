"""What the native routes take and give: the HTTP face of requests, jobs and the queue's condition.

A request's sampling options stand flat beside the prompt, as most HTTP clients expect; validation is that of the
protocol's own `SamplingParams`. Nothing here touches Redis.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from penstock_core.protocol.jobs import FinishReason, JobState
from penstock_core.protocol.requests import (
    MAX_MESSAGES,
    MAX_PROMPT_CHARS,
    MAX_PROMPT_TOKENS,
    PRIORITY_DEFAULT,
    PRIORITY_HIGHEST,
    PRIORITY_LOWEST,
    ChatMessage,
    GenerationRequest,
    JobOptions,
    SamplingParams,
    TokenId,
)

MAX_BATCH = 1024

_DELIVERY = ("priority", "deadline_s", "delay_s", "not_before", "max_retries", "result_ttl_s", "affinity", "metadata")
_PROMPT = ("prompt", "messages", "prompt_token_ids", "model")


class GenerateRequest(SamplingParams):
    """One prompt, in exactly one of three forms, with sampling and delivery options beside it.

    Attributes:
        timeout_s: how long the synchronous routes wait before they answer 504; the job itself goes on.
        The others: see `GenerationRequest`, `SamplingParams` and `JobOptions`. The tenant comes from the API key.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"prompt": "The miller lost her", "max_tokens": 64, "temperature": 0.8, "seed": 7, "priority": 7}
            ]
        }
    )

    prompt: Annotated[str, StringConstraints(min_length=1, max_length=MAX_PROMPT_CHARS)] | None = None
    messages: Annotated[tuple[ChatMessage, ...], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    prompt_token_ids: Annotated[tuple[TokenId, ...], Field(min_length=1, max_length=MAX_PROMPT_TOKENS)] | None = None
    model: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = None

    priority: Annotated[int, Field(ge=PRIORITY_LOWEST, le=PRIORITY_HIGHEST)] = PRIORITY_DEFAULT
    deadline_s: Annotated[float, Field(gt=0.0, le=30 * 86_400.0)] | None = None
    delay_s: Annotated[float, Field(ge=0.0, le=365 * 86_400.0)] | None = None
    not_before: Annotated[float, Field(ge=0.0, le=1e11)] | None = None
    max_retries: Annotated[int, Field(ge=0, le=100)] = 3
    result_ttl_s: Annotated[float, Field(gt=0.0, le=30 * 86_400.0)] = 3600.0
    affinity: Annotated[str, StringConstraints(max_length=64)] | None = None
    metadata: (
        Annotated[
            dict[Annotated[str, StringConstraints(max_length=64)], Annotated[str, StringConstraints(max_length=1024)]],
            Field(max_length=32),
        ]
        | None
    ) = None
    timeout_s: Annotated[float, Field(gt=0.0, le=3600.0)] = 300.0

    @model_validator(mode="after")
    def _one_prompt_one_start(self) -> Self:
        self.job()
        return self

    def job(self) -> GenerationRequest:
        """The work itself."""
        sampling = {name: getattr(self, name) for name in self.model_fields_set if name in SamplingParams.model_fields}
        prompt = {name: getattr(self, name) for name in _PROMPT}
        return GenerationRequest(sampling=SamplingParams(**sampling), **prompt)

    def options(self, tenant: str, *, idempotency_key: str | None = None, traceparent: str | None = None) -> JobOptions:
        """How it is delivered, for the tenant whose key came with it."""
        delivery = {name: getattr(self, name) for name in _DELIVERY}
        return JobOptions(tenant=tenant, idempotency_key=idempotency_key, traceparent=traceparent, **delivery)


class GenerateChoice(BaseModel):
    """One of several answers."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason


class GenerateResponse(BaseModel):
    """A finished generation. `text`, `token_ids` and `finish_reason` are the first choice's.

    Attributes:
        request_id: the job's id; its result stays readable at `/v1/jobs/{request_id}` for its retention time.
        prompt_tokens, generated_tokens, cached_tokens: tokens; `generated_tokens` counts all choices.
        latency_ms: from the request's arrival at the gateway to the result.
        throughput_tokens_per_sec: `generated_tokens` over that time.
        choices: all choices, where `n` was above 1.
    """

    request_id: str
    model: str
    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int
    text: str
    token_ids: list[int]
    latency_ms: float
    throughput_tokens_per_sec: float
    finish_reason: FinishReason
    choices: list[GenerateChoice] | None = None


class BatchRequest(BaseModel):
    """Several generations, submitted in one round trip and answered together."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests: Annotated[list[GenerateRequest], Field(min_length=1, max_length=MAX_BATCH)]


class ErrorBody(BaseModel):
    """What went wrong: a stable code, a sentence that names the remedy, and the field where there is one."""

    code: str
    message: str
    field: str | None = None
    retry_after_s: float | None = None


class BatchItem(BaseModel):
    """One answer of a batch: the response, or why there is none."""

    response: GenerateResponse | None = None
    error: ErrorBody | None = None


class BatchResponse(BaseModel):
    """The answers, in the order of the requests."""

    responses: list[BatchItem]
    total_latency_ms: float
    batch_throughput_tokens_per_sec: float


class JobAccepted(BaseModel):
    """A job is stored; follow the links."""

    id: str
    state: JobState
    status_url: str
    stream_url: str


class JobView(BaseModel):
    """Where a job stands; `result` once it has ended with one, `error` once it has ended without completing."""

    id: str
    state: JobState
    priority: int
    attempt: int
    crashes: int
    submitted_ms: int
    started_ms: int | None
    finished_ms: int | None
    deadline_ms: int | None
    tokens: int
    metadata: dict[str, str]
    result: dict[str, Any] | None = None
    error: ErrorBody | None = None


class HealthResponse(BaseModel):
    """`ok`: Redis answers and a worker lives; `degraded`: no worker lives; `down`: Redis does not answer."""

    status: Literal["ok", "degraded", "down"]
    queue: str
    broker: Literal["up", "down"]
    workers: int
    version: str
    detail: str | None = None


class QueueLine(BaseModel):
    """Waiting jobs of one priority (and tenant)."""

    priority: int
    tenant: str
    depth: int
    oldest_wait_ms: int


class WorkerLine(BaseModel):
    """A live worker."""

    worker_id: str
    model: str
    host: str
    running: int
    free_sequences: int
    free_tokens: int
    total_tokens: int
    tokens_per_s: float
    prefix_hit_rate: float
    draft_acceptance: float
    draining: bool


class MetricsResponse(BaseModel):
    """The queue and its workers at one moment. Counters run since the queue's beginning."""

    queue: str
    waiting: int
    running: int
    delayed: int
    dead: int
    oldest_wait_ms: int
    tokens_per_s: float
    counters: dict[str, int]
    depths: list[QueueLine]
    workers: list[WorkerLine]
