"""RequestHandler: what the native routes do, without HTTP. All state is in Redis, so a restart loses nothing.

Every method takes the tenant that the caller has proved to be; another tenant's job is answered exactly like one that
does not exist.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import asdict

from penstock.aio import AsyncClient, AsyncJobHandle
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
    WorkerLine,
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
from penstock_core.protocol.events import TokenChunk
from penstock_core.protocol.jobs import JobResult, JobState
from penstock_core.protocol.transitions import CancelOutcome, JobStatus

HEARTBEAT_GRACE_MS = 15_000


class RequestHandler:
    """Answers generation requests through one queue.

    Args:
        client: of the queue; the handler does not close it.
    """

    def __init__(self, client: AsyncClient) -> None:
        self.client = client

    async def submit(
        self,
        request: GenerateRequest,
        tenant: str,
        *,
        idempotency_key: str | None = None,
        traceparent: str | None = None,
    ) -> AsyncJobHandle:
        """Store a job. Raises `InvalidRequest`, `QueueFull` or `BrokerUnavailable`."""
        options = request.options(tenant, idempotency_key=idempotency_key, traceparent=traceparent)
        delivery = {name: getattr(options, name) for name in options.model_fields_set}
        return await self.client.submit(request=request.job(), **delivery)

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
            ResultTimeout: it takes longer than `request.timeout_s`; it goes on, under the id that the error names.
        """
        started = time.perf_counter()
        job = await self.submit(request, tenant, idempotency_key=idempotency_key, traceparent=traceparent)
        try:
            result = await job.result(request.timeout_s)
        except asyncio.CancelledError:
            if not job.duplicate:
                await asyncio.shield(job.cancel())
            raise
        return _response(job.id, result, started)

    async def generate_batch(self, batch: BatchRequest, tenant: str) -> BatchResponse:
        """Submit all in one round trip and wait for all; an item that fails does not fail the others."""
        started = time.perf_counter()
        items = [
            {"request": request.job(), **request.options(tenant).model_dump(exclude_unset=True)}
            for request in batch.requests
        ]
        handles = await self.client.submit_many(items)

        async def answer(handle: AsyncJobHandle | QueueFull, timeout_s: float) -> BatchItem:
            try:
                if isinstance(handle, QueueFull):
                    raise handle
                return BatchItem(response=_response(handle.id, await handle.result(timeout_s), started))
            except PenstockError as error:
                return BatchItem(error=error_body(error))

        try:
            answers = await asyncio.gather(
                *(answer(handle, request.timeout_s) for handle, request in zip(handles, batch.requests, strict=True))
            )
        except asyncio.CancelledError:
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

    async def status(self, job_id: str, tenant: str) -> JobStatus:
        """Where a job of this tenant stands. Raises `JobNotFound`, also for another tenant's job."""
        status = await self.client.job(job_id).status()
        if status.tenant != tenant:
            raise JobNotFound(f"no job {job_id} in queue {self.client.settings.queue}")
        return status

    async def view(self, job_id: str, tenant: str) -> JobView:
        """Status, and the result or the failure once it has ended. Raises `JobNotFound`."""
        status = await self.status(job_id, tenant)
        result, error = None, None
        if status.state.is_terminal:
            try:
                result = await self.client.job(job_id).result(timeout=5.0)
            except JobError as ended:
                result, error = ended.result, error_body(ended)
        view = _view(status)
        view.result = None if result is None else asdict(result)
        view.error = error
        return view

    async def stream(self, job_id: str, tenant: str, from_offset: int = 0) -> AsyncGenerator[TokenChunk]:
        """The job's tokens from `from_offset` on; ends as `AsyncJobHandle.stream` does. Raises `JobNotFound`."""
        await self.status(job_id, tenant)
        return self.client.job(job_id).stream(from_offset)

    async def jobs(self, tenant: str, limit: int, state: JobState | None) -> list[JobView]:
        """The tenant's newest jobs, without their results."""
        return [_view(status) for status in await self.client.jobs(limit=limit, state=state, tenant=tenant)]

    async def cancel(self, job_id: str, tenant: str) -> CancelOutcome:
        """Ask for the job's end. Raises `JobNotFound`."""
        await self.status(job_id, tenant)
        return await self.client.job(job_id).cancel()

    async def health(self) -> HealthResponse:
        """Whether jobs can be stored and somebody works on them. Never raises."""
        queue = self.client.settings.queue
        try:
            seen = await self.client.queue_snapshot()
        except BrokerUnavailable as error:
            return HealthResponse(
                status="down", queue=queue, broker="down", workers=0, version=__version__, detail=str(error)
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

    async def metrics(self, tenant: str | None = None) -> MetricsResponse:
        """The queue's condition; with a tenant, only that tenant's lines of it."""
        seen = await self.client.queue_snapshot()
        workers = [
            WorkerLine(
                worker_id=worker.worker_id,
                model=worker.record.model,
                host=worker.record.host,
                running=worker.record.running,
                free_sequences=worker.record.free_sequences,
                free_tokens=worker.record.free_tokens,
                total_tokens=worker.record.total_tokens,
                tokens_per_s=worker.record.tokens_per_s,
                prefix_hit_rate=worker.record.prefix_hit_rate,
                draft_acceptance=worker.record.draft_acceptance,
                draining=worker.record.draining,
            )
            for worker in seen.workers
            if worker.record is not None and seen.now_ms - worker.heartbeat_ms < HEARTBEAT_GRACE_MS
        ]
        return MetricsResponse(
            queue=self.client.settings.queue,
            waiting=seen.waiting,
            running=seen.running,
            delayed=seen.delayed,
            dead=seen.dead,
            oldest_wait_ms=seen.oldest_wait_ms,
            tokens_per_s=sum(worker.tokens_per_s for worker in workers),
            counters=seen.stats,
            depths=[
                QueueLine(
                    priority=line.priority,
                    tenant=line.tenant,
                    depth=line.depth,
                    oldest_wait_ms=seen.now_ms - line.oldest_ms,
                )
                for line in seen.lines
                if tenant is None or line.tenant == tenant
            ],
            workers=workers,
        )


def _view(status: JobStatus) -> JobView:
    failure = status.failure
    return JobView(
        id=status.job_id,
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
    )


def error_code(error: PenstockError) -> str:
    """The stable code of an error."""
    if isinstance(error, JobError):
        return error.code
    codes: Sequence[tuple[type[PenstockError], str]] = (
        (InvalidRequest, "invalid_request"),
        (QueueFull, "queue_full"),
        (JobNotFound, "not_found"),
        (ResultTimeout, "timeout"),
        (BrokerUnavailable, "broker_unavailable"),
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
        choices=[
            GenerateChoice(
                index=choice.index,
                text=choice.text,
                token_ids=list(choice.token_ids),
                finish_reason=choice.finish_reason,
            )
            for choice in result.choices
        ]
        if len(result.choices) > 1
        else None,
    )
