"""What only the holder of a job may do, and what a repeated or late call comes to."""

from __future__ import annotations

import pytest

from penstock_core.protocol import transitions as t
from penstock_core.protocol.codec import decode_event, decode_frame
from penstock_core.protocol.errors import InvalidRequest
from penstock_core.protocol.events import JobEnded, TokenChunk
from penstock_core.protocol.jobs import FinishReason, JobState
from tests.queue_driver import LEASE_MS, QueueDriver


def taken_over(driver: QueueDriver) -> t.ClaimedJob:
    """A job that w1 held until its lease ran out, and w2 holds now. Returns w1's view."""
    driver.submit()
    job = driver.take("w1")
    assert driver.publish("w1", driver.chunk(job.job_id, 1, 0, [1, 2])) == ["ok"]
    driver.tick(LEASE_MS)
    assert driver.reclaim().requeued == [job.job_id]
    again = driver.take("w2")
    assert (again.job_id, again.attempt) == (job.job_id, 2)
    return job


class TestZombies:
    """A worker that lost its job can publish nothing, renew nothing, end nothing, and learns it."""

    def test_zombie_cannot_publish_after_reclaim(self, driver: QueueDriver) -> None:
        job = taken_over(driver)
        assert driver.publish("w1", driver.chunk(job.job_id, 1, 2, [3])) == ["fenced"]
        assert driver.tokens(job.job_id) == [1, 2]

    def test_zombie_cannot_renew_finish_fail_release_or_bury(self, driver: QueueDriver) -> None:
        job = taken_over(driver)
        lease = driver.client.zscore(driver.keys.leases, job.job_id)
        driver.tick(1000)
        assert driver.renew("w1", (job.job_id, 1)) == ["fenced"]
        assert driver.finish("w1", driver.final(job.job_id, 1)) == ["fenced"]
        assert driver.fail("w1", job.job_id, 1) == "fenced"
        assert driver.release("w1", (job.job_id, 1)) == ["fenced"]
        assert driver.bury("w1", job.job_id, 1) == "fenced"
        assert driver.client.zscore(driver.keys.leases, job.job_id) == lease
        assert driver.status(job.job_id).owner == "w2"
        assert driver.stats()["fenced"] == 5

    def test_the_same_worker_s_earlier_attempt_is_a_zombie_too(self, driver: QueueDriver) -> None:
        driver.submit()
        job = driver.take("w1")
        driver.release("w1", (job.job_id, 1))
        assert driver.take("w1").attempt == 2
        assert driver.publish("w1", driver.chunk(job.job_id, 1, 0, [1])) == ["fenced"]
        assert driver.renew("w1", (job.job_id, 1)) == ["fenced"]
        assert driver.finish("w1", driver.final(job.job_id, 1)) == ["fenced"]
        assert driver.fail("w1", job.job_id, 1) == "fenced"
        assert driver.release("w1", (job.job_id, 1)) == ["fenced"]
        assert driver.bury("w1", job.job_id, 1) == "fenced"
        assert driver.publish("w1", driver.chunk(job.job_id, 2, 0, [1])) == ["ok"]

    def test_nothing_is_appended_after_the_end(self, driver: QueueDriver) -> None:
        job_id = driver.submit()
        driver.take()
        driver.finish("w1", driver.final(job_id, 1))
        assert driver.publish("w1", driver.chunk(job_id, 1, 0, [1])) == ["fenced"]
        assert driver.renew("w1", (job_id, 1)) == ["fenced"]
        driver.ended(job_id)

    def test_another_worker_with_the_right_attempt_is_fenced(self, driver: QueueDriver) -> None:
        driver.submit()
        job = driver.take("w1")
        assert driver.publish("w2", driver.chunk(job.job_id, 1, 0, [1])) == ["fenced"]
        assert driver.renew("w2", (job.job_id, 1)) == ["fenced"]
        assert driver.finish("w2", driver.final(job.job_id, 1)) == ["fenced"]
        assert driver.fail("w2", job.job_id, 1) == "fenced"
        assert driver.release("w2", (job.job_id, 1)) == ["fenced"]
        assert driver.bury("w2", job.job_id, 1) == "fenced"

    def test_nobody_holds_a_job_that_does_not_exist(self, driver: QueueDriver) -> None:
        assert driver.renew("w1", ("nope", 1)) == ["fenced"]
        assert driver.publish("w1", driver.chunk("nope", 1, 0, [1])) == ["fenced"]
        assert driver.finish("w1", driver.final("nope", 1)) == ["fenced"]
        assert driver.fail("w1", "nope", 1) == "fenced"
        assert driver.release("w1", ("nope", 1)) == ["fenced"]
        assert driver.bury("w1", "nope", 1) == "fenced"

    def test_a_zombie_among_live_holds_spoils_only_its_own_record(self, driver: QueueDriver) -> None:
        zombie = taken_over(driver)
        driver.submit()
        live = driver.take("w1")
        records = [driver.chunk(zombie.job_id, 1, 2, [9]), driver.chunk(live.job_id, 1, 0, [1])]
        assert driver.publish("w1", *records) == ["fenced", "ok"]
        assert driver.finish("w1", driver.final(zombie.job_id, 1), driver.final(live.job_id, 1)) == ["fenced", "ok"]

    def test_a_requeued_dead_job_keeps_its_old_workers_fenced(self, driver: QueueDriver) -> None:
        driver.submit()
        job = driver.take("w1")
        driver.bury("w1", job.job_id, 1)
        driver.requeue(job.job_id)
        assert driver.take("w1").attempt == 2
        assert driver.publish("w1", driver.chunk(job.job_id, 1, 0, [1])) == ["fenced"]


