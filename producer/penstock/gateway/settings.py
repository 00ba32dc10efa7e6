"""The gateway's settings: filled from flags and `PENSTOCK_*` variables by the command line."""

from __future__ import annotations

from dataclasses import dataclass, field

from penstock.gateway.auth import ApiKeys
from penstock_core.protocol.errors import InvalidConfiguration


@dataclass(frozen=True, slots=True)
class Limits:
    """What one client may cost.

    Attributes:
        max_body_bytes: larger request bodies are answered 413. body_timeout_s: a body that is not here by then, 408.
        max_head_bytes: a larger request line with its headers is answered 431. head_timeout_s: one that is not here by
            then, 408.
        stall_timeout_s: a client whose full buffer (64 KiB) does not drain for so long is disconnected; a stream it was
            reading can be resumed where it stopped.
        request_timeout_s: no request waits longer than this for its job; the answer is then 504, and the job goes on.
        max_connections: connections held at once; more are answered 503.
    """

    max_body_bytes: int = 8 * 1024 * 1024
    body_timeout_s: float = 60.0
    max_head_bytes: int = 32 * 1024
    head_timeout_s: float = 15.0
    stall_timeout_s: float = 30.0
    request_timeout_s: float = 600.0
    max_connections: int = 16_384

    def __post_init__(self) -> None:
        for name, least in (("max_body_bytes", 1024), ("max_head_bytes", 1024), ("max_connections", 1)):
            if getattr(self, name) < least:
                raise InvalidConfiguration(name, f"{getattr(self, name)} is below {least}")
        for name in ("body_timeout_s", "head_timeout_s", "stall_timeout_s", "request_timeout_s"):
            if not 0 < getattr(self, name) <= 86_400:
                raise InvalidConfiguration(name, f"{getattr(self, name)} is no number of seconds up to a day")


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """How one gateway process serves.

    Attributes:
        url, queue: the broker and the queue; None resolves as `AsyncClient` does.
        keys: API keys; without any, everybody is the operator.
        limits: what one client may cost.
        cancel_on_disconnect: a client that hangs up cancels its synchronous request.
        cors_origins: origins that browsers may call from; none by default.
        keepalive_s: a silent event stream gets a comment this often, so that proxies keep it open.
        grace_s: on SIGTERM, time for requests to end; streams that can be resumed end at once.
    """

    url: str | None = None
    queue: str | None = None
    keys: ApiKeys = field(default_factory=lambda: ApiKeys({}))
    limits: Limits = field(default_factory=Limits)
    cancel_on_disconnect: bool = True
    cors_origins: tuple[str, ...] = ()
    keepalive_s: float = 15.0
    grace_s: float = 10.0

    def __post_init__(self) -> None:
        if not self.keepalive_s > 0:
            raise InvalidConfiguration("keepalive_s", f"{self.keepalive_s} is no positive number of seconds")
        if not 0 <= self.grace_s <= 86_400:
            raise InvalidConfiguration("grace_s", f"{self.grace_s} is no number of seconds up to a day")
        for origin in self.cors_origins:
            if origin == "*" or "://" not in origin or origin.rstrip("/").count("/") != 2:
                raise InvalidConfiguration(
                    "cors_origin", f"{origin!r} names no origin; write it as the browser does, https://app.example.com"
                )
