"""`Client` and `JobHandle`: submit jobs and follow them, from threads. `aio` is the same for asyncio.

This is a shell: it performs the I/O that the flows ask for and decides nothing itself. redis-py is imported with the
first `Client` that is made, and what validates a job with the first `submit`: they take longer than all the rest.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack

from penstock import flows
from penstock.cursor import TokenCursor
from penstock.effects import Command, Confirm, Effect, Emit, Flow, Pause, Run, RunToDisk
from penstock.listing import list_jobs
from penstock.reader import Reader, WaitingInbox, release_reader, shared_reader
from penstock.settings import ClientSettings, Mode, locate
from penstock.tickets import Ticket, known_result, tickets_of, watching
from penstock.tracing import submission
from penstock_core.protocol.errors import ClientClosed, QueueFull
from penstock_core.protocol.events import TokenChunk
from penstock_core.protocol.jobs import JobResult, JobState
from penstock_core.protocol.keys import DEFAULT_TENANT
from penstock_core.protocol.transitions import CancelOutcome, JobStatus, NewJob, QueueSnapshot, run, run_many, snapshot

if TYPE_CHECKING:
    import redis

    from penstock.submission import JobItem, SubmitOptions

T = TypeVar("T")


class JobHandle:
    """One job, as its submitter or anyone else who knows its id sees it. Made by `Client`; safe to use from any thread.

    Attributes:
        id: the job's id; `Client.job(id)` gives a handle for it anywhere.
        duplicate: `submit` found an earlier job with the same idempotency key: this one.
    """

    __slots__ = ("_client", "_ticket")

    def __init__(self, client: Client, ticket: Ticket) -> None:
        self._client = client
        self._ticket = ticket

    def __repr__(self) -> str:
        return f"JobHandle({self.id!r}, queue={self._client.settings.queue!r})"

    @property
    def id(self) -> str:
        """The job's id."""
        return self._ticket.job_id

    @property
    def duplicate(self) -> bool:
        """Whether the job had been submitted before."""
        return self._ticket.duplicate

    def status(self) -> JobStatus:
        """Where the job stands. Raises `JobNotFound`."""
        return self._client._drive(flows.status(self._client._around, self._client._keys, self.id))

    def result(self, timeout: float | None = None) -> JobResult:
        """Wait until the job has ended, and return what it produced.

        Args:
            timeout: seconds to wait at most; 0 only looks.

        Raises:
            JobFailed, JobDead, JobCancelled, JobExpired: it ended otherwise; `.result` has what it produced until then.
            ResultTimeout: it has not ended; the message says where it stands.
            JobNotFound: there is no such job, or no longer.
            BrokerUnavailable: Redis cannot be reached for the length of `timeout`, or of the client's patience.
        """
        known = known_result(self._ticket)
        if known is not None:
            return known
        client = self._client
        with watching(client._reader(), client._keys, self._ticket, chunks=False) as watch:
            return client._drive(flows.result(client._around, watch, timeout))

    def stream(
        self, from_offset: int = 0, index: int | None = None, timeout: float | None = None
    ) -> Generator[TokenChunk]:
        """Iterate over the job's tokens as they come: without gap or repetition, whatever happens to workers.

        May be called again, at any time while the job is retained, by anyone, from any offset.

        Args:
            from_offset: the first token wanted, of each choice; a chunk that straddles it is cut.
            index: the only choice wanted; None interleaves all, each in its own order.
            timeout: the longest silence to bear, in seconds.

        Raises:
            As `result`: where the job does not complete, after the tokens it produced.
        """
        return self._stream(TokenCursor(from_offset, index), timeout)

    def _stream(self, cursor: TokenCursor, timeout: float | None) -> Generator[TokenChunk]:
        client = self._client
        with watching(client._reader(), client._keys, self._ticket, chunks=True) as watch:
            yield from client._iterate(flows.stream(client._around, watch, cursor, timeout))

    def text_stream(self, index: int = 0, timeout: float | None = None) -> Iterator[str]:
        """Iterate over one choice's text, as `stream` does over its tokens."""
        return (chunk.text for chunk in self.stream(0, index, timeout) if chunk.text)

    def cancel(self) -> CancelOutcome:
        """Ask for the job's end: `cancelled` (it was waiting), `cancelling` (it runs, and stops at its next token), or
        `ended` (too late). Raises `JobNotFound`."""
        return self._client._drive(flows.cancel(self._client._around, self._client._keys, self.id))


