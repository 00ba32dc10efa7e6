"""Which job is next, for whom, and whether it fits."""

from __future__ import annotations

import pytest

from penstock_core.protocol import transitions as t
from penstock_core.protocol.config import TenantLimits
from tests.queue_driver import LEASE_MS, QueueDriver


def test_every_priority_from_9_to_0_is_served_in_order(driver: QueueDriver) -> None:
    jobs = {priority: driver.submit(priority=priority) for priority in (3, 0, 9, 5, 1, 7, 2, 8, 4, 6)}
    expected = [jobs[priority] for priority in range(9, -1, -1)]
    assert driver.claim_ids(max_jobs=10) == expected


def test_one_at_a_time_or_many_at_once_is_the_same_order(driver: QueueDriver) -> None:
    specs = [(p, tenant) for p in (2, 7, 5, 5, 2, 7, 0) for tenant in ("a", "b", "b")]
    single = [driver.submit(priority=p, tenant=tenant) for p, tenant in specs]
    one_by_one = [driver.take().job_id for _ in single]
    for job_id in one_by_one:
        driver.finish("w1", driver.final(job_id, 1, tokens=(10, 20)))
    driver.client.delete(driver.keys.tenants, driver.keys.stats)
    again = [driver.submit(priority=p, tenant=tenant) for p, tenant in specs]
    order = driver.claim_ids(max_jobs=100)
    assert [again.index(job) for job in order] == [single.index(job) for job in one_by_one]


def test_a_claim_starts_an_attempt_under_a_lease(driver: QueueDriver) -> None:
    job_id = driver.submit(
        client_id="c1", priority=6, tenant="acme", max_retries=2, deadline_s=100,
        traceparent="00-" + "a" * 32 + "-" + "b" * 16 + "-01",
    )  # fmt: skip
    driver.tick(250)
    (job,) = driver.claim("w1")
    assert (job.job_id, job.attempt, job.client_id, job.priority, job.tenant) == (job_id, 1, "c1", 6, "acme")
    assert (job.claimed_ms, job.claimed_ms - job.enqueued_ms, job.max_retries) == (driver.now, 250, 2)
    assert job.deadline_ms == driver.now - 250 + 100_000
    assert job.traceparent == "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
    assert (job.crashes, job.errors, job.log) == (0, 0, [])
    assert driver.client.zscore(driver.keys.leases, job_id) == driver.now + LEASE_MS
    assert driver.client.smembers(driver.keys.held("w1")) == {job_id.encode()}
    assert (driver.state(job_id), driver.status(job_id).owner) == ("running", "w1")
    assert driver.claim("w2") == []


def test_no_job_is_given_twice_however_claims_interleave(driver: QueueDriver) -> None:
    submitted = {driver.submit(priority=i % 10, tenant="abc"[i % 3]) for i in range(60)}
    given: list[str] = []
    while len(given) < 60:
        for worker in ("w1", "w2", "w3"):
            given += driver.claim_ids(worker, 7)
    assert sorted(given) == sorted(submitted)
    stats = driver.stats()
    assert (stats["queued"], stats["running"], stats["waiting_bytes"]) == (0, 60, 0)


def test_a_claim_takes_no_more_than_sequences_or_jobs_asked_for(driver: QueueDriver) -> None:
    driver.submit_all([driver.new_job() for _ in range(10)])
    assert len(driver.claim(max_jobs=4, free_sequences=3)) == 3
    assert len(driver.claim(max_jobs=2, free_sequences=100)) == 2
    assert driver.claim(max_jobs=0) == []


def test_a_claim_takes_only_what_fits_the_free_tokens(driver: QueueDriver) -> None:
    driver.submit_all([driver.new_job(tokens=(10, 20)) for _ in range(5)])
    assert len(driver.claim(max_jobs=5, free_tokens=89, idle=False)) == 2


def test_an_idle_worker_takes_the_first_job_whatever_its_size(driver: QueueDriver) -> None:
    big = driver.submit(tokens=(10_000, 10_000))
    driver.submit(tokens=(1, 1))
    assert driver.claim(max_jobs=5, free_tokens=100, idle=False) == []
    assert driver.claim_ids(max_jobs=5, free_tokens=100, idle=True) == [big]


