"""`AsyncClient` and `AsyncJobHandle`: submit jobs and follow them, from coroutines. `client` is the same for threads.

This is a shell: it performs the I/O that the flows ask for and decides nothing itself.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import redis.asyncio
from redis.asyncio.cluster import RedisCluster
from redis.exceptions import ResponseError

from penstock import flows
from penstock.aio_reader import AsyncReader, AwaitedInbox, release_reader, shared_reader
from penstock.cursor import TokenCursor
from penstock.effects import Command, Confirm, Effect, Emit, Flow, Pause, Run, RunToDisk
from penstock.listing import list_jobs
from penstock.settings import ClientSettings, Mode, locate
from penstock.submission import JobItem, SubmitOptions, prepare, prepare_many
from penstock.tickets import Ticket, known_result, tickets_of, watching
from penstock.tracing import submission
from penstock_core.protocol.connection import broker_errors, connect_async
from penstock_core.protocol.errors import ClientClosed, QueueFull
from penstock_core.protocol.events import TokenChunk
from penstock_core.protocol.jobs import JobResult, JobState
from penstock_core.protocol.requests import DEFAULT_TENANT
from penstock_core.protocol.transitions import (
    CancelOutcome,
    JobStatus,
    NewJob,
    QueueSnapshot,
    run_async,
    run_many_async,
    snapshot,
)

T = TypeVar("T")


class AsyncJobHandle:
    """One job, as its submitter or anyone else who knows its id sees it. Made by `AsyncClient`.

    Attributes and methods are those of `JobHandle`; see there for what they promise and raise.
    """

    __slots__ = ("_client", "_ticket")

    def __init__(self, client: AsyncClient, ticket: Ticket) -> None:
        self._client = client
        self._ticket = ticket

    def __repr__(self) -> str:
        return f"AsyncJobHandle({self.id!r}, queue={self._client.settings.queue!r})"

    @property
    def id(self) -> str:
        """The job's id."""
        return self._ticket.job_id

    @property
    def duplicate(self) -> bool:
        """Whether the job had been submitted before."""
        return self._ticket.duplicate

    async def status(self) -> JobStatus:
        """As `JobHandle.status`."""
        return await self._client._drive(flows.status(self._client._around, self._client._keys, self.id))

    async def result(self, timeout: float | None = None) -> JobResult:  # noqa: ASYNC109 - what it says is part of it
        """As `JobHandle.result`."""
        known = known_result(self._ticket)
        if known is not None:
            return known
        client = self._client
        with watching(client._reader(), client._keys, self._ticket, chunks=False) as watch:
            return await client._drive(flows.result(client._around, watch, timeout))

    def stream(
        self, from_offset: int = 0, index: int | None = None, timeout: float | None = None
    ) -> AsyncGenerator[TokenChunk]:
        """As `JobHandle.stream`."""
        return self._stream(TokenCursor(from_offset, index), timeout)

    async def _stream(self, cursor: TokenCursor, timeout: float | None) -> AsyncGenerator[TokenChunk]:  # noqa: ASYNC109
        client = self._client
        with watching(client._reader(), client._keys, self._ticket, chunks=True) as watch:
            async for chunk in client._iterate(flows.stream(client._around, watch, cursor, timeout)):
                yield chunk

    async def text_stream(self, index: int = 0, timeout: float | None = None) -> AsyncGenerator[str]:  # noqa: ASYNC109
        """As `JobHandle.text_stream`."""
        async with aclosing(self.stream(0, index, timeout)) as chunks:
            async for chunk in chunks:
                if chunk.text:
                    yield chunk.text

    async def cancel(self) -> CancelOutcome:
        """As `JobHandle.cancel`."""
        return await self._client._drive(flows.cancel(self._client._around, self._client._keys, self.id))


