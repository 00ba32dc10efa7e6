"""Server-sent events as a response: each written as it comes, a comment where none comes for a while.

The client's hanging up ends the iterator, which is what cancels or abandons the work behind it; so does the gateway's
stopping, between two events and with a last word.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from penstock.gateway.closing import Closing

_COMMENT: Message = {"type": "http.response.body", "body": b": alive\n\n", "more_body": True}


class EventStream(Response):
    """The events of an asynchronous generator.

    Args:
        events: each a whole event, with its empty line.
        keepalive_s: a silent stream gets a comment this often, so that proxies keep it open.
        closing: of the process.
        farewell: the last event where the process stops before the others have come.
        resumable: whether the client can have the rest elsewhere; the stream then ends as soon as the process stops.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[str],
        keepalive_s: float,
        *,
        closing: Closing,
        farewell: str,
        resumable: bool,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._keepalive_s = keepalive_s
        self._closing = closing
        self._farewell = farewell
        self._resumable = resumable
        self._heard = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write until the events end, the client is gone or the process stops."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        writing = asyncio.ensure_future(self._write(send))
        watching = asyncio.ensure_future(self._watch(receive, send))
        try:
            with self._closing.telling(resumable=self._resumable) as told:
                await asyncio.wait({writing, watching, told}, return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
            elif not watching.done():
                await self._take_leave(writing, send)
        finally:
            writing.cancel()
            watching.cancel()
            await asyncio.gather(writing, watching, return_exceptions=True)
            await self._events.aclose()

    async def _write(self, send: Send) -> None:
        async for event in self._events:
            self._heard = True
            await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _take_leave(self, writing: asyncio.Future[None], send: Send) -> None:
        """End the response. What `send` was given it has written whole, so this stands between two events."""
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        await send({"type": "http.response.body", "body": self._farewell.encode(), "more_body": False})

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
