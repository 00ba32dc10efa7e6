"""The whole of delivery against a small model: any order of calls, crashes, repeated calls, zombies and clock jumps.

The model knows nothing of Redis: a dict of jobs with state, holder, tokens and counts. After every step the queue's
counters equal the model's; at the end every accepted job is either waiting, running or has exactly one terminal event,
and every log holds exactly the tokens that were acknowledged, contiguous and without duplicates.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import fakeredis
import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from penstock_core.protocol import transitions as t
from penstock_core.protocol.codec import is_terminal_event
from penstock_core.protocol.jobs import JobState
from penstock_core.protocol.keys import QueueKeys
from tests.key_accounting import leaked_keys
from tests.queue_driver import LEASE_MS, REQUEST, QueueDriver
from tests.redis_server import RedisServer

MAX_CRASHES = 3
MENDED_LEASE_MS = 30_000
WORKERS = ("w1", "w2")
TENANTS = ("a", "b", "c")
ENDED = {"completed", "failed", "cancelled", "expired", "dead"}
workers = st.sampled_from(WORKERS)
picks = st.integers(0, 1000)
specs = st.fixed_dictionaries(
    {
        "priority": st.sampled_from([0, 4, 5, 9]),
        "tenant": st.sampled_from(TENANTS),
        "delay_ms": st.sampled_from([0, 0, 0, 500, 20_000]),
        "deadline_ms": st.sampled_from([None, None, None, 300, 20_000, 60_000]),
        "max_retries": st.integers(0, 2),
        "tokens": st.tuples(st.integers(1, 50), st.integers(1, 50)),
        "affinity": st.sampled_from(["", "", "x", "y"]),
    }
)


@dataclass
class ModelJob:
    job_id: str
    tenant: str
    due: int
    deadline: int | None
    retries: int
    state: str = "queued"
    owner: str = ""
    attempt: int = 0
    lease: int = 0
    crashes: int = 0
    losses: int = 0
    lost: dict[int, str] = field(default_factory=dict)  # attempt -> worker it was taken from, not heard of since
    errors: int = 0
    cancelling: bool = False
    tokens: list[int] = field(default_factory=list)
    log: list[bytes] = field(default_factory=list)
    released: tuple[str, int, str] | None = None  # who gave it up, at which attempt, and the answer
    terminals: int = 0

    def asked(self, now: int) -> str:
        if self.cancelling:
            return "cancelled"
        return "expired" if self.deadline is not None and self.deadline <= now else "ok"


Hold = tuple[str, int, str]


class DeliveryMachine(RuleBasedStateMachine):
    """Few rules of many actions each: Hypothesis leaves out whole rules at random, and without claims nothing happens.

    A hold is (job id, attempt, worker), as a claim gave it; most of those ever given are stale.
    """

    @staticmethod
    def connect() -> redis.Redis:
        return fakeredis.FakeRedis(version=(7,), protocol=2)

    def __init__(self) -> None:
        super().__init__()
        self.client = self.connect()
        self.driver = QueueDriver(self.client, QueueKeys(f"machine-{uuid.uuid4().hex[:12]}"))
        self.model: dict[str, ModelJob] = {}
        self.holds: list[Hold] = []
        self.counts = dict.fromkeys(t.COUNTERS, 0)

    def teardown(self) -> None:
        try:
            self.settle()
            assert leaked_keys(self.client, self.driver.keys.queue) == []
        finally:
            mine = list(self.client.scan_iter(match=f"{self.driver.keys.prefix}*", count=1000))
            if mine:
                self.client.delete(*mine)
            self.client.close()

    @property
    def now(self) -> int:
        return self.driver.now

    # --- helpers of the model

    def end(self, job: ModelJob, state: str) -> None:
        assert job.state not in ENDED, f"{job.job_id} ended twice"
        job.state, job.terminals = state, job.terminals + 1
        self.counts[state] += 1

    def held(self, hold: Hold) -> ModelJob | None:
        job = self.model[hold[0]]
        mine = job.state == "running" and job.owner == hold[2] and job.attempt == hold[1]
        return job if mine else None

    def fenced(self, hold: Hold) -> str:
        """A refused write; it shows that its worker lives, so that what it lost was no crash."""
        self.counts["fenced"] += 1
        job = self.model[hold[0]]
        if job.lost.get(hold[1]) == hold[2] and job.state != "dead":
            del job.lost[hold[1]]
            job.crashes, job.losses = job.crashes - 1, job.losses + 1
        return "fenced"

    # --- producer

    @initialize(limit=st.sampled_from([8, 100, 100]), first=st.lists(specs, min_size=3, max_size=8))
    def begin(self, limit: int, first: list[dict[str, Any]]) -> None:
        """Start with jobs waiting and running, so that no run is about an empty queue."""
        self.limit = limit
        self.driver.set_config(max_waiting_jobs=limit, max_crashes=MAX_CRASHES)
        for spec in first:
            self.submit_one(spec)
        self.claim("w1", 3, 10**6)

    @rule(spec=specs, repeats=st.integers(1, 2))
    def producer_submits(self, spec: dict[str, Any], repeats: int) -> None:
        job_id = self.submit_one(spec)
        for _ in range(repeats - 1 if job_id else 0):  # the reply was lost, the client asked again
            assert self.driver.submit_all([self.driver.new_job(job_id)], "client")[0].status == "duplicate"
            self.counts["duplicates"] += 1

    @rule(pick=picks, action=st.sampled_from(["cancel", "requeue", "read", "vandalise"]))
    def producer_or_operator_acts(self, pick: int, action: str) -> None:
        jobs = list(self.model.values())
        if action == "requeue":  # mostly of a dead job, where there is one
            jobs = [job for job in jobs if job.state == "dead"] or jobs
        job = jobs[pick % len(jobs)]
        if action == "vandalise":
            self.vandalise(("ready", "leases", "delayed", "heads")[pick % 4])
        else:
            {"cancel": self.cancel, "requeue": self.requeue, "read": self.check}[action](job)

    @rule(
        worker=workers,
        max_jobs=st.integers(1, 5),
        free_tokens=st.sampled_from([60, 10**6]),
        may_take_last=st.booleans(),
    )
    def worker_claims(self, worker: str, max_jobs: int, free_tokens: int, may_take_last: bool) -> None:
        self.claim(worker, max_jobs, free_tokens, may_take_last)

    @rule(
        pick=picks,
        kind=st.sampled_from(["live", "live", "live", "zombie", "any"]),
        action=st.sampled_from(
            ["publish", "publish", "gap", "renew", "finish", "fail", "release", "bury", "lost", "takeover", "cancel"]
        ),
        n=st.integers(0, 3),
        retryable=st.booleans(),
        state=st.sampled_from(
            [JobState.COMPLETED, JobState.COMPLETED, JobState.CANCELLED, JobState.EXPIRED, JobState.FAILED]
        ),
        repeats=st.integers(1, 2),
    )
    def holder_acts(
        self, pick: int, kind: str, action: str, n: int, retryable: bool, state: JobState, repeats: int
    ) -> None:
        """Something a holder does, or a zombie that believes it is one; once or, after a lost reply, twice."""
        holds = self.holds
        if kind == "live":
            holds = [hold for hold in holds if self.held(hold)]
        elif kind == "zombie":  # its job runs elsewhere, or here in a later attempt
            holds = [hold for hold in holds if not self.held(hold) and self.model[hold[0]].state == "running"]
        if not holds:
            return
        hold = holds[pick % len(holds)]
        match action:
            case "publish":
                self.publish(hold, n, repeats)
            case "gap":
                self.publish_with_a_gap(hold, n + 1)
            case "renew":
                self.renew(hold)
            case "finish":
                self.finish(hold, n, state, repeats)
            case "fail":
                self.fail(hold, retryable, repeats)
            case "release":
                self.release(hold, repeats)
            case "bury":
                self.bury(hold)
            case "lost":
                self.claim_reply_lost(hold[2], known=retryable)
            case "takeover":
                self.takeover(hold, WORKERS[pick % 2], dies=retryable)
            case "cancel":
                self.cancel(self.model[hold[0]])

    @rule(
        ms=st.sampled_from([0, 1, 50, 100, 1000, 5000, LEASE_MS, 70_000, -1, -20_000]),
        crashed=st.sampled_from([None, None, *WORKERS]),
        sure=st.booleans(),
    )
    def time_passes_and_upkeep_is_done(self, ms: int, crashed: str | None, sure: bool) -> None:
        self.driver.tick(ms)
        self.reclaim(crashed, sure)

    @rule(ms=st.sampled_from([1, 100, 1000, LEASE_MS, -1000]), restart=st.integers(0, 15))
    def time_passes(self, ms: int, restart: int) -> None:
        if restart == 0:
            self.restart()
        self.driver.tick(ms)

    def restart(self) -> None:
        """What a fake can lose of what a server forgets when it dies: the scripts it knew."""
        self.client.script_flush()

    def submit_one(self, spec: dict[str, Any]) -> str | None:
        options = dict(spec)
        delay_ms, deadline_ms = options.pop("delay_ms"), options.pop("deadline_ms")
        if delay_ms:
            options["delay_s"] = delay_ms / 1000
        if deadline_ms:
            options["deadline_s"] = deadline_ms / 1000
        job_id = f"j{len(self.model):04}"
        waiting = sum(job.state in ("queued", "delayed") for job in self.model.values())
        (outcome,) = self.driver.submit_all([self.driver.new_job(job_id, **options)], "client")
        if waiting >= self.limit:
            assert outcome.status == "full"
            self.counts["refused"] += 1
            return None
        assert outcome.status == "accepted"
        deadline = self.now + deadline_ms if deadline_ms else None
        state = "delayed" if delay_ms else "queued"
        self.model[job_id] = ModelJob(
            job_id, options["tenant"], self.now + delay_ms, deadline, options["max_retries"], state
        )
        self.counts["submitted"] += 1
        return job_id

    def cancel(self, job: ModelJob) -> None:
        outcome = self.driver.cancel(job.job_id)
        if job.state in ("queued", "delayed"):
            assert outcome == "cancelled"
            self.end(job, "cancelled")
        elif job.state == "running":
            assert outcome == "cancelling"
            job.cancelling = True
        else:
            assert outcome == "ended"

    # --- workers

    def claim(self, worker: str, max_jobs: int, free_tokens: int, may_take_last: bool = True) -> None:
        idle = not any(job.state == "running" and job.owner == worker for job in self.model.values())
        claimed = self.driver.claim(worker, max_jobs, free_tokens=free_tokens, idle=idle, may_take_last=may_take_last)
        assert sum(got.last_life for got in claimed) <= may_take_last
        self.note_expired()
        for got in claimed:
            job = self.model[got.job_id]
            assert job.state == "queued", f"{got.job_id} was {job.state} and is given out"
            assert job.deadline is None or job.deadline > self.now
            job.attempt += 1
            assert (got.attempt, got.crashes, got.errors) == (job.attempt, job.crashes, job.errors)
            assert got.last_life or job.crashes + 1 < MAX_CRASHES
            assert (got.request, got.log) == (REQUEST, job.log)
            job.state, job.owner, job.lease, job.released = "running", worker, self.now + LEASE_MS, None
            self.counts["claimed"] += 1
        assert len(claimed) <= max_jobs
        self.holds += [(got.job_id, got.attempt, worker) for got in claimed]

    def takeover(self, hold: Hold, worker: str, dies: bool) -> None:
        """The holder's lease runs out, or it is shown to be gone, and a worker claims what comes back."""
        if dies:
            self.renew(hold)
            self.reclaim(hold[2], sure=worker == WORKERS[0])
        else:
            self.driver.tick(LEASE_MS)
            self.reclaim(None)
        self.claim(worker, 5, 10**6)

    def note_expired(self) -> None:
        """A claim may end queued jobs past their deadline: which ones it met is its own business."""
        for job in self.model.values():
            late = job.deadline is not None and job.deadline <= self.now
            if job.state == "queued" and late and self.driver.state(job.job_id) == "expired":
                self.end(job, "expired")

    def publish(self, hold: Hold, n: int, repeats: int) -> None:
        """Append n tokens; twice where the reply was lost. Called with stale holds it is a zombie's write."""
        job = self.held(hold)
        offset = len(self.model[hold[0]].tokens)
        tokens = list(range(offset, offset + n))
        record = self.driver.chunk(hold[0], hold[1], offset, tokens)
        for _ in range(repeats):
            expected = job.asked(self.now) if job else self.fenced(hold)
            assert self.driver.publish(hold[2], record) == [expected]
        if job:
            self.append(job, tokens, record)

    def append(self, job: ModelJob, tokens: list[int], record: t.PublishRecord) -> None:
        if record.payload not in job.log:  # a chunk without tokens, said again, is a repetition
            job.log.append(record.payload)
        job.tokens += tokens
        self.counts["tokens_out"] += len(tokens)

    def publish_with_a_gap(self, hold: Hold, skip: int) -> None:
        offset = len(self.model[hold[0]].tokens) + skip
        assert self.driver.publish(hold[2], self.driver.chunk(hold[0], hold[1], offset, [99])) == ["fenced"]
        if self.held(hold):
            self.counts["gaps"] += 1
        else:
            self.fenced(hold)

    def renew(self, hold: Hold) -> None:
        job = self.held(hold)
        expected = job.asked(self.now) if job else self.fenced(hold)
        assert self.driver.renew(hold[2], (hold[0], hold[1])) == [expected]
        if job:
            job.lease = self.now + LEASE_MS

    def finish(self, hold: Hold, n: int, state: JobState, repeats: int) -> None:
        job_id, attempt, worker = hold
        offset = len(self.model[job_id].tokens)
        tokens = list(range(offset, offset + n))
        chunks = [self.driver.chunk(job_id, attempt, offset, tokens)] if n else []
        final = self.driver.final(job_id, attempt, state, chunks, tokens=(10, offset + n))
        job = self.held(hold)
        if job:
            assert self.driver.finish(worker, final) == ["ok"]
            for record in chunks:
                self.append(job, tokens, record)
            self.counts["tokens_in"] += 10
            self.end(job, state.value)
            job.released = (worker, attempt, "ended")
            repeats -= 1
        for _ in range(repeats):
            repeated = self.model[job_id].released == (worker, attempt, "ended")
            assert self.driver.finish(worker, final) == ["ok" if repeated else self.fenced(hold)]

    def fail(self, hold: Hold, retryable: bool, repeats: int) -> None:
        job_id, attempt, worker = hold
        job = self.held(hold)
        if job:
            outcome = self.driver.fail(worker, job_id, attempt, retryable=retryable, backoff_ms=1000)
            repeats -= 1
            asked = job.asked(self.now)
            if asked != "ok":
                assert outcome == asked
                self.end(job, asked)
                job.released = (worker, attempt, "ended")
            else:
                job.errors += 1
                if retryable and job.errors <= job.retries:
                    assert outcome == "delayed"
                    job.state, job.due, job.owner = "delayed", self.now + 1000, ""
                    job.released = (worker, attempt, "delayed")
                    self.counts["retried"] += 1
                else:
                    assert outcome == "failed"
                    self.end(job, "failed")
                    job.released = (worker, attempt, "ended")
        for _ in range(repeats):
            found = self.model[job_id]
            outcome = self.driver.fail(worker, job_id, attempt, retryable=retryable, backoff_ms=1000)
            if found.released == (worker, attempt, "ended"):
                assert outcome == found.state
            elif found.released is not None and found.released[:2] == (worker, attempt) and found.attempt == attempt:
                assert outcome == "delayed"
            else:
                assert outcome == self.fenced(hold)

    def release(self, hold: Hold, repeats: int) -> None:
        job_id, attempt, worker = hold
        job = self.held(hold)
        if job:
            asked = job.asked(self.now)
            assert self.driver.release(worker, (job_id, attempt)) == [asked]
            repeats -= 1
            if asked == "ok":
                job.state, job.owner, job.released = "queued", "", (worker, attempt, "released")
                self.counts["released"] += 1
            else:
                self.end(job, asked)
                job.released = (worker, attempt, "ended")
        for _ in range(repeats):
            found = self.model[job_id]
            (outcome,) = self.driver.release(worker, (job_id, attempt))
            if found.released == (worker, attempt, "ended") and found.state in ("cancelled", "expired"):
                assert outcome == found.state
            elif (
                found.released is not None and found.released[:2] == (worker, attempt) and found.released[2] != "ended"
            ):
                assert outcome == "ok"
            else:
                assert outcome == self.fenced(hold)

    def bury(self, hold: Hold) -> None:
        job_id, attempt, worker = hold
        job = self.held(hold)
        outcome = self.driver.bury(worker, job_id, attempt)
        if job:
            assert outcome == "ok"
            self.end(job, "dead")
            job.released = (worker, attempt, "ended")
        elif self.model[job_id].released == (worker, attempt, "ended"):
            assert outcome == "ok"
        else:
            assert outcome == self.fenced(hold)

    # --- time and upkeep

    def lose(self, job: ModelJob, sure: bool) -> str:
        """The model of a job taken from a worker that is gone."""
        job.crashes += 1
        self.counts["reclaimed"] += 1
        asked = job.asked(self.now)
        if asked != "ok":
            self.end(job, asked)
            job.released = None
            return "ended"
        if job.crashes >= MAX_CRASHES or job.crashes + job.losses >= 10 * MAX_CRASHES:
            self.end(job, "dead")
            job.released = None
            return "dead"
        if not sure:
            job.lost[job.attempt] = job.owner
        job.state, job.owner, job.released = "queued", "", None
        return "requeued"

    def reclaim(self, crashed: str | None, sure: bool = False) -> None:
        """A round of upkeep; `crashed` is a worker shown to be gone (its death may be `sure`), its leases not over."""
        expected: dict[str, set[str]] = {"requeued": set(), "dead": set(), "ended": set()}
        beat = self.client.zscore(self.driver.keys.heartbeats, crashed) if crashed else None
        lost = []
        if crashed and beat is not None:
            lost += [job for job in self.model.values() if job.state == "running" and job.owner == crashed]
        proven = {job.job_id for job in lost} if sure else set()
        lost += [
            job for job in self.model.values() if job.state == "running" and job.lease <= self.now and job not in lost
        ]
        for job in lost:
            expected[self.lose(job, job.job_id in proven)].add(job.job_id)
        requeued_late = set()
        for job in self.model.values():
            if job.state in ("queued", "delayed") and job.asked(self.now) == "expired":
                self.end(job, "expired")
                expected["ended"].add(job.job_id)
                requeued_late.add(job.job_id)
        promoted = [job for job in self.model.values() if job.state == "delayed" and job.due <= self.now]
        for job in promoted:
            job.state = "queued"
            self.counts["promoted"] += 1
        outcome = self.driver.reclaim(limit=1000, worker_id=crashed or "", heartbeat_ms=int(beat or 0), sure=sure)
        assert set(outcome.requeued) == expected["requeued"]
        assert set(outcome.dead) == expected["dead"]
        assert set(outcome.ended) == expected["ended"]
        assert outcome.promoted == len(promoted)
        assert all(delay >= 0 for delay in outcome.reclaim_delay_ms)

    def claim_reply_lost(self, worker: str, known: bool) -> None:
        """A claim whose reply never came: the worker gives back all it does not know of."""
        holds = [(j.job_id, j.attempt) for j in self.model.values() if j.state == "running" and j.owner == worker]
        holds = holds if known else []
        lost = {
            j.job_id
            for j in self.model.values()
            if j.state == "running" and j.owner == worker and (j.job_id, j.attempt) not in holds
        }
        given = self.driver.run(t.release_others(self.driver.keys, worker, holds, self.now))
        assert set(given) == lost
        for job_id in given:
            job = self.model[job_id]
            asked = job.asked(self.now)
            if asked == "ok":
                job.state, job.owner, job.released = "queued", "", (worker, job.attempt, "released")
                self.counts["released"] += 1
            else:
                self.end(job, asked)
                job.released = (worker, job.attempt, "ended")

    def requeue(self, job: ModelJob) -> None:
        outcome = self.driver.requeue(job.job_id)
        if job.state != "dead":
            assert outcome == "not_dead"
            return
        assert outcome == "requeued"
        self.counts["requeued"] += 1
        job.state, job.owner, job.deadline, job.cancelling, job.released = "queued", "", None, False, None
        job.crashes = job.losses = job.errors = job.terminals = 0
        job.lost = {}
        job.tokens, job.log = [], []

    def vandalise(self, what: str) -> None:
        """Somebody deletes keys that are none of their business; upkeep makes them anew from the jobs."""
        others = {"ready": ["resume"], "heads": ["fair"], "leases": ["held"], "delayed": ["deadlines"]}[what]
        for name in (what, *others):
            for key in self.client.scan_iter(f"{self.driver.keys.prefix}{name}*", count=1000):
                self.client.delete(key)
        self.driver.run(t.mend(self.driver.keys, list(self.model), self.now))
        assert not any(self.driver.run(t.missing(self.driver.keys)))
        for job in self.model.values():
            if what == "leases" and job.state == "running":
                job.lease = self.now + MENDED_LEASE_MS

    # --- what always holds

    @invariant()
    def counters_equal_the_model(self) -> None:
        snapshot = self.driver.snapshot()
        gauges = {
            "queued": sum(job.state == "queued" for job in self.model.values()),
            "delayed": sum(job.state == "delayed" for job in self.model.values()),
            "running": sum(job.state == "running" for job in self.model.values()),
        }
        gauges["waiting_bytes"] = len(REQUEST) * (gauges["queued"] + gauges["delayed"])
        assert snapshot.stats == {**self.counts, **gauges}
        assert sum(line.depth for line in snapshot.lines) == gauges["queued"]
        assert snapshot.running == gauges["running"]
        assert snapshot.delayed == gauges["delayed"]

    def check(self, job: ModelJob) -> None:
        assert self.driver.state(job.job_id) == job.state
        page = self.driver.run(t.read_events(self.driver.keys, job.job_id, limit=100_000))
        assert page is not None
        assert [event for event in page.events if not is_terminal_event(event)] == job.log
        assert self.driver.tokens(job.job_id) == job.tokens
        assert job.terminals == (1 if job.state in ENDED else 0)
        if job.state in ENDED:
            assert self.driver.ended(job.job_id).state == job.state
        else:
            assert not self.driver.client.exists(self.driver.keys.job(job.job_id)) or (
                self.driver.client.pttl(self.driver.keys.job(job.job_id)) == -1
            )

    def settle(self) -> None:
        """Nothing is lost: with patient workers every accepted job reaches its end."""
        for job in self.model.values():
            self.check(job)
        for _ in range(200):
            if all(job.state in ENDED for job in self.model.values()):
                break
            self.driver.tick(LEASE_MS)
            self.reclaim(None)
            for got in self.driver.claim("patient", 100):
                job = self.model[got.job_id]
                self.counts["claimed"] += 1
                assert got.log == job.log
                assert self.driver.finish("patient", self.driver.final(got.job_id, got.attempt, tokens=(0, 0))) == [
                    "ok"
                ]
                self.end(job, "completed")
            self.note_expired()
        assert all(job.state in ENDED for job in self.model.values()), "some job never ends"
        for job in self.model.values():
            self.check(job)
        self.counters_equal_the_model()


FAST = settings(max_examples=70, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck))


def test_delivery_on_fakeredis() -> None:
    run_state_machine_as_test(DeliveryMachine, settings=FAST)


@pytest.mark.integration
def test_delivery_on_real_redis(start_redis: Callable[..., RedisServer]) -> None:
    server = start_redis(None, "--appendfsync", "always")

    class OnRealRedis(DeliveryMachine):
        @staticmethod
        def connect() -> redis.Redis:
            return server.client()

        def restart(self) -> None:
            """The server is killed, and comes back with what its append-only file holds: everything."""
            server.kill()
            server.start()

    run_state_machine_as_test(OnRealRedis, settings=settings(FAST, max_examples=100, print_blob=True))
