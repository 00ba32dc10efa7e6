"""Running one OpenAI request: its jobs submitted together, awaited together or streamed together.

All choices of all prompts are numbered through: prompt number times `n`, plus the choice.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, nullcontext
from typing import Any

from penstock.aio import AsyncJobHandle
from penstock.gateway.closing import Closing, GatewayStopping
from penstock.gateway.handler import RequestHandler, StillRunning
from penstock.gateway.intake import cancel_quietly
from penstock.gateway.openai.errors import error_object
from penstock.gateway.openai.requests import ChatBody, CompletionBody, GenerationBody
from penstock.gateway.openai.responses import Answer, Logprobs, total
from penstock_core.protocol.errors import PenstockError, QueueFull, ResultTimeout
from penstock_core.protocol.events import TokenChunk
from penstock_core.protocol.jobs import JobResult, Usage
from penstock_core.protocol.requests import GenerationRequest, JobOptions

Body = ChatBody | CompletionBody


def item(request: GenerationRequest, options: JobOptions) -> dict[str, Any]:
    """An item of `submit_many`."""
    return {"request": request, **{name: getattr(options, name) for name in options.model_fields_set}}


class Generation:
    """The jobs of one request.

    Args:
        body: the request.
        handles: its jobs, one per prompt.
        timeout_s: how long to wait for them (of a stream: between two tokens); None: as long as they take.
        closing: of the process; None: whoever waits for these jobs sees to that.
        keep: leave them running when nobody waits any more.
    """

    def __init__(
        self,
        body: Body,
        handles: list[AsyncJobHandle],
        *,
        timeout_s: float | None,
        closing: Closing | None = None,
        keep: bool = False,
    ) -> None:
        self.body = body
        self.handles = handles
        self._timeout_s = timeout_s
        self._closing = closing
        self._keep = keep
        self._choices = body.n or 1
        self._answer = Answer("chat" if isinstance(body, ChatBody) else "text", handles[0].id, body.model)
        self._wants_logprobs = wants_logprobs(body)
        self._ended = False
        self._opened = False

    @classmethod
    async def begin(
        cls,
        handler: RequestHandler,
        body: Body,
        tenant: str,
        idempotency_key: str | None,
        traceparent: str | None,
        *,
        keep: bool = False,
    ) -> Generation:
        """Submit all jobs in one round trip. Raises `InvalidRequest`, `QueueFull` (and then none of them runs)."""
        jobs = body.jobs()
        items = []
        for number, job in enumerate(jobs):
            key = idempotency_key if idempotency_key is None or len(jobs) == 1 else f"{idempotency_key}:{number}"
            items.append(item(job, body.delivery(tenant, idempotency_key=key, traceparent=traceparent)))
        outcomes = await handler.intake.submit(items)
        handles = [outcome for outcome in outcomes if isinstance(outcome, AsyncJobHandle)]
        refusal = next((outcome for outcome in outcomes if isinstance(outcome, QueueFull)), None)
        if refusal is not None:
            await asyncio.gather(*(handle.cancel() for handle in handles), return_exceptions=True)
            raise refusal
        return cls(body, handles, timeout_s=handler.longest_wait_s, closing=handler.closing, keep=keep)

    async def whole(self) -> dict[str, Any]:
        """The answer, once all jobs have ended.

        Raises `JobError`; `StillRunning` or `GatewayStopping`, and then they go on.
        """
        try:
            results = await asyncio.gather(*(self._result(handle) for handle in self.handles))
            self._ended = True
        except StillRunning:
            self._ended = True
            raise
        finally:
            self.abandon()
        choices = []
        for number, (result, chunks) in enumerate(results):
            for choice in result.choices:
                index = number * self._choices + choice.index
                mine = [chunk for chunk in chunks if chunk.index == choice.index]
                choices.append(self._answer.choice(index, choice, Logprobs.of(mine) if self._wants_logprobs else None))
        return self._answer.whole(choices, total(result.usage for result, _ in results))

    async def _result(self, handle: AsyncJobHandle) -> tuple[JobResult, list[TokenChunk]]:
        chunks: list[TokenChunk] = []
        async with self._patience(handle):
            if self._wants_logprobs:  # only the stream has each token's text
                async with aclosing(handle.stream()) as stream:
                    chunks = [chunk async for chunk in stream]
            return await handle.result(), chunks

    @asynccontextmanager
    async def _patience(self, handle: AsyncJobHandle) -> AsyncGenerator[None]:
        """Bounds the body as a whole. Raises `StillRunning`, `GatewayStopping`."""
        try:
            async with self._stoppable(handle), asyncio.timeout(self._timeout_s) as limit:
                yield
        except TimeoutError:
            if not limit.expired():
                raise
            raise StillRunning(handle.id, self._timeout_s or 0.0) from None

    def _stoppable(self, handle: AsyncJobHandle) -> AbstractAsyncContextManager[None]:
        return nullcontext() if self._closing is None else self._closing.bounding(handle.id)

    def farewell(self) -> str:
        """What a stream ends with where the process stops before the last token."""
        return _event({"error": error_object(GatewayStopping(self.handles[0].id))[1]})

    async def _stream(self, handle: AsyncJobHandle) -> AsyncGenerator[TokenChunk]:
        """The job's chunks. Raises `StillRunning` where nothing comes for too long."""
        try:
            async with aclosing(handle.stream(timeout=self._timeout_s)) as stream:
                async for chunk in stream:
                    yield chunk
        except ResultTimeout:
            raise StillRunning(handle.id, self._timeout_s or 0.0) from None

    async def opened(self, within_s: float) -> AsyncGenerator[str]:
        """The events, once the first is there or `within_s` is over. Until then errors are raised."""
        events = self._events()
        first = asyncio.ensure_future(anext(events))
        try:
            async with self._stoppable(self.handles[0]):
                await asyncio.wait({first}, timeout=within_s)
            if first.done():
                first.result()
        except BaseException:
            first.cancel()
            self.abandon()
            raise
        self._opened = True
        return _chained(first, events)

    async def _events(self) -> AsyncGenerator[str]:
        """Server-sent events up to `[DONE]`; an error that comes late is one of them."""
        lengths: dict[int, int] = {}
        try:
            async for number, chunk in self._merged():
                index = number * self._choices + chunk.index
                choices = []
                if index not in lengths:
                    lengths[index] = 0
                    if self._answer.kind == "chat":
                        choices.append(self._answer.opening(index))
                logprobs = Logprobs.of([chunk], lengths[index]) if self._wants_logprobs and chunk.token_ids else None
                lengths[index] += len(chunk.text)
                choices.append(self._answer.delta(index, chunk, logprobs))
                for choice in choices:
                    yield _event(self._answer.piece([choice]))
            usage = await self._usage()
            self._ended = True
            if self.body.include_usage:
                yield _event(self._answer.piece([], usage))
        except PenstockError as error:
            self._ended = self._ended or isinstance(error, StillRunning)
            if not self._opened:
                raise
            yield _event({"error": error_object(error)[1]})
        finally:
            self.abandon()
        yield "data: [DONE]\n\n"

    async def _usage(self) -> Usage:
        return total([(await handle.result(self._timeout_s)).usage for handle in self.handles])

    async def _merged(self) -> AsyncGenerator[tuple[int, TokenChunk]]:
        """The chunks of all jobs as they come, with their job's number."""
        if len(self.handles) == 1:
            async with aclosing(self._stream(self.handles[0])) as stream:
                async for chunk in stream:
                    yield 0, chunk
            return
        inbox: asyncio.Queue[tuple[int, TokenChunk | None]] = asyncio.Queue(256)

        async def feed(number: int, handle: AsyncJobHandle) -> None:
            async with aclosing(self._stream(handle)) as stream:
                async for chunk in stream:
                    await inbox.put((number, chunk))

        async def feed_all() -> None:
            try:
                await asyncio.gather(*(feed(number, handle) for number, handle in enumerate(self.handles)))
            finally:
                await inbox.put((0, None))

        feeding = asyncio.ensure_future(feed_all())
        try:
            while True:
                number, arrived = await inbox.get()
                if arrived is None:
                    break
                yield number, arrived
            await feeding
        finally:
            feeding.cancel()
            await asyncio.gather(feeding, return_exceptions=True)

    def abandon(self) -> None:
        """Cancel what has not ended, unless an earlier request had submitted it, or the process is stopping."""
        if self._ended or self._keep or (self._closing is not None and self._closing.begun):
            return
        self._ended = True
        for handle in self.handles:
            if not handle.duplicate:
                task = asyncio.ensure_future(cancel_quietly(handle))
                _CANCELLING.add(task)
                task.add_done_callback(_CANCELLING.discard)


_CANCELLING: set[asyncio.Future[None]] = set()  # the loop itself holds tasks only weakly


def wants_logprobs(body: GenerationBody) -> bool:
    """Whether log-probabilities were asked for: true or a number of a chat, a number (0 as well) of a completion."""
    if isinstance(body, CompletionBody):
        return body.logprobs is not None
    return isinstance(body, ChatBody) and bool(body.logprobs)


async def _chained(first: asyncio.Future[str], rest: AsyncGenerator[str]) -> AsyncGenerator[str]:
    try:
        yield await first
        async for event in rest:
            yield event
    finally:
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await rest.aclose()


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
