"""The publish role: takes what the engine made, and has it written to Redis, many jobs in one round trip.

The engine's thread hands over each step's outputs without waiting. At most one batch is in flight; what arrives
meanwhile joins the next. Tokens wait at most the publish interval, ends do not wait. While Redis is away the outbox
buffers within bounds; on return the server decides, by attempt, which of it still counts.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence

from redis.exceptions import RedisError

from penstock_core.pipeline import FinishedRequest, RequestOutput
from penstock_core.protocol.errors import BrokerUnavailable
from penstock_core.protocol.events import TokenChunk
from penstock_core.protocol.jobs import FinishReason, JobResult, JobState, Timings
from penstock_worker.broker import Broker
from penstock_worker.engine import Engine
from penstock_worker.held import HeldJob, HeldJobs
from penstock_worker.metrics import WorkerMetrics
from penstock_worker.outbox import Ending, Fail, Finish, HandBack, Outbox, Parcel
from penstock_worker.role import RoleLoop
from penstock_worker.writes import Writer

_logger = logging.getLogger(__name__)


class Publisher:
    """Owns the outbox; the only role that writes tokens and endings.

    `on_freed` is called when the engine has room again.

    Attributes:
        tokens_out: tokens the engine has made so far.
        engine_died: the engine's thread is gone; what it says of the jobs it had is no verdict on them.
    """

    def __init__(
        self,
        broker: Broker,
        writer: Writer,
        held: HeldJobs,
        metrics: WorkerMetrics,
        engine: Engine,
        *,
        worker_id: str,
        served_name: str,
        interval_s: float,
        max_buffered_tokens: int,
        on_freed: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.tokens_out = 0
        self.engine_died = asyncio.Event()
        self._broker = broker
        self._writer = writer
        self._held = held
        self._metrics = metrics
        self._engine = engine
        self._worker_id = worker_id
        self._served_name = served_name
        self._interval_s = interval_s
        self._max_buffered_tokens = max_buffered_tokens
        self._on_freed = on_freed
        self._clock = clock
        self._outbox = Outbox(held)
        self._arrived: deque[Sequence[RequestOutput]] = deque()
        self._event_loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._last_flush = float("-inf")
        self._flushing = asyncio.Lock()
        self._role = RoleLoop("publish", self._iterate, metrics.role_failed)

    def start(self) -> None:
        """Begin publishing."""
        self._role.start()

    async def shutdown(self) -> None:
        """Stop publishing; what waits stays in the outbox, and `flush` still works."""
        await self._role.shutdown()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def on_outputs(self, outputs: Sequence[RequestOutput]) -> None:
        """Take the outputs of one step. Called in the engine's thread; returns at once."""
        self._arrived.append(outputs)
        self._event_loop.call_soon_threadsafe(self.collect)

    def end(self, job: HeldJob, ending: Ending) -> None:
        """Write how `job` ended, after the tokens that are already here."""
        self._outbox.end(job, ending)
        self._schedule()

    def collect(self) -> None:
        """Move what the engine handed over into the outbox."""
        freed = False
        if self._arrived and not self._engine.is_alive:
            self.engine_died.set()
        while self._arrived:
            for output in self._arrived.popleft():
                freed = freed or output.result is not None
                job = self._held.by_request(output.request_id)
                if job is not None and not job.ended:
                    self._take(job, output)
        if freed:
            self._on_freed()
        if not self._broker.available:
            self._keep_within_bounds()
        self._schedule()

    async def flush(self) -> None:
        """Write what waits: one batch.

        Raises:
            BrokerUnavailable: the batch stays, and is sent again by the next flush.
        """
        async with self._flushing:
            self.collect()
            self._wake.clear()
            batch = self._outbox.take()
            if batch:
                self._last_flush = self._clock()
                await self._send(batch)
                self._metrics.flush_seconds.observe(self._clock() - self._last_flush)
            self._outbox.answered()
            self._metrics.buffered_tokens.set(self._outbox.tokens)
        self._schedule()

    async def flush_all(self) -> None:
        """Write all that waits now. Raises as `flush`."""
        await self.flush()
        while len(self._outbox):
            await self.flush()

    async def _iterate(self) -> None:
        await self._wake.wait()
        self._wake.clear()
        try:
            await self.flush()
        except BrokerUnavailable:
            self._keep_within_bounds()
            self._wake.set()
            raise

    def _take(self, job: HeldJob, output: RequestOutput) -> None:
        attempt = job.attempt
        for chunk in output.chunks:
            if chunk.finish_reason is FinishReason.ERROR:
                continue  # not an end: the next attempt goes on from the tokens before it
            self._outbox.add_chunk(
                job,
                TokenChunk(
                    attempt,
                    chunk.index,
                    chunk.offset,
                    chunk.token_ids,
                    chunk.pieces,
                    chunk.finish_reason,
                    chunk.logprobs,
                ),
            )
            self.tokens_out += len(chunk.token_ids)
            self._metrics.tokens_out.inc(len(chunk.token_ids))
        if output.result is not None:
            ending = self._ending(job, output.result)
            if isinstance(ending, Fail) and self.engine_died.is_set():
                return  # not this job's failure: it stays held, and goes to another worker
            self._outbox.end(job, ending)

    def _ending(self, job: HeldJob, finished: FinishedRequest) -> Ending:
        reasons = {choice.finish_reason for choice in finished.choices}
        if FinishReason.ERROR in reasons:
            return Fail("engine_error", finished.error or "the engine gave no reason", retryable=True)
        took = finished.timings
        timings = Timings(
            job.queue_ms + took.queue_ms,
            took.prefill_ms,
            took.ttft_ms,
            took.decode_ms,
            took.preemptions,
            took.drafted_tokens,
            took.accepted_tokens,
        )
        result = JobResult(
            finished.choices,
            finished.usage,
            timings,
            finished.prompt_logprobs,
            self._worker_id,
            self._served_name,
            finished.speculation,
        )
        self._metrics.prefill_wait.observe(finished.timings.queue_ms / 1000)
        if FinishReason.CANCELLED in reasons:
            return Finish(JobState.CANCELLED, result)
        if FinishReason.EXPIRED in reasons:
            return Finish(JobState.EXPIRED, result)
        return Finish(JobState.COMPLETED, result)

    def _schedule(self) -> None:
        """Wake the role now, or when the publish interval has passed."""
        if not len(self._outbox) or self._wake.is_set():
            return
        wait_s = self._last_flush + self._interval_s - self._clock()
        if wait_s <= 0 or self._outbox.urgent:
            self._wake.set()
        elif self._timer is None:
            self._timer = self._event_loop.call_later(wait_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._wake.set()

    def _keep_within_bounds(self) -> None:
        if self._outbox.tokens <= self._max_buffered_tokens:
            return
        for parcel in self._outbox.largest_first():
            if parcel.ending is None:
                parcel.job.log.warning("too much is buffered while Redis is away; handing the job back")
                self._held.halt(parcel.job)
                self._outbox.drop(parcel.job)
                self._outbox.end(parcel.job, HandBack("its tokens did not fit the buffer while Redis was away"))
            if self._outbox.tokens <= self._max_buffered_tokens:
                return

    async def _send(self, batch: Sequence[Parcel]) -> None:
        try:
            await self._writer.write(batch)
        except RedisError as error:
            _logger.error("a batch was refused; writing its jobs one by one", extra={"reason": str(error)})
            for parcel in batch:
                await self._send_alone(parcel)

    async def _send_alone(self, parcel: Parcel) -> None:
        """Write one job; one whose write Redis refuses must not hold up the others, nor run on unpublished."""
        try:
            await self._writer.write([parcel])
        except RedisError as error:
            parcel.job.log.error("Redis refuses what this job writes; letting it go", extra={"reason": str(error)})
            self._metrics.role_failed("publish")
            self._held.lose(parcel.job)
