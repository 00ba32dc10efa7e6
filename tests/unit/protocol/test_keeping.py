"""Cancel, reclaim, deadlines, dead letters, and what the queue forgets."""

from __future__ import annotations

import pytest

from penstock_core.protocol import transitions as t
from penstock_core.protocol.config import QueueConfig, TenantLimits
from penstock_core.protocol.errors import InvalidRequest
from penstock_core.protocol.jobs import JobState
from penstock_core.protocol.workers import WorkerRecord
from tests.queue_driver import LEASE_MS, REQUEST, QueueDriver


class TestCancel:
    def test_a_queued_job_ends_at_once_and_leaves_the_line(self, driver: QueueDriver) -> None:
        first, second, third = (driver.submit() for _ in range(3))
        assert driver.cancel(second) == "cancelled"
        ended = driver.ended(second)
        assert (ended.state, ended.attempt) == ("cancelled", 0)
        assert driver.client.xlen(driver.keys.ready(5, "default")) == 2
        assert driver.claim_ids(max_jobs=10) == [first, third]

    def test_cancelling_the_head_moves_the_head(self, driver: QueueDriver) -> None:
        first = driver.submit()
        driver.tick(50)
        driver.submit()
        driver.cancel(first)
        assert driver.client.zscore(driver.keys.heads(5), "default") == driver.now

    def test_cancelling_the_only_job_empties_its_level(self, driver: QueueDriver) -> None:
        driver.cancel(driver.submit())
        keys = driver.keys
        assert driver.client.exists(keys.ready(5, "default"), keys.heads(5), keys.fair(5)) == 0
        assert driver.stats()["queued"] == driver.stats()["waiting_bytes"] == 0

    def test_a_delayed_job_ends_at_once(self, driver: QueueDriver) -> None:
        job_id = driver.submit(delay_s=60)
        assert driver.cancel(job_id) == "cancelled"
        assert driver.client.exists(driver.keys.delayed) == 0
        assert driver.stats()["delayed"] == 0

    def test_an_interrupted_job_ends_at_once_and_keeps_its_log(self, driver: QueueDriver) -> None:
        job_id = driver.submit()
        driver.take()
        driver.publish("w1", driver.chunk(job_id, 1, 0, [1, 2]))
        driver.release("w1", (job_id, 1))
        assert driver.cancel(job_id) == "cancelled"
        assert driver.tokens(job_id) == [1, 2]
        assert driver.ended(job_id).attempt == 1
        assert driver.claim() == []

    def test_a_running_job_s_worker_is_rung_and_ends_it(self, driver: QueueDriver) -> None:
        job_id = driver.submit()
        driver.take()
        with driver.listening(driver.keys.bell) as heard:
            assert driver.cancel(job_id) == "cancelling"
        assert heard == [(driver.keys.bell, f"cancel {job_id}".encode())]
        assert driver.status(job_id).cancelling
        assert driver.finish("w1", driver.final(job_id, 1, JobState.CANCELLED)) == ["ok"]
        assert driver.cancel(job_id) == "ended"

    def test_a_job_whose_worker_died_after_the_cancel_is_not_run_again(self, driver: QueueDriver) -> None:
        job_id = driver.submit()
        driver.take()
        driver.publish("w1", driver.chunk(job_id, 1, 0, [1]))
        driver.cancel(job_id)
        driver.tick(LEASE_MS)
        outcome = driver.reclaim()
        assert (outcome.ended, outcome.requeued) == ([job_id], [])
        assert (driver.ended(job_id).state, driver.tokens(job_id)) == ("cancelled", [1])

    def test_a_tenant_cancels_only_its_own(self, driver: QueueDriver) -> None:
        job_id = driver.submit(tenant="a")
        assert driver.cancel(job_id, tenant="b") == "unknown"
        assert driver.cancel("nope") == "unknown"
        assert driver.cancel(job_id, tenant="a") == "cancelled"


