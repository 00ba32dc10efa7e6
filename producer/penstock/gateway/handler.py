"""RequestHandler: what the native routes do, without HTTP. All state is in Redis, so a restart loses nothing.

Methods that look at a job take the caller's scope: the only tenant whose jobs exist for it, or None for an operator.
Another tenant's job is answered exactly like one that does not exist.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict

from penstock.aio import AsyncClient, AsyncJobHandle
from penstock.gateway.auth import Caller, Forbidden, TooManyRequests, Unauthorized
from penstock.gateway.books import Books
from penstock.gateway.closing import Closing, GatewayStopping
from penstock.gateway.intake import Intake
from penstock.gateway.models import (
    BatchItem,
    BatchRequest,
    BatchResponse,
    ErrorBody,
    GenerateChoice,
    GenerateRequest,
    GenerateResponse,
    HealthResponse,
    JobView,
    MetricsResponse,
    QueueLine,
    QuotaLimits,
    SpeculationCounts,
    TenantQuota,
    WorkerLine,
    prompt_scores,
    result_view,
    scores,
)
from penstock_core import __version__
from penstock_core.protocol.errors import (
    BrokerUnavailable,
    InvalidRequest,
    JobError,
    JobNotFound,
    PenstockError,
    QueueFull,
    ResultTimeout,
)
from penstock_core.protocol.jobs import JobResult, JobState
from penstock_core.protocol.transitions import COUNTERS, CancelOutcome, JobStatus, QueueSnapshot

HEARTBEAT_GRACE_MS = 15_000
_log = logging.getLogger("penstock.gateway")


class StillRunning(ResultTimeout):
    """A request waited as long as it may; its job goes on.

    Attributes:
        job_id: under which the answer can be fetched later.
    """

    def __init__(self, job_id: str, waited_s: float) -> None:
        super().__init__(
            f"job {job_id} has not ended after {waited_s:g} s and goes on: GET /v1/jobs/{job_id} has its result later, "
            f"GET /v1/jobs/{job_id}/stream its tokens, DELETE /v1/jobs/{job_id} ends it"
        )
        self.job_id = job_id


class RequestHandler:
    """Answers generation requests through one queue.

    Args:
        client, books: of the queue; the handler closes neither.
        closing: of the process.
        longest_wait_s: no request waits longer for its job.
    """

    def __init__(self, client: AsyncClient, books: Books, closing: Closing, longest_wait_s: float = 600.0) -> None:
        self.client = client
        self.books = books
        self.closing = closing
        self.intake = Intake(client)
        self.longest_wait_s = longest_wait_s

    async def submit(
        self,
        request: GenerateRequest,
        tenant: str,
        *,
        idempotency_key: str | None = None,
        traceparent: str | None = None,
    ) -> AsyncJobHandle:
        """Store a job. Raises `InvalidRequest`, `QueueFull` or `BrokerUnavailable`."""
        delivery = request.delivery(tenant, idempotency_key=idempotency_key, traceparent=traceparent)
        outcome = (await self.intake.submit([{"request": request.job(), **delivery}]))[0]
        if isinstance(outcome, QueueFull):
            raise outcome
        return outcome

    async def result(self, job: AsyncJobHandle, timeout_s: float) -> JobResult:
        """The job's result, within this time and the longest any request waits.

        Raises `StillRunning`, `GatewayStopping`, `JobError`.
        """
        within_s = min(timeout_s, self.longest_wait_s)
        try:
            async with self.closing.bounding(job.id):
                return await job.result(within_s)
        except ResultTimeout:
            raise StillRunning(job.id, within_s) from None

    async def generate(
        self,
        request: GenerateRequest,
        tenant: str,
        *,
        idempotency_key: str | None = None,
        traceparent: str | None = None,
    ) -> GenerateResponse:
        """Submit and wait. A caller that is cancelled (its client hung up) cancels the job.

        Raises:
            InvalidRequest, QueueFull, BrokerUnavailable: nothing was stored.
            JobError: the job ended otherwise than completed.
            StillRunning: it takes longer than `request.timeout_s`; it goes on, under the id that the error names.
            GatewayStopping: so does it where the process is stopping.
        """
        started = time.perf_counter()
        job = await self.submit(request, tenant, idempotency_key=idempotency_key, traceparent=traceparent)
        try:
            result = await self.result(job, request.timeout_s)
        except asyncio.CancelledError:
            if not job.duplicate and not self.closing.begun:
                await asyncio.shield(job.cancel())
            raise
        return _response(job.id, result, started)

    async def generate_batch(self, batch: BatchRequest, tenant: str) -> BatchResponse:
        """Submit all in one round trip and wait for all; an item that fails does not fail the others."""
        started = time.perf_counter()
        items = [{"request": request.job(), **request.delivery(tenant)} for request in batch.requests]
        handles = await self.intake.submit(items)

        async def answer(handle: AsyncJobHandle | QueueFull, timeout_s: float) -> BatchItem:
            try:
                if isinstance(handle, QueueFull):
                    raise handle
                return BatchItem(response=_response(handle.id, await self.result(handle, timeout_s), started))
            except PenstockError as error:
                return BatchItem(error=error_body(error))

        try:
            answers = await asyncio.gather(
                *(answer(handle, request.timeout_s) for handle, request in zip(handles, batch.requests, strict=True))
            )
        except asyncio.CancelledError:
            if not self.closing.begun:
                await asyncio.shield(
                    asyncio.gather(*(handle.cancel() for handle in handles if isinstance(handle, AsyncJobHandle)))
                )
            raise
        elapsed_s = time.perf_counter() - started
        tokens = sum(item.response.generated_tokens for item in answers if item.response is not None)
        return BatchResponse(
            responses=list(answers),
            total_latency_ms=elapsed_s * 1e3,
            batch_throughput_tokens_per_sec=tokens / elapsed_s,
        )

    async def status(self, job_id: str, scope: str | None) -> JobStatus:
        """Where a job in the caller's scope stands. Raises `JobNotFound`."""
        status = await self.client.job(job_id).status()
        if scope not in (None, status.tenant):
            raise JobNotFound(f"no job {job_id} in queue {self.client.settings.queue}")
        return status

    async def view(self, job_id: str, scope: str | None) -> JobView:
        """Status, and the result or the failure once it has ended. Raises `JobNotFound`."""
        status = await self.status(job_id, scope)
        view = _view(status)
        if status.state.is_terminal:
            try:
                result = await self.client.job(job_id).result(timeout=5.0)
                view.result, view.error = result_view(result), None
            except JobError as ended:
                view.result = None if ended.result is None else result_view(ended.result)
                view.error = error_body(ended)
        return view

    async def jobs(self, scope: str | None, limit: int, state: JobState | None, before: str | None) -> list[JobView]:
        """The newest jobs in scope, without their results."""
        return [
            _view(status) for status in await self.books.recent_jobs(scope, limit=limit, state=state, before=before)
        ]

    async def cancel(self, job_id: str, scope: str | None) -> CancelOutcome:
        """Ask for the job's end. Raises `JobNotFound`."""
        await self.status(job_id, scope)
        return await self.client.job(job_id).cancel()

    async def quota(self, tenant: str, requests_per_minute: int | None = None) -> TenantQuota:
        """What a tenant uses, and what it may."""
        used = await self.books.usage(tenant)
        return TenantQuota(
            tenant=tenant,
            queued=used.queued + used.delayed,
            running=used.running,
            tokens_charged=used.tokens_charged,
            limits=QuotaLimits(
                max_queued=used.max_queued or None,
                max_running=used.max_running or None,
                tokens_per_minute=used.tokens_per_minute or None,
            ),
            requests_per_minute=requests_per_minute or None,
        )

    async def health(self) -> HealthResponse:
        """Whether jobs can be stored and somebody works on them. Never raises."""
        queue = self.client.settings.queue
        try:
            seen = await self.client.queue_snapshot()
        except BrokerUnavailable as error:
            _log.warning("health: %s", error)
            detail = "Redis does not answer, so no job can be stored; this gateway's log has the reason"
            return HealthResponse(
                status="down", queue=queue, broker="down", workers=0, version=__version__, detail=detail
            )
        alive = sum(seen.now_ms - worker.heartbeat_ms < HEARTBEAT_GRACE_MS for worker in seen.workers)
        return HealthResponse(
            status="ok" if alive else "degraded",
            queue=queue,
            broker="up",
            workers=alive,
            version=__version__,
            detail=None if alive else f"no worker serves queue {queue}: start one with 'penstock worker'",
        )

    async def metrics(self, caller: Caller) -> MetricsResponse:
        """The queue's condition as an operator sees it; a tenant sees its own jobs only."""
        seen = await self.client.queue_snapshot()
        return await self._tenant_metrics(caller.tenant, seen) if caller.scope else self._queue_metrics(seen)

    def _queue_metrics(self, seen: QueueSnapshot) -> MetricsResponse:
        workers = [
            WorkerLine(
                worker_id=worker.worker_id,
                model=worker.record.model,
                host=worker.record.host,
                device=worker.record.device,
                ranks=worker.record.ranks,
                total_pages=worker.record.total_pages,
                used_pages=worker.record.used_pages,
                cached_pages=worker.record.cached_pages,
                running=worker.record.running,
                free_sequences=worker.record.free_sequences,
                free_tokens=worker.record.free_tokens,
                total_tokens=worker.record.total_tokens,
                tokens_per_s=worker.record.tokens_per_s,
                prefix_hit_rate=worker.record.prefix_hit_rate,
                draft_acceptance=worker.record.draft_acceptance,
                speculation_gain=worker.record.speculation_gain,
                draining=worker.record.draining,
            )
            for worker in seen.workers
            if worker.record is not None and seen.now_ms - worker.heartbeat_ms < HEARTBEAT_GRACE_MS
        ]
        return MetricsResponse(
            queue=self.client.settings.queue,
            scope="queue",
            waiting=seen.waiting,
            running=seen.running,
            delayed=seen.delayed,
            dead=seen.dead,
            oldest_wait_ms=seen.oldest_wait_ms,
            tokens_per_s=sum(worker.tokens_per_s for worker in workers),
            waiting_bytes=seen.stats["waiting_bytes"],
            counters={name: seen.stats[name] for name in COUNTERS},
            depths=_depths(seen, None),
            workers=workers,
        )

    async def _tenant_metrics(self, tenant: str, seen: QueueSnapshot) -> MetricsResponse:
        used = await self.books.usage(tenant)
        depths = _depths(seen, tenant)
        return MetricsResponse(
            queue=self.client.settings.queue,
            scope="tenant",
            waiting=used.queued,
            running=used.running,
            delayed=used.delayed,
            oldest_wait_ms=max((line.oldest_wait_ms for line in depths), default=0),
            depths=depths,
        )


