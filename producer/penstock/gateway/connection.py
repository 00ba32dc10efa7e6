"""What binds work to a client's connection: hanging up cancels it, and a silent stream is kept open."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from fastapi import Request

from penstock.gateway.settings import GatewaySettings

T = TypeVar("T")


async def with_keepalive(events: AsyncIterator[str], every_s: float) -> AsyncIterator[str]:
    """The events, and a comment wherever none came for a while."""
    step = asyncio.ensure_future(anext(events, None))
    try:
        while True:
            done, _ = await asyncio.wait({step}, timeout=every_s)
            if not done:
                yield ": alive\n\n"
                continue
            event = step.result()
            if event is None:
                return
            yield event
            step = asyncio.ensure_future(anext(events, None))
    finally:
        step.cancel()
        await asyncio.gather(step, return_exceptions=True)


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled where the client hangs up first."""
    settings: GatewaySettings = request.app.state.settings
    task = asyncio.ensure_future(work)
    if not settings.cancel_on_disconnect:
        return await task

    async def gone() -> None:
        while not await request.is_disconnected():  # noqa: ASYNC110 - starlette has no event for it
            await asyncio.sleep(0.25)

    watcher = asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
        return await task
    finally:
        watcher.cancel()
        task.cancel()
        await asyncio.gather(watcher, task, return_exceptions=True)
