"""What a process keeps of a job it submitted or attached to, and how it opens an inbox for it. Used by both shells."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from penstock.feed import Feed, Inbox
from penstock.flows import Watch, settle
from penstock_core.protocol.errors import QueueFull
from penstock_core.protocol.jobs import JobResult
from penstock_core.protocol.keys import QueueKeys
from penstock_core.protocol.records import quick
from penstock_core.protocol.transitions import NewJob, SubmitOutcome


@quick
@dataclass(frozen=True, slots=True)
class Ticket:
    """One job of this process.

    Attributes:
        duplicate: an earlier job with the same idempotency key, rather than a new one.
        feed: where its events are pushed, if it was submitted here in push mode; the ticket keeps it alive.
        client_id: of the reader that fills the feed; a forked child has another reader.
        deadline_at, knows_deadline: see `Watch`.
    """

    job_id: str
    duplicate: bool = False
    feed: Feed | None = None
    client_id: str = ""
    deadline_at: float | None = None
    knows_deadline: bool = False


class EventReader(Protocol):
    """What the threaded and the asyncio reader have in common."""

    client_id: str

    def watch(self, keys: QueueKeys, job_id: str, feed: Feed | None, *, chunks: bool) -> tuple[Feed, Inbox]:
        """Open an inbox for a job."""

    def unwatch(self, keys: QueueKeys, feed: Feed, inbox: Inbox) -> None:
        """Close it."""


def tickets_of(
    jobs: Sequence[NewJob],
    outcomes: Sequence[SubmitOutcome],
    feeds: Sequence[Feed] | None,
    client_id: str,
    clock: Callable[[], float],
) -> list[Ticket | QueueFull]:
    """A ticket for every job that is in the queue now, and the error of every one that is not."""
    now = clock()
    tickets: list[Ticket | QueueFull] = []
    for position, (job, outcome) in enumerate(zip(jobs, outcomes, strict=True)):
        if outcome.status == "full":
            tickets.append(QueueFull(outcome.message, outcome.retry_after_s))
        elif outcome.job_id != job.job_id:
            tickets.append(Ticket(outcome.job_id, duplicate=True))
        else:
            deadline_s = job.options.deadline_s
            tickets.append(
                Ticket(
                    job.job_id,
                    feed=feeds[position] if feeds is not None else None,
                    client_id=client_id,
                    deadline_at=now + deadline_s if deadline_s is not None else None,
                    knows_deadline=True,
                )
            )
    return tickets


def known_result(ticket: Ticket) -> JobResult | None:
    """The result, where the job's end was pushed here before anyone waited for it; raises the errors of `result_of`."""
    feed = ticket.feed
    if feed is None or feed.ended is None:
        return None
    return settle(ticket.job_id, feed, feed.ended)


@contextmanager
def watching(reader: EventReader | None, keys: QueueKeys, ticket: Ticket, *, chunks: bool) -> Iterator[Watch]:
    """A view of the job for as long as the block runs; without a reader it polls."""
    watch = Watch(keys, ticket.job_id, None, None, ticket.deadline_at, ticket.knows_deadline)
    if reader is None:
        yield watch
        return
    own = ticket.feed if ticket.client_id == reader.client_id else None
    watch.feed, watch.inbox = reader.watch(keys, ticket.job_id, own, chunks=chunks)
    try:
        yield watch
    finally:
        reader.unwatch(keys, watch.feed, watch.inbox)
