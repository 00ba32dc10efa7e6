"""The index that listings read, and what a tenant is told of its limits: bounded, each tenant's own, read-only."""

from __future__ import annotations

from penstock_core.protocol import transitions as t
from penstock_core.protocol.config import TenantLimits
from tests.queue_driver import QueueDriver


def test_a_tenants_newest_jobs_come_first_and_nobody_elses(driver: QueueDriver) -> None:
    mine = []
    for _ in range(5):
        mine.append(driver.submit(tenant="mill"))
        driver.now += 10
    other = driver.submit(tenant="harbour")
    assert driver.run(t.read_recent(driver.keys, tenant="mill")) == mine[::-1]
    assert driver.run(t.read_recent(driver.keys)) == [other, *mine[::-1]]


def test_pages_go_on_behind_a_job_whatever_was_submitted_since(driver: QueueDriver) -> None:
    ids = []
    for _ in range(6):
        ids.append(driver.submit(tenant="mill"))
        driver.now += 10
    first = driver.run(t.read_recent(driver.keys, tenant="mill", limit=2))
    assert first == [ids[5], ids[4]]
    driver.submit(tenant="mill")
    assert driver.run(t.read_recent(driver.keys, tenant="mill", limit=3, before=first[-1])) == ids[3:0:-1]
    assert driver.run(t.read_recent(driver.keys, tenant="mill", before="nobody")) is None


def test_the_index_keeps_the_newest_thousand_of_a_tenant(driver: QueueDriver) -> None:
    first = driver.submit(tenant="mill")
    driver.now += 10
    driver.submit_all([driver.new_job(tenant="mill") for _ in range(1200)])
    ids = driver.run(t.read_recent(driver.keys, tenant="mill", limit=5000))
    assert ids is not None
    assert len(ids) == 1000
    assert first not in ids
    assert driver.client.pttl(f"{driver.keys.prefix}recent:mill") > 0


def test_a_refused_or_known_job_is_listed_once(driver: QueueDriver) -> None:
    driver.set_config(max_waiting_jobs=1)
    job = driver.new_job()
    driver.submit_all([job, job, driver.new_job()])
    assert driver.run(t.read_recent(driver.keys)) == [job.job_id]


def test_usage_tells_jobs_tokens_and_the_limits_that_hold(driver: QueueDriver) -> None:
    driver.set_config({"mill": TenantLimits(max_queued=5, tokens_per_minute=600)}, max_queued=2, max_running=7)
    idle = driver.run(t.read_usage(driver.keys, "mill"))
    assert (idle.queued, idle.delayed, idle.running, idle.tokens_charged) == (0, 0, 0, 0)
    assert (idle.max_queued, idle.max_running, idle.tokens_per_minute) == (5, 7, 600)
    job = driver.new_job(tenant="mill")
    driver.submit_all([job])
    used = driver.run(t.read_usage(driver.keys, "mill", now_ms=driver.now))
    assert (used.queued, used.tokens_charged) == (1, job.input_tokens + job.output_tokens)
    driver.take()
    assert driver.run(t.read_usage(driver.keys, "mill", now_ms=driver.now)).running == 1
    assert driver.run(t.read_usage(driver.keys, "mill", now_ms=driver.now + 60_000)).tokens_charged == 0
    assert driver.run(t.read_usage(driver.keys, "harbour")).max_queued == 2
