"""What is accepted, refused or recognised at the door."""

from __future__ import annotations

import pytest

from penstock_core.protocol import transitions as t
from penstock_core.protocol.config import TenantLimits
from penstock_core.protocol.errors import InvalidRequest
from penstock_core.protocol.requests import JobOptions
from tests.queue_driver import REQUEST, QueueDriver


def test_an_accepted_job_waits_where_its_priority_and_tenant_say(driver: QueueDriver) -> None:
    job_id = driver.submit(priority=7, tenant="acme", metadata={"order": "12"}, client_id="c1")
    status = driver.status(job_id)
    assert (status.state, status.priority, status.tenant, status.metadata) == ("queued", 7, "acme", {"order": "12"})
    assert driver.client.xlen(driver.keys.ready(7, "acme")) == 1
    assert driver.client.zscore(driver.keys.heads(7), "acme") == driver.now
    assert driver.stats()["waiting_bytes"] == len(REQUEST)


def test_submitting_the_same_id_again_stores_nothing_new(driver: QueueDriver) -> None:
    job = driver.new_job()
    assert driver.submit_all([job])[0].status == "accepted"
    (again,) = driver.submit_all([job])
    assert (again.status, again.job_id) == ("duplicate", job.job_id)
    assert driver.stats()["queued"] == 1
    assert len(driver.claim("w1", 10)) == 1


def test_an_idempotency_key_names_one_job_per_tenant(driver: QueueDriver) -> None:
    first = driver.submit(idempotency_key="order 12 {ü}")
    (second,) = driver.submit_all([driver.new_job(idempotency_key="order 12 {ü}")])
    assert (second.status, second.job_id) == ("duplicate", first)
    other = driver.submit(idempotency_key="order 12 {ü}", tenant="other")
    assert other != first


def test_an_idempotency_key_within_one_call_names_one_job(driver: QueueDriver) -> None:
    outcomes = driver.submit_all([driver.new_job(idempotency_key="k") for _ in range(3)])
    assert [outcome.status for outcome in outcomes] == ["accepted", "duplicate", "duplicate"]
    assert {outcome.job_id for outcome in outcomes} == {outcomes[0].job_id}


def test_an_idempotency_key_lives_as_long_as_its_job(driver: QueueDriver) -> None:
    driver.submit(idempotency_key="k", result_ttl_s=5.0)
    key = driver.keys.dedupe("default", "k")
    assert driver.client.pttl(key) == -1
    job = driver.take()
    driver.finish("w1", driver.final(job.job_id, job.attempt))
    assert 0 < driver.client.pttl(key) <= 5000


def test_bulk_submit_answers_each_job_for_itself(driver: QueueDriver) -> None:
    driver.set_config(max_waiting_jobs=3)
    jobs = [driver.new_job() for _ in range(5)]
    jobs[1] = jobs[0]
    outcomes = driver.submit_all(jobs)
    assert [outcome.status for outcome in outcomes] == ["accepted", "duplicate", "accepted", "accepted", "full"]


def test_a_full_queue_says_which_bound_and_when_to_come_back(driver: QueueDriver) -> None:
    driver.set_config(max_waiting_jobs=2)
    driver.submit_all([driver.new_job() for _ in range(2)])
    (full,) = driver.submit_all([driver.new_job()])
    assert full.status == "full"
    assert full.retry_after_s > 0
    assert "max_waiting_jobs is 2" in full.message
    assert driver.stats()["refused"] == 1
    driver.take()
    assert driver.submit_all([driver.new_job()])[0].status == "accepted"


def test_delayed_jobs_count_as_waiting(driver: QueueDriver) -> None:
    driver.set_config(max_waiting_jobs=1)
    driver.submit(delay_s=60)
    assert driver.submit_all([driver.new_job()])[0].status == "full"


def test_retry_after_follows_the_recent_rate_of_departures(driver: QueueDriver) -> None:
    driver.submit_all([driver.new_job() for _ in range(600)])
    for _ in range(30):
        driver.claim("w1", 10)
        driver.tick(1000)
    driver.set_config(max_waiting_jobs=1)
    outcomes = driver.submit_all([driver.new_job() for _ in range(100)])
    # About 10 jobs a second left; the decaying average has seen most, not all, of one time constant.
    assert 0.1 <= outcomes[0].retry_after_s <= 0.4
    assert 8 <= outcomes[-1].retry_after_s <= 30