class TestPublish:
    def test_chunks_are_appended_in_order_and_pushed_to_both_channels(self, driver: QueueDriver) -> None:
        job_id = driver.submit(client_id="c1")
        other = driver.submit(client_id="c1")
        driver.claim("w1", 2)
        records = [driver.chunk(job_id, 1, 0, [1, 2]), driver.chunk(other, 1, 0, [7]), driver.chunk(job_id, 1, 2, [3])]
        channel = driver.keys.channel(job_id)
        with driver.listening(channel, driver.keys.client("c1")) as heard:
            assert driver.publish("w1", *records) == ["ok"] * 3
        assert [data for where, data in heard if where == channel] == [records[0].payload, records[2].payload]
        (frame,) = [data for where, data in heard if where != channel]
        assert decode_frame(frame) == [(r.job_id, r.payload) for r in records]
        assert driver.tokens(job_id) == [1, 2, 3]

    def test_an_offset_that_is_not_the_next_is_refused(self, driver: QueueDriver) -> None:
        driver.submit()
        job = driver.take()
        driver.publish("w1", driver.chunk(job.job_id, 1, 0, [1, 2]))
        assert driver.publish("w1", driver.chunk(job.job_id, 1, 3, [4])) == ["fenced"]
        assert driver.publish("w1", driver.chunk(job.job_id, 1, 1, [9])) == ["fenced"]
        assert driver.tokens(job.job_id) == [1, 2]
        assert driver.stats()["gaps"] == 2

    def test_a_call_repeated_after_a_lost_reply_changes_nothing(self, driver: QueueDriver) -> None:
        driver.submit(client_id="c1")
        job = driver.take()
        call = [driver.chunk(job.job_id, 1, 0, [1, 2]), driver.chunk(job.job_id, 1, 2, [3])]
        assert driver.publish("w1", *call) == ["ok", "ok"]
        before = driver.client.hgetall(driver.keys.job(job.job_id)), driver.stats()
        assert driver.publish("w1", *call) == ["ok", "ok"]
        assert (driver.client.hgetall(driver.keys.job(job.job_id)), driver.stats()) == before
        assert driver.tokens(job.job_id) == [1, 2, 3]
        assert driver.publish("w1", driver.chunk(job.job_id, 1, 3, [4])) == ["ok"]

    def test_a_chunk_without_tokens_is_not_doubled_by_a_repetition(self, driver: QueueDriver) -> None:
        driver.submit()
        job = driver.take()
        last = driver.chunk(job.job_id, 1, 1, [], finish_reason=FinishReason.STOP)
        assert driver.publish("w1", driver.chunk(job.job_id, 1, 0, [1]), last) == ["ok", "ok"]
        assert driver.publish("w1", last) == ["ok"]
        chunks = [event for event in driver.events(job.job_id) if isinstance(event, TokenChunk)]
        assert [chunk.finish_reason for chunk in chunks] == [None, FinishReason.STOP]

    def test_choices_have_offsets_of_their_own(self, driver: QueueDriver) -> None:
        driver.submit()
        job = driver.take()
        assert driver.publish(
            "w1",
            driver.chunk(job.job_id, 1, 0, [1, 2], index=0),
            driver.chunk(job.job_id, 1, 0, [7], index=1),
            driver.chunk(job.job_id, 1, 2, [3], index=0),
            driver.chunk(job.job_id, 1, 1, [8, 9], index=1),
        ) == ["ok"] * 4  # fmt: skip
        assert (driver.tokens(job.job_id, 0), driver.tokens(job.job_id, 1)) == ([1, 2, 3], [7, 8, 9])
        assert driver.status(job.job_id).tokens == 6

    def test_the_next_attempt_gets_the_checkpoint_and_goes_on_from_it(self, driver: QueueDriver) -> None:
        taken_over(driver)
        job_id = "job00001"
        driver.release("w2", (job_id, 2))
        job = driver.take("w3")
        (chunk,) = [decode_event(data) for data in job.log]
        assert isinstance(chunk, TokenChunk)
        assert (job.attempt, chunk.token_ids, chunk.attempt) == (3, (1, 2), 1)
        assert driver.publish("w3", driver.chunk(job_id, 3, 2, [3])) == ["ok"]
        assert driver.tokens(job_id) == [1, 2, 3]

    def test_a_log_over_its_limit_ends_the_job_with_the_reason(self, driver: QueueDriver) -> None:
        driver.set_config(max_log_bytes=60)
        driver.submit()
        job = driver.take()
        statuses = [driver.publish("w1", driver.chunk(job.job_id, 1, i, [i]))[0] for i in range(6)]
        assert statuses[0] == "ok"
        assert statuses[-1] == "fenced"
        ended = driver.ended(job.job_id)
        assert (ended.state, ended.attempt) == ("failed", 1)
        assert ended.failure is not None
        assert (ended.failure.code, "max_log_bytes" in ended.failure.message) == ("log_full", True)
        assert driver.finish("w1", driver.final(job.job_id, 1)) == ["fenced"]

    def test_a_holder_is_told_to_stop_and_its_last_tokens_are_kept(self, driver: QueueDriver) -> None:
        cancelled, expired = driver.submit(), driver.submit(deadline_s=1)
        driver.claim("w1", 2)
        driver.cancel(cancelled)
        driver.tick(1000)
        records = [driver.chunk(cancelled, 1, 0, [1]), driver.chunk(expired, 1, 0, [1])]
        assert driver.publish("w1", *records) == ["cancelled", "expired"]
        assert (driver.tokens(cancelled), driver.tokens(expired)) == ([1], [1])
        assert driver.renew("w1", (cancelled, 1), (expired, 1)) == ["cancelled", "expired"]