class Client:
    """A connection to one queue of one broker. Safe to share between threads; survives fork.

    Args:
        url: the broker; None: PENSTOCK_REDIS_URL, else the user's running `penstock serve`, else Redis on this machine.
        queue: None takes the one named after `model`, else PENSTOCK_QUEUE, else the bundled model's.
        model: served name a worker must have to run these jobs; None takes what the queue serves.
        tenant: whose jobs these are; `submit` can say otherwise.
        mode: `push`, or `poll` where a proxy breaks pub/sub.
        patience_s: how long waiting without a timeout of its own bears a broker that cannot be reached.
        connection: a ready redis-py client (for a credential provider, say) instead of the URL.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        queue: str | None = None,
        model: str | None = None,
        tenant: str = DEFAULT_TENANT,
        mode: Mode = "push",
        patience_s: float = 30.0,
        connection: redis.Redis | None = None,
    ) -> None:
        from penstock_core.protocol.connection import broker_errors, connect

        url, queue = locate(url, queue, model)
        self.settings = ClientSettings(
            url=url, queue=queue, model=model, tenant=tenant, mode=mode, patience_s=patience_s
        )
        self._keys = self.settings.keys
        self._around = flows.Surroundings(self.settings, time.monotonic)
        self._broker = (
            connection if connection is not None else connect(self.settings.url, client_name="penstock-client")
        )
        self._broker_errors = partial(broker_errors, self.settings.url)
        self._owns_broker = connection is None
        self._identity: object = self.settings.url if connection is None else connection
        self._shared: Reader | None = None
        self._closed = False
        self._pid = os.getpid()
        self._lock = threading.Lock()

    def submit(self, prompt: str | None = None, **options: Unpack[SubmitOptions]) -> JobHandle:
        """Put a job into the queue; when this returns, the broker has it.

        Args:
            prompt: the text to continue; or give `messages` (a conversation) or `prompt_token_ids`.
            options: sampling and delivery, see `SubmitOptions`. Without a seed one is drawn, so that the job can be
                resumed and repeated.

        Raises:
            InvalidRequest: names what is wrong; nothing was sent.
            QueueFull: a bound of the queue or the tenant is reached; nothing was stored.
            BrokerUnavailable: Redis cannot be reached. Submitting again with the same `idempotency_key` is harmless.
        """
        from penstock.submission import prepare

        job = prepare(self.settings, {"prompt": prompt, **options})
        outcome = self._submit([job])[0]
        if isinstance(outcome, QueueFull):
            raise outcome
        return outcome

    def submit_many(self, items: Sequence[str | JobItem | Mapping[str, Any]]) -> list[JobHandle | QueueFull]:
        """Put many jobs into the queue in one round trip (several where they are more than 32 MiB).

        Args:
            items: prompts, or mappings of `submit`'s keywords.

        Returns:
            Per item its handle, or the `QueueFull` that refused it (returned, not raised: the others are in).

        Raises:
            InvalidRequest: names the first bad item's index and field; nothing was sent.
            BrokerUnavailable: Redis cannot be reached; some jobs may be in.
        """
        from penstock.submission import prepare_many

        return self._submit(prepare_many(self.settings, items))

    def job(self, job_id: str) -> JobHandle:
        """A handle for a job submitted by anyone. Asks nothing of Redis yet."""
        return JobHandle(self, Ticket(job_id))

    def jobs(self, *, limit: int = 100, state: JobState | None = None, tenant: str | None = None) -> list[JobStatus]:
        """The queue's newest retained jobs, at most `limit` (up to 10,000) and among the 200,000 it looks at."""
        return self._drive(list_jobs(self._around, self._keys, limit=limit, state=state, tenant=tenant))

    def queue_snapshot(self) -> QueueSnapshot:
        """Depths, waits, counters and workers of the queue at one moment."""
        return self._drive(flows.briefly(self._around, snapshot(self._keys)))

    def close(self) -> None:
        """Give the connections back. Handles of this client are of no use afterwards; the jobs go on."""
        self._closed = True
        with self._lock:
            reader, self._shared = self._shared, None
        if reader is not None and self._pid == os.getpid():
            release_reader(self._identity, reader)
        if self._owns_broker:
            self._broker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _submit(self, jobs: list[NewJob]) -> list[JobHandle | QueueFull]:
        reader = self._reader()
        feeds = reader.table(self._keys).add_own([job.job_id for job in jobs]) if reader is not None else None
        client_id = reader.client_id if reader is not None else ""
        with submission(self._keys.queue, jobs) as traced:
            outcomes = self._drive(flows.submit_jobs(self._around, self._keys, traced, client_id))
        tickets = tickets_of(jobs, outcomes, feeds, client_id, self._around.clock)
        return [JobHandle(self, ticket) if isinstance(ticket, Ticket) else ticket for ticket in tickets]

    def _reader(self) -> Reader | None:
        """The process's reader for this broker; None in poll mode."""
        if self.settings.mode == "poll":
            return None
        if self._pid != os.getpid():  # a forked child has neither its parent's threads nor the holders of its locks
            self._pid, self._lock, self._shared = os.getpid(), threading.Lock(), None
        with self._lock:
            if self._shared is None:
                if self._closed:
                    raise _closed()
                self._shared = shared_reader(self._identity, self._broker)
            return self._shared

    def _drive(self, flow: Flow[T]) -> T:
        """Perform a flow to its end."""
        answer: Any = None
        step: Any = flow.send
        while True:
            try:
                effect = step(answer)
            except StopIteration as stop:
                value: T = stop.value
                return value
            try:
                answer, step = self._perform(effect), flow.send
            except Exception as error:
                answer, step = error, flow.throw

    def _iterate(self, flow: Flow[None]) -> Generator[TokenChunk]:
        """Perform a flow, yielding what it emits."""
        answer: Any = None
        step: Any = flow.send
        while True:
            try:
                effect = step(answer)
            except StopIteration:
                return
            if isinstance(effect, Emit):
                yield effect.chunk
                answer, step = None, flow.send
                continue
            try:
                answer, step = self._perform(effect), flow.send
            except Exception as error:
                answer, step = error, flow.throw

    def _perform(self, effect: Effect) -> Any:
        if self._closed:
            raise _closed()
        if isinstance(effect, Pause):
            if isinstance(effect.inbox, WaitingInbox):
                return effect.inbox.wait(effect.seconds)
            return time.sleep(effect.seconds)
        with self._broker_errors():
            match effect:
                case Run(calls):
                    return [run(self._broker, calls[0])] if len(calls) == 1 else run_many(self._broker, calls)
                case RunToDisk(calls, timeout_ms):
                    with self._broker.client() as connection:  # type: ignore[no-untyped-call]
                        answers = run_many(connection, calls)
                        return answers, connection.execute_command("WAITAOF", 1, 0, timeout_ms)[0]
                case Command(words):
                    return self._command(words)
                case Confirm(channel):
                    reader = self._reader()
                    assert reader is not None
                    return reader.confirm(channel)
        raise AssertionError(effect)

    def _command(self, words: Sequence[str | int]) -> Any:
        from redis.cluster import RedisCluster
        from redis.exceptions import ResponseError

        if isinstance(self._broker, RedisCluster):
            raise ResponseError("in a cluster no connection speaks for the whole of it")
        return self._broker.execute_command(*words)  # type: ignore[no-untyped-call]


def _closed() -> ClientClosed:
    return ClientClosed("this client is closed; make a new one")