def test_waiting_bytes_are_bounded(driver: QueueDriver) -> None:
    driver.set_config(max_waiting_bytes=2 * len(REQUEST) + 1)
    outcomes = driver.submit_all([driver.new_job() for _ in range(3)])
    assert [outcome.status for outcome in outcomes] == ["accepted", "accepted", "full"]
    assert "max_waiting_bytes" in outcomes[2].message


def test_a_tenant_over_its_queue_limit_hinders_nobody_else(driver: QueueDriver) -> None:
    driver.set_config({"big": TenantLimits(max_queued=5)}, max_queued=1)
    assert [o.status for o in driver.submit_all([driver.new_job(tenant="a") for _ in range(2)])] == ["accepted", "full"]
    assert driver.submit_all([driver.new_job(tenant="b")])[0].status == "accepted"
    big = driver.submit_all([driver.new_job(tenant="big") for _ in range(6)])
    assert [o.status for o in big] == ["accepted"] * 5 + ["full"]
    assert "tenant big" in big[5].message


def test_tokens_per_minute_refill_as_a_bucket(driver: QueueDriver) -> None:
    driver.set_config(tokens_per_minute=60)
    outcomes = driver.submit_all([driver.new_job(tokens=(10, 20)) for _ in range(3)])
    assert [o.status for o in outcomes] == ["accepted", "accepted", "full"]
    assert outcomes[2].retry_after_s == pytest.approx(30.0, abs=0.1)
    driver.tick(29_000)
    assert driver.submit_all([driver.new_job(tokens=(10, 20))])[0].status == "full"
    driver.tick(1_100)
    assert driver.submit_all([driver.new_job(tokens=(10, 20))])[0].status == "accepted"


def test_a_job_over_a_whole_minute_s_tokens_passes_when_the_bucket_is_full_and_leaves_a_debt(
    driver: QueueDriver,
) -> None:
    driver.set_config(tokens_per_minute=60)
    assert driver.submit_all([driver.new_job(tokens=(100, 20))])[0].status == "accepted"
    (next_one,) = driver.submit_all([driver.new_job(tokens=(1, 0))])
    assert next_one.retry_after_s == pytest.approx(61.0, abs=0.2)


def test_delayed_jobs_wait_apart_until_due(driver: QueueDriver) -> None:
    later = driver.submit(delay_s=10)
    at = driver.submit(not_before=(driver.now + 5_000) / 1000)
    past = driver.submit(not_before=1.0)
    assert [driver.state(job) for job in (later, at, past)] == ["delayed", "delayed", "queued"]
    outcome = driver.claim_outcome(max_jobs=10)
    assert [job.job_id for job in outcome.jobs] == [past]
    assert outcome.next_due_ms == driver.now + 5_000
    driver.tick(5_000)
    assert driver.reclaim().promoted == 1
    assert driver.claim_ids(max_jobs=10) == [at]
    driver.tick(5_000)
    driver.reclaim()
    (job,) = driver.claim(max_jobs=10)
    assert (job.job_id, job.enqueued_ms) == (later, driver.now)


def test_the_bell_rings_once_per_call_and_not_for_delayed_jobs(driver: QueueDriver) -> None:
    with driver.listening(driver.keys.bell) as heard:
        driver.submit(delay_s=10)
        driver.submit_all([driver.new_job() for _ in range(3)])
        driver.submit_all([driver.new_job()])
    assert [data for _, data in heard] == [b"job", b"job"]


@pytest.mark.parametrize(
    ("job", "field"),
    [
        (t.NewJob("", REQUEST, JobOptions(), 1, 1), "job_id"),
        (t.NewJob("x" * 129, REQUEST, JobOptions(), 1, 1), "job_id"),
        (t.NewJob("x", b"x" * (8 * 1024 * 1024 + 1), JobOptions(), 1, 1), "request"),
    ],
)
def test_a_job_over_a_size_bound_is_refused_before_it_travels(fake_redis, keys, job: t.NewJob, field: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        t.submit(keys, [job])
    assert refusal.value.field == field


def test_too_many_jobs_in_one_call_are_refused(keys) -> None:
    job = t.NewJob("x", REQUEST, JobOptions(), 1, 1)
    with pytest.raises(InvalidRequest, match="10001 in one call, limit 10000"):
        t.submit(keys, [job] * 10_001)
