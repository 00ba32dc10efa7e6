"""The two bounds claim promises: nobody waits for ever (aging), and no backlogged tenant falls behind (VTC)."""

from __future__ import annotations

import uuid

import fakeredis
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock_core.protocol.keys import QueueKeys
from tests.queue_driver import QueueDriver

AGING_MS = 1000


def new_driver() -> QueueDriver:
    client = fakeredis.FakeRedis(version=(7,), protocol=2)
    driver = QueueDriver(client, QueueKeys(f"bounds-{uuid.uuid4().hex[:12]}"))
    driver.set_config(aging_interval_ms=AGING_MS)
    return driver


arrivals = st.lists(st.tuples(st.integers(0, 20), st.sampled_from([0, 5, 9]), st.sampled_from("abc")), min_size=30)


@settings(max_examples=20, deadline=None)
@given(arrivals, st.integers(1, 2))
def test_no_aged_job_waits_behind_one_that_is_less_aged(arrivals, batch: int) -> None:
    """A job whose effective priority reached 10 waits only for jobs whose own is higher, whoever they are from.

    A later job's is higher only if it came at most 9 aging intervals later, so what can delay an aged job is bounded.
    """
    driver = new_driver()
    waiting: dict[str, tuple[int, int]] = {}
    pending = sorted(arrivals, key=lambda arrival: arrival[0])

    def effective(since: int, priority: int) -> float:
        return priority + (driver.now - since) / AGING_MS

    for turn in range(10**6):
        driver.tick(500)
        while pending and pending[0][0] <= turn:
            _, priority, tenant = pending.pop(0)
            waiting[driver.submit(priority=priority, tenant=tenant)] = (driver.now, priority)
        for job in driver.claim("w", batch):
            chosen = effective(*waiting.pop(job.job_id))
            aged = {other: effective(*facts) for other, facts in waiting.items() if effective(*facts) >= 10}
            assert all(chosen >= value for value in aged.values()), f"{job.job_id} ({chosen}) went before {aged}"
        if not pending and not waiting:
            break


jobs_of = st.tuples(st.integers(1, 200), st.integers(1, 200))


@settings(max_examples=20, deadline=None)
@given(
    st.lists(jobs_of, min_size=15, max_size=15),
    st.lists(jobs_of, min_size=30, max_size=30),
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 3)), min_size=15, max_size=15),
)
def test_backlogged_tenants_differ_by_no_more_than_one_job_s_cost(few, many, turns) -> None:
    """VTC (OSDI 2024), lemma 4.3: while both wait, virtual counts differ by at most the largest charge of a job."""
    driver = new_driver()
    costs: dict[str, tuple[int, int]] = {}
    for tenant, sizes in (("few", few), ("many", many)):
        new = [driver.new_job(tenant=tenant, tokens=size) for size in sizes]
        costs |= {job.job_id: size for job, size in zip(new, sizes, strict=True)}
        driver.submit_all(new)
    largest = max(i + 2 * o for i, o in costs.values())
    served, left, running = {"few": 0, "many": 0}, {"few": len(few), "many": len(many)}, []
    for claimed, finished in turns:
        for job in driver.claim("w", claimed):
            i, o = costs[job.job_id]
            served[job.tenant] += i + 2 * o
            left[job.tenant] -= 1
            running.append(job)
            if min(left.values()) > 0:
                assert abs(served["few"] - served["many"]) <= largest
        for job in running[:finished]:
            driver.finish("w", driver.final(job.job_id, job.attempt, tokens=costs[job.job_id]))
        del running[:finished]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 30))
def test_a_tenant_that_was_idle_gets_its_share_and_no_more(history: int, jobs: int) -> None:
    """However much the others used while it was away, a returning tenant shares evenly from now on."""
    driver = new_driver()
    driver.submit(tenant="steady", tokens=(history, 0))
    driver.take()
    driver.submit_all([driver.new_job(tenant="steady") for _ in range(jobs)])
    driver.submit_all([driver.new_job(tenant="returning") for _ in range(jobs)])
    tenants = [job.tenant for job in driver.claim("w", jobs)]
    assert abs(tenants.count("steady") - tenants.count("returning")) <= 1
