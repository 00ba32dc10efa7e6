"""What is pushed is kept within bounds, and what is dropped is admitted."""

from __future__ import annotations

import gc

import msgpack
import pytest

from penstock.feed import FeedTable, Inbox
from penstock_core.protocol.codec import encode_event
from penstock_core.protocol.errors import UndecodableRecord
from penstock_core.protocol.events import JobEnded, TokenChunk
from penstock_core.protocol.jobs import JobState

CHUNK = encode_event(TokenChunk(1, 0, 0, (1,), ("x",)))
ENDED = encode_event(JobEnded(JobState.COMPLETED, 1))


def drained(inbox: Inbox) -> list[bytes]:
    events = []
    while (event := inbox.take()) is not None:
        events.append(event)
    return events


def test_a_full_inbox_forgets_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.feed.INBOX_BYTES", 3 * len(CHUNK))
    woken: list[int] = []
    inbox = Inbox(lambda: woken.append(1), chunks=True)
    for _ in range(100):
        inbox.put(CHUNK)
    assert len(woken) == 100
    assert len(drained(inbox)) == 4
    assert inbox.take_lost()
    assert not inbox.take_lost()
    inbox.put(CHUNK)
    assert drained(inbox) == [CHUNK]


def test_a_feed_is_pristine_until_its_first_event() -> None:
    table = FeedTable()
    (feed,) = table.add_own(["a"])
    assert feed.pristine
    assert not table.obtain("b", "channel:b").pristine, "an attached job has a past"
    table.deliver("a", CHUNK)
    assert not feed.pristine


def test_an_interruption_reaches_every_own_job_and_no_other() -> None:
    table = FeedTable()
    (own,), foreign = table.add_own(["a"]), table.obtain("b", "channel:b")
    inboxes = []
    for feed in (own, foreign):
        inboxes.append(Inbox(lambda: None, chunks=True))
        table.open(feed, inboxes[-1])
    table.mark_own_lost()
    assert [inbox.take_lost() for inbox in inboxes] == [True, False]
    assert not own.pristine


def test_who_waits_for_the_end_is_not_bothered_with_chunks() -> None:
    table = FeedTable()
    (feed,) = table.add_own(["a"])
    inbox = Inbox(lambda: None, chunks=False)
    table.open(feed, inbox)
    frame = msgpack.packb([("a", CHUNK), ("stranger", CHUNK), ("a", ENDED)])
    table.deliver_frame(frame)
    assert drained(inbox) == [ENDED]
    assert feed.ended == ENDED
    table.close(feed, inbox)
    table.deliver("a", ENDED)
    assert drained(inbox) == []


def test_a_table_keeps_no_feed_alive() -> None:
    table = FeedTable()
    feeds = table.add_own([str(i) for i in range(100)])
    assert len(table) == 100
    del feeds
    gc.collect()
    assert len(table) == 0


@pytest.mark.parametrize("frame", [b"", b"\xc1", msgpack.packb(3), msgpack.packb([("a",)])])
def test_a_frame_that_is_none_is_an_error_and_not_a_crash(frame: bytes) -> None:
    with pytest.raises(UndecodableRecord):
        FeedTable().deliver_frame(frame)
