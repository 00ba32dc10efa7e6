"""Driving batches: one job per line, a window of them in the queue at a time, answers written in the input's order.

Each gateway looks for batches that nobody drives. A job's idempotency key is its batch and line, so after a crash the
next driver submits the unanswered lines again and gets the jobs that are there already.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
import uuid
from collections import deque
from typing import Any

from penstock.aio import AsyncClient, AsyncJobHandle
from penstock.gateway.openai.batches import FINAL, Batch, BatchStore, Status
from penstock.gateway.openai.generation import Generation, item
from penstock.gateway.openai.lines import Line, answered, broken, given_up, read_lines, refused
from penstock_core.protocol.errors import (
    InvalidRequest,
    JobCancelled,
    JobExpired,
    JobNotFound,
    PenstockError,
    QueueFull,
)

WINDOW = 256
URGENT_WINDOW_S = 3600
_BEAT_S = 1.0
_AT_ONCE = 8
_STEP = 64
_RESULT_TTL_S = 86_400.0
_log = logging.getLogger(__name__)

Answer = tuple[bytes, bool]
"""A line of the output file (True) or of the error file."""


class BatchDriver:
    """This gateway's share of the batches.

    Args:
        store: where they are.
        client: of their queue.
    """

    def __init__(self, store: BatchStore, client: AsyncClient) -> None:
        self._store = store
        self._client = client
        self._name = uuid.uuid4().hex
        self._driving: dict[str, asyncio.Task[None]] = {}
        self._bell = asyncio.Event()

    def ring(self) -> None:
        """There is a new batch."""
        self._bell.set()

    async def run(self) -> None:
        """Look for batches until cancelled; those in hand are then left to other gateways."""
        trouble = ""
        try:
            while True:
                try:
                    for batch_id in await self._store.due():
                        if len(self._driving) >= _AT_ONCE:
                            break
                        if batch_id not in self._driving and await self._store.claim(batch_id, self._name):
                            task = asyncio.ensure_future(self._drive(batch_id))
                            self._driving[batch_id] = task
                    if trouble:
                        _log.info("batches: looked for again")
                    trouble = ""
                except PenstockError as error:
                    if str(error) != trouble:  # said once, not every second
                        _log.warning("batches: %s", error)
                    trouble = str(error)
                self._bell.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_BEAT_S):
                        await self._bell.wait()
        finally:
            tasks = list(self._driving.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _drive(self, batch_id: str) -> None:
        try:
            batch = await self._store.get(batch_id)
            if batch.status not in FINAL:
                await _Drive(self._store, self._client, self._name, batch).run()
        except JobNotFound:
            await self._store.forget(batch_id)
        except PenstockError as error:  # its lease runs out, and somebody tries again
            _log.warning("batch %s: %s", batch_id, error)
        except Exception:
            _log.exception("batch %s", batch_id)
        finally:
            del self._driving[batch_id]


class _Drive:
    """One batch in this gateway's hands."""

    def __init__(self, store: BatchStore, client: AsyncClient, driver: str, batch: Batch) -> None:
        self._store = store
        self._client = client
        self._driver = driver
        self._batch = batch
        self._lines: list[Line] = []
        self._next = batch.done
        self._window: deque[tuple[asyncio.Task[Answer], AsyncJobHandle | None]] = deque()
        self._cancelling = asyncio.Event()
        self._lost = False
        self._full_until = 0.0

    async def run(self) -> None:
        """From where it stands to its end, unless the lease is lost."""
        beating = asyncio.ensure_future(self._beat())
        try:
            if await self._open():
                await self._answer_all()
        finally:
            beating.cancel()
            for task, _ in self._window:
                task.cancel()
            await asyncio.gather(beating, *(task for task, _ in self._window), return_exceptions=True)

    async def _beat(self) -> None:
        """Keep the lease, and notice a cancellation."""
        while not self._lost:
            await asyncio.sleep(_BEAT_S)
            try:
                self._lost = not await self._store.claim(self._batch.batch_id, self._driver)
                if (await self._store.get(self._batch.batch_id)).status == "cancelling":
                    self._cancelling.set()
            except JobNotFound:
                self._lost = True
            except PenstockError as error:
                _log.warning("batch %s: %s", self._batch.batch_id, error)

    async def _open(self) -> bool:
        """Read the input; a file that is no batch ends it here."""
        batch, store = self._batch, self._store
        lines, errors = read_lines(await store.files.read(batch.input_file_id), batch.endpoint)
        if batch.status == "cancelling":
            self._cancelling.set()
        if errors and not batch.done:
            await store.change(
                batch.batch_id, self._driver, ("validating", "cancelling"), "failed", errors=json.dumps(errors)
            )
            await store.forget(batch.batch_id)
            return False
        self._lines = lines
        if batch.status == "validating":
            await store.change(batch.batch_id, self._driver, ("validating",), "in_progress", total=len(lines))
        elif not batch.total:  # cancelled before it was read
            await store.change(batch.batch_id, self._driver, ("cancelling",), "cancelling", total=len(lines))
        self._batch = await store.get(batch.batch_id)
        return True

    async def _answer_all(self) -> None:
        batch_id = self._batch.batch_id
        cancelled_window = False
        while self._batch.done < len(self._lines) and not self._lost:
            if self._cancelling.is_set() and not cancelled_window:
                cancelled_window = True
                await self._cancel_window()
            await self._fill()
            if not self._window:  # the queue is full
                await self._pause(max(0.05, min(1.0, self._full_until - time.monotonic())))
                continue
            head = self._window[0][0]
            waiting: set[asyncio.Future[Any]] = {head}
            if not cancelled_window:
                waiting.add(asyncio.ensure_future(self._cancelling.wait()))
            await asyncio.wait(waiting, timeout=_BEAT_S, return_when=asyncio.FIRST_COMPLETED)
            for other in waiting - {head}:
                other.cancel()
            if not await self._write():
                return
        if not self._lost:
            batch = await self._store.get(batch_id)
            ended: Status = "cancelled" if batch.status == "cancelling" else "completed"
            if ended == "completed" and batch.failed and time.time() >= batch.expires:
                ended = "expired"
            if ended != "cancelled":
                await self._store.change(batch_id, self._driver, (batch.status,), "finalizing")
                batch = await self._store.get(batch_id)
            await self._store.finish(batch, self._driver, ended)

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._cancelling.wait()

    async def _write(self) -> bool:
        """Store the answers at the head of the window; False where the batch is another gateway's by now."""
        ready: list[Answer] = []
        while self._window and self._window[0][0].done() and len(ready) < WINDOW:
            ready.append(self._window.popleft()[0].result())
        if not ready:
            return True
        output = [line for line, good in ready if good]
        errors = [line for line, good in ready if not good]
        if not await self._store.save(self._batch, self._driver, output, errors):
            return False
        self._batch = await self._store.get(self._batch.batch_id)
        return True

    async def _cancel_window(self) -> None:
        handles = [handle for _, handle in self._window if handle is not None]
        await asyncio.gather(*(handle.cancel() for handle in handles), return_exceptions=True)

    async def _fill(self) -> None:
        """Submit the next lines, as far as the window and the queue have room."""
        while self._next < len(self._lines) and len(self._window) < WINDOW and time.monotonic() >= self._full_until:
            first, last = self._next, min(len(self._lines), self._next + _STEP)
            over = time.time() >= self._batch.expires
            if (self._cancelling.is_set() and first >= self._batch.intended) or over:
                code = "batch_expired" if over else "batch_cancelled"
                for line in self._lines[first:last]:
                    self._put(_given_up(line, code), None)
                self._next = last
                continue
            if self._cancelling.is_set():
                last = min(last, self._batch.intended)
            elif last > self._batch.intended and not await self._intend(last):
                return
            if not await self._submit(first, last):
                return

    async def _intend(self, last: int) -> bool:
        known = await self._store.intend(self._batch.batch_id, self._driver, last)
        self._batch = await self._store.get(self._batch.batch_id)
        if self._batch.status == "cancelling":
            self._cancelling.set()
        return known

    async def _submit(self, first: int, last: int) -> bool:
        """Submit lines `first` to `last`; False where the queue refused some, which are then next."""
        batch = self._batch
        remaining_s = batch.expires - time.time()
        urgent = batch.expires - batch.created <= URGENT_WINDOW_S
        items: list[dict[str, Any]] = []
        prepared: list[Any] = []
        for number in range(first, last):
            try:
                body = self._lines[number].parsed(batch.endpoint)
                options = body.delivery(
                    batch.tenant,
                    priority=(3 if urgent else 1) if body.priority is None else body.priority,
                    deadline_s=min(max(remaining_s, 1.0), body.deadline_s or remaining_s),
                    idempotency_key=f"{batch.batch_id}:{number}",
                    result_ttl_s=_RESULT_TTL_S,
                    metadata={"batch": batch.batch_id},
                )
                items.append(item(body.jobs()[0], options))
                prepared.append(body)
            except InvalidRequest as error:
                prepared.append(error)
        handles = iter(await self._client.submit_many(items) if items else [])
        for number, body in enumerate(prepared, first):
            line = self._lines[number]
            if isinstance(body, InvalidRequest):
                self._put(_refused(line, body), None)
            else:
                handle = next(handles)
                if isinstance(handle, QueueFull):
                    self._full_until = time.monotonic() + min(5.0, max(0.2, handle.retry_after_s))
                    return False  # later lines of this step, if stored, are found again by their keys
                if self._cancelling.is_set():
                    await handle.cancel()
                self._put(_follow(line, body, handle), handle)
            self._next = number + 1
        return True

    def _put(self, work: Any, handle: AsyncJobHandle | None) -> None:
        self._window.append((asyncio.ensure_future(work), handle))


async def _follow(line: Line, body: Any, handle: AsyncJobHandle) -> Answer:
    """The answer of one job, however long it takes."""
    while True:
        try:
            answer = await Generation(body, [handle], timeout_s=None, keep=True).whole()
        except JobCancelled:
            return await _given_up(line, "batch_cancelled")
        except JobExpired:
            return await _given_up(line, "batch_expired")
        except ConnectionError:  # Redis is away; the job is not
            await asyncio.sleep(_BEAT_S)
        except PenstockError as error:
            return refused(line, error), False
        except Exception as error:
            _log.exception("batch line %s", line.custom_id)
            return broken(line, error), False
        else:
            return answered(line, handle.id, answer), True


async def _refused(line: Line, error: InvalidRequest) -> Answer:
    return refused(line, error), False


async def _given_up(line: Line, code: str) -> Answer:
    reason = "the completion window ended" if code == "batch_expired" else "the batch was cancelled"
    return given_up(line, code, f"{reason} before this request was answered"), False
