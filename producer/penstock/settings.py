"""Where a client finds its broker and its queue. The only place of the SDK that reads the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from penstock.served import find_served
from penstock_core.protocol.errors import InvalidConfiguration
from penstock_core.protocol.keys import DEFAULT_TENANT, TENANT_PATTERN, QueueKeys

DEFAULT_URL = "redis://127.0.0.1:6379"
DEFAULT_QUEUE = "penstock-story"

Mode = Literal["push", "poll"]

_TENANT = re.compile(TENANT_PATTERN)


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """What a client was told, resolved and checked.

    Attributes:
        url: the broker, as redis-py reads it: `redis://`, `rediss://`, `unix://`.
        queue: jobs go to this queue. A queue serves one model and is named after it unless set otherwise.
        model: served name that the worker must have; None takes what the queue serves.
        tenant: whose jobs these are, where a job does not say.
        mode: `push` receives events over pub/sub; `poll` reads them from the log, for proxies that break pub/sub.
        patience_s: how long waiting without a timeout of its own bears a broker that cannot be reached.
        submit_patience_s: the same for `submit` and other short calls. Sending a job again is harmless.
        backstop_s: how long a push subscriber trusts silence before it looks into the log itself; grows eightfold
            while the silence proves true.
        poll_min_s, poll_max_s: how often `poll` looks; the interval grows from one to the other while nothing comes.
    """

    url: str
    queue: str
    model: str | None = None
    tenant: str = DEFAULT_TENANT
    mode: Mode = "push"
    patience_s: float = 30.0
    submit_patience_s: float = 2.0
    backstop_s: float = 5.0
    poll_min_s: float = 0.005
    poll_max_s: float = 0.25

    def __post_init__(self) -> None:
        QueueKeys(self.queue)
        if self.mode not in ("push", "poll"):
            raise InvalidConfiguration("mode", f"{self.mode!r} is unknown; use 'push' or 'poll'")
        if not isinstance(self.tenant, str) or not _TENANT.fullmatch(self.tenant):
            raise InvalidConfiguration(
                "tenant",
                f"{self.tenant!r} is no tenant name; use 1 to 64 letters, digits or any of _ . - and start with a "
                "letter or digit",
            )
        for name in ("patience_s", "submit_patience_s", "backstop_s", "poll_min_s", "poll_max_s"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise InvalidConfiguration(name, f"{value!r} is no duration; use a positive number of seconds")

    @property
    def keys(self) -> QueueKeys:
        """Key names of the queue."""
        return QueueKeys(self.queue)


def locate(
    url: str | None, queue: str | None, model: str | None, environment: Mapping[str, str] = os.environ
) -> tuple[str, str]:
    """URL and queue: as told, else as the environment says, else those of this user's running `penstock serve`."""
    served = None if url or environment.get("PENSTOCK_REDIS_URL") else find_served(environment)
    if served is None:
        return resolve_url(url, environment), resolve_queue(queue, model, environment)
    return served.url, queue or model or environment.get("PENSTOCK_QUEUE") or served.queue


def resolve_url(url: str | None, environment: Mapping[str, str] = os.environ) -> str:
    """The given URL, else PENSTOCK_REDIS_URL, else Redis on this machine."""
    return url or environment.get("PENSTOCK_REDIS_URL") or DEFAULT_URL


def resolve_queue(queue: str | None, model: str | None, environment: Mapping[str, str] = os.environ) -> str:
    """The given queue, else the one named after the model, else PENSTOCK_QUEUE, else the bundled model's."""
    return queue or model or environment.get("PENSTOCK_QUEUE") or DEFAULT_QUEUE
