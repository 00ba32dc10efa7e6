"""What binds work to a client's connection: hanging up cancels it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import HTTPException, Request

from penstock.gateway.settings import GatewaySettings

T = TypeVar("T")
_CLIENT_GONE = 499  # nobody reads it; it is what the metrics count


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled where the client hangs up first."""
    settings: GatewaySettings = request.app.state.settings
    task = asyncio.ensure_future(work)
    if not settings.cancel_on_disconnect:
        return await task

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    watcher = asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise HTTPException(_CLIENT_GONE, "the client hung up")
        return task.result()
    finally:
        watcher.cancel()
        task.cancel()
        await asyncio.gather(watcher, task, return_exceptions=True)