class TestRenew:
    def test_a_renewed_lease_runs_from_now(self, driver: QueueDriver) -> None:
        driver.submit()
        job = driver.take()
        driver.tick(LEASE_MS - 1)
        assert driver.renew("w1", (job.job_id, 1)) == ["ok"]
        driver.tick(LEASE_MS - 1)
        assert driver.reclaim().requeued == []
        driver.tick(1)
        assert driver.reclaim().requeued == [job.job_id]

    def test_a_lease_that_ran_out_unnoticed_can_still_be_renewed(self, driver: QueueDriver) -> None:
        driver.submit()
        job = driver.take()
        driver.tick(LEASE_MS * 3)
        assert driver.renew("w1", (job.job_id, 1)) == ["ok"]
        assert driver.reclaim().requeued == []

    def test_a_worker_s_record_and_heartbeat_are_kept(self, driver: QueueDriver) -> None:
        driver.renew("w1", record=b"first")
        driver.tick(500)
        driver.renew("w1")
        assert driver.client.hget(driver.keys.workers, "w1") == b"first"
        assert driver.client.zscore(driver.keys.heartbeats, "w1") == driver.now
        (worker,) = driver.snapshot().workers
        assert (worker.worker_id, worker.heartbeat_ms, worker.record) == ("w1", driver.now, None)


