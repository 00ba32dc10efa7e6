"""The HTTP protocol with bounds: how large and how slow a request's head, and how long a full buffer, may be.

uvicorn holds a response back while the client's buffer is full, so a slow reader costs at most that buffer and its
inbox; here it also loses the connection when the buffer does not drain. Extends asyncio's and the parser's callbacks,
and nothing else.
"""

from __future__ import annotations

import asyncio
import logging

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from penstock.gateway.settings import Limits

_log = logging.getLogger("penstock.gateway")
_REASONS = {400: "Bad Request", 408: "Request Timeout", 431: "Request Header Fields Too Large"}


class BoundedHttp(HttpToolsProtocol):
    """One connection. `bounded` makes the class for some limits."""

    limits = Limits()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """Begin to wait for the first request's head."""
        super().connection_made(transport)
        self._head_bytes = 0
        self._head_open = True
        self._refusal: int | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self._late: asyncio.TimerHandle | None = None
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all clocks."""
        for timer in (self._stalled, self._late):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse, and count what belongs to an unfinished head."""
        super().data_received(data)
        if self._head_open and self.parser is not None:
            self._head_bytes += len(data)
            if self._head_bytes > self.limits.max_head_bytes:
                self._refuse(431)

    def on_message_begin(self) -> None:
        """A head begins."""
        super().on_message_begin()
        self._head_open, self._head_bytes = True, 0
        self._await_head()

    def on_headers_complete(self) -> None:
        """A head is here."""
        self._head_open = False
        if self._late is not None:
            self._late.cancel()
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > self.limits.max_head_bytes:
            self._refusal = 431
            raise ValueError("the request's head is too large")  # the parser stops, and uvicorn refuses
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """The refusal of what cannot be parsed, or is too large."""
        self._refuse(self._refusal or 400)

    def pause_writing(self) -> None:
        """The client's buffer is full."""
        super().pause_writing()
        self._stalled = self.loop.call_later(self.limits.stall_timeout_s, self._abort)

    def resume_writing(self) -> None:
        """It has drained."""
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()

    def _await_head(self) -> None:
        if self._late is not None:
            self._late.cancel()
        self._late = self.loop.call_later(self.limits.head_timeout_s, self._refuse, 408)

    def _refuse(self, status: int) -> None:
        if self.transport.is_closing():
            return
        text = f"HTTP/1.1 {status} {_REASONS[status]}\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
        if self.cycle is None or self.cycle.response_complete:
            self.transport.write(text.encode())
        self.transport.close()

    def _abort(self) -> None:
        _log.warning("%s does not read: disconnected after %g s", self.client, self.limits.stall_timeout_s)
        self.transport.abort()


def bounded(limits: Limits) -> type[BoundedHttp]:
    """The protocol with these limits."""
    return type("BoundedHttp", (BoundedHttp,), {"limits": limits})
