"""The process that serves the application: uvicorn, with bounded HTTP, which says when it begins to stop."""

from __future__ import annotations

import contextlib
import socket
import sys

import uvicorn

from penstock.gateway.app import create_app
from penstock.gateway.closing import Closing
from penstock.gateway.settings import GatewaySettings
from penstock.gateway.wire import bounded

_BACKSTOP_S = 3.0  # for answers under way when the grace is over, before uvicorn cuts them off
_NOT_STARTED = 3


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, closing: Closing) -> None:
        super().__init__(config)
        self._closing = closing

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Tell what waits, then wait for it."""
        self._closing.begin()
        await super().shutdown(sockets)


def serve(settings: GatewaySettings, *, host: str, port: int, log_level: str, access_log: bool) -> None:
    """Serve until SIGTERM or SIGINT. Raises `InvalidConfiguration`; `SystemExit` where it cannot start."""
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=bounded(settings.limits),
        ws="none",
        log_level=log_level,
        access_log=access_log,
        limit_concurrency=settings.limits.max_connections,
        timeout_graceful_shutdown=round(settings.grace_s + _BACKSTOP_S),
    )
    server = _Server(config, app.state.closing)
    with contextlib.suppress(KeyboardInterrupt):
        server.run()
    if not server.started:
        sys.exit(_NOT_STARTED)