class TestFinish:
    def test_the_end_is_one_event_with_result_and_lifetimes(self, driver: QueueDriver) -> None:
        job_id = driver.submit(client_id="c1", result_ttl_s=7)
        driver.take()
        driver.publish("w1", driver.chunk(job_id, 1, 0, [1]))
        final = driver.final(job_id, 1, chunks=[driver.chunk(job_id, 1, 1, [2, 3])], tokens=(10, 3))
        assert driver.finish("w1", final) == ["ok"]
        assert driver.tokens(job_id) == [1, 2, 3]
        assert driver.ended(job_id) == decode_event(final.ended)
        status = driver.status(job_id)
        assert (status.state, status.finished_ms, status.tokens, status.owner) == ("completed", driver.now, 3, "w1")
        for key in (driver.keys.job(job_id), driver.keys.events(job_id)):
            assert 0 < driver.client.pttl(key) <= 7000
        assert driver.client.exists(driver.keys.leases, driver.keys.held("w1")) == 0
        assert driver.client.hget(driver.keys.job(job_id), "request") == b""
        stats = driver.stats()
        assert (stats["completed"], stats["running"], stats["tokens_in"], stats["tokens_out"]) == (1, 0, 10, 3)

    def test_a_call_repeated_after_a_lost_reply_answers_ok_and_changes_nothing(self, driver: QueueDriver) -> None:
        job_id = driver.submit()
        driver.take()
        final = driver.final(job_id, 1, chunks=[driver.chunk(job_id, 1, 0, [1])], tokens=(10, 1))
        assert driver.finish("w1", final) == ["ok"]
        stats, tenants = driver.stats(), driver.client.zscore(driver.keys.tenants, "default")
        assert driver.finish("w1", final) == ["ok"]
        assert (driver.stats(), driver.client.zscore(driver.keys.tenants, "default")) == (stats, tenants)
        assert driver.tokens(job_id) == [1]
        driver.ended(job_id)

    @pytest.mark.parametrize("state", [JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED])
    def test_a_worker_ends_a_job_in_any_terminal_state_but_dead(self, driver: QueueDriver, state: JobState) -> None:
        job_id = driver.submit()
        driver.take()
        assert driver.finish("w1", driver.final(job_id, 1, state)) == ["ok"]
        assert driver.ended(job_id).state == driver.state(job_id) == state
        assert driver.stats()[state.value] == 1

    @pytest.mark.parametrize("state", [JobState.DEAD, JobState.QUEUED, JobState.RUNNING])
    def test_no_other_state_is_an_end(self, keys, state: JobState) -> None:
        with pytest.raises(InvalidRequest, match="does not finish as"):
            t.finish(keys, "w1", [QueueDriver.final("job", 1, state)])

    def test_a_final_chunk_with_a_gap_leaves_the_job_running(self, driver: QueueDriver) -> None:
        job_id = driver.submit()
        driver.take()
        assert driver.finish("w1", driver.final(job_id, 1, chunks=[driver.chunk(job_id, 1, 5, [1])])) == ["fenced"]
        assert driver.state(job_id) == "running"
        assert driver.finish("w1", driver.final(job_id, 1)) == ["ok"]

    def test_final_chunks_of_several_choices_and_without_tokens_are_kept(self, driver: QueueDriver) -> None:
        job_id = driver.submit()
        driver.take()
        chunks = [
            driver.chunk(job_id, 1, 0, [1, 2], index=0),
            driver.chunk(job_id, 1, 2, [], index=0, finish_reason=FinishReason.LENGTH),
            driver.chunk(job_id, 1, 0, [7], index=3),
        ]
        assert driver.finish("w1", driver.final(job_id, 1, chunks=chunks, tokens=(10, 3))) == ["ok"]
        assert (driver.tokens(job_id, 0), driver.tokens(job_id, 3)) == ([1, 2], [7])
        assert len(driver.events(job_id)) == 4
        assert driver.stats()["tokens_out"] == 3

    def test_tokens_never_streamed_are_counted_at_the_end(self, driver: QueueDriver) -> None:
        job_id = driver.submit()
        driver.take()
        driver.finish("w1", driver.final(job_id, 1, tokens=(10, 25)))
        assert driver.stats()["tokens_out"] == 25

    def test_ten_thousand_jobs_end_in_one_call(self, driver: QueueDriver) -> None:
        # Lua's unpack gives at most some 8,000 values.
        if driver.client.connection_pool.connection_class.__name__ == "FakeRedisConnection":
            pytest.skip("fakeredis is too slow for it")
        driver.submit_all([driver.new_job() for _ in range(10_000)])
        jobs = [job for _ in range(10) for job in driver.claim("w1", 1000)]
        assert driver.finish("w1", *(driver.final(job.job_id, 1) for job in jobs)) == ["ok"] * 10_000
        assert driver.stats()["completed"] == 10_000

    def test_completion_wins_over_a_cancel_that_came_too_late(self, driver: QueueDriver) -> None:
        job_id = driver.submit()
        driver.take()
        assert driver.cancel(job_id) == "cancelling"
        assert driver.finish("w1", driver.final(job_id, 1)) == ["ok"]
        assert driver.ended(job_id).state == "completed"


