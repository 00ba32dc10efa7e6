"""The end of a gateway process: who still waits is told where to go on, and no job ends for it.

When it begins, event streams that can be resumed end at once; everything else has the time of grace. A stream is told
by a future, because a generator that is suspended cannot be interrupted; a plain wait is bounded.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager

from penstock_core.protocol.errors import PenstockError

RETRY_AFTER_S = 1


class GatewayStopping(PenstockError):
    """The gateway stops before the job has ended; the job goes on.

    Attributes:
        job_id: under which another gateway, or this one when it is back, has it.
    """

    def __init__(self, job_id: str) -> None:
        super().__init__(
            f"this gateway is stopping; job {job_id} goes on: GET /v1/jobs/{job_id} has its result, "
            f"GET /v1/jobs/{job_id}/stream its tokens, and the same request with the same Idempotency-Key its answer"
        )
        self.job_id = job_id


class Closing:
    """Whether the process is stopping, and what waits for that.

    Args:
        grace_s: seconds that requests have to end once it has begun.
    """

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._over_at: float | None = None
        self._bounds: set[asyncio.Timeout] = set()
        self._streams: dict[asyncio.Future[None], bool] = {}

    @property
    def begun(self) -> bool:
        """Whether it is stopping: a request that ends now was not given up by its client."""
        return self._over_at is not None

    def begin(self) -> None:
        """It is stopping. Runs in the event loop; only the first call counts."""
        if self.begun:
            return
        loop = asyncio.get_running_loop()
        self._over_at = loop.time() + self._grace_s
        for bound in self._bounds:
            bound.reschedule(self._over_at)
        for told, resumable in self._streams.items():
            self._tell(told, resumable)

    @asynccontextmanager
    async def bounding(self, job_id: str) -> AsyncGenerator[None]:
        """A wait for a job, which ends with the grace. Raises `GatewayStopping`."""
        try:
            async with asyncio.timeout_at(self._over_at) as bound:
                self._bounds.add(bound)
                try:
                    yield
                finally:
                    self._bounds.discard(bound)
        except TimeoutError:
            if not bound.expired():
                raise
            raise GatewayStopping(job_id) from None

    @contextmanager
    def telling(self, *, resumable: bool) -> Generator[asyncio.Future[None]]:
        """A future that is done when a stream is to end: at once if it is `resumable`, else with the grace."""
        told = asyncio.get_running_loop().create_future()
        self._streams[told] = resumable
        if self.begun:
            self._tell(told, resumable)
        try:
            yield told
        finally:
            del self._streams[told]
            told.cancel()

    def _tell(self, told: asyncio.Future[None], resumable: bool) -> None:
        loop = asyncio.get_running_loop()
        loop.call_at(loop.time() if resumable else self._over_at or 0.0, _resolve, told)


def _resolve(told: asyncio.Future[None]) -> None:
    if not told.done():
        told.set_result(None)