class AsyncClient:
    """A connection to one queue of one broker, for the event loop that first uses it; another loop gets its own.

    Args:
        url: the broker; None: PENSTOCK_REDIS_URL, else the user's running `penstock serve`, else Redis on this machine.
        queue: None takes the one named after `model`, else PENSTOCK_QUEUE, else the bundled model's.
        model: served name a worker must have to run these jobs; None takes what the queue serves.
        tenant: whose jobs these are; `submit` can say otherwise.
        mode: `push`, or `poll` where a proxy breaks pub/sub.
        patience_s: how long waiting without a timeout of its own bears a broker that cannot be reached.
        connection: a ready redis.asyncio client (for a credential provider, say) instead of the URL.
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
        connection: redis.asyncio.Redis | None = None,
    ) -> None:
        url, queue = locate(url, queue, model)
        self.settings = ClientSettings(
            url=url, queue=queue, model=model, tenant=tenant, mode=mode, patience_s=patience_s
        )
        self._keys = self.settings.keys
        self._around = flows.Surroundings(self.settings, time.monotonic)
        self._given = connection
        self._identity: object = self.settings.url if connection is None else connection
        self._loop: asyncio.AbstractEventLoop | None = None
        self._connected: redis.asyncio.Redis | None = None
        self._shared: AsyncReader | None = None
        self._closed = False
        if connection is None:
            connect_async(self.settings.url)  # refuses a bad URL here rather than at the first use; connects to nothing

    async def submit(self, prompt: str | None = None, **options: Unpack[SubmitOptions]) -> AsyncJobHandle:
        """As `Client.submit`."""
        job = prepare(self.settings, {"prompt": prompt, **options})
        outcome = (await self._submit([job]))[0]
        if isinstance(outcome, QueueFull):
            raise outcome
        return outcome

    async def submit_many(self, items: Sequence[str | JobItem | Mapping[str, Any]]) -> list[AsyncJobHandle | QueueFull]:
        """As `Client.submit_many`."""
        return await self._submit(prepare_many(self.settings, items))

    def job(self, job_id: str) -> AsyncJobHandle:
        """As `Client.job`."""
        return AsyncJobHandle(self, Ticket(job_id))

    async def jobs(
        self, *, limit: int = 100, state: JobState | None = None, tenant: str | None = None
    ) -> list[JobStatus]:
        """As `Client.jobs`."""
        return await self._drive(list_jobs(self._around, self._keys, limit=limit, state=state, tenant=tenant))

    async def queue_snapshot(self) -> QueueSnapshot:
        """As `Client.queue_snapshot`."""
        return await self._drive(flows.briefly(self._around, snapshot(self._keys)))

    async def close(self) -> None:
        """As `Client.close`."""
        self._closed = True
        reader, self._shared = self._shared, None
        broker, self._connected = self._connected, None
        if self._loop is not asyncio.get_running_loop():
            return  # what belongs to another loop went with it
        if reader is not None:
            await release_reader(self._identity, reader)
        if broker is not None and self._given is None:
            await broker.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    async def _submit(self, jobs: list[NewJob]) -> list[AsyncJobHandle | QueueFull]:
        reader = self._reader()
        feeds = reader.table(self._keys).add_own([job.job_id for job in jobs]) if reader is not None else None
        client_id = reader.client_id if reader is not None else ""
        with submission(self._keys.queue, jobs) as traced:
            outcomes = await self._drive(flows.submit_jobs(self._around, self._keys, traced, client_id))
        tickets = tickets_of(jobs, outcomes, feeds, client_id, self._around.clock)
        return [AsyncJobHandle(self, ticket) if isinstance(ticket, Ticket) else ticket for ticket in tickets]

    def _broker(self) -> redis.asyncio.Redis:
        """The connections of the running loop; those of another loop are of no use here."""
        if self._closed:
            raise ClientClosed("this client is closed; make a new one")
        loop = asyncio.get_running_loop()
        if self._connected is None or self._loop is not loop:
            self._loop, self._shared = loop, None
            self._connected = self._given or connect_async(self.settings.url, client_name="penstock-client")
        return self._connected

    def _reader(self) -> AsyncReader | None:
        """The running loop's reader for this broker; None in poll mode."""
        broker = self._broker()
        if self.settings.mode == "poll":
            return None
        if self._shared is None:
            self._shared = shared_reader(self._identity, broker)
        return self._shared

    async def _drive(self, flow: Flow[T]) -> T:
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
                answer, step = await self._perform(effect), flow.send
            except Exception as error:
                answer, step = error, flow.throw

    async def _iterate(self, flow: Flow[None]) -> AsyncGenerator[TokenChunk]:
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
                answer, step = await self._perform(effect), flow.send
            except Exception as error:
                answer, step = error, flow.throw

    async def _perform(self, effect: Effect) -> Any:
        broker = self._broker()
        if isinstance(effect, Pause):
            if isinstance(effect.inbox, AwaitedInbox):
                return await effect.inbox.wait(effect.seconds)
            return await asyncio.sleep(effect.seconds)
        with broker_errors(self.settings.url):
            match effect:
                case Run(calls):
                    return (
                        [await run_async(broker, calls[0])] if len(calls) == 1 else await run_many_async(broker, calls)
                    )
                case RunToDisk(calls, timeout_ms):
                    async with broker.client() as connection:
                        wait = ("WAITAOF", 1, 0, timeout_ms)
                        answers = await run_many_async(connection, calls)
                        return answers, (await connection.execute_command(*wait))[0]  # type: ignore[no-untyped-call]
                case Command() if isinstance(broker, RedisCluster):
                    raise ResponseError("in a cluster no connection speaks for the whole of it")
                case Command(words):
                    return await broker.execute_command(*words)  # type: ignore[no-untyped-call]
                case Confirm(channel):
                    reader = self._reader()
                    assert reader is not None
                    return await reader.confirm(channel)
        raise AssertionError(effect)