class TestFail:
    def test_a_retryable_error_is_retried_after_its_backoff_from_the_checkpoint(self, driver: QueueDriver) -> None:
        job_id = driver.submit(max_retries=1)
        driver.take()
        driver.publish("w1", driver.chunk(job_id, 1, 0, [1]))
        assert driver.fail("w1", job_id, 1, backoff_ms=2000) == "delayed"
        status = driver.status(job_id)
        assert (status.state, status.errors, status.crashes, status.owner) == ("delayed", 1, 0, "")
        assert status.failure is not None
        assert status.failure.code == "engine"
        driver.tick(1999)
        assert driver.reclaim().promoted == 0
        driver.tick(1)
        assert driver.reclaim().promoted == 1
        job = driver.take("w2")
        assert (job.attempt, job.errors, len(job.log)) == (2, 1, 1)
        assert driver.fail("w2", job_id, 2) == "failed"
        assert driver.ended(job_id).failure == driver.status(job_id).failure
        assert driver.stats()["retried"] == 1

    def test_an_error_that_is_not_retryable_ends_the_job(self, driver: QueueDriver) -> None:
        job_id = driver.submit(max_retries=5)
        driver.take()
        assert driver.fail("w1", job_id, 1, retryable=False) == "failed"
        assert (driver.state(job_id), driver.status(job_id).errors) == ("failed", 1)

    @pytest.mark.parametrize(("retries", "outcome"), [(1, "delayed"), (0, "failed")])
    def test_a_call_repeated_after_a_lost_reply_gets_the_first_answer(self, driver, retries: int, outcome: str) -> None:
        job_id = driver.submit(max_retries=retries)
        driver.take()
        assert driver.fail("w1", job_id, 1) == outcome
        stats = driver.stats()
        assert driver.fail("w1", job_id, 1) == outcome
        assert driver.stats() == stats

    def test_a_job_asked_to_stop_is_not_retried(self, driver: QueueDriver) -> None:
        cancelled, expired = driver.submit(), driver.submit(deadline_s=1)
        driver.claim("w1", 2)
        driver.cancel(cancelled)
        driver.tick(1000)
        for _ in range(2):
            assert driver.fail("w1", cancelled, 1) == "cancelled"
            assert driver.fail("w1", expired, 1) == "expired"
        assert (driver.ended(cancelled).state, driver.ended(expired).state) == ("cancelled", "expired")

    def test_a_deadline_that_passes_during_the_backoff_expires_the_job(self, driver: QueueDriver) -> None:
        job_id = driver.submit(deadline_s=1)
        driver.take()
        driver.fail("w1", job_id, 1, backoff_ms=5000)
        driver.tick(1000)
        assert driver.reclaim().ended == [job_id]
        assert driver.ended(job_id).state == "expired"


