"""The drain: on SIGTERM or SIGINT stop claiming, finish within the grace time, hand the rest back with its checkpoint.

A second signal hands everything back at once. Renewing and publishing go on until the last job is gone; what cannot be
handed back because Redis is away stays leased, and is reclaimed by others.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Awaitable, Callable

from penstock_core.protocol.errors import BrokerUnavailable
from penstock_worker.held import HeldJobs
from penstock_worker.outbox import HandBack
from penstock_worker.publish import Publisher
from penstock_worker.role import Backoff

_logger = logging.getLogger(__name__)

_HAND_BACK_WITHIN_S = 5.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Drain:
    """Turns signals into an orderly end.

    Attributes:
        requested: the worker is to end.
        hurried: it is to end without waiting for its jobs.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.requested = asyncio.Event()
        self.hurried = asyncio.Event()
        self._clock = clock

    def install(self) -> None:
        """Take over the stop signals."""
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self.request, f"signal {signal.Signals(number).name}")

    def uninstall(self) -> None:
        """Give the stop signals back to Python."""
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.remove_signal_handler(number)

    def request(self, reason: str) -> None:
        """Ask for the end; asked again, hurry."""
        if self.requested.is_set():
            _logger.warning("handing all jobs back now", extra={"reason": reason})
            self.hurried.set()
        else:
            _logger.info("draining: no more jobs are claimed", extra={"reason": reason})
            self.requested.set()

    async def finish_jobs(self, held: HeldJobs, grace_s: float, hopeless: asyncio.Event) -> None:
        """Wait until nothing is held, the grace time has passed, somebody hurries, or it is `hopeless`."""
        if len(held):
            _logger.info("finishing jobs", extra={"held": len(held), "grace_s": grace_s})
        waits = {asyncio.ensure_future(wait) for wait in (held.wait_empty(), self.hurried.wait(), hopeless.wait())}
        _, pending = await asyncio.wait(waits, timeout=grace_s, return_when=asyncio.FIRST_COMPLETED)
        for wait in pending:
            wait.cancel()

    async def hand_back(self, held: HeldJobs, publisher: Publisher, within_s: float = _HAND_BACK_WITHIN_S) -> None:
        """Publish what there is of the jobs still held, and release them to other workers."""
        publisher.collect()
        remaining = list(held)
        for job in remaining:
            held.halt(job)
            publisher.end(job, HandBack("the worker is stopping"))
        await self.insist(publisher.flush_all, within_s)
        if remaining:
            _logger.info("handed jobs back", extra={"jobs": len(remaining), "kept": len(held)})

    async def insist(self, write: Callable[[], Awaitable[None]], within_s: float = _HAND_BACK_WITHIN_S) -> bool:
        """Try `write` until it succeeds or time is up; whether it did."""
        backoff = Backoff()
        give_up = self._clock() + within_s
        while True:
            try:
                await write()
                return True
            except BrokerUnavailable as error:
                if self._clock() >= give_up:
                    _logger.warning("Redis stays away; other workers will take over", extra={"reason": str(error)})
                    return False
                await asyncio.sleep(backoff.next_s())