def _depths(seen: QueueSnapshot, tenant: str | None) -> list[QueueLine]:
    return [
        QueueLine(
            priority=line.priority, tenant=line.tenant, depth=line.depth, oldest_wait_ms=seen.now_ms - line.oldest_ms
        )
        for line in seen.lines
        if tenant in (None, line.tenant)
    ]


def _view(status: JobStatus) -> JobView:
    failure = status.failure
    return JobView(
        id=status.job_id,
        tenant=status.tenant,
        state=status.state,
        priority=status.priority,
        attempt=status.attempt,
        crashes=status.crashes,
        submitted_ms=status.submitted_ms,
        started_ms=status.started_ms,
        finished_ms=status.finished_ms,
        deadline_ms=status.deadline_ms,
        tokens=status.tokens,
        metadata=status.metadata,
        error=None if failure is None else ErrorBody(code=failure.code, message=failure.message),
    )


def error_body(error: PenstockError) -> ErrorBody:
    """An error as the routes answer it."""
    return ErrorBody(
        code=error_code(error),
        message=str(error),
        field=error.field if isinstance(error, InvalidRequest) else None,
        retry_after_s=error.retry_after_s if isinstance(error, QueueFull) else None,
        job_id=error.job_id if isinstance(error, JobError | StillRunning | GatewayStopping) else None,
    )