class TestReclaim:
    def test_a_lease_that_runs_out_puts_the_job_back_with_its_delay(self, driver: QueueDriver) -> None:
        job_id = driver.submit()
        driver.take()
        driver.tick(LEASE_MS - 1)
        assert driver.reclaim().requeued == []
        driver.tick(251)
        outcome = driver.reclaim()
        assert (outcome.requeued, outcome.reclaim_delay_ms) == ([job_id], [250])
        job = driver.take("w2")
        assert (job.attempt, job.crashes) == (2, 1)
        assert driver.stats()["reclaimed"] == 1

    def test_hundreds_of_live_long_jobs_hide_no_dead_one(self, driver: QueueDriver) -> None:
        # XAUTOCLAIM scans a bounded number of entries from the oldest, and never got past many live long jobs.
        driver.submit_all([driver.new_job() for _ in range(500)])
        holds = [(job.job_id, 1) for job in driver.claim("alive", 500)]
        lost = driver.submit()
        driver.take("gone")
        driver.tick(LEASE_MS - 1)
        driver.renew("alive", *holds)
        driver.tick(1)
        assert driver.reclaim(limit=10).requeued == [lost]

    def test_a_round_is_bounded_and_the_next_goes_on(self, driver: QueueDriver) -> None:
        driver.submit_all([driver.new_job() for _ in range(25)])
        driver.claim("w1", 25)
        driver.tick(LEASE_MS)
        assert [len(driver.reclaim(limit=10).requeued) for _ in range(4)] == [10, 10, 5, 0]

    def test_a_job_that_crashes_its_workers_is_dead_lettered(self, driver: QueueDriver) -> None:
        job_id = driver.submit(idempotency_key="k")
        for _ in range(2):
            driver.take()
            driver.tick(LEASE_MS)
            assert driver.reclaim().requeued == [job_id]
        driver.take()
        driver.tick(LEASE_MS)
        assert driver.reclaim().dead == [job_id]
        status = driver.status(job_id)
        assert (status.state, status.crashes, status.losses, status.attempt) == ("dead", 3, 0, 3)
        assert status.failure is not None
        assert (status.failure.code, "max_crashes 3" in status.failure.message) == ("poison", True)
        assert driver.ended(job_id).attempt == 3
        (letter,) = driver.run(t.dead_letters(driver.keys))
        assert (letter.job_id, letter.code) == (job_id, "poison")
        assert driver.client.pttl(driver.keys.job(job_id)) > 24 * 3600 * 1000

    def test_max_crashes_is_the_queue_s(self, driver: QueueDriver) -> None:
        driver.set_config(max_crashes=1)
        job_id = driver.submit()
        driver.take()
        driver.tick(LEASE_MS)
        assert driver.reclaim().dead == [job_id]
        assert "1 times (max_crashes 1)" in driver.ended(job_id).failure.message

    @pytest.mark.parametrize("write", ["renew", "publish", "finish", "fail", "release", "bury"])
    def test_a_worker_heard_of_again_did_not_crash(self, driver: QueueDriver, write: str) -> None:
        """A worker cut off from Redis loses its jobs, but a job must not be buried for its network's faults."""
        driver.set_config(max_crashes=2)
        job_id = driver.submit()
        driver.take("w1")
        driver.tick(LEASE_MS)
        assert driver.reclaim().requeued == [job_id]
        assert driver.status(job_id).crashes == 1
        for _ in range(2):  # its second refused write changes nothing more
            match write:
                case "renew":
                    assert driver.renew("w1", (job_id, 1)) == ["fenced"]
                case "publish":
                    assert driver.publish("w1", driver.chunk(job_id, 1, 0, [1])) == ["fenced"]
                case "finish":
                    assert driver.finish("w1", driver.final(job_id, 1)) == ["fenced"]
                case "fail":
                    assert driver.fail("w1", job_id, 1) == "fenced"
                case "release":
                    assert driver.release("w1", (job_id, 1)) == ["fenced"]
                case "bury":
                    assert driver.bury("w1", job_id, 1) == "fenced"
            status = driver.status(job_id)
            assert (status.crashes, status.losses) == (0, 1)
        driver.take("w2")
        driver.tick(LEASE_MS)
        assert driver.reclaim().requeued == [job_id], "the first crash that nobody took back"
        assert driver.renew("w1", (job_id, 2)) == ["fenced"], "not the worker that lost it"
        assert driver.status(job_id).crashes == 1

    def test_nobody_is_buried_for_having_been_near(self, driver: QueueDriver) -> None:
        """A job that kills its workers has company each time; on their last life each of them runs apart."""
        names = [driver.submit() for _ in range(4)]
        for crash in (1, 2):
            assert [job.last_life for job in driver.claim("w1", 10)] == [False] * 4, f"crash {crash}"
            driver.tick(LEASE_MS)
            assert sorted(driver.reclaim().requeued) == names
        fresh = [driver.submit() for _ in range(2)]
        first, *others = driver.claim("w1", 10)
        assert first.last_life
        assert [(job.job_id, job.last_life) for job in others] == [(name, False) for name in fresh]
        outcome = driver.claim_outcome("w1", 10, may_take_last=False)
        assert (outcome.jobs, outcome.waiting, outcome.next_due_ms) == ([], 3, None)
        (second,) = driver.claim("w2", 10)
        assert second.last_life
        driver.tick(LEASE_MS - 1)
        driver.renew("w2", (second.job_id, 3))
        driver.tick(1)
        outcome = driver.reclaim()
        assert outcome.dead == [first.job_id]
        assert sorted(outcome.requeued) == fresh
        driver.finish("w2", driver.final(second.job_id, 3))
        rest = set(names) - {first.job_id, second.job_id}
        assert {driver.take("w2").job_id, driver.take("w3").job_id} == rest

    def test_an_error_makes_no_last_life_longer(self, driver: QueueDriver) -> None:
        driver.set_config(max_crashes=2)
        one, two = driver.submit(), driver.submit()
        driver.claim("w1", 2)
        driver.tick(LEASE_MS)
        driver.reclaim()
        assert driver.claim_ids("w1", 2) == [one]
        assert driver.claim_ids("w2", 2) == [two]
        assert driver.fail("w1", one, 2, backoff_ms=10) == "delayed"
        assert driver.fail("w2", two, 2, backoff_ms=10) == "delayed"
        driver.tick(10)
        assert driver.reclaim().promoted == 2
        assert [job.last_life for job in driver.claim("w1", 2)] == [True]
        assert driver.claim("w1", 2, may_take_last=False) == []

    def test_a_death_that_is_sure_is_never_taken_back(self, driver: QueueDriver) -> None:
        job_id = driver.submit()
        driver.take("w1")
        driver.renew("w1", record=b"r")
        beat = int(driver.client.zscore(driver.keys.heartbeats, "w1"))
        assert driver.reclaim(worker_id="w1", heartbeat_ms=beat, sure=True).requeued == [job_id]
        assert driver.renew("w1", (job_id, 1)) == ["fenced"]
        assert driver.status(job_id).crashes == 1

    def test_a_job_that_stalls_its_workers_for_ever_ends_too(self, driver: QueueDriver) -> None:
        driver.set_config(max_crashes=2)
        job_id = driver.submit()
        for attempt in range(1, 20):
            driver.take("w1")
            driver.tick(LEASE_MS)
            assert driver.reclaim().requeued == [job_id]
            assert driver.renew("w1", (job_id, attempt)) == ["fenced"]
        driver.take("w1")
        driver.tick(LEASE_MS)
        assert driver.reclaim().dead == [job_id]
        assert "taken from its workers 20 times" in driver.ended(job_id).failure.message
        assert driver.requeue(job_id) == "requeued"
        driver.take("w1")
        driver.tick(LEASE_MS)
        assert driver.reclaim().requeued == [job_id], "a requeued job begins anew"

    def test_a_worker_proven_gone_loses_its_jobs_at_once(self, driver: QueueDriver) -> None:
        driver.submit_all([driver.new_job() for _ in range(3)])
        driver.renew("w1", record=b"r")
        beat = driver.now
        mine = driver.claim_ids("w1", 2)
        driver.claim_ids("w2", 1)
        driver.tick(1200)
        outcome = driver.reclaim(worker_id="w1", heartbeat_ms=beat)
        assert (sorted(outcome.requeued), outcome.reclaim_delay_ms) == (sorted(mine), [1200, 1200])
        assert driver.snapshot().workers == []
        assert driver.snapshot().running == 1

    def test_a_worker_that_has_beaten_since_keeps_its_jobs(self, driver: QueueDriver) -> None:
        driver.submit()
        driver.renew("w1")
        seen = driver.now
        driver.take("w1")
        driver.tick(1200)
        driver.renew("w1")
        assert driver.reclaim(worker_id="w1", heartbeat_ms=seen).requeued == []
        assert driver.snapshot().running == 1

    def test_a_job_running_past_its_deadline_expires_when_its_worker_is_gone(self, driver: QueueDriver) -> None:
        job_id = driver.submit(deadline_s=5)
        driver.take()
        driver.tick(LEASE_MS)
        assert driver.reclaim().ended == [job_id]
        assert driver.ended(job_id).state == "expired"

    def test_waiting_jobs_past_their_deadline_expire_without_a_claim(self, driver: QueueDriver) -> None:
        queued, delayed = driver.submit(deadline_s=5), driver.submit(deadline_s=5, delay_s=60)
        released = driver.submit(deadline_s=5, priority=9)
        driver.take()
        driver.release("w1", (released, 1))
        driver.submit(deadline_s=6)
        driver.tick(5000)
        assert sorted(driver.reclaim().ended) == sorted([queued, delayed, released])
        assert driver.client.zcard(driver.keys.deadlines) == 1
        assert driver.stats()["expired"] == 3

    def test_workers_long_silent_are_forgotten_once_they_hold_nothing(self, driver: QueueDriver) -> None:
        driver.submit_all([driver.new_job() for _ in range(2)])
        for worker in ("idle", "busy"):
            driver.renew(worker, record=b"r")
        driver.claim("busy", 2)
        driver.tick(60_000)
        driver.reclaim(limit=1)
        assert [worker.worker_id for worker in driver.snapshot().workers] == ["busy"]
        driver.reclaim(limit=1)
        assert driver.snapshot().workers == []
        assert driver.client.exists(driver.keys.workers, driver.keys.heartbeats) == 0

    def test_counts_of_idle_tenants_below_the_floor_are_forgotten(self, driver: QueueDriver) -> None:
        for tenant in ("a", "b", "c"):
            driver.submit(tenant=tenant)
            job = driver.take()
            driver.finish("w1", driver.final(job.job_id, 1, tokens=({"a": 10, "b": 20, "c": 30}[tenant], 0)))
        driver.reclaim()
        assert driver.client.zcard(driver.keys.tenants) <= 1

    def test_leftovers_of_vanished_jobs_are_cleared_away(self, driver: QueueDriver) -> None:
        running, delayed, late = driver.submit(), driver.submit(delay_s=1), driver.submit(deadline_s=1, delay_s=9)
        driver.take()
        driver.client.delete(*(driver.keys.job(job_id) for job_id in (running, delayed, late)))
        driver.tick(60_000)
        outcome = driver.reclaim()
        assert (outcome.requeued, outcome.ended, outcome.promoted) == ([], [], 0)
        keys = driver.keys
        assert driver.client.exists(keys.leases, keys.delayed, keys.deadlines) == 0
        driver.client.delete(keys.held("w1"), keys.tenant("default"))


