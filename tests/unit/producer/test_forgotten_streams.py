"""A stream that nobody finished is closed by the garbage collector, in the middle of anything.

The story: `submit_many` held the feed table's lock while a weak reference was made; that set off a collection, which
finalised a stream a test had broken off; its clean-up waited for the same lock, on the same thread, for ever.
"""

from __future__ import annotations

import fakeredis
import pytest

from penstock.feed import Feed, FeedTable, Inbox
from penstock.reader import Reader
from penstock_core.protocol.keys import QueueKeys


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Reader:
    """A reader whose thread does not run, so that only the test moves it."""
    made = Reader(fakeredis.FakeRedis(protocol=2))
    monkeypatch.setattr("penstock.reader.threading.Thread.start", lambda thread: None)
    return made


def watched(reader: Reader) -> tuple[QueueKeys, FeedTable, Feed, Inbox]:
    keys = QueueKeys("q")
    table = reader.table(keys)
    (feed,) = table.add_own(["job"])
    inbox = reader.watch(keys, "job", feed, chunks=True)[1]
    return keys, table, feed, inbox


def test_closing_under_the_tables_lock_waits_for_nothing_and_is_made_up_for(reader: Reader) -> None:
    keys, table, feed, inbox = watched(reader)
    with table._lock:
        reader.unwatch(keys, feed, inbox)
        assert feed.inboxes == (inbox,)
    reader.watch(keys, "job", feed, chunks=False)
    assert inbox not in feed.inboxes


def test_closing_under_the_readers_lock_waits_for_nothing_and_is_made_up_for(reader: Reader) -> None:
    keys, _, feed, inbox = watched(reader)
    with reader._changed:
        reader.unwatch(keys, feed, inbox)
    reader._let_go()
    assert feed.inboxes == ()


def test_an_inbox_that_is_left_keeps_nothing_more(reader: Reader) -> None:
    keys, table, feed, inbox = watched(reader)
    with table._lock:
        reader.unwatch(keys, feed, inbox)
    feed.deliver(b"\x93\x01\x00 a chunk")
    assert inbox.take() is None
