"""From a batch of parcels to transitions, one round trip, and from their answers to what becomes of the jobs.

Only the publish role calls this. Every write carries the job's attempt; the answer decides, never this process'
opinion.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from penstock_core.protocol import transitions
from penstock_core.protocol.codec import encode_event
from penstock_core.protocol.errors import RecordTooLarge
from penstock_core.protocol.events import JobEnded, TokenChunk
from penstock_core.protocol.jobs import FinishReason, JobFailure, JobState
from penstock_core.protocol.keys import QueueKeys
from penstock_core.protocol.transitions import BuryRecord, FailRecord, FinishRecord, PublishRecord
from penstock_worker.broker import Broker
from penstock_worker.held import HeldJob, HeldJobs
from penstock_worker.metrics import WorkerMetrics
from penstock_worker.outbox import Bury, Fail, Finish, HandBack, Parcel

_RETRY_BASE_MS = 1_000
_RETRY_CAP_MS = 60_000
_INCOMPLETE = {
    JobState.CANCELLED: JobFailure("cancelled", "cancelled by request"),
    JobState.EXPIRED: JobFailure("deadline", "its deadline passed before it completed"),
}


@dataclass(frozen=True, slots=True)
class _Write:
    """One call and who hears its answers: `hear(parcel, answer)` for each parcel in turn."""

    call: transitions.Call[Any]
    parcels: Sequence[Parcel]
    hear: Callable[[Parcel, str], None]


class Writer:
    """Writes parcels to Redis."""

    def __init__(
        self,
        broker: Broker,
        keys: QueueKeys,
        held: HeldJobs,
        metrics: WorkerMetrics,
        *,
        worker_id: str,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._broker = broker
        self._keys = keys
        self._held = held
        self._metrics = metrics
        self._worker_id = worker_id
        self._draw = draw

    async def write(self, batch: Sequence[Parcel]) -> None:
        """Write a batch in one round trip and act on the answers.

        Raises:
            BrokerUnavailable: nothing is known of what was applied; write the same batch again.
            RedisError: the server refused the batch, or a part of it.
        """
        writes = self._writes(batch)
        answered = await self._broker.run_many([write.call for write in writes])
        for write, answers in zip(writes, answered, strict=True):
            for parcel, answer in zip(write.parcels, answers, strict=True):
                if parcel.job in self._held:
                    write.hear(parcel, answer)

    def _writes(self, batch: Sequence[Parcel]) -> list[_Write]:
        keys, me = self._keys, self._worker_id
        finished = [(parcel, end) for parcel in batch if (end := self._finish_record(parcel))]
        failed = [(parcel, error) for parcel in batch if (error := self._fail_record(parcel))]
        buried = [(parcel, letter) for parcel in batch if (letter := _bury_record(parcel))]
        handed_back = [parcel for parcel in batch if isinstance(parcel.ending, HandBack)]
        published = [
            (parcel, _publish_record(parcel.job, chunk))
            for parcel in batch
            if not isinstance(parcel.ending, Finish)
            for chunk in parcel.all_chunks()
        ]
        writes: list[_Write] = []
        if published:
            parcels, chunks = zip(*published, strict=True)
            writes.append(_Write(transitions.publish(keys, me, chunks), parcels, self._published))
        if finished:
            parcels, ends = zip(*finished, strict=True)
            writes.append(_Write(transitions.finish(keys, me, ends), parcels, self._finished))
        if failed:
            parcels, errors = zip(*failed, strict=True)
            writes.append(_Write(transitions.fail(keys, me, errors), parcels, self._failed))
        if buried:
            parcels, letters = zip(*buried, strict=True)
            writes.append(_Write(transitions.bury(keys, me, letters), parcels, self._buried))
        if handed_back:
            holds = [(parcel.job.job_id, parcel.job.attempt) for parcel in handed_back]
            writes.append(_Write(transitions.release(keys, me, holds), handed_back, self._handed_back))
        return writes

    # --- records ------------------------------------------------------------------------------------------------------

    def _finish_record(self, parcel: Parcel) -> FinishRecord | None:
        job, ending = parcel.job, parcel.ending
        if not isinstance(ending, Finish):
            return None
        try:
            ended = encode_event(JobEnded(ending.state, job.attempt, ending.result, _INCOMPLETE.get(ending.state)))
        except RecordTooLarge as error:
            parcel.ending = Fail("result_too_large", f"{error}; lower max_tokens, n or logprobs", retryable=False)
            return None
        usage = ending.result.usage
        chunks = [_publish_record(job, chunk) for chunk in parcel.all_chunks()]
        return FinishRecord(
            job.job_id, job.attempt, ending.state, chunks, ended, usage.prompt_tokens, usage.completion_tokens
        )

    def _fail_record(self, parcel: Parcel) -> FailRecord | None:
        job, ending = parcel.job, parcel.ending
        if not isinstance(ending, Fail):
            return None
        return FailRecord(
            job.job_id,
            job.attempt,
            ending.code,
            ending.message,
            ending.retryable,
            _ended(job, JobState.FAILED, ending),
            self._backoff_ms(job.claimed.errors),
        )

    def _backoff_ms(self, errors: int) -> int:
        """Exponential with full jitter, so that jobs which failed together do not come back together."""
        return round(min(_RETRY_CAP_MS, _RETRY_BASE_MS * 2.0 ** min(errors, 30)) * self._draw())

    # --- answers ------------------------------------------------------------------------------------------------------

    def _published(self, parcel: Parcel, answer: str) -> None:
        if answer == "fenced":
            self._fenced(parcel)
        elif answer == "cancelled":
            self._held.stop(parcel.job, FinishReason.CANCELLED)
        elif answer == "expired":
            self._held.stop(parcel.job, FinishReason.EXPIRED)

    def _finished(self, parcel: Parcel, answer: str) -> None:
        if answer == "fenced":
            self._fenced(parcel)
            return
        ending = parcel.ending
        assert isinstance(ending, Finish)
        usage, timings = ending.result.usage, ending.result.timings
        if parcel.job.span is not None:
            parcel.job.span.ran(ending.result, parcel.job.queue_ms)
            parcel.job.span.outcome(ending.state.value)
        self._metrics.tokens_in.inc(usage.prompt_tokens)
        self._metrics.tokens_cached.inc(usage.cached_tokens)
        self._metrics.first_token.observe(timings.ttft_ms / 1000)
        self._metrics.decode.observe(timings.decode_ms / 1000)
        self._ended(parcel, ending.state)
        if parcel.job.says(logging.INFO):
            parcel.job.log.info(
                ending.state.value,
                extra={"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens},
            )

    def _failed(self, parcel: Parcel, answer: str) -> None:
        ending = parcel.ending
        assert isinstance(ending, Fail)
        if answer == "fenced":
            self._fenced(parcel)
            return
        if parcel.job.span is not None:
            parcel.job.span.outcome(answer, f"{ending.code}: {ending.message}")
        if answer == "delayed":
            self._metrics.retried.inc()
            self._held.discard(parcel.job)
        else:
            self._ended(parcel, JobState(answer))
        parcel.job.log.warning("failed", extra={"code": ending.code, "reason": ending.message, "outcome": answer})

    def _buried(self, parcel: Parcel, answer: str) -> None:
        ending = parcel.ending
        assert isinstance(ending, Bury)
        if answer == "fenced":
            self._fenced(parcel)
            return
        if parcel.job.span is not None:
            parcel.job.span.outcome("dead", f"{ending.code}: {ending.message}")
        self._metrics.dead.inc()
        self._ended(parcel, JobState.DEAD)
        parcel.job.log.error("dead-lettered", extra={"code": ending.code, "reason": ending.message})

    def _handed_back(self, parcel: Parcel, answer: str) -> None:
        ending = parcel.ending
        assert isinstance(ending, HandBack)
        if answer == "fenced":
            self._fenced(parcel)
            return
        if parcel.job.span is not None:
            parcel.job.span.outcome("released" if answer == "ok" else answer)
        if answer == "ok":
            self._metrics.released.inc()
            self._held.discard(parcel.job)
        else:
            self._ended(parcel, JobState(answer))
        parcel.job.log.info("handed back", extra={"reason": ending.reason, "outcome": answer})

    def _ended(self, parcel: Parcel, state: JobState) -> None:
        self._metrics.ended[state.value].inc()
        self._held.discard(parcel.job)

    def _fenced(self, parcel: Parcel) -> None:
        parcel.job.log.warning("fenced: the job belongs to another attempt, or has ended; dropping it")
        self._metrics.fenced.inc()
        self._held.lose(parcel.job)


def _publish_record(job: HeldJob, chunk: TokenChunk) -> PublishRecord:
    return PublishRecord(job.job_id, job.attempt, chunk.index, chunk.offset, len(chunk.token_ids), encode_event(chunk))


def _bury_record(parcel: Parcel) -> BuryRecord | None:
    job, ending = parcel.job, parcel.ending
    if not isinstance(ending, Bury):
        return None
    return BuryRecord(job.job_id, job.attempt, ending.code, ending.message, _ended(job, JobState.DEAD, ending))


def _ended(job: HeldJob, state: JobState, ending: Fail | Bury) -> bytes:
    return encode_event(JobEnded(state, job.attempt, None, JobFailure(ending.code, ending.message)))
