"""A worker that does as the test says: the real transitions on a real server, with tokens made from their offsets."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Sequence

import redis

from penstock_core.protocol.codec import decode_request, encode_event
from penstock_core.protocol.events import JobEnded, TokenChunk
from penstock_core.protocol.jobs import Choice, FinishReason, JobFailure, JobResult, JobState, Usage
from penstock_core.protocol.keys import QueueKeys
from penstock_core.protocol.transitions import (
    ClaimedJob,
    FailRecord,
    FinishRecord,
    PublishRecord,
    claim,
    fail,
    finish,
    publish,
    run,
)


def piece(index: int, offset: int) -> str:
    """The text of the token at an offset of a choice: tells where it belongs."""
    return f" {index}:{offset}"


def chunk(attempt: int, index: int, offset: int, count: int, reason: FinishReason | None = None) -> TokenChunk:
    """Tokens of a choice from an offset on; token ids are offsets."""
    return TokenChunk(
        attempt,
        index,
        offset,
        tuple(range(offset, offset + count)),
        tuple(piece(index, o) for o in range(offset, offset + count)) if count else ("",),
        reason,
    )


class ScriptedWorker:
    """Claims, publishes and finishes when told to; claims and publishes at `now_ms`, if not by the server's clock."""

    def __init__(self, client: redis.Redis, keys: QueueKeys, *, lease_ms: int = 15_000, now_ms: int = 0) -> None:
        self.id = f"scripted-{uuid.uuid4().hex[:8]}"
        self._client = client
        self._keys = keys
        self._lease_ms = lease_ms
        self._now_ms = now_ms
        self._offsets: dict[tuple[str, int], int] = {}

    def use(self, client: redis.Redis) -> None:
        """Go on over another connection."""
        self._client = client

    def claim(self, max_jobs: int = 1) -> list[ClaimedJob]:
        """Take what waits."""
        call = claim(
            self._keys, self.id, max_jobs=max_jobs, free_sequences=10**6, free_tokens=10**9, lease_ms=self._lease_ms,
            idle=True, now_ms=self._now_ms,
        )  # fmt: skip
        return run(self._client, call).jobs

    def claim_one(self, job_id: str) -> ClaimedJob:
        """Take the one job there is."""
        (job,) = self.claim()
        assert job.job_id == job_id
        return job

    def say(self, job: ClaimedJob, count: int, *, index: int = 0) -> None:
        """Publish the next tokens of a choice."""
        self.say_all([(job, index, count)])

    def say_all(self, parts: Sequence[tuple[ClaimedJob, int, int]]) -> None:
        """Publish the next tokens of several jobs and choices in one call, as an engine step does."""
        records = [self._record(job, index, count) for job, index, count in parts]
        statuses = run(self._client, publish(self._keys, self.id, records, self._now_ms))
        assert "fenced" not in statuses

    def end(self, job: ClaimedJob, state: JobState = JobState.COMPLETED, *, failure: JobFailure | None = None) -> None:
        """Finish a job with what was said."""
        self.end_all([job], state, failure=failure)

    def end_all(
        self, jobs: Sequence[ClaimedJob], state: JobState = JobState.COMPLETED, *, failure: JobFailure | None = None
    ) -> None:
        """Finish several jobs in one call."""
        records = [self._finish_record(job, state, failure) for job in jobs]
        statuses = run(self._client, finish(self._keys, self.id, records))
        assert statuses == ["ok"] * len(jobs)

    def fail(self, job: ClaimedJob, code: str, message: str) -> None:
        """Fail a job for good."""
        ended = encode_event(JobEnded(JobState.FAILED, job.attempt, None, JobFailure(code, message)))
        record = FailRecord(job.job_id, job.attempt, code, message, False, ended, 0)
        assert run(self._client, fail(self._keys, self.id, [record])) == ["failed"]

    def offset_of(self, job_id: str, index: int = 0) -> int:
        """How many tokens of the choice have been said."""
        return self._offsets.get((job_id, index), 0)

    def _record(self, job: ClaimedJob, index: int, count: int, reason: FinishReason | None = None) -> PublishRecord:
        offset = self._offsets.get((job.job_id, index), 0)
        self._offsets[job.job_id, index] = offset + count
        payload = encode_event(chunk(job.attempt, index, offset, count, reason))
        return PublishRecord(job.job_id, job.attempt, index, offset, count, payload)

    def _finish_record(self, job: ClaimedJob, state: JobState, failure: JobFailure | None) -> FinishRecord:
        reason = {
            JobState.COMPLETED: FinishReason.LENGTH,
            JobState.CANCELLED: FinishReason.CANCELLED,
            JobState.EXPIRED: FinishReason.EXPIRED,
        }.get(state, FinishReason.ERROR)
        indices = sorted(index for job_id, index in self._offsets if job_id == job.job_id) or [0]
        lasts = [self._record(job, index, 0, reason) for index in indices]
        choices = tuple(
            Choice(
                index,
                "".join(piece(index, o) for o in range(self._offsets[job.job_id, index])),
                tuple(range(self._offsets[job.job_id, index])),
                reason,
            )
            for index in indices
        )
        total = sum(len(choice.token_ids) for choice in choices)
        result = JobResult(choices, Usage(5, total), worker=self.id)
        ended = encode_event(JobEnded(state, job.attempt, result, failure))
        return FinishRecord(job.job_id, job.attempt, state, lasts, ended, 5, total)


class BusyWorker:
    """A scripted worker in a thread: completes every job with as many tokens as asked for, `step` at a time."""

    def __init__(
        self,
        connect: Callable[[], redis.Redis],
        keys: QueueKeys,
        *,
        step: int = 8,
        batch: int = 64,
        stream: bool = True,
    ) -> None:
        self._client = connect()
        self._worker = ScriptedWorker(self._client, keys)
        self._step = step
        self._batch = batch
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.done = 0

    def __enter__(self) -> BusyWorker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._client.close()

    def _run(self) -> None:
        while not self._stop.is_set():
            jobs = self._worker.claim(self._batch)
            if not jobs:
                self._stop.wait(0.002)
                continue
            left = {job.job_id: decode_request(job.request).sampling.max_tokens or 1 for job in jobs}
            while any(left.values()):
                parts = []
                for job in jobs:
                    count = min(self._step, left[job.job_id])
                    if count:
                        parts.append((job, 0, count))
                        left[job.job_id] -= count
                self._worker.say_all(parts)
            self._worker.end_all(jobs)
            self.done += len(jobs)
