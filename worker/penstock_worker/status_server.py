"""`/metrics` and `/health` over HTTP, on the event loop that they tell about: a loop that hangs does not answer.

Speaks just enough HTTP/1.1 for a scraper and a probe: GET, one request a connection, bounded in size and time.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from dataclasses import asdict

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from penstock_worker.health import Health

_logger = logging.getLogger(__name__)
_TIMEOUT_S = 5.0
_JSON = "application/json"


class StatusServer:
    """The HTTP server of one worker, or of a supervisor.

    `before_scrape` refreshes what is only read when somebody looks, if there is such; `health` describes it now.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        health: Callable[[], Health],
        before_scrape: Callable[[], Awaitable[None]] | None,
        host: str,
        port: int,
    ) -> None:
        self._registry = registry
        self._health = health
        self._before_scrape = before_scrape
        self._host = host
        self._port = port
        self._server: asyncio.Server | None = None

    async def start(self) -> int:
        """Listen, and return the port. Raises `OSError` where it is taken."""
        self._server = await asyncio.start_server(self._serve, self._host, self._port, limit=8192)
        port = int(self._server.sockets[0].getsockname()[1])
        _logger.info("serving /metrics and /health", extra={"host": self._host, "port": port})
        return port

    async def shutdown(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                head = await reader.readuntil(b"\r\n\r\n")
                status, content_type, body = await self._answer(head)
                writer.write(
                    f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
                    "Connection: close\r\n\r\n".encode()
                    + body
                )
                await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # a client that hangs, hangs up or talks too long gets no answer
        finally:
            writer.close()

    async def _answer(self, head: bytes) -> tuple[str, str, bytes]:
        method, _, rest = head.partition(b" ")
        path = rest.split(b" ", 1)[0].split(b"?", 1)[0]
        if method != b"GET":
            return "405 Method Not Allowed", "text/plain", b"only GET\n"
        if path == b"/metrics":
            if self._before_scrape is not None:
                await self._before_scrape()
            return "200 OK", CONTENT_TYPE_LATEST, generate_latest(self._registry)
        if path == b"/health":
            health = self._health()
            return (
                "200 OK" if health.is_healthy else "503 Service Unavailable",
                _JSON,
                json.dumps({**asdict(health), "healthy": health.is_healthy}).encode(),
            )
        return "404 Not Found", "text/plain", b"/metrics or /health\n"
