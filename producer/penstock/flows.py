"""Submitting and following a job, step by step, as generators of effects: the client's logic, once for both shells.

Read top-down they are the protocol of a client: subscribe before submitting; trust what is pushed as far as offsets
prove it complete; read the log for the rest; the terminal event comes last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from penstock.cursor import TokenCursor
from penstock.effects import Command, Confirm, Emit, Flow, Run, RunToDisk
from penstock.feed import Feed, Inbox
from penstock.outcome import result_of
from penstock.settings import ClientSettings
from penstock.vigil import Outage, Vigil, not_found
from penstock_core.protocol import transitions
from penstock_core.protocol.codec import decode_event
from penstock_core.protocol.errors import BrokerUnavailable, InvalidRequest, JobNotFound, UndecodableRecord
from penstock_core.protocol.events import JobEnded
from penstock_core.protocol.jobs import JobResult, JobState
from penstock_core.protocol.keys import QueueKeys
from penstock_core.protocol.transitions import (
    Call,
    CancelOutcome,
    JobStatus,
    NewJob,
    SubmitOutcome,
    read_end,
    read_events,
    read_job,
    submit,
)

T = TypeVar("T")

PAGE_EVENTS = 256  # of the log, per round trip
_CALL_JOBS, _CALL_BYTES = 500, 2 * 1024 * 1024  # per script call: Redis serves nobody else meanwhile
_TRIP_BYTES = 32 * 1024 * 1024  # per round trip: what a pipeline holds in memory
_FSYNC_TIMEOUT_MS = 4000  # below the connection's own timeout


@dataclass(slots=True)
class Watch:
    """One reader's view of one job: where its events are pushed, and what is known of its deadline.

    Attributes:
        feed, inbox: None in poll mode.
        deadline_at: by the client's monotonic clock; None if there is none or it is not known.
        knows_deadline: whether None means that there is none.
    """

    keys: QueueKeys
    job_id: str
    feed: Feed | None
    inbox: Inbox | None
    deadline_at: float | None
    knows_deadline: bool


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What flows need beside their arguments."""

    settings: ClientSettings
    clock: Callable[[], float]

    def vigil(self, watch: Watch, timeout_s: float | None) -> Vigil:
        """A wait for the job that is watched."""
        return Vigil(
            watch.keys, watch.job_id, watch.inbox, self.settings, self.clock,
            timeout_s=timeout_s, deadline_at=watch.deadline_at, knows_deadline=watch.knows_deadline,
        )  # fmt: skip


def briefly(around: Surroundings, call: Call[T]) -> Flow[T]:
    """Execute one call that may be repeated, bearing a short outage."""
    outage = Outage(around.settings.submit_patience_s, around.clock)
    while True:
        try:
            answer: list[T] = yield Run((call,))
            return answer[0]
        except BrokerUnavailable as error:
            yield from outage.bear(error)


def status(around: Surroundings, keys: QueueKeys, job_id: str) -> Flow[JobStatus]:
    """Where the job stands. Raises `JobNotFound`."""
    found = yield from briefly(around, read_job(keys, job_id))
    if found is None:
        raise not_found(keys, job_id)
    return found


def cancel(around: Surroundings, keys: QueueKeys, job_id: str) -> Flow[CancelOutcome]:
    """Ask for the job's end. Raises `JobNotFound`."""
    outcome = (yield from briefly(around, transitions.cancel(keys, [job_id])))[0]
    if outcome == "unknown":
        raise not_found(keys, job_id)
    return outcome


def submit_jobs(
    around: Surroundings, keys: QueueKeys, jobs: Sequence[NewJob], client_id: str
) -> Flow[list[SubmitOutcome]]:
    """Submit jobs, each for itself; one outcome per job. One round trip, unless they are more than a trip should hold.

    Args:
        around, keys: the client's settings and queue.
        jobs: their ids are fixed, so repeating after a lost reply is harmless.
        client_id: whose channel gets the events; '' for none. Subscribed before anything is sent.

    Raises:
        InvalidRequest: a job asks for `durability="fsync"` and the server cannot promise it.
        BrokerUnavailable: Redis cannot be reached, or its disk does not keep up with such a job.
    """
    outage = Outage(around.settings.submit_patience_s, around.clock)
    to_disk = any(job.options.durability == "fsync" for job in jobs)
    fsync = (yield from fsync_way()) if to_disk else None
    outcomes: list[SubmitOutcome] = []
    for trip in _trips(keys, jobs, client_id):
        while True:
            try:
                if client_id:
                    yield Confirm(keys.client(client_id))
                if fsync == "waitaof":
                    answer, on_disk = yield RunToDisk(trip, _FSYNC_TIMEOUT_MS)
                else:
                    answer, on_disk = (yield Run(trip)), 1
            except BrokerUnavailable as error:
                yield from outage.bear(error)
            else:
                break
        if not on_disk:
            raise BrokerUnavailable(
                f"the jobs are stored, but not on disk within {_FSYNC_TIMEOUT_MS / 1000:g} s (durability='fsync'): "
                "the disk of Redis is slow or full; submitting again with the same idempotency_key is harmless"
            )
        for part in answer:
            outcomes += part
    return outcomes


def _trips(keys: QueueKeys, jobs: Sequence[NewJob], client_id: str) -> Iterator[list[Call[list[SubmitOutcome]]]]:
    """The calls of each round trip."""
    trip: list[Call[list[SubmitOutcome]]] = []
    trip_bytes, start, size = 0, 0, 0
    for end in range(1, len(jobs) + 1):
        size += len(jobs[end - 1].request)
        if end == len(jobs) or end - start >= _CALL_JOBS or size + len(jobs[end].request) > _CALL_BYTES:
            trip.append(submit(keys, jobs[start:end], client_id=client_id))
            trip_bytes += size
            start, size = end, 0
            if trip_bytes >= _TRIP_BYTES or end == len(jobs):
                yield trip
                trip, trip_bytes = [], 0


