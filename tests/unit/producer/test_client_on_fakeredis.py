"""The client on fakeredis, by a connection that is handed in: what needs no server needs none to be tested."""

from __future__ import annotations

from typing import Literal

import fakeredis
import pytest

from penstock import Client, InvalidRequest, JobCancelled, JobState
from penstock.settings import Mode
from penstock_core.protocol.keys import QueueKeys
from tests.integration.producer.scripted import ScriptedWorker


@pytest.mark.parametrize("mode", ["push", "poll"])
def test_a_job_goes_in_and_its_tokens_come_out(fake_redis: fakeredis.FakeRedis, queue: str, mode: Mode) -> None:
    with Client(queue=queue, mode=mode, connection=fake_redis) as client:
        job = client.submit("once", priority=9)
        worker = ScriptedWorker(fake_redis, QueueKeys(queue))
        held = worker.claim_one(job.id)
        worker.say(held, 2)
        worker.end(held)
        assert [chunk.token_ids for chunk in job.stream(timeout=30)] == [(0, 1), ()]
        assert job.result(timeout=30).token_ids == (0, 1)
        assert job.status().priority == 9
    assert fake_redis.ping(), "a connection that was handed in stays open"


def test_a_waiting_job_is_cancelled(fake_redis: fakeredis.FakeRedis, queue: str) -> None:
    with Client(queue=queue, mode="poll", connection=fake_redis) as client:
        job = client.submit("once")
        assert [status.job_id for status in client.jobs(state=JobState.QUEUED)] == [job.id]
        assert job.cancel() == "cancelled"
        with pytest.raises(JobCancelled):
            job.result(timeout=30)
        assert client.queue_snapshot().stats["cancelled"] == 1


@pytest.mark.parametrize("durability", ["fsync"])
def test_a_server_without_an_append_only_file_promises_no_fsync(
    fake_redis: fakeredis.FakeRedis, queue: str, durability: Literal["fsync"]
) -> None:
    with Client(queue=queue, connection=fake_redis) as client, pytest.raises(InvalidRequest, match="durability"):
        client.submit("once", durability=durability)


def test_a_handle_shows_its_job_and_queue(fake_redis: fakeredis.FakeRedis, queue: str) -> None:
    with Client(queue=queue, connection=fake_redis) as client:
        assert repr(client.job("abc")) == f"JobHandle('abc', queue='{queue}')"
