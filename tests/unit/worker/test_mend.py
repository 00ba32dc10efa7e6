"""The mend role: what somebody deleted is found missing, and made anew from the jobs."""

from __future__ import annotations

import pytest

from penstock_worker.mend import Mender
from tests.unit.worker.conftest import Bench, settle


@pytest.fixture
def mender(bench: Bench) -> Mender:
    return Mender(bench.broker, bench.keys, bench.metrics)


async def test_one_call_a_look_where_the_queue_is_whole(bench: Bench, mender: Mender) -> None:
    bench.submit()
    await bench.hold()
    calls = bench.broker.calls
    assert await mender.look() == []
    assert bench.broker.calls == calls + 1
    settle(bench)


async def test_a_job_whose_pointer_was_deleted_is_claimed_after_all(
    bench: Bench, mender: Mender, caplog: pytest.LogCaptureFixture
) -> None:
    job_id = bench.submit()
    bench.driver.client.delete(bench.keys.ready(5, "default"))
    await bench.claimer.claim_once()
    assert len(bench.held) == 0
    with caplog.at_level("ERROR"):
        assert await mender.look() == [job_id]
    assert "does somebody trim or delete" in caplog.text
    await bench.claimer.claim_once()
    assert bench.held.by_job(job_id) is not None
    assert await mender.look() == []
    settle(bench)


async def test_a_count_that_no_job_explains_is_looked_into_once(bench: Bench, mender: Mender) -> None:
    bench.driver.client.hset(bench.keys.stats, "queued", 3)
    assert await mender.look() == []
    calls = bench.broker.calls
    assert await mender.look() == []
    assert bench.broker.calls == calls + 1