def fsync_way() -> Flow[Literal["waitaof", "always"]]:
    """How this server can promise that a job is on disk; raises `InvalidRequest` if it cannot."""
    from redis.exceptions import ResponseError

    try:
        yield Command(("WAITAOF", 1, 0, 1))
    except ResponseError as error:
        if "unknown command" not in str(error).lower():
            raise _no_fsync(str(error)) from None
    else:
        return "waitaof"
    try:
        settings = []
        for name in ("appendonly", "appendfsync"):
            reply = yield Command(("CONFIG", "GET", name))
            settings.append((reply.get(name) or reply.get(name.encode())) if isinstance(reply, dict) else reply[1])
    except ResponseError as error:
        raise _no_fsync(f"it has no WAITAOF, and CONFIG GET is refused ({error})") from None
    if [value.decode() if isinstance(value, bytes) else value for value in settings] != ["yes", "always"]:
        raise _no_fsync("it has no WAITAOF (Redis 7.2), and does not run with appendonly yes and appendfsync always")
    return "always"


def _no_fsync(reason: str) -> InvalidRequest:
    return InvalidRequest(
        "durability", f"'fsync' cannot be promised by this server: {reason}; use 'memory', or set the server up for it"
    )


def result(around: Surroundings, watch: Watch, timeout_s: float | None) -> Flow[JobResult]:
    """Wait for the job's end. Raises the errors of `result_of`, of `Vigil.rest`, and `JobNotFound`."""
    vigil = around.vigil(watch, timeout_s)
    feed = watch.feed
    if feed is not None and feed.channel is not None and feed.ended is None:
        yield from vigil.listen(feed.channel)
    look = feed is None or feed.missed
    while True:
        if feed is not None and feed.ended is not None:
            return settle(watch.job_id, feed, feed.ended)
        if look:
            end = yield from vigil.ask(read_end(watch.keys, watch.job_id))
            if end is None:
                raise not_found(watch.keys, watch.job_id)
            if end.state.is_terminal and end.event:
                return settle(watch.job_id, feed, end.event)
        look = yield from vigil.rest()
        if watch.inbox is not None:
            # An event in the inbox is the end: feed.ended has it, or it is too large to keep and Redis has it.
            while watch.inbox.take() is not None:
                look = True
            look = watch.inbox.take_lost() or look


def settle(job_id: str, feed: Feed | None, data: bytes) -> JobResult:
    """The result in an encoded terminal event; raises the errors of `result_of`."""
    ended = decode_event(data)
    if not isinstance(ended, JobEnded):
        raise UndecodableRecord(f"job {job_id}: its terminal record is a {type(ended).__name__}")
    if ended.state is JobState.DEAD and feed is not None:
        feed.ended, feed.missed = None, True  # an operator may requeue it
    return result_of(job_id, ended)


def stream(around: Surroundings, watch: Watch, cursor: TokenCursor, timeout_s: float | None) -> Flow[None]:
    """Emit the job's tokens from the cursor on: each once, in order, whatever happens to connections and workers.

    Returns when the job has completed; raises the errors of `result`. `timeout_s` is the longest silence.
    """
    vigil = around.vigil(watch, timeout_s)
    feed, inbox = watch.feed, watch.inbox
    if feed is not None and feed.channel is not None:
        yield from vigil.listen(feed.channel)
    look = feed is None or not feed.pristine
    after = ""
    while True:
        if look:
            ended, after = yield from _emit_log(watch, vigil, cursor, after)
            if ended is not None:
                settle(watch.job_id, feed, ended)
                return
            look = False
        while inbox is not None and not look and (data := inbox.take()) is not None:
            event = decode_event(data)
            if isinstance(event, JobEnded):
                look = event.result is not None and cursor.lacks_of(event.result)
                if not look:
                    settle(watch.job_id, feed, data)
                    return
            elif cursor.lacks_before(event) or cursor.is_ambiguous(event):
                look = True
            elif (chunk := cursor.take(event)) is not None:
                yield Emit(chunk)
                vigil.heard(restart_timeout=True)
        if inbox is not None:
            look = inbox.take_lost() or look
        if not look:
            look = yield from vigil.rest()


def _emit_log(watch: Watch, vigil: Vigil, cursor: TokenCursor, after: str) -> Flow[tuple[bytes | None, str]]:
    """Emit what the log has after entry `after`; returns the terminal event, if it has come, and the last entry."""
    while True:
        page = yield from vigil.ask(read_events(watch.keys, watch.job_id, after=after, limit=PAGE_EVENTS))
        if page is None:
            raise not_found(watch.keys, watch.job_id)
        for data in page.events:
            event = decode_event(data)
            if isinstance(event, JobEnded):
                return data, page.last_id
            if cursor.lacks_before(event):
                raise JobNotFound(
                    f"job {watch.job_id}: its token log begins at offset {event.offset} of choice {event.index}; "
                    "earlier tokens are no longer kept"
                )
            if (chunk := cursor.take(event)) is not None:
                yield Emit(chunk)
                vigil.heard(restart_timeout=True)
        after = page.last_id
        if len(page.events) < PAGE_EVENTS:
            if page.state.is_terminal:
                raise JobNotFound(f"job {watch.job_id} is {page.state}, but its token log is no longer kept")
            return None, after
