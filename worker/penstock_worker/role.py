"""How a background role runs: one iteration after another, until it is shut down.

A role never ends by itself. Redis being away is waited out with backoff; any other error is logged with its traceback,
counted, and tried again, because a worker that silently stopped renewing would lose every job it holds.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from penstock_core.protocol.errors import BrokerUnavailable

_logger = logging.getLogger(__name__)

_CANCEL_AGAIN_S = 0.5

SIGN_OF_LIFE_BACKOFF_S = 1.0
"""The longest backoff of the roles by which others see that this worker lives; how soon it is missed depends on it."""


@dataclass(slots=True)
class Backoff:
    """Exponential backoff with full jitter: each delay is uniform between zero and a doubling, capped bound."""

    base_s: float = 0.05
    cap_s: float = 2.0
    draw: Callable[[], float] = random.random
    failures: int = field(default=0, init=False)

    def next_s(self) -> float:
        """Count a failure and return how long to wait after it."""
        bound = min(self.cap_s, self.base_s * 2.0 ** min(self.failures, 30))
        self.failures += 1
        return bound * self.draw()

    def reset(self) -> None:
        """Start over after a success."""
        self.failures = 0


class RoleLoop:
    """The task of one role."""

    def __init__(
        self,
        name: str,
        iterate: Callable[[], Awaitable[None]],
        on_error: Callable[[str], None],
        *,
        longest_backoff_s: float = 2.0,
    ) -> None:
        self.name = name
        self._longest_backoff_s = longest_backoff_s
        self._iterate = iterate
        self._on_error = on_error
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin iterating."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"penstock-{self.name}")

    async def shutdown(self) -> None:
        """Stop at the next await, and return when it has stopped.

        A client library that is interrupted in the middle of a reply may swallow the cancellation: it is repeated.
        """
        task, self._task = self._task, None
        while task is not None and not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=_CANCEL_AGAIN_S)

    async def _run(self) -> None:
        backoff = Backoff(cap_s=self._longest_backoff_s)
        while True:
            try:
                await self._iterate()
                backoff.reset()
            except BrokerUnavailable:
                await asyncio.sleep(backoff.next_s())
            except Exception:
                self._on_error(self.name)
                _logger.exception("the %s role failed; trying again", self.name)
                await asyncio.sleep(backoff.next_s())
