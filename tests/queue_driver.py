"""Drives a queue through its transitions in tests: short verbs, an injected clock, and readable events."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import redis

from penstock_core.protocol import transitions as t
from penstock_core.protocol.codec import decode_event, encode_event, encode_request
from penstock_core.protocol.events import JobEnded, TokenChunk
from penstock_core.protocol.jobs import JobFailure, JobResult, JobState
from penstock_core.protocol.keys import QueueKeys
from penstock_core.protocol.requests import GenerationRequest, JobOptions

T = TypeVar("T")
REQUEST = encode_request(GenerationRequest(prompt="Once upon a time"))
LEASE_MS = 15_000
START_MS = 1_800_000_000_000


class QueueDriver:
    """One queue, one clock (`now`, in ms, moved by `tick`), and any number of workers named by the caller."""

    def __init__(self, client: redis.Redis, keys: QueueKeys) -> None:
        self.client = client
        self.keys = keys
        self.now = START_MS
        self._ids = itertools.count(1)

    def tick(self, ms: int) -> None:
        self.now += ms

    def run(self, call: t.Call[T]) -> T:
        return t.run(self.client, call)

    # --- producer

    def new_job(
        self, job_id: str | None = None, *, tokens: tuple[int, int] = (10, 20), affinity: str = "", **options: Any
    ):
        job_id = job_id or f"job{next(self._ids):05}"
        return t.NewJob(job_id, REQUEST, JobOptions(**options), tokens[0], tokens[1], affinity)

    def submit_all(self, jobs: Sequence[t.NewJob], client_id: str = "") -> list[t.SubmitOutcome]:
        return self.run(t.submit(self.keys, jobs, client_id=client_id, now_ms=self.now))

    def submit(self, job_id: str | None = None, *, client_id: str = "", **options: Any) -> str:
        """Submit one job that must be accepted; returns its id."""
        (outcome,) = self.submit_all([self.new_job(job_id, **options)], client_id)
        assert outcome.status == "accepted", outcome
        return outcome.job_id

    def cancel(self, job_id: str, tenant: str | None = None) -> str:
        (outcome,) = self.run(t.cancel(self.keys, [job_id], tenant=tenant, now_ms=self.now))
        return outcome

    # --- worker

    def claim_outcome(
        self,
        worker: str = "w1",
        max_jobs: int = 1,
        *,
        free_sequences: int = 1000,
        free_tokens: int = 10**9,
        idle: bool = True,
        may_take_last: bool = True,
    ) -> t.ClaimOutcome:
        return self.run(
            t.claim(
                self.keys,
                worker,
                max_jobs=max_jobs,
                free_sequences=free_sequences,
                free_tokens=free_tokens,
                lease_ms=LEASE_MS,
                idle=idle,
                may_take_last=may_take_last,
                now_ms=self.now,
            )
        )

    def claim(self, worker: str = "w1", max_jobs: int = 1, **room: Any) -> list[t.ClaimedJob]:
        return self.claim_outcome(worker, max_jobs, **room).jobs

    def claim_ids(self, worker: str = "w1", max_jobs: int = 1, **room: Any) -> list[str]:
        return [job.job_id for job in self.claim(worker, max_jobs, **room)]

    def take(self, worker: str = "w1") -> t.ClaimedJob:
        """Claim one job that must be there."""
        (job,) = self.claim(worker)
        return job

    def renew(self, worker: str, *holds: t.Hold, record: bytes | None = None) -> list[str]:
        call = t.renew(self.keys, worker, holds, lease_ms=LEASE_MS, record=record, now_ms=self.now)
        return list(self.run(call))

    @staticmethod
    def chunk(job_id: str, attempt: int, offset: int, tokens: Sequence[int], index: int = 0, **more: Any):
        event = TokenChunk(
            attempt, index, offset, tuple(tokens), tuple(f" {token}" for token in tokens) or ("",), **more
        )
        return t.PublishRecord(job_id, attempt, index, offset, len(tokens), encode_event(event))

    def publish(self, worker: str, *records: t.PublishRecord) -> list[str]:
        return list(self.run(t.publish(self.keys, worker, records, now_ms=self.now)))

    @staticmethod
    def final(
        job_id: str,
        attempt: int,
        state: JobState = JobState.COMPLETED,
        chunks: Sequence[t.PublishRecord] = (),
        tokens: tuple[int, int] = (10, 0),
    ) -> t.FinishRecord:
        failure = None if state is JobState.COMPLETED else JobFailure(state.value, "as the worker said")
        ended = encode_event(JobEnded(state, attempt, JobResult(worker="w"), failure))
        return t.FinishRecord(job_id, attempt, state, chunks, ended, *tokens)

    def finish(self, worker: str, *records: t.FinishRecord) -> list[str]:
        return list(self.run(t.finish(self.keys, worker, records, now_ms=self.now)))

    def fail(self, worker: str, job_id: str, attempt: int, *, retryable: bool = True, backoff_ms: int = 1000) -> str:
        ended = encode_event(JobEnded(JobState.FAILED, attempt, None, JobFailure("engine", "out of luck")))
        record = t.FailRecord(job_id, attempt, "engine", "out of luck", retryable, ended, backoff_ms)
        (outcome,) = self.run(t.fail(self.keys, worker, [record], now_ms=self.now))
        return outcome

    def release(self, worker: str, *holds: t.Hold) -> list[str]:
        return list(self.run(t.release(self.keys, worker, holds, now_ms=self.now)))

    def bury(self, worker: str, job_id: str, attempt: int) -> str:
        ended = encode_event(JobEnded(JobState.DEAD, attempt, None, JobFailure("undecodable", "not a request")))
        record = t.BuryRecord(job_id, attempt, "undecodable", "not a request", ended)
        (outcome,) = self.run(t.bury(self.keys, worker, [record], now_ms=self.now))
        return outcome

    # --- upkeep and looking

    @contextlib.contextmanager
    def listening(self, *channels: str) -> Iterator[list[tuple[str, bytes]]]:
        """Collect (channel, data) of everything published inside the block; complete when the block has ended."""
        heard: list[tuple[str, bytes]] = []
        fence = f"fence-{id(heard)}"
        subscriber = self.client.pubsub()
        subscriber.subscribe(*channels, fence)
        for _ in range(len(channels) + 1):
            assert subscriber.get_message(timeout=60)["type"] == "subscribe"
        yield heard
        self.client.publish(fence, b"")
        while (message := subscriber.get_message(timeout=60))["channel"] != fence.encode():
            heard.append((message["channel"].decode(), message["data"]))
        subscriber.close()

    def reclaim(self, **options: Any) -> t.ReclaimOutcome:
        return self.run(t.reclaim(self.keys, now_ms=self.now, **options))

    def requeue(self, job_id: str) -> str:
        (outcome,) = self.run(t.requeue(self.keys, [job_id], now_ms=self.now))
        return outcome

    def status(self, job_id: str) -> t.JobStatus:
        status = self.run(t.read_job(self.keys, job_id))
        assert status is not None, f"{job_id} is unknown"
        return status

    def state(self, job_id: str) -> str:
        return self.status(job_id).state.value

    def snapshot(self) -> t.QueueSnapshot:
        return self.run(t.snapshot(self.keys, now_ms=self.now))

    def stats(self) -> dict[str, int]:
        return self.snapshot().stats

    def events(self, job_id: str) -> list[TokenChunk | JobEnded]:
        page = self.run(t.read_events(self.keys, job_id, limit=100_000))
        assert page is not None, f"{job_id} is unknown"
        return [decode_event(event) for event in page.events]

    def tokens(self, job_id: str, index: int = 0) -> list[int]:
        """Tokens in the log of one choice, checked to be contiguous from 0."""
        tokens: list[int] = []
        for event in self.events(job_id):
            if isinstance(event, TokenChunk) and event.index == index:
                assert event.offset == len(tokens), f"offset {event.offset} after {len(tokens)} tokens"
                tokens += event.token_ids
        return tokens

    def ended(self, job_id: str) -> JobEnded:
        """The terminal event, which must be the one and the last."""
        events = self.events(job_id)
        terminal = [event for event in events if isinstance(event, JobEnded)]
        assert len(terminal) == 1, terminal
        assert events[-1] is terminal[0]
        return terminal[0]

    def set_config(self, tenants: Any = None, **changes: int | None) -> None:
        self.run(t.configure(self.keys, changes, tenants))
