"""A stream is gapless and free of repetitions: from any offset, for any reader, at any time, whatever breaks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from penstock import JobCancelled, TokenChunk
from penstock.client import Client
from penstock_core.protocol.jobs import FinishReason, JobState
from penstock_core.protocol.keys import QueueKeys
from tests.integration.producer.scripted import ScriptedWorker, piece
from tests.worker_process import until

pytestmark = pytest.mark.integration


def tokens(chunks: Iterator[TokenChunk] | list[TokenChunk], index: int = 0) -> list[int]:
    """The token ids of a choice, after checking that every chunk begins where the last one ended."""
    found: list[int] = []
    begun = False
    for chunk in chunks:
        if chunk.index == index:
            assert not begun or chunk.offset == found[-1] + 1
            assert len(chunk.pieces) == max(1, len(chunk.token_ids))
            assert chunk.text == "".join(piece(index, token) for token in chunk.token_ids)
            if chunk.token_ids:
                assert chunk.offset == chunk.token_ids[0]
                begun = True
                found += chunk.token_ids
    return found


def test_tokens_arrive_while_the_job_runs(sdk: Any, worker: ScriptedWorker) -> None:
    job = sdk.submit("story", max_tokens=10)
    held = worker.claim_one(job.id)
    stream = job.stream(timeout=30)
    worker.say(held, 3)
    assert next(stream).token_ids == (0, 1, 2)
    worker.say(held, 2)
    assert next(stream).token_ids == (3, 4)
    worker.end(held)
    last = next(stream)
    assert (last.token_ids, last.finish_reason) == ((), FinishReason.LENGTH)
    with pytest.raises(StopIteration):
        next(stream)


@pytest.mark.parametrize("offset", [0, 1, 5, 7, 12, 19, 20, 21])
def test_a_stream_begins_at_any_offset_of_a_finished_job(sdk: Any, worker: ScriptedWorker, offset: int) -> None:
    job = sdk.submit("story")
    held = worker.claim_one(job.id)
    for count in (5, 1, 7, 7):
        worker.say(held, count)
    worker.end(held)
    chunks = list(sdk.job(job.id).stream(from_offset=offset, timeout=30))
    assert tokens(chunks) == list(range(offset, 20))
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == (
        [FinishReason.LENGTH] if offset <= 20 else []
    )


def test_a_reader_that_comes_late_gets_the_past_and_the_future(connect_sdk: Any, worker: ScriptedWorker) -> None:
    job = connect_sdk().submit("story")
    held = worker.claim_one(job.id)
    for _ in range(5):
        worker.say(held, 2)
    late = connect_sdk().job(job.id).stream(timeout=30)
    first = next(late)
    assert first.offset == 0
    worker.say(held, 2)
    worker.end(held)
    assert tokens([first, *late]) == list(range(12))


def test_two_readers_of_one_job_see_the_same(connect_sdk: Any, worker: ScriptedWorker) -> None:
    sdk = connect_sdk()
    job = sdk.submit("story")
    held = worker.claim_one(job.id)
    mine, again, stranger = job.stream(timeout=30), job.stream(timeout=30), connect_sdk().job(job.id).stream(timeout=30)
    worker.say(held, 4)
    seen = [[next(mine)], [next(again)], [next(stranger)]]
    worker.say(held, 4)
    worker.end(held)
    for stream, chunks in zip((mine, again, stranger), seen, strict=True):
        assert tokens([*chunks, *stream]) == list(range(8))


def test_choices_interleave_and_one_can_be_picked(sdk: Any, worker: ScriptedWorker) -> None:
    job = sdk.submit("story", n=3)
    held = worker.claim_one(job.id)
    worker.say_all([(held, 0, 2), (held, 1, 3), (held, 2, 1)])
    worker.say_all([(held, 2, 4), (held, 1, 2)])
    worker.end(held)
    everything = list(job.stream(timeout=30))
    assert [tokens(everything, index) for index in range(3)] == [[0, 1], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    picked = list(job.stream(from_offset=2, index=1, timeout=30))
    assert {chunk.index for chunk in picked} == {1}
    assert tokens(picked, 1) == [2, 3, 4]
    assert "".join(job.text_stream(index=2, timeout=30)) == "".join(piece(2, offset) for offset in range(5))


def test_a_stream_of_a_cancelled_job_gives_its_tokens_and_then_says_so(sdk: Any, worker: ScriptedWorker) -> None:
    job = sdk.submit("story")
    held = worker.claim_one(job.id)
    worker.say(held, 3)
    worker.end(held, JobState.CANCELLED)
    stream = job.stream(timeout=30)
    assert next(stream).token_ids == (0, 1, 2)
    assert next(stream).finish_reason is FinishReason.CANCELLED
    with pytest.raises(JobCancelled) as caught:
        next(stream)
    assert caught.value.result is not None
    assert caught.value.result.token_ids == (0, 1, 2)


def test_no_token_is_lost_when_the_reader_connection_is_killed(
    sdk: Any, worker: ScriptedWorker, redis_client: redis.Redis
) -> None:
    job = sdk.submit("story")
    held = worker.claim_one(job.id)
    stream = job.stream(timeout=30)
    seen = []
    for _ in range(5):
        worker.say(held, 3)
        seen.append(next(stream))
        redis_client.client_kill_filter(_type="pubsub")
        worker.say(held, 2)  # nobody is subscribed: only the log has these
        while seen[-1].end < worker.offset_of(job.id):
            seen.append(next(stream))
    worker.end(held)
    assert tokens([*seen, *stream]) == list(range(25))


def test_every_connection_killed_at_once_loses_nothing(
    sdk: Any, worker: ScriptedWorker, redis_client: redis.Redis
) -> None:
    job = sdk.submit("story")
    held = worker.claim_one(job.id)
    stream = job.stream(timeout=30)
    worker.say(held, 1)
    seen = [next(stream)]
    redis_client.client_kill_filter(_type="pubsub")
    redis_client.client_kill_filter(_type="normal", skipme=True)
    worker.say(held, 3)
    worker.end(held)
    assert tokens([*seen, *stream]) == list(range(4))


def test_a_slow_reader_falls_back_to_the_log_instead_of_growing(
    sdk: Any, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.feed.INBOX_BYTES", 512)
    job = sdk.submit("story")
    held = worker.claim_one(job.id)
    stream = job.stream(timeout=30)
    worker.say(held, 1)
    seen = [next(stream)]
    for _ in range(300):
        worker.say(held, 2)
    worker.end(held)
    assert tokens([*seen, *stream]) == list(range(601))


def test_a_log_longer_than_a_page_is_read_to_its_end(sdk: Any, worker: ScriptedWorker, connect_sdk: Any) -> None:
    job = sdk.submit("story")
    held = worker.claim_one(job.id)
    for _ in range(40):
        worker.say_all([(held, 0, 1)] * 16)
    late = connect_sdk().job(job.id).stream(timeout=30)
    seen = [next(late)]
    worker.end(held)
    assert tokens([*seen, *late]) == list(range(640))


def test_an_abandoned_stream_leaves_no_subscription(redis_url: str, queue: str, worker: ScriptedWorker) -> None:
    with Client(redis_url, queue=queue) as owner, Client(redis_url, queue=queue) as client:
        job = owner.submit("story")
        held = worker.claim_one(job.id)
        worker.say(held, 2)
        stream = client.job(job.id).stream(timeout=30)
        next(stream)
        stream.close()
        reader = client._reader()
        assert reader is not None
        keys = QueueKeys(queue)
        assert reader._subscriptions.names == [keys.client(reader.client_id)]
        worker.end(held)
        assert owner.job(job.id).result(30).token_ids == (0, 1)


def test_text_stops_and_reasons_survive_a_reader_that_reconnects_by_offset(sdk: Any, worker: ScriptedWorker) -> None:
    """A reader keeps only the offset it has reached; each call goes on exactly there."""
    job = sdk.submit("story")
    held = worker.claim_one(job.id)
    text, offset = "", 0
    for count in (3, 1, 4):
        worker.say(held, count)
        for chunk in sdk.job(job.id).stream(from_offset=offset, timeout=30):
            text, offset = text + chunk.text, chunk.end
            if offset == worker.offset_of(job.id):
                break
    worker.end(held)
    rest = list(sdk.job(job.id).stream(from_offset=offset, timeout=30))
    assert [(chunk.token_ids, chunk.finish_reason) for chunk in rest] == [((), FinishReason.LENGTH)]
    assert text == "".join(piece(0, position) for position in range(8))


def test_readers_in_many_threads_share_one_connection(
    redis_url: str, redis_client: redis.Redis, queue: str, worker: ScriptedWorker
) -> None:
    until(lambda: not redis_client.client_list(_type="pubsub"), "connections of earlier tests to end")
    with Client(redis_url, queue=queue) as client:
        jobs = client.submit_many(["story"] * 20)
        held = worker.claim(20)
        found: dict[str, list[int]] = {}

        def follow(job: Any) -> None:
            found[job.id] = tokens(job.stream(timeout=30))

        threads = [threading.Thread(target=follow, args=(job,)) for job in jobs]
        for thread in threads:
            thread.start()
        for _ in range(5):
            worker.say_all([(job, 0, 2) for job in held])
        assert len(redis_client.client_list(_type="pubsub")) == 1
        worker.end_all(held)
        for thread in threads:
            thread.join(30)
        assert found == {job.id: list(range(10)) for job in jobs}  # type: ignore[union-attr]