class TestDeadLetters:
    def bury(self, driver: QueueDriver, **options: object) -> str:
        job_id = driver.submit(**options)
        job = driver.take()
        driver.publish("w1", driver.chunk(job_id, job.attempt, 0, [1, 2]))
        driver.bury("w1", job_id, job.attempt)
        return job_id

    def test_a_requeued_job_starts_as_new_but_under_a_new_attempt(self, driver: QueueDriver) -> None:
        job_id = driver.submit(idempotency_key="k", deadline_s=1, metadata={"a": "b"})
        driver.take()
        driver.publish("w1", driver.chunk(job_id, 1, 0, [1, 2]))
        driver.cancel(job_id)
        driver.bury("w1", job_id, 1)
        driver.tick(5000)
        assert driver.requeue(job_id) == "requeued"
        status = driver.status(job_id)
        assert (status.state, status.crashes, status.errors, status.tokens) == ("queued", 0, 0, 0)
        assert (status.deadline_ms, status.failure, status.finished_ms) == (None, None, None)
        assert driver.client.pttl(driver.keys.job(job_id)) == -1
        assert driver.run(t.dead_letters(driver.keys)) == []
        (again,) = driver.submit_all([driver.new_job(idempotency_key="k")])
        assert again.job_id == job_id
        job = driver.take()
        assert (job.attempt, job.log, job.request) == (2, [], REQUEST)
        assert driver.publish("w1", driver.chunk(job_id, 2, 0, [5])) == ["ok"]
        assert driver.finish("w1", driver.final(job_id, 2)) == ["ok"]
        assert driver.tokens(job_id) == [5]
        driver.ended(job_id)

    def test_only_dead_jobs_are_requeued(self, driver: QueueDriver) -> None:
        queued = driver.submit()
        assert driver.requeue(queued) == "not_dead"
        assert driver.requeue("nope") == "unknown"
        job_id = self.bury(driver, priority=9)
        driver.requeue(job_id)
        assert driver.requeue(job_id) == "not_dead"

    def test_purging_removes_job_log_and_letter(self, driver: QueueDriver) -> None:
        kept, gone = self.bury(driver), self.bury(driver, idempotency_key="k")
        running = driver.submit()
        assert driver.run(t.purge_dead(driver.keys, [gone, running, "nope"])) == 1
        assert driver.run(t.read_job(driver.keys, gone)) is None
        keys = driver.keys
        assert driver.client.exists(keys.events(gone), keys.dedupe("default", "k")) == 0
        assert [letter.job_id for letter in driver.run(t.dead_letters(keys))] == [kept]
        assert driver.run(t.purge_dead(keys, [])) == 0

    def test_purging_all_takes_the_oldest_first_and_stray_letters_too(self, driver: QueueDriver) -> None:
        first, second = self.bury(driver), self.bury(driver)
        driver.submit()
        driver.client.xadd(driver.keys.ready(5, "default"), {"rubbish": 1})
        driver.claim(max_jobs=5)
        assert driver.run(t.purge_dead(driver.keys, limit=1)) == 1
        assert driver.run(t.read_job(driver.keys, first)) is None
        assert driver.run(t.purge_dead(driver.keys)) == 2
        assert driver.run(t.read_job(driver.keys, second)) is None
        assert driver.client.exists(driver.keys.dead) == 0

    def test_letters_are_paged_newest_first(self, driver: QueueDriver) -> None:
        jobs = [self.bury(driver) for _ in range(5)]
        page = driver.run(t.dead_letters(driver.keys, limit=2))
        rest = driver.run(t.dead_letters(driver.keys, before=page[-1].letter_id))
        assert [letter.job_id for letter in page + rest] == jobs[::-1]

    def test_dead_letters_are_bounded(self, driver: QueueDriver) -> None:
        driver.set_config(max_dead=1)
        driver.submit_all([driver.new_job() for _ in range(300)])
        for job in driver.claim("w1", 300):
            driver.bury("w1", job.job_id, 1)
        assert driver.client.xlen(driver.keys.dead) <= 200, "trimmed by whole nodes, so a little over the bound"