def test_a_large_job_is_not_passed_over_for_small_ones(driver: QueueDriver) -> None:
    driver.submit(tokens=(1, 1))
    driver.submit(tokens=(500, 500))
    driver.submit(tokens=(1, 1))
    assert len(driver.claim(max_jobs=5, free_tokens=100, idle=True)) == 1
    assert driver.claim(max_jobs=5, free_tokens=100, idle=False) == []


def test_a_low_priority_job_ages_past_every_fresh_one(driver: QueueDriver) -> None:
    old = driver.submit(priority=0)
    driver.tick(9 * 60_000)
    fresh = [driver.submit(priority=9) for _ in range(2)]
    assert driver.take().job_id == fresh[0], "nine intervals make it equal to a fresh one, which goes first"
    driver.tick(60_000)
    driver.submit(priority=9)
    assert driver.take().job_id == fresh[1], "that one has aged, too"
    assert driver.take().job_id == old


def test_aged_jobs_go_by_age_whatever_their_tenant(driver: QueueDriver) -> None:
    jobs = []
    for tenant in ("a", "b", "b", "a", "c", "a", "c", "b"):
        jobs.append(driver.submit(tenant=tenant))
        driver.tick(10)
    driver.tick(10 * 60_000)
    assert driver.claim_ids(max_jobs=100) == jobs


def test_levels_take_turns_as_their_heads_age(driver: QueueDriver) -> None:
    order = []
    for minute in range(4):  # a job of priority 5 - n that waited n minutes longer is just as urgent
        order.append(driver.submit(priority=2 + minute))
        driver.submit(priority=1 + minute)
        driver.tick(60_000)
    claimed = driver.claim_ids(max_jobs=100)
    assert [job for job in claimed if job in order] == order[::-1]
    assert set(claimed[:4]) == set(order)


def test_an_aged_job_goes_before_tenants_served_less(driver: QueueDriver) -> None:
    driver.submit(tenant="much", tokens=(1000, 1000))
    driver.take()
    old = driver.submit(tenant="much")
    driver.tick(5 * 60_000)
    driver.submit(tenant="little")
    assert driver.take().job_id == old


def test_age_decides_between_levels_before_it_decides_alone(driver: QueueDriver) -> None:
    old = driver.submit(priority=4)
    driver.tick(61_000)
    driver.submit(priority=5)
    assert driver.take().job_id == old


def test_the_aging_interval_is_the_operator_s(driver: QueueDriver) -> None:
    driver.set_config(aging_interval_ms=100)
    old = driver.submit(priority=0)
    driver.tick(1000)
    driver.submit(priority=9)
    assert driver.take().job_id == old


def test_within_a_priority_the_tenant_served_least_is_next(driver: QueueDriver) -> None:
    for _ in range(6):
        driver.submit(tenant="many", tokens=(100, 100))
        driver.submit(tenant="few", tokens=(10, 10))
    tenants = [job.tenant for job in driver.claim(max_jobs=8)]
    # 100 + 2*100 virtual tokens against 10 + 2*10: ten of `few` weigh as much as one of `many`.
    assert tenants[:2] in (["few", "many"], ["many", "few"])
    assert tenants.count("few") == 6


def test_an_idle_tenant_saves_up_no_credit(driver: QueueDriver) -> None:
    for _ in range(20):
        driver.submit(tenant="busy")
    driver.claim(max_jobs=10)
    for _ in range(10):
        driver.submit(tenant="late")
    served = [job.tenant for job in driver.claim(max_jobs=10)]
    assert 4 <= served.count("late") <= 6


def test_a_tenant_returning_to_an_empty_queue_is_lifted_to_the_last_one_s_count(driver: QueueDriver) -> None:
    driver.submit_all([driver.new_job(tenant="old") for _ in range(10)])
    driver.claim(max_jobs=10)
    driver.submit_all([driver.new_job(tenant="new") for _ in range(10)])
    driver.submit_all([driver.new_job(tenant="old") for _ in range(10)])
    served = [job.tenant for job in driver.claim(max_jobs=10)]
    assert 4 <= served.count("old") <= 6


