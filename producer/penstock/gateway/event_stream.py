"""Server-sent events as a response: each written as it comes, a comment where none comes for a while.

The client's hanging up ends the iterator, which is what cancels or abandons the work behind it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

_COMMENT: Message = {"type": "http.response.body", "body": b": alive\n\n", "more_body": True}


class EventStream(Response):
    """The events of an asynchronous generator.

    Args:
        events: each a whole event, with its empty line.
        keepalive_s: a silent stream gets a comment this often, so that proxies keep it open.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str], keepalive_s: float) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._keepalive_s = keepalive_s
        self._heard = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write until the events end or the client is gone."""
        writing = asyncio.ensure_future(self._write(send))
        watching = asyncio.ensure_future(self._watch(receive, send))
        try:
            await asyncio.wait({writing, watching}, return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
        finally:
            writing.cancel()
            watching.cancel()
            await asyncio.gather(writing, watching, return_exceptions=True)
            await self._events.aclose()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self._events:
            self._heard = True
            await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _watch(self, receive: Receive, send: Send) -> None:
        """Return when the client is gone; until then, comment on silence."""
        while True:
            try:
                async with asyncio.timeout(self._keepalive_s):
                    while (await receive())["type"] != "http.disconnect":
                        pass
                    return
            except TimeoutError:
                quiet, self._heard = not self._heard, False
                if quiet:
                    await send(_COMMENT)