class TestReading:
    def test_a_snapshot_of_an_empty_queue_has_every_counter_at_zero(self, driver: QueueDriver) -> None:
        snapshot = driver.snapshot()
        assert set(snapshot.stats) == {*t.COUNTERS, *t.GAUGES}
        assert set(snapshot.stats.values()) == {0}
        assert (snapshot.lines, snapshot.oldest_wait_ms, snapshot.waiting) == ([], 0, 0)

    def test_a_snapshot_tells_depths_waits_and_workers(self, driver: QueueDriver) -> None:
        record = WorkerRecord("w1", model="m", free_tokens=7, tokens_per_s=1.5)
        driver.renew("w1", record=record.encode())
        driver.submit(priority=9, tenant="a")
        driver.tick(100)
        driver.submit(priority=9, tenant="a")
        driver.submit(priority=1, tenant="b")
        driver.submit(delay_s=5)
        driver.take()
        driver.release("w1", ("job00001", 1))
        driver.tick(50)
        snapshot = driver.snapshot()
        assert [(line.priority, line.tenant, line.depth) for line in snapshot.lines] == [(9, "a", 2), (1, "b", 1)]
        assert (snapshot.waiting, snapshot.delayed, snapshot.running, snapshot.dead) == (3, 1, 0, 0)
        assert snapshot.oldest_wait_ms == 150
        assert [worker.record for worker in snapshot.workers] == [record]

    def test_events_are_read_in_pages(self, driver: QueueDriver) -> None:
        job_id = driver.submit()
        driver.take()
        for i in range(5):
            driver.publish("w1", driver.chunk(job_id, 1, i, [i]))
        driver.finish("w1", driver.final(job_id, 1))
        read, after = [], ""
        while page := driver.run(t.read_events(driver.keys, job_id, after=after, limit=2)):
            if not page.events:
                break
            read += page.events
            after = page.last_id
        assert len(read) == 6
        assert page is not None
        assert page.state == "completed"
        assert driver.run(t.read_events(driver.keys, "nope")) is None

    def test_statuses_of_several_jobs_come_in_their_order(self, driver: QueueDriver) -> None:
        first, second = driver.submit(), driver.submit(priority=9)
        found = driver.run(t.read_jobs(driver.keys, [second, "nope", first]))
        assert [status and status.job_id for status in found] == [second, None, first]