def test_estimates_charged_at_claim_become_actual_counts_at_the_end(driver: QueueDriver) -> None:
    driver.submit(tenant="a", tokens=(10, 100))
    job = driver.take()
    assert driver.client.zscore(driver.keys.tenants, "a") == 210
    driver.finish("w1", driver.final(job.job_id, 1, tokens=(12, 5)))
    assert driver.client.zscore(driver.keys.tenants, "a") == 12 + 2 * 5


def test_fair_shares_hold_between_more_tenants_than_are_read_at_once(driver: QueueDriver) -> None:
    tenants = [f"t{i:02}" for i in range(30)]
    driver.submit_all([driver.new_job(tenant=tenant) for tenant in tenants for _ in range(4)])
    served = [job.tenant for job in driver.claim(max_jobs=60)]
    assert {served.count(tenant) for tenant in tenants} == {2}


def test_a_tenant_at_its_running_limit_waits_and_others_go_on(driver: QueueDriver) -> None:
    driver.set_config({"vip": TenantLimits(max_running=3)}, max_running=1)
    for tenant in ("a", "b", "vip"):
        driver.submit_all([driver.new_job(tenant=tenant, priority=5) for _ in range(4)])
    taken = driver.claim(max_jobs=12)
    assert sorted(job.tenant for job in taken) == ["a", "b", "vip", "vip", "vip"]
    assert driver.claim(max_jobs=12) == []
    done = next(job for job in taken if job.tenant == "a")
    driver.finish("w1", driver.final(done.job_id, 1))
    assert [job.tenant for job in driver.claim(max_jobs=12)] == ["a"]


def test_a_page_of_tenants_at_their_limit_does_not_hide_the_next_one(driver: QueueDriver) -> None:
    driver.set_config(max_running=1)
    tenants = [f"t{i:02}" for i in range(25)]
    driver.submit_all([driver.new_job(tenant=tenant) for tenant in tenants for _ in range(2)])
    assert len(driver.claim(max_jobs=25)) == 25
    free = driver.submit(tenant="zz")
    assert driver.claim_ids(max_jobs=5) == [free]


def test_an_interrupted_job_goes_before_jobs_never_started(driver: QueueDriver) -> None:
    first = driver.submit()
    second = driver.submit()
    job = driver.take()
    driver.tick(1000)
    driver.release("w1", (job.job_id, 1))
    assert driver.claim_ids("w2", 2) == [first, second]


def test_an_interrupted_job_keeps_its_age(driver: QueueDriver) -> None:
    job_id = driver.submit(priority=0)
    job = driver.take()
    driver.tick(11 * 60_000)
    driver.release("w1", (job.job_id, 1))
    driver.submit(priority=9)
    (again,) = driver.claim("w2")
    assert (again.job_id, again.enqueued_ms) == (job_id, job.enqueued_ms)


class TestAffinity:
    def owned(self, driver: QueueDriver) -> None:
        """Worker w1 owns tag `a` and is alive."""
        driver.submit(affinity="a")
        job = driver.take("w1")
        driver.finish("w1", driver.final(job.job_id, 1))
        driver.renew("w1")

    def test_a_job_waits_for_the_worker_that_has_its_prefix(self, driver: QueueDriver) -> None:
        self.owned(driver)
        tagged = driver.submit(affinity="a")
        plain = driver.submit()
        assert driver.claim_ids("w2", 5) == [plain]
        assert driver.claim_ids("w1", 5) == [tagged]

    def test_its_patience_is_bounded_and_then_anyone_takes_it(self, driver: QueueDriver) -> None:
        self.owned(driver)
        tagged = driver.submit(affinity="a")
        outcome = driver.claim_outcome("w2")
        assert (outcome.jobs, outcome.next_due_ms) == ([], driver.now + 100)
        driver.tick(100)
        assert driver.claim_ids("w2") == [tagged]
        driver.renew("w2")
        driver.submit(affinity="a")
        assert driver.claim_ids("w1") == [], "the worker that ran it last owns the tag now"

    def test_a_silent_owner_is_not_waited_for(self, driver: QueueDriver) -> None:
        self.owned(driver)
        driver.tick(LEASE_MS)
        tagged = driver.submit(affinity="a")
        assert driver.claim_ids("w2") == [tagged]

    def test_ownership_fades_after_ten_minutes(self, driver: QueueDriver) -> None:
        self.owned(driver)
        driver.tick(600_000)
        driver.renew("w1")
        tagged = driver.submit(affinity="a")
        assert driver.claim_ids("w2") == [tagged]

    def test_only_the_oldest_sixteen_are_looked_through(self, driver: QueueDriver) -> None:
        self.owned(driver)
        driver.submit_all([driver.new_job(affinity="a") for _ in range(16)])
        driver.submit()
        assert driver.claim("w2", 5) == []

    def test_passing_over_keeps_the_rest_in_order(self, driver: QueueDriver) -> None:
        self.owned(driver)
        jobs = [driver.submit(affinity="a" if i % 2 else "") for i in range(10)]
        assert driver.claim_ids("w2", 10) == jobs[0::2]
        assert driver.claim_ids("w1", 10) == jobs[1::2]


