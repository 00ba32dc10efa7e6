"""The drain: finish in time, else hand back; and never wait for a Redis that stays away."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

from penstock_core.protocol.errors import BrokerUnavailable
from penstock_core.protocol.jobs import FinishReason, JobState
from penstock_worker.drain import Drain
from tests.unit.worker.conftest import Bench


@pytest.fixture
def drain(bench: Bench) -> Drain:
    return Drain(clock=bench.clock)


async def test_the_first_signal_drains_and_the_second_hurries(drain: Drain) -> None:
    drain.request("SIGTERM")
    assert (drain.requested.is_set(), drain.hurried.is_set()) == (True, False)
    drain.request("SIGTERM")
    assert drain.hurried.is_set()


async def test_jobs_that_finish_within_the_grace_time_are_waited_for(bench: Bench, drain: Drain) -> None:
    (job,) = await bench.hold()
    waiting = asyncio.create_task(drain.finish_jobs(bench.held, grace_s=60, hopeless=bench.publisher.engine_died))
    await bench.step(256)
    await asyncio.wait_for(waiting, 60)
    assert bench.driver.state(job.job_id) == "completed"


async def test_hurrying_ends_the_wait(bench: Bench, drain: Drain) -> None:
    await bench.hold()
    waiting = asyncio.create_task(drain.finish_jobs(bench.held, grace_s=60, hopeless=bench.publisher.engine_died))
    drain.request("first")
    drain.request("second")
    await asyncio.wait_for(waiting, 60)
    assert len(bench.held) == 1


async def test_an_engine_that_dies_meanwhile_ends_the_wait(bench: Bench, drain: Drain) -> None:
    await bench.hold()
    waiting = asyncio.create_task(drain.finish_jobs(bench.held, grace_s=60, hopeless=bench.publisher.engine_died))
    bench.publisher.engine_died.set()
    await asyncio.wait_for(waiting, 60)


async def test_unfinished_jobs_are_handed_back_with_every_token(bench: Bench, drain: Drain) -> None:
    jobs = await bench.hold(3)
    bench.engine.step(4)
    await drain.hand_back(bench.held, bench.publisher)
    for job in jobs:
        status = bench.driver.status(job.job_id)
        assert (status.state, status.crashes, status.errors) == (JobState.QUEUED, 0, 0)
        assert bench.driver.tokens(job.job_id) == [1000, 1001, 1002, 1003]
        assert (job.request_id, FinishReason.CANCELLED) in bench.engine.aborted
    assert len(bench.held) == 0


async def test_a_job_asked_to_stop_is_ended_and_not_handed_on(bench: Bench, drain: Drain) -> None:
    (job,) = await bench.hold()
    bench.driver.cancel(job.job_id)
    await drain.hand_back(bench.held, bench.publisher)
    assert bench.driver.ended(job.job_id).state is JobState.CANCELLED


async def test_a_passing_outage_does_not_keep_jobs_from_being_handed_back(bench: Bench, drain: Drain) -> None:
    (job,) = await bench.hold()
    bench.broker.fail("before", "after", "before")
    await drain.hand_back(bench.held, bench.publisher)
    assert bench.driver.state(job.job_id) == "queued"


async def test_it_gives_up_on_a_redis_that_stays_away(bench: Bench, drain: Drain) -> None:
    attempts = 0

    async def write() -> None:
        nonlocal attempts
        attempts += 1
        bench.clock.tick(2.0)
        raise BrokerUnavailable("away")

    assert not await drain.insist(write, within_s=5.0)
    assert attempts == 3


def test_a_worker_stopped_while_it_is_still_being_imported_leaves_in_good_order() -> None:
    """Its loop takes the signals over only once PyTorch is there, a second or two later."""
    script = """
import os, signal, sys
from penstock_worker import __main__ as worker

class Import:  # stands for the import of PyTorch, during which the signal comes
    def find_spec(self, name, path=None, target=None):
        if name == "penstock_worker.app":
            os.kill(os.getpid(), signal.SIGTERM)

sys.meta_path.insert(0, Import())
sys.argv = ["penstock worker"]
sys.exit(worker.main())
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")
