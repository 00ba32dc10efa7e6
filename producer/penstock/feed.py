"""Where pushed events land: per job a feed, per waiting reader an inbox of bounded size. No I/O.

Filled by the one reader connection of the process, emptied by whoever waits. Nothing here is the truth: a full inbox
forgets and says so (`lost`), and its owner goes back to the log in Redis. One thread fills and one thread empties an
inbox; the fields each writes are disjoint, so neither takes a lock for it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from weakref import WeakValueDictionary

from penstock_core.protocol.codec import decode_frame, is_terminal_event

INBOX_BYTES = 1024 * 1024  # per waiting reader
KEPT_END_BYTES = 256 * 1024  # per job handle; a larger result is fetched when it is asked for


class Inbox:
    """Events pushed for one reader of one job.

    Attributes:
        chunks: whether the reader wants token chunks, or waits for the end only.
        lost: events were pushed that are not here; the log has them.
    """

    __slots__ = ("_events", "_received_bytes", "_taken_bytes", "chunks", "lost", "wake")

    def __init__(self, wake: Callable[[], object], *, chunks: bool) -> None:
        self.wake = wake
        self.chunks = chunks
        self.lost = False
        self._events: deque[bytes] = deque()
        self._received_bytes = 0  # written by the filling side only
        self._taken_bytes = 0  # written by the emptying side only

    def put(self, event: bytes) -> None:
        """Filling side: add an event, or note its loss where the reader is too far behind."""
        if self.lost or self._received_bytes - self._taken_bytes > INBOX_BYTES:
            self.lost = True
        else:
            self._received_bytes += len(event)
            self._events.append(event)
        self.wake()

    def mark_lost(self) -> None:
        """Filling side: events may have passed by unseen."""
        self.lost = True
        self.wake()

    def take(self) -> bytes | None:
        """Emptying side: the next event, or None."""
        try:
            event = self._events.popleft()
        except IndexError:
            return None
        self._taken_bytes += len(event)
        return event

    def take_lost(self) -> bool:
        """Emptying side, when empty: whether the log must be read. Asked before it is read."""
        lost, self.lost = self.lost, False
        return lost

    @property
    def is_quiet(self) -> bool:
        """Whether there is nothing to do."""
        return not self._events and not self.lost


class Feed:
    """What this process is told of one job. Lives as long as a handle or a reader of the job does.

    Attributes:
        channel: the job's own channel; None for a job submitted here, whose events come on the process's channel.
        ended: the terminal event's bytes, once pushed and if not too large to keep.
        pristine: every event of the job since its submission has been, or will be, pushed here, and none has yet. What
            is not pristine has a past that only the log knows.
        missed: the end may have passed by without being kept: whoever waits for it has to look.
    """

    __slots__ = ("__weakref__", "channel", "ended", "inboxes", "job_id", "missed", "pristine")

    def __init__(self, job_id: str, channel: str | None) -> None:
        self.job_id = job_id
        self.channel = channel
        self.inboxes: tuple[Inbox, ...] = ()
        self.ended: bytes | None = None
        self.pristine = channel is None
        self.missed = channel is not None

    def deliver(self, event: bytes) -> None:
        """Pass an event on. `pristine` and `missed` change before the inboxes are read: an inbox added while they still
        stand misses nothing."""
        self.pristine = False
        terminal = is_terminal_event(event)
        if terminal and len(event) <= KEPT_END_BYTES:
            self.ended = event
        elif terminal:
            self.missed = True
        for inbox in self.inboxes:
            if terminal or inbox.chunks:
                inbox.put(event)

    def mark_lost(self) -> None:
        """Events may have passed by unseen."""
        self.pristine = False
        self.missed = True
        for inbox in self.inboxes:
            inbox.mark_lost()


class FeedTable:
    """The feeds of one queue in this process, by job id. Holds none of them alive."""

    def __init__(self) -> None:
        self._feeds: WeakValueDictionary[str, Feed] = WeakValueDictionary()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._feeds)

    def add_own(self, job_ids: Sequence[str]) -> list[Feed]:
        """Feeds for jobs about to be submitted from here."""
        feeds = [Feed(job_id, None) for job_id in job_ids]
        with self._lock:
            for feed in feeds:
                self._feeds[feed.job_id] = feed
        return feeds

    def obtain(self, job_id: str, channel: str) -> Feed:
        """The feed of any job; one that is new to this process listens on the job's own channel."""
        with self._lock:
            feed = self._feeds.get(job_id)
            if feed is None:
                feed = self._feeds[job_id] = Feed(job_id, channel)
            return feed

    def open(self, feed: Feed, inbox: Inbox) -> None:
        """Let events of the job reach the inbox."""
        with self._lock:
            feed.inboxes += (inbox,)

    def close(self, feed: Feed, inbox: Inbox) -> bool:
        """Stop that, unless the lock is taken; whether it was done.

        It may be called by the garbage collector, in the middle of any of these methods: waiting could be for ever.
        """
        if not self._lock.acquire(blocking=False):
            return False
        try:
            feed.inboxes = tuple(other for other in feed.inboxes if other is not inbox)
        finally:
            self._lock.release()
        return True

    def deliver(self, job_id: str, event: bytes) -> None:
        """An event arrived; nobody waiting for it is no error."""
        feed = self._feeds.get(job_id)
        if feed is not None:
            feed.deliver(event)

    def deliver_frame(self, frame: bytes) -> None:
        """A frame of the process's channel arrived. Raises `UndecodableRecord`."""
        for job_id, event in decode_frame(frame):
            self.deliver(job_id, event)

    def mark_own_lost(self) -> None:
        """The process's channel was interrupted."""
        with self._lock:
            feeds = [feed for feed in self._feeds.values() if feed.channel is None]
        for feed in feeds:
            feed.mark_lost()