def error_code(error: PenstockError) -> str:
    """The stable code of an error."""
    if isinstance(error, JobError):
        return error.code
    codes: Sequence[tuple[type[PenstockError], str]] = (
        (InvalidRequest, "invalid_request"),
        (Unauthorized, "unauthorized"),
        (Forbidden, "forbidden"),
        (TooManyRequests, "too_many_requests"),
        (QueueFull, "queue_full"),
        (JobNotFound, "not_found"),
        (ResultTimeout, "timeout"),
        (BrokerUnavailable, "broker_unavailable"),
        (GatewayStopping, "gateway_stopping"),
    )
    return next((code for kind, code in codes if isinstance(error, kind)), "error")


def _response(job_id: str, result: JobResult, started: float) -> GenerateResponse:
    elapsed_s = time.perf_counter() - started
    first = result.choices[0]
    return GenerateResponse(
        request_id=job_id,
        model=result.model,
        prompt_tokens=result.usage.prompt_tokens,
        generated_tokens=result.usage.completion_tokens,
        cached_tokens=result.usage.cached_tokens,
        text=first.text,
        token_ids=list(first.token_ids),
        latency_ms=elapsed_s * 1e3,
        throughput_tokens_per_sec=result.usage.completion_tokens / elapsed_s,
        finish_reason=first.finish_reason,
        logprobs=scores(first.logprobs),
        prompt_logprobs=prompt_scores(result),
        choices=[
            GenerateChoice(
                index=choice.index,
                text=choice.text,
                token_ids=list(choice.token_ids),
                finish_reason=choice.finish_reason,
                logprobs=scores(choice.logprobs),
            )
            for choice in result.choices
        ]
        if len(result.choices) > 1
        else None,
        speculation=SpeculationCounts(**asdict(result.speculation)) if result.speculation is not None else None,
    )