class TestConfig:
    def test_settings_hold_at_once_and_go_back_to_their_defaults(self, driver: QueueDriver) -> None:
        call = t.configure(driver.keys, {"max_waiting_jobs": 5, "patience_ms": 0}, {"a": TenantLimits(max_running=2)})
        config, tenants = driver.run(call)
        assert (config.max_waiting_jobs, config.patience_ms, tenants) == (5, 0, {"a": TenantLimits(max_running=2)})
        config, tenants = driver.run(t.configure(driver.keys, {"max_waiting_jobs": None}, {"a": TenantLimits()}))
        assert (config, tenants) == (QueueConfig(patience_ms=0), {})

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"max_jobs": 1}, "no such setting"),
            ({"max_jobs": None}, "no such setting"),
            ({"aging_interval_ms": 0}, "from 1"),
            ({"max_waiting_jobs": -1}, "from 0"),
            ({"max_waiting_jobs": True}, "no integer"),
        ],
    )
    def test_a_setting_out_of_range_is_refused(self, keys, changes, message: str) -> None:
        with pytest.raises(InvalidRequest, match=message):
            t.configure(keys, changes)

    def test_the_scripts_defaults_are_the_documented_ones(self, keys) -> None:
        import re
        from dataclasses import asdict

        from penstock_core.protocol.script import load_script

        table = load_script("claim").text.split("local DEFAULTS = {")[1].split("}")[0]
        assert {name: int(value) for name, value in re.findall(r"(\w+) = (\d+)", table)} == asdict(QueueConfig())

    def test_fields_nobody_knows_are_ignored(self, driver: QueueDriver) -> None:
        driver.client.hset(driver.keys.config, mapping={"future": "1", "max_dead": "junk"})
        assert driver.run(t.configure(driver.keys)) == (QueueConfig(), {})
        driver.submit()
        assert len(driver.claim()) == 1
