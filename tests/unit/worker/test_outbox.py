"""The outbox: what it merges says what its parts said, and what it sent is sent again as it was."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock_core.protocol.events import TokenChunk
from penstock_core.protocol.jobs import FinishReason, JobResult, JobState, TokenLogprob
from penstock_core.protocol.transitions import ClaimedJob
from penstock_worker.held import HeldJob, HeldJobs
from penstock_worker.outbox import MAX_CHUNK_TOKENS, Fail, Finish, HandBack, Outbox, Parcel, join


def held_job(job_id: str = "j", attempt: int = 1) -> HeldJob:
    claimed = ClaimedJob(job_id, attempt, b"", 5, "default", "", 0, 0, None, 0, 0, 3, None, [])
    return HeldJob(claimed, 0.0)


@pytest.fixture
def held() -> HeldJobs:
    return HeldJobs(lambda request_id, reason: None)


def chunk(offset: int, count: int, *, index: int = 0, text: str = "", **more: object) -> TokenChunk:
    pieces = tuple(f"{offset + n} " for n in range(count)) if count else (text,)
    tokens = tuple(range(offset, offset + count))
    return TokenChunk(1, index, offset, tokens, pieces, **more)  # type: ignore[arg-type]


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 300)), max_size=20), st.booleans())
def test_merged_chunks_say_what_their_parts_said(steps: list[tuple[int, int]], logprobs: bool) -> None:
    parts: list[TokenChunk] = []
    ends = {0: 0, 1: 0}
    for index, count in steps:
        part = chunk(ends[index], count, index=index, text="held back")
        if logprobs:
            part = dataclasses.replace(part, logprobs=tuple(TokenLogprob(-0.1 * n) for n in range(count)))
        parts.append(part)
        ends[index] += count
    parcel = Parcel(held_job())
    for part in parts:
        parcel.add(part)
    for index in (0, 1):
        mine = [one for one in parts if one.index == index]
        merged = [one for one in parcel.all_chunks() if one.index == index]
        assert sum((one.token_ids for one in merged), ()) == sum((one.token_ids for one in mine), ())
        assert "".join(one.text for one in merged) == "".join(one.text for one in mine)
        assert sum((one.logprobs or () for one in merged), ()) == sum((one.logprobs or () for one in mine), ())
        assert all(first.end == second.offset for first, second in pairwise(merged))
        assert all(len(one.pieces) == max(1, len(one.token_ids)) for one in merged)
    assert parcel.tokens == sum(ends.values())


def test_chunks_are_bounded_in_tokens() -> None:
    parcel = Parcel(held_job())
    for offset in range(3 * MAX_CHUNK_TOKENS):
        parcel.add(chunk(offset, 1))
    assert [len(one.token_ids) for one in parcel.all_chunks()] == [MAX_CHUNK_TOKENS] * 3


def test_nothing_is_joined_behind_an_end_or_across_a_gap() -> None:
    assert join(chunk(0, 2, finish_reason=FinishReason.STOP), chunk(2, 1)) is None
    assert join(chunk(0, 2), chunk(3, 1)) is None


def test_an_unanswered_batch_is_sent_again_as_it_was_before_anything_newer(held: HeldJobs) -> None:
    job = held_job()
    held.add(job)
    outbox = Outbox(held)
    outbox.add_chunk(job, chunk(0, 2))
    first = [one for parcel in outbox.take() for one in parcel.all_chunks()]
    outbox.add_chunk(job, chunk(2, 1))
    assert [one for parcel in outbox.take() for one in parcel.all_chunks()] == first
    outbox.answered()
    assert [one.offset for parcel in outbox.take() for one in parcel.all_chunks()] == [2]


def test_jobs_that_were_let_go_are_left_out(held: HeldJobs) -> None:
    kept, gone = held_job("kept"), held_job("gone")
    outbox = Outbox(held)
    for job in (kept, gone):
        held.add(job)
        outbox.add_chunk(job, chunk(0, 1))
    outbox.take()
    held.lose(gone)
    assert [parcel.job for parcel in outbox.take()] == [kept]


def test_the_first_ending_counts(held: HeldJobs) -> None:
    job = held_job()
    held.add(job)
    outbox = Outbox(held)
    finish = Finish(JobState.COMPLETED, JobResult())
    outbox.end(job, finish)
    outbox.end(job, Fail("late", "too late", retryable=True))
    outbox.end(job, HandBack("too late"))
    (parcel,) = outbox.take()
    assert parcel.ending is finish
    assert job.ended


def test_two_attempts_of_a_job_are_two_parcels(held: HeldJobs) -> None:
    first, second = held_job(attempt=1), held_job(attempt=2)
    outbox = Outbox(held)
    for job in (first, second):
        held.add(job)
        outbox.add_chunk(job, chunk(0, 1))
    assert [parcel.job.attempt for parcel in outbox.take()] == [1, 2]
    held.discard(first)
    assert held.by_job("j") is second