class TestBrokenPointers:
    @pytest.mark.parametrize("fields", [{"hello": "world"}, {"id": "job1"}, {"id": "nobody", "t": "1", "cost": "x"}])
    def test_a_pointer_to_nothing_is_dead_lettered_and_the_rest_is_served(self, driver, fields) -> None:
        first = driver.submit()
        driver.client.xadd(driver.keys.ready(5, "default"), fields)
        last = driver.submit()
        assert driver.claim_ids(max_jobs=10) == [first, last]
        (letter,) = driver.run(t.dead_letters(driver.keys))
        assert (letter.code, letter.job_id) == ("undecodable", fields.get("id", ""))
        assert driver.keys.ready(5, "default") in letter.message
        assert driver.stats()["undecodable"] == 1

    def test_a_page_of_rubbish_alone_is_cleared_away(self, driver: QueueDriver) -> None:
        job_id = driver.submit()
        for i in range(50):
            driver.client.xadd(driver.keys.ready(5, "default"), {"rubbish": i})
        assert driver.claim_ids(max_jobs=10) == [job_id]
        driver.claim()
        assert driver.client.exists(driver.keys.ready(5, "default"), driver.keys.heads(5), driver.keys.fair(5)) == 0

    def test_a_second_pointer_to_a_job_does_not_run_it_twice(self, driver: QueueDriver) -> None:
        job_id = driver.submit()
        driver.client.xadd(driver.keys.ready(5, "default"), {"id": job_id, "t": driver.now, "cost": 1, "tag": ""})
        assert driver.claim_ids(max_jobs=10) == [job_id]
        assert driver.stats()["undecodable"] == 1
        assert driver.state(job_id) == "running"

    def test_a_vanished_job_hash_crashes_nobody(self, driver: QueueDriver) -> None:
        gone = driver.submit()
        kept = driver.submit()
        driver.client.delete(driver.keys.job(gone))
        assert driver.claim_ids(max_jobs=10) == [kept]

    def test_a_job_without_its_request_is_dead_with_the_reason(self, driver: QueueDriver) -> None:
        job_id = driver.submit()
        driver.client.hdel(driver.keys.job(job_id), "request")
        assert driver.claim() == []
        ended = driver.ended(job_id)
        assert ended.state == "dead"
        assert ended.failure is not None
        assert "request is missing" in ended.failure.message


def test_a_claim_ends_expired_jobs_instead_of_starting_them(driver: QueueDriver) -> None:
    late = driver.submit(deadline_s=1)
    fine = driver.submit(deadline_s=100)
    driver.tick(1000)
    assert driver.claim_ids(max_jobs=10) == [fine]
    ended = driver.ended(late)
    assert (ended.state, ended.attempt) == ("expired", 0)
    assert driver.stats()["expired"] == 1


def test_a_claim_says_how_many_wait_and_when_to_look_again(driver: QueueDriver) -> None:
    driver.submit_all([driver.new_job() for _ in range(3)])
    driver.submit(delay_s=30)
    outcome = driver.claim_outcome()
    assert (outcome.waiting, outcome.next_due_ms) == (2, driver.now + 30_000)
