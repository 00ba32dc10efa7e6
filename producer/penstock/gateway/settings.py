"""The gateway's settings: filled from flags and `PENSTOCK_*` variables by the command line."""

from __future__ import annotations

from dataclasses import dataclass, field

from penstock.gateway.auth import ApiKeys
from penstock_core.protocol.errors import InvalidConfiguration


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """How one gateway process serves.

    Attributes:
        url, queue: the broker and the queue; None resolves as `AsyncClient` does.
        keys: API keys; without any, everybody is the default tenant.
        max_body_bytes: larger request bodies are answered 413.
        cancel_on_disconnect: a client that hangs up cancels its synchronous request.
        cors_origins: origins that browsers may call from; none by default.
        keepalive_s: a silent event stream gets a comment this often, so that proxies keep it open.
    """

    url: str | None = None
    queue: str | None = None
    keys: ApiKeys = field(default_factory=lambda: ApiKeys({}))
    max_body_bytes: int = 8 * 1024 * 1024
    cancel_on_disconnect: bool = True
    cors_origins: tuple[str, ...] = ()
    keepalive_s: float = 15.0

    def __post_init__(self) -> None:
        if self.max_body_bytes < 1024:
            raise InvalidConfiguration("max_body_bytes", f"{self.max_body_bytes} is below 1024 bytes")
        if not self.keepalive_s > 0:
            raise InvalidConfiguration("keepalive_s", f"{self.keepalive_s} is no positive number of seconds")
