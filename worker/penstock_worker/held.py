"""The jobs this worker holds: claimed, not yet finished, failed, released or fenced.

The table is the one place where the roles meet: claim adds, publish and renew look up, drain waits for it to empty. It
lives on the event loop and is never touched by the engine's thread. What a job's tokens are is not here: the engine
makes them, publish buffers them, and Redis has the truth.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from penstock_core.protocol.jobs import FinishReason
from penstock_core.protocol.transitions import ClaimedJob
from penstock_worker.structured_log import JobLog
from penstock_worker.tracing import AttemptSpan

_logger = logging.getLogger(__name__)


@dataclass(slots=True)
class HeldJob:
    """One claimed job.

    Attributes:
        claimed: what the claim returned.
        request_id: the engine's name for this attempt; another attempt of the job on this worker is another request.
        claimed_at: this process's monotonic time when the claim was answered; with `claimed.claimed_ms` it relates the
            server's clock to ours, so that no two machines' clocks are ever compared.
        stopping: why the engine was told to stop it; its result then reports that.
        span: the attempt's, where it is traced.
        ended: how it ends is decided and waits to be written; only the answer to that write counts now.
    """

    claimed: ClaimedJob
    claimed_at: float
    prompt_tokens: int = 0
    stopping: FinishReason | None = None
    ended: bool = False
    span: AttemptSpan | None = None
    job_id: str = field(init=False)
    request_id: str = field(init=False)

    def __post_init__(self) -> None:
        self.job_id = self.claimed.job_id
        self.request_id = f"{self.claimed.job_id}#{self.claimed.attempt}"

    @property
    def log(self) -> JobLog:
        """A logger for lines about this job."""
        return JobLog(_logger, self.job_id, self.attempt, self.claimed.traceparent)

    @staticmethod
    def says(level: int) -> bool:
        """Whether lines of this level are printed at all: making one costs more than the rest of a small job."""
        return _logger.isEnabledFor(level)

    @property
    def attempt(self) -> int:
        """The fencing token: every write to Redis carries it."""
        return self.claimed.attempt

    @property
    def queue_ms(self) -> float:
        """How long the job waited in the queue before this claim."""
        return max(0.0, float(self.claimed.claimed_ms - self.claimed.enqueued_ms))


class HeldJobs:
    """Held jobs by request id.

    `abort` is the engine's: it tells the engine to stop a request, and is harmless for one it does not know.

    Attributes:
        fenced: jobs lost to another attempt so far.
        last_lives: how many of those held are on their last life.
    """

    def __init__(self, abort: Callable[[str, FinishReason], None]) -> None:
        self.fenced = 0
        self.last_lives = 0
        self._abort = abort
        self._jobs: dict[str, HeldJob] = {}
        self._by_job: dict[str, HeldJob] = {}
        self._empty = asyncio.Event()
        self._empty.set()

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[HeldJob]:
        return iter(list(self._jobs.values()))

    def __contains__(self, job: object) -> bool:
        return isinstance(job, HeldJob) and self._jobs.get(job.request_id) is job

    def add(self, job: HeldJob) -> None:
        """Take `job` in; a newer attempt replaces an older one under the job's id."""
        self.last_lives += job.claimed.last_life
        self._jobs[job.request_id] = job
        self._by_job[job.job_id] = job
        self._empty.clear()

    def discard(self, job: HeldJob) -> None:
        """Let `job` go, however it ended."""
        if job in self:
            self.last_lives -= job.claimed.last_life
            if job.span is not None:
                job.span.end()
        self._jobs.pop(job.request_id, None)
        if self._by_job.get(job.job_id) is job:
            del self._by_job[job.job_id]
        if not self._jobs:
            self._empty.set()

    def stop(self, job: HeldJob, reason: FinishReason) -> None:
        """Have the engine end `job` now; its result arrives as any other does, with what there is."""
        if job.stopping is None and not job.ended and job in self:
            job.stopping = reason
            self._abort(job.request_id, reason)

    def halt(self, job: HeldJob) -> None:
        """Have the engine stop `job` without a result: it goes on elsewhere."""
        if job.stopping is None and not job.ended:
            self._abort(job.request_id, FinishReason.CANCELLED)

    def lose(self, job: HeldJob) -> None:
        """Drop a job that belongs to another attempt now: whatever the engine still makes of it goes nowhere."""
        if job in self:
            self.fenced += 1
            self._abort(job.request_id, FinishReason.CANCELLED)
            self.discard(job)

    def by_request(self, request_id: str) -> HeldJob | None:
        """The job behind an engine request, or None where it was let go."""
        return self._jobs.get(request_id)

    def by_job(self, job_id: str) -> HeldJob | None:
        """The newest held attempt of a job."""
        return self._by_job.get(job_id)

    async def wait_empty(self) -> None:
        """Return once nothing is held."""
        await self._empty.wait()
