"""Submissions of concurrent requests, gathered: what arrives while one script call is under way goes with the next.

A busy gateway then needs one round trip and one connection for dozens of requests; an idle one waits for nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from penstock.aio import AsyncClient, AsyncJobHandle
from penstock_core.protocol.errors import InvalidRequest, PenstockError, QueueFull

MAX_TOGETHER = 64

Outcome = AsyncJobHandle | QueueFull
_Entry = tuple[Sequence[Mapping[str, Any]], asyncio.Future[list[Outcome]]]


class Intake:
    """Submits jobs through a client.

    Args:
        client: of the queue.
    """

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._waiting: list[_Entry] = []
        self._running: asyncio.Task[None] | None = None
        self._cancelling: set[asyncio.Future[Any]] = set()  # the loop itself holds tasks only weakly

    async def submit(self, items: Sequence[Mapping[str, Any]]) -> list[Outcome]:
        """As `AsyncClient.submit_many`. The jobs of a caller that is cancelled meanwhile are cancelled.

        Raises `InvalidRequest`, and then none of these items is stored; `BrokerUnavailable`.
        """
        done: asyncio.Future[list[Outcome]] = asyncio.get_running_loop().create_future()
        self._waiting.append((items, done))
        if self._running is None:
            self._running = asyncio.ensure_future(self._run())
        return await done

    async def _run(self) -> None:
        try:
            while self._waiting:
                count = taken = 0
                for items, _ in self._waiting:
                    if taken and count + len(items) > MAX_TOGETHER:
                        break
                    count, taken = count + len(items), taken + 1
                entries, self._waiting = self._waiting[:taken], self._waiting[taken:]
                await self._submit(entries)
        finally:
            self._running = None

    async def _submit(self, entries: list[_Entry]) -> None:
        try:
            outcomes = iter(await self._client.submit_many([item for items, _ in entries for item in items]))
        except InvalidRequest as error:
            if len(entries) == 1:
                _fail(entries, error)
            else:  # one of them is to blame, and nothing was stored
                for entry in entries:
                    await self._submit([entry])
        except PenstockError as error:
            _fail(entries, error)
        except BaseException:
            _fail(entries, PenstockError("the gateway is shutting down"))
            raise
        else:
            for items, done in entries:
                mine = [next(outcomes) for _ in items]
                if not done.cancelled():
                    done.set_result(mine)
                    continue
                for outcome in mine:
                    if isinstance(outcome, AsyncJobHandle) and not outcome.duplicate:
                        task = asyncio.ensure_future(cancel_quietly(outcome))
                        self._cancelling.add(task)
                        task.add_done_callback(self._cancelling.discard)


def _fail(entries: list[_Entry], error: PenstockError) -> None:
    for _, done in entries:
        if not done.done():
            done.set_exception(error)


async def cancel_quietly(handle: AsyncJobHandle) -> None:
    """Cancel a job that nobody waits for any more."""
    try:
        await handle.cancel()
    except PenstockError:
        return  # it is gone, or Redis is: there is nobody left to tell
