"""The claim role: asks for as many jobs as the engine has room for, and hands each to the engine or to its end.

It sleeps until something changes: the doorbell rings, a sequence ends, a scheduled job becomes due. A claim never
blocks and never asks beyond capacity, so a job waits in the queue, where every worker can reach it, and not in this
process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

from penstock_core.protocol import transitions
from penstock_core.protocol.errors import BrokerUnavailable
from penstock_core.protocol.jobs import FinishReason, JobResult, JobState
from penstock_core.protocol.keys import QueueKeys
from penstock_core.protocol.transitions import ClaimedJob, ClaimOutcome
from penstock_worker.admit import INLINE_BYTES, Run, admit
from penstock_worker.broker import Broker
from penstock_worker.engine import Engine
from penstock_worker.held import HeldJob, HeldJobs
from penstock_worker.metrics import WorkerMetrics
from penstock_worker.outbox import Ending, Fail, Finish
from penstock_worker.publish import Publisher
from penstock_worker.role import RoleLoop
from penstock_worker.tracing import tracer

_logger = logging.getLogger(__name__)

_LEAST_SLICE, _SLICES = 8, 8
"""A claim takes at most an eighth of the room, but 8 jobs: workers that wake together then share a burst evenly, where
the first to ask would take it all and leave the others idle."""

_LONGEST_SLEEP_S = 5.0
"""A ring can be lost with its connection; a waiting job is noticed after this long all the same."""


class Claimer:
    """Claims jobs while there is room."""

    def __init__(
        self,
        broker: Broker,
        keys: QueueKeys,
        engine: Engine,
        held: HeldJobs,
        publisher: Publisher,
        metrics: WorkerMetrics,
        *,
        worker_id: str,
        served_name: str,
        lease_ms: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._broker = broker
        self._keys = keys
        self._engine = engine
        self._held = held
        self._publisher = publisher
        self._metrics = metrics
        self._worker_id = worker_id
        self._served_name = served_name
        self._lease_ms = lease_ms
        self._clock = clock
        self._wake = asyncio.Event()
        self._wake.set()
        self.sleep_s = _LONGEST_SLEEP_S
        self._jobs_wait = True  # as far as we know
        self._reply_lost = False
        self._tracer = tracer(keys.queue, worker_id, served_name)
        self._unnoted: list[tuple[str, int, str]] = []
        self._preparing: set[asyncio.Task[None]] = set()
        self._role = RoleLoop("claim", self._iterate, metrics.role_failed)

    def start(self) -> None:
        """Begin claiming."""
        self._role.start()

    async def shutdown(self) -> None:
        """Stop claiming; jobs still being prepared stay held, and are handed back by the drain."""
        await self._role.shutdown()
        for task in self._preparing:
            task.cancel()
        await asyncio.gather(*self._preparing, return_exceptions=True)

    def rung(self) -> None:
        """A job may wait."""
        self._jobs_wait = True
        self._wake.set()

    def freed(self) -> None:
        """The engine has room again."""
        if self._jobs_wait:
            self._wake.set()

    async def claim_once(self) -> bool:
        """Claim a slice of what fits now. Returns whether more waits for the room that is left.

        Raises:
            BrokerUnavailable: what was claimed, if anything, is handed back before the next claim.
        """
        if self._reply_lost:
            await self._hand_back_unknown()
        capacity = self._engine.capacity()
        self._metrics.free_sequences.set(capacity.free_sequences)
        self._metrics.free_tokens.set(capacity.free_tokens)
        free_sequences = capacity.free_sequences - len(self._preparing)
        if free_sequences < 1:
            self._jobs_wait = True
            self.sleep_s = _LONGEST_SLEEP_S
            return False
        slice_ = min(free_sequences, max(_LEAST_SLICE, free_sequences // _SLICES))
        self._reply_lost = True
        outcome = await self._broker.run(
            transitions.claim(
                self._keys,
                self._worker_id,
                max_jobs=slice_,
                free_sequences=free_sequences,
                free_tokens=max(0, capacity.free_tokens),
                lease_ms=self._lease_ms,
                idle=len(self._held) == 0,
                may_take_last=self._held.last_lives == 0,
            )
        )
        self._reply_lost = False
        self._jobs_wait = outcome.waiting > 0
        self.sleep_s = self._until_due(outcome)
        claimed_at = self._clock()
        for claimed in outcome.jobs:
            self._take(claimed, claimed_at)
        if self._unnoted:
            await self._note_spans()
        return len(outcome.jobs) == slice_ and self._jobs_wait

    async def _iterate(self) -> None:
        try:
            async with asyncio.timeout(self.sleep_s):
                await self._wake.wait()
        except TimeoutError:
            pass
        self._wake.clear()
        try:
            while await self.claim_once():
                pass
        except BrokerUnavailable:
            self._wake.set()
            raise

    async def _hand_back_unknown(self) -> None:
        """A claim's reply was lost: whatever it gave is in our name, and we do not know of it."""
        holds = [(job.job_id, job.attempt) for job in self._held]
        given = await self._broker.run(transitions.release_others(self._keys, self._worker_id, holds))
        self._reply_lost = False
        if given:
            _logger.warning("handed back jobs of a claim whose reply was lost", extra={"jobs": len(given)})

    async def _note_spans(self) -> None:
        """Keep the new attempts' spans in Redis; a link that is lost with a connection is not worth a retry."""
        spans, self._unnoted = self._unnoted, []
        with contextlib.suppress(BrokerUnavailable):
            await self._broker.run(transitions.note_spans(self._keys, self._worker_id, spans))

    def _until_due(self, outcome: ClaimOutcome) -> float:
        if outcome.next_due_ms is None:
            return _LONGEST_SLEEP_S
        wait_s = (outcome.next_due_ms - self._broker.server_now_ms()) / 1000
        return min(_LONGEST_SLEEP_S, max(0.001, wait_s))

    def _take(self, claimed: ClaimedJob, claimed_at: float) -> None:
        job = HeldJob(claimed, claimed_at)
        if self._tracer is not None:
            job.span = self._tracer.begin(claimed)
            if job.span is not None:
                self._unnoted.append((job.job_id, job.attempt, job.span.traceparent))
        self._held.add(job)
        self._metrics.claimed.inc()
        self._metrics.queue_residence.observe(job.queue_ms / 1000)
        if claimed.attempt > 1:
            self._metrics.redelivered.inc()
        if len(claimed.request) + sum(map(len, claimed.log)) <= INLINE_BYTES:
            self._start_job(job, self._judge(job))
        else:
            task = asyncio.get_running_loop().create_task(self._take_aside(job))
            self._preparing.add(task)
            task.add_done_callback(self._prepared)

    async def _take_aside(self, job: HeldJob) -> None:
        self._start_job(job, await asyncio.to_thread(self._judge, job))

    def _prepared(self, task: asyncio.Task[None]) -> None:
        self._preparing.discard(task)
        self.freed()

    def _judge(self, job: HeldJob) -> Run | Ending:
        try:
            return admit(job, self._engine, served_name=self._served_name, worker_id=self._worker_id)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            job.log.exception("cannot prepare the job")
            return Fail("worker_error", f"{type(error).__name__}: {error}", retryable=True)

    def _start_job(self, job: HeldJob, verdict: Run | Ending) -> None:
        if job not in self._held or job.ended:
            return  # lost or handed back while it was prepared
        if not isinstance(verdict, Run):
            self._publisher.end(job, verdict)
        elif job.stopping is not None:
            state = JobState.EXPIRED if job.stopping is FinishReason.EXPIRED else JobState.CANCELLED
            result = JobResult(worker=self._worker_id, model=self._served_name)
            self._publisher.end(job, Finish(state, result))
        else:
            claimed = job.claimed
            self._metrics.resumed_tokens.inc(verdict.resumed_tokens)
            level = logging.DEBUG if claimed.attempt == 1 else logging.INFO
            if job.says(level):
                job.log.log(
                    level,
                    "started" if claimed.attempt == 1 else "resumed",
                    extra={
                        "prompt_tokens": job.prompt_tokens,
                        "resumed_tokens": verdict.resumed_tokens,
                        "queue_ms": round(job.queue_ms),
                    },
                )
            try:
                self._engine.submit(verdict.request)
            except RuntimeError:  # its thread died; the worker will end, and the job goes back with the others
                self._publisher.engine_died.set()
