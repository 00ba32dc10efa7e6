"""What the native routes take and give: the HTTP face of requests, jobs and the queue's condition.

A request's sampling options stand flat beside the prompt, as most HTTP clients expect; validation is that of the
protocol's own `SamplingParams`. Nothing here touches Redis.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, StringConstraints, model_validator

from penstock_core.protocol.jobs import FinishReason, JobResult, JobState, TokenLogprob
from penstock_core.protocol.requests import (
    MAX_MESSAGES,
    MAX_PROMPT_CHARS,
    MAX_PROMPT_TOKENS,
    PRIORITY_DEFAULT,
    PRIORITY_HIGHEST,
    PRIORITY_LOWEST,
    ChatMessage,
    GenerationRequest,
    SamplingParams,
    TokenId,
)

MAX_BATCH = 1024

_DELIVERY = frozenset(
    {"priority", "deadline_s", "delay_s", "not_before", "max_retries", "result_ttl_s", "affinity", "metadata"}
)
_SAMPLING = frozenset(SamplingParams.model_fields)
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

    _job: GenerationRequest = PrivateAttr()

    @model_validator(mode="after")
    def _one_prompt_one_start(self) -> Self:
        # Made once, seed and all: validating is a good part of what a request costs.
        sampling = {name: getattr(self, name) for name in self.model_fields_set if name in _SAMPLING}
        if self.seed is None:
            sampling["seed"] = random.getrandbits(63)
        prompt = {name: value for name in _PROMPT if (value := getattr(self, name)) is not None}
        self._job = GenerationRequest(sampling=SamplingParams.model_construct(**sampling), **prompt)
        if self.delay_s is not None and self.not_before is not None:
            raise ValueError("give delay_s or not_before, not both")
        return self

    def job(self) -> GenerationRequest:
        """The work itself."""
        return self._job

    def delivery(
        self, tenant: str, *, idempotency_key: str | None = None, traceparent: str | None = None
    ) -> dict[str, Any]:
        """How it is delivered, for the tenant whose key came with it: keywords of `submit`."""
        given = {name: getattr(self, name) for name in self.model_fields_set if name in _DELIVERY}
        return {**given, "tenant": tenant, "idempotency_key": idempotency_key, "traceparent": traceparent}


class LikelyToken(BaseModel):
    """A token that the model might have chosen. `token`: its text, or `bytes:\\xe2` where it is part of a character."""

    token_id: int
    token: str | None
    logprob: float


class TokenScore(BaseModel):
    """Log-probability of a token, and the likeliest ones in its place."""

    token: str | None
    logprob: float
    top: list[LikelyToken]

    @classmethod
    def of(cls, entry: TokenLogprob) -> TokenScore:
        """The record of a token as JSON has it."""
        chosen, *others = entry.tokens or (None,) * (1 + len(entry.top))
        top = [
            LikelyToken(token_id=token_id, token=token, logprob=value)
            for (token_id, value), token in zip(entry.top, others, strict=True)
        ]
        return cls(token=chosen, logprob=entry.logprob, top=top)


def scores(entries: Sequence[TokenLogprob] | None) -> list[TokenScore] | None:
    """The records of some tokens, where they were asked for."""
    return None if entries is None else [TokenScore.of(entry) for entry in entries]


def prompt_scores(result: JobResult) -> list[TokenScore | None] | None:
    """The records of the prompt's tokens, where they were asked for; the first has none."""
    entries = result.prompt_logprobs
    return None if entries is None else [None if entry is None else TokenScore.of(entry) for entry in entries]


class GenerateChoice(BaseModel):
    """One of several answers."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenScore] | None = None


class SpeculationCounts(BaseModel):
    """What speculative decoding did for a job in its last attempt; none of it changes a token.

    Attributes:
        drafted_at, accepted_at: drafted tokens that were checked, and that were right, by position in the draft.
        depths: steps with drafting by the number of drafts checked in them, from none on.
        saved_ms: decoding time it saved, estimated from what steps without drafts usually take; below 0: lost.
    """

    drafted_at: list[int]
    accepted_at: list[int]
    depths: list[int]
    saved_ms: float


class GenerateResponse(BaseModel):
    """A finished generation. `text`, `token_ids` and `finish_reason` are the first choice's.

    Attributes:
        request_id: the job's id; its result stays readable at `/v1/jobs/{request_id}` for its retention time.
        prompt_tokens, generated_tokens, cached_tokens: tokens; `generated_tokens` counts all choices.
        latency_ms: from the request's arrival at the gateway to the result.
        throughput_tokens_per_sec: `generated_tokens` over that time.
        logprobs: of the first choice's tokens, where asked for. prompt_logprobs: of the prompt's, null for its first.
        choices: all choices, where `n` was above 1.
        speculation: where the worker looked for drafts.
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
    logprobs: list[TokenScore] | None = None
    prompt_logprobs: list[TokenScore | None] | None = None
    choices: list[GenerateChoice] | None = None
    speculation: SpeculationCounts | None = None


