"""Follows jobs as subscribers would, and accounts for every token: what was lost, doubled, missing or wrong."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import redis

from penstock import Client, JobHandle, JobResult, JobState
from penstock_core.protocol.codec import decode_event
from penstock_core.protocol.events import JobEnded, TokenChunk
from penstock_core.protocol.keys import QueueKeys
from penstock_core.protocol.transitions import read_events, run, snapshot


@dataclass
class Follower:
    """One subscriber of one job, in a thread of its own, noting each chunk as it comes."""

    job: JobHandle
    tokens: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    text: dict[int, str] = field(default_factory=lambda: defaultdict(str))
    attempts: set[int] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)
    started: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        try:
            for chunk in self.job.stream(timeout=240):
                seen = self.tokens[chunk.index]
                if chunk.offset != len(seen):
                    kind = "missing" if chunk.offset > len(seen) else "doubled"
                    self.faults.append(f"{self.job.id}: {kind} tokens at {chunk.offset}, has {len(seen)}")
                seen.extend(chunk.token_ids)
                self.text[chunk.index] += chunk.text
                self.attempts.add(chunk.attempt)
                if len(seen) >= 4:
                    self.started.set()
        except BaseException as error:
            self.error = error
        finally:
            self.started.set()

    def join(self) -> None:
        """Wait for the end of the stream; an error other than the job's own end is raised."""
        self._thread.join(300)
        assert not self._thread.is_alive(), f"{self.job.id}: the stream never ended: {self.job.status()}"


def account(client: Client, follower: Follower) -> JobResult:
    """Hold stream, log and result of a completed job against one another; returns the result."""
    follower.join()
    assert follower.error is None, follower.error
    result = follower.job.result(timeout=60)
    assert not follower.faults, follower.faults
    for choice in result.choices:
        assert follower.tokens[choice.index] == list(choice.token_ids)
        assert follower.text[choice.index] == choice.text
    assert_log_is_whole(client, follower.job.id)
    return result


def assert_log_is_whole(client: Client, job_id: str) -> None:
    """The log has every offset once, attempts that only rise, one terminal event, at its end; no job ended twice."""
    keys = QueueKeys(client.settings.queue)
    with redis.Redis.from_url(client.settings.url) as connection:
        page = run(connection, read_events(keys, job_id, limit=100_000))
        counted = run(connection, snapshot(keys)).stats
        states = [connection.hget(key, "state") for key in connection.scan_iter(keys.job("*"), count=1000)]
    assert page is not None
    assert page.state.is_terminal
    *chunks, last = [decode_event(data) for data in page.events]
    assert isinstance(last, JobEnded)
    ended = Counter(JobState(state.decode()) for state in states if state is not None)
    if not counted["running"] + counted["queued"] + counted["delayed"]:
        for state, jobs in ended.items():
            assert counted[state] == jobs, f"{jobs} jobs are {state}, {counted[state]} ends were counted"
    offsets: dict[int, int] = defaultdict(int)
    attempt = 0
    for chunk in chunks:
        assert isinstance(chunk, TokenChunk)
        assert chunk.offset == offsets[chunk.index], f"{job_id}: offset {chunk.offset}, expected {offsets[chunk.index]}"
        assert chunk.attempt >= attempt
        offsets[chunk.index], attempt = chunk.end, chunk.attempt