class TestRelease:
    def test_a_released_job_spends_no_crash_and_no_retry(self, driver: QueueDriver) -> None:
        job_id = driver.submit()
        driver.take()
        driver.publish("w1", driver.chunk(job_id, 1, 0, [1]))
        assert driver.release("w1", (job_id, 1)) == ["ok"]
        job = driver.take("w2")
        assert (job.attempt, job.crashes, job.errors, len(job.log)) == (2, 0, 0, 1)

    def test_a_call_repeated_after_a_lost_reply_answers_ok(self, driver: QueueDriver) -> None:
        job_id = driver.submit()
        driver.take()
        assert driver.release("w1", (job_id, 1)) == ["ok"]
        assert driver.release("w1", (job_id, 1)) == ["ok"]
        assert driver.stats()["queued"] == 1
        assert driver.claim_ids("w2", 5) == [job_id]
        assert driver.release("w1", (job_id, 1)) == ["fenced"]

    def test_a_job_asked_to_stop_ends_instead(self, driver: QueueDriver) -> None:
        cancelled, expired = driver.submit(), driver.submit(deadline_s=1)
        driver.claim("w1", 2)
        driver.cancel(cancelled)
        driver.tick(1000)
        for _ in range(2):
            assert driver.release("w1", (cancelled, 1), (expired, 1)) == ["cancelled", "expired"]
        assert (driver.ended(cancelled).state, driver.ended(expired).state) == ("cancelled", "expired")

    def test_what_a_claim_gave_whose_reply_was_lost_is_given_back(self, driver: QueueDriver) -> None:
        driver.submit_all([driver.new_job() for _ in range(5)])
        known = driver.claim("w1", 2)
        lost = driver.claim_ids("w1", 3)
        given = driver.run(t.release_others(driver.keys, "w1", [(j.job_id, j.attempt) for j in known], driver.now))
        assert sorted(given) == sorted(lost)
        assert driver.claim_ids("w2", 10) == lost
        assert driver.snapshot().running == 5
        assert driver.stats()["reclaimed"] == 0

    def test_deregistering_gives_back_what_is_held_and_forgets_the_worker(self, driver: QueueDriver) -> None:
        job_id, cancelled = driver.submit(), driver.submit()
        driver.renew("w1", record=b"r")
        driver.claim("w1", 2)
        driver.cancel(cancelled)
        assert driver.run(t.deregister(driver.keys, "w1", driver.now)) == [job_id]
        assert driver.ended(cancelled).state == "cancelled"
        assert driver.snapshot().workers == []
        assert driver.client.exists(driver.keys.held("w1")) == 0
        assert driver.take("w2").crashes == 0


class TestBury:
    def test_a_buried_job_is_dead_with_its_reason(self, driver: QueueDriver) -> None:
        job_id = driver.submit()
        driver.take()
        assert driver.bury("w1", job_id, 1) == "ok"
        assert driver.bury("w1", job_id, 1) == "ok"
        ended = driver.ended(job_id)
        assert isinstance(ended, JobEnded)
        assert ended.state == driver.state(job_id) == "dead"
        (letter,) = driver.run(t.dead_letters(driver.keys))
        assert (letter.job_id, letter.code, letter.message, letter.at_ms) == (
            job_id, "undecodable", "not a request", driver.now,
        )  # fmt: skip
        assert driver.stats()["dead"] == 1