def result_view(result: JobResult) -> dict[str, Any]:
    """A whole result as JSON: as `JobResult`, its log-probabilities as `TokenScore`."""
    shown = asdict(replace(result, prompt_logprobs=None, choices=()))
    shown["prompt_logprobs"] = prompt_scores(result)
    shown["choices"] = [
        {**asdict(replace(choice, logprobs=None)), "logprobs": scores(choice.logprobs)} for choice in result.choices
    ]
    return shown


class BatchRequest(BaseModel):
    """Several generations, submitted in one round trip and answered together."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests: Annotated[list[GenerateRequest], Field(min_length=1, max_length=MAX_BATCH)]


class ErrorBody(BaseModel):
    """What went wrong: a stable code, a sentence that names the remedy, and the field or the job where there is one."""

    code: str
    message: str
    field: str | None = None
    retry_after_s: float | None = None
    job_id: str | None = None


class ErrorAnswer(BaseModel):
    """The body of every answer that is none of the good ones."""

    error: ErrorBody


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
    tenant: str
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


class CancelAnswer(BaseModel):
    """`cancelled`: it ended at once; `cancelling`: its worker will end it; `ended`: it had ended already."""

    id: str
    outcome: Literal["cancelled", "cancelling", "ended"]


class RequeueAnswer(BaseModel):
    """`requeued`: it is back in line; `not_dead`: there was nothing to do; `unknown`: it is gone."""

    id: str
    outcome: Literal["requeued", "not_dead", "unknown"]


class QuotaLimits(BaseModel):
    """A tenant's limits; null is none, or in a change the queue's general one.

    Attributes:
        max_queued: waiting jobs, those scheduled for later included; a submission beyond it is answered 429.
        max_running: running jobs; the others wait.
        tokens_per_minute: estimated input and output tokens admitted a minute; a submission beyond it is answered 429.
    """

    model_config = ConfigDict(extra="forbid")

    max_queued: Annotated[int, Field(ge=1, le=2**53)] | None = None
    max_running: Annotated[int, Field(ge=1, le=2**53)] | None = None
    tokens_per_minute: Annotated[int, Field(ge=1, le=2**53)] | None = None


class TenantQuota(BaseModel):
    """What a tenant uses, and what it may.

    Attributes:
        tokens_charged: of `tokens_per_minute`, not refilled yet; above it where one job cost more than a minute's.
        requests_per_minute: of the asking key, over all gateways of the queue; null: no limit.
    """

    tenant: str
    queued: int
    running: int
    tokens_charged: int
    limits: QuotaLimits
    requests_per_minute: int | None


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
    """A live worker.

    Attributes:
        device: where it computes, in the machine's own names. ranks: the processes its model is cut over.
        used_pages, cached_pages: of the cache's `total_pages`, those that sequences hold, and those kept for others.
    """

    worker_id: str
    model: str
    host: str
    device: str
    ranks: int
    total_pages: int
    used_pages: int
    cached_pages: int
    running: int
    free_sequences: int
    free_tokens: int
    total_tokens: int
    tokens_per_s: float
    prefix_hit_rate: float
    draft_acceptance: float
    speculation_gain: float = 0.0
    draining: bool


class MetricsResponse(BaseModel):
    """The queue and its workers at one moment. Counters run since the queue's beginning.

    Attributes:
        scope: `queue` for an operator. `tenant`: the caller's own jobs only; nothing of workers, the dead or counters.
    """

    queue: str
    scope: Literal["queue", "tenant"]
    waiting: int
    running: int
    delayed: int
    dead: int = 0
    oldest_wait_ms: int
    tokens_per_s: float = 0.0
    waiting_bytes: int = 0
    counters: dict[str, int] = {}
    depths: list[QueueLine]
    workers: list[WorkerLine] = []
