"""Submitting, waiting, cancelling, listing: every job ends for its submitter in a result or one typed error."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import pytest
import redis

from penstock import (
    InvalidRequest,
    JobCancelled,
    JobDead,
    JobExpired,
    JobFailed,
    JobNotFound,
    JobState,
    QueueFull,
    ResultTimeout,
    SamplingParams,
)
from penstock_core.protocol.codec import decode_request, encode_event
from penstock_core.protocol.events import JobEnded
from penstock_core.protocol.jobs import JobFailure
from penstock_core.protocol.keys import QueueKeys
from penstock_core.protocol.transitions import BuryRecord, bury, configure, run
from tests.integration.producer.scripted import ScriptedWorker
from tests.worker_process import until

pytestmark = pytest.mark.integration


def test_what_was_asked_for_arrives_at_the_worker(sdk: Any, worker: ScriptedWorker) -> None:
    job = sdk.submit(
        messages=[{"role": "user", "content": "hello"}],
        sampling=SamplingParams(temperature=0.5, top_k=7),
        top_k=3,
        stop="\n",
        priority=8,
        tenant="acme",
        deadline_s=100,
        metadata={"page": "1"},
    )
    held = worker.claim_one(job.id)
    request = decode_request(held.request)
    assert request.messages is not None
    assert request.messages[0].content == "hello"
    assert (request.sampling.temperature, request.sampling.top_k, request.sampling.stop) == (0.5, 3, ("\n",))
    assert request.sampling.seed is not None, "every job is repeatable"
    assert (held.priority, held.tenant) == (8, "acme")
    status = job.status()
    assert (status.state, status.owner, status.metadata) == (JobState.RUNNING, worker.id, {"page": "1"})
    worker.end(held)


def test_a_result_is_pushed_to_whoever_waits(sdk: Any, worker: ScriptedWorker) -> None:
    job = sdk.submit("story")
    held = worker.claim_one(job.id)
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(job.result(timeout=30)))
    thread.start()
    worker.say(held, 4)
    worker.end(held)
    thread.join(30)
    assert results[0].token_ids == (0, 1, 2, 3)
    assert results[0].choices[0].finish_reason == "length"
    assert job.result(timeout=0) == results[0] == sdk.job(job.id).result(timeout=0)


def test_a_result_too_large_to_keep_is_fetched(
    sdk: Any, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.feed.KEPT_END_BYTES", 10)
    job = sdk.submit("story")
    held = worker.claim_one(job.id)
    worker.say(held, 4)
    worker.end(held)
    assert job.result(timeout=30).token_ids == (0, 1, 2, 3)


def test_a_failed_job_raises_its_reason(sdk: Any, worker: ScriptedWorker) -> None:
    job = sdk.submit("story")
    worker.fail(worker.claim_one(job.id), "context_length", "the prompt has 9000 tokens, limit 4096")
    for handle in (job, sdk.job(job.id)):
        with pytest.raises(JobFailed, match="9000 tokens") as caught:
            handle.result(timeout=30)
        assert (caught.value.code, caught.value.job_id) == ("context_length", job.id)


def test_a_dead_job_raises_its_reason_until_it_is_requeued(
    sdk: Any, worker: ScriptedWorker, redis_client: redis.Redis, keys: QueueKeys
) -> None:
    from penstock_core.protocol.transitions import requeue

    job = sdk.submit("story")
    held = worker.claim_one(job.id)
    ended = encode_event(JobEnded(JobState.DEAD, held.attempt, None, JobFailure("undecodable", "version 9")))
    run(redis_client, bury(keys, worker.id, [BuryRecord(job.id, held.attempt, "undecodable", "version 9", ended)]))
    with pytest.raises(JobDead, match="version 9"):
        job.result(timeout=30)
    assert run(redis_client, requeue(keys, [job.id])) == ["requeued"]
    again = worker.claim_one(job.id)
    worker.say(again, 2)
    worker.end(again)
    assert sdk.job(job.id).result(timeout=30).token_ids == (0, 1)


def test_a_waiting_job_is_cancelled_at_once(sdk: Any) -> None:
    job = sdk.submit("story")
    assert job.cancel() == "cancelled"
    with pytest.raises(JobCancelled):
        job.result(timeout=30)
    with pytest.raises(JobCancelled):
        list(job.stream(timeout=30))
    assert job.cancel() == "ended"


def test_a_running_job_is_cancelled_with_what_it_has(sdk: Any, worker: ScriptedWorker) -> None:
    job = sdk.submit("story")
    held = worker.claim_one(job.id)
    worker.say(held, 3)
    assert job.cancel() == "cancelling"
    assert job.status().cancelling
    worker.end(held, JobState.CANCELLED, failure=JobFailure("cancelled", "cancelled by request"))
    with pytest.raises(JobCancelled) as caught:
        job.result(timeout=30)
    assert caught.value.result is not None
    assert caught.value.result.token_ids == (0, 1, 2)


def test_a_deadline_holds_without_any_worker(sdk: Any) -> None:
    job = sdk.submit("story", deadline_s=0.2)
    with pytest.raises(JobExpired, match="deadline"):
        job.result(timeout=30)
    job = sdk.submit("story", deadline_s=0.2)
    with pytest.raises(JobExpired, match="deadline"):
        list(job.stream(timeout=30))


def test_a_deadline_holds_for_a_reader_that_did_not_submit(sdk: Any) -> None:
    job_id = sdk.submit("story", deadline_s=0.3).id
    quick_to_doubt(sdk)
    with pytest.raises(JobExpired, match="deadline"):
        sdk.job(job_id).result(timeout=30)


def test_a_deadline_holds_for_a_worker_that_died(sdk: Any, redis_client: redis.Redis, keys: QueueKeys) -> None:
    quick_to_doubt(sdk)
    job = sdk.submit("story", deadline_s=0.3)
    worker = ScriptedWorker(redis_client, keys, lease_ms=500, now_ms=job.status().submitted_ms)  # in time, however late
    worker.say(worker.claim_one(job.id), 2)  # and is never heard of again
    with pytest.raises(JobExpired, match="deadline"):
        job.result(timeout=30)


def test_waiting_for_a_dead_worker_times_out_with_the_state(sdk: Any, worker: ScriptedWorker) -> None:
    job = sdk.submit("story")
    with pytest.raises(ResultTimeout, match=r"0\.1 s: it is queued, and no worker"):
        job.result(timeout=0.1)
    worker.say(worker.claim_one(job.id), 2)
    with pytest.raises(ResultTimeout, match=rf"running on worker {worker.id} \(attempt 1, 2 tokens so far\)"):
        job.result(timeout=0.1)
    with pytest.raises(ResultTimeout, match="running on worker"):
        list(job.stream(timeout=0.1))
    with pytest.raises(ResultTimeout, match="has not ended after 0 s"):
        job.result(timeout=0)


@pytest.mark.parametrize("timeout", [-1, float("nan"), float("inf")])
def test_a_timeout_that_is_no_time_is_refused(sdk: Any, timeout: float) -> None:
    with pytest.raises(InvalidRequest, match="timeout"):
        sdk.job("x").result(timeout=timeout)


def test_a_job_nobody_knows_is_not_found(sdk: Any) -> None:
    stranger = sdk.job("0" * 32)
    for ask in (
        stranger.status,
        stranger.cancel,
        lambda: stranger.result(30),
        lambda: list(stranger.stream(timeout=30)),
    ):
        with pytest.raises(JobNotFound, match="no job 000"):
            ask()


def test_a_job_past_its_retention_is_not_found(sdk: Any, worker: ScriptedWorker) -> None:
    job = sdk.submit("story", result_ttl_s=0.001)
    worker.end(worker.claim_one(job.id))

    with pytest.raises(JobNotFound, match="result_ttl_s"):
        until(lambda: sdk.job(job.id).status() is None, "it to be forgotten")


def test_the_same_idempotency_key_is_the_same_job(connect_sdk: Any, worker: ScriptedWorker) -> None:
    sdk, other = connect_sdk(), connect_sdk()
    first = sdk.submit("story", idempotency_key="order-7")
    again, elsewhere = sdk.submit("story", idempotency_key="order-7"), other.submit("story", idempotency_key="order-7")
    assert [first.duplicate, again.duplicate, elsewhere.duplicate] == [False, True, True]
    assert first.id == again.id == elsewhere.id
    assert sdk.submit("story", idempotency_key="order-7", tenant="acme").id != first.id
    for held in worker.claim(2):
        worker.say(held, 2)
        worker.end(held)
    assert elsewhere.result(timeout=30) == again.result(timeout=30) == first.result(timeout=30)
    assert [chunk.token_ids for chunk in elsewhere.stream(timeout=30)] == [(0, 1), ()]


def test_a_full_queue_refuses_and_says_when_to_come_back(sdk: Any, redis_client: redis.Redis, keys: QueueKeys) -> None:
    run(redis_client, configure(keys, {"max_waiting_jobs": 2}))
    handles = sdk.submit_many(["one", "two", "three"])
    assert [isinstance(handle, QueueFull) for handle in handles] == [False, False, True]
    with pytest.raises(QueueFull, match="max_waiting_jobs is 2") as caught:
        sdk.submit("four")
    assert caught.value.retry_after_s > 0
    assert handles[0].cancel() == "cancelled"
    assert sdk.submit("five").status().state is JobState.QUEUED


def test_a_bad_item_is_named_and_nothing_is_sent(sdk: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"jobs\[2\]\.sampling\.temperature") as caught:
        sdk.submit_many(["fine", {"prompt": "fine"}, {"prompt": "bad", "temperature": float("nan")}])
    assert caught.value.field == "jobs[2].sampling.temperature"
    assert sdk.jobs() == []
    assert sdk.submit_many([]) == []


def test_listing_is_newest_first_filtered_and_bounded(sdk: Any, worker: ScriptedWorker) -> None:
    jobs = [sdk.submit("story", tenant=tenant) for tenant in ("a", "b", "a", "b", "a")]
    worker.end(worker.claim()[0])
    assert [status.job_id for status in sdk.jobs(limit=3)] == [job.id for job in reversed(jobs)][:3]
    assert {status.tenant for status in sdk.jobs(tenant="b")} == {"b"}
    assert [status.state for status in sdk.jobs(state=JobState.COMPLETED)] == [JobState.COMPLETED]
    assert len(sdk.jobs(tenant="a", limit=2)) == 2
    with pytest.raises(InvalidRequest, match="limit"):
        sdk.jobs(limit=0)


def test_the_snapshot_counts_what_waits_and_runs(sdk: Any, worker: ScriptedWorker) -> None:
    sdk.submit_many([{"prompt": "x", "priority": 9}, {"prompt": "x", "tenant": "acme"}, "x"])
    worker.claim()
    seen = sdk.queue_snapshot()
    assert (seen.waiting, seen.running) == (2, 1)
    assert {(line.priority, line.tenant, line.depth) for line in seen.lines} == {(5, "acme", 1), (5, "default", 1)}


def test_fsync_is_refused_where_it_cannot_be_promised_and_kept_where_it_can(
    sdk: Any, redis_client: redis.Redis, keys: QueueKeys
) -> None:
    if int(redis_client.info("server")["redis_version"].split(".")[0]) >= 8:
        pytest.skip("this server has WAITAOF")
    with pytest.raises(InvalidRequest, match=r"durability: 'fsync' cannot be promised.*appendfsync always"):
        sdk.submit("story", durability="fsync")
    assert sdk.jobs() == []
    redis_client.config_set("appendfsync", "always")
    try:
        assert sdk.submit("story", durability="fsync").status().state is JobState.QUEUED
    finally:
        redis_client.config_set("appendfsync", "everysec")


def test_a_closed_client_says_that_it_is_closed(connect_sdk: Any) -> None:
    sdk = connect_sdk()
    job = sdk.submit("story")
    sdk.close()
    for ask in (job.status, lambda: job.result(1), lambda: sdk.submit("x"), lambda: next(job.stream())):
        with pytest.raises(ConnectionError, match="closed"):
            ask()


def quick_to_doubt(sdk: Any) -> None:
    """Make a client look into Redis after a short silence instead of seconds."""
    client = getattr(sdk, "_client", sdk)
    client._around = dataclasses.replace(
        client._around, settings=dataclasses.replace(client._around.settings, backstop_s=0.05)
    )
