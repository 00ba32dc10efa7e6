"""The pulse: once a heartbeat, look at the engine and say how the worker fares.

Fills the gauges, writes the health file, makes the record that the renew role sends, and notices what ends a worker
from outside: an engine whose thread died, a supervisor that is gone.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version

from penstock_core.protocol.workers import WorkerRecord
from penstock_worker.broker import Broker
from penstock_worker.doorbell import Doorbell
from penstock_worker.drain import Drain
from penstock_worker.engine import Engine
from penstock_worker.groups import physical_device, visible_gpus
from penstock_worker.health import Health, HealthFile
from penstock_worker.held import HeldJobs
from penstock_worker.metrics import WorkerMetrics
from penstock_worker.publish import Publisher
from penstock_worker.role import RoleLoop
from penstock_worker.settings import WorkerSettings

_logger = logging.getLogger(__name__)

STALLED_AFTER_S = 60.0
"""An engine that has work and completes no step for so long hangs."""
_LOOK_S = 1.0
"""Longest time between two looks: a dead rank must be noticed soon, however rare the heartbeats are."""
_SMOOTHING = 0.3


class Pulse:
    """Watches over the engine and describes the worker."""

    def __init__(
        self,
        settings: WorkerSettings,
        served_name: str,
        broker: Broker,
        engine: Engine,
        held: HeldJobs,
        publisher: Publisher,
        doorbell: Doorbell,
        drain: Drain,
        metrics: WorkerMetrics,
        health_file: HealthFile,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._broker = broker
        self._engine = engine
        self._held = held
        self._publisher = publisher
        self._doorbell = doorbell
        self._drain = drain
        self._metrics = metrics
        self._health_file = health_file
        self._clock = clock
        self._tokens_per_s = 0.0
        self._measured_at = clock()
        self._measured_tokens = 0
        self._progress_at = clock()
        self._steps = -1
        engine_is = engine.describe()
        self._fixed = WorkerRecord(
            worker_id=settings.worker_id or "",
            model=served_name,
            host=socket.gethostname(),
            pid=os.getpid(),
            version=version("penstock"),
            device=physical_device(engine_is.device, engine_is.ranks, visible_gpus()),
            ranks=engine_is.ranks,
            page_size=engine_is.page_size,
            started_ms=round(time.time() * 1000),
            max_sequences=settings.max_num_sequences,
        )
        self._role = RoleLoop("pulse", self._iterate, metrics.role_failed)

    def start(self) -> None:
        """Begin beating."""
        self._role.start()

    async def shutdown(self) -> None:
        """Stop beating, and remove the health file."""
        await self._role.shutdown()
        self._health_file.remove()

    def describe(self) -> WorkerRecord:
        """The worker's record of this moment."""
        statistics, capacity = self._engine.statistics(), self._engine.capacity()
        prompt_tokens = statistics.prompt_tokens
        return replace(
            self._fixed,
            connection_id=self._doorbell.client_id or 0,
            draining=self._drain.requested.is_set(),
            running=len(self._held),
            free_sequences=capacity.free_sequences,
            free_tokens=capacity.free_tokens,
            total_tokens=capacity.total_tokens,
            total_pages=statistics.cache.total_pages,
            used_pages=statistics.cache.used_pages,
            cached_pages=statistics.cache.cached_pages,
            jobs_done=statistics.requests,
            tokens_in=prompt_tokens,
            tokens_out=self._publisher.tokens_out,
            tokens_per_s=round(self._tokens_per_s, 2),
            prefix_hit_rate=round(statistics.cached_tokens / prompt_tokens, 4) if prompt_tokens else 0.0,
            draft_acceptance=round(statistics.acceptance_rate, 4),
            speculation_gain=0.0 if statistics.speculation is None else round(statistics.speculation.gain, 4),
            step_ms=round(statistics.mean_step_ms, 3),
            fenced=self._held.fenced,
            broker_errors=self._broker.outages,
        )

    def health(self) -> Health:
        """What the health check is told."""
        stalled = self._clock() - self._progress_at > STALLED_AFTER_S
        status = "stalled" if stalled else "draining" if self._drain.requested.is_set() else "ready"
        return Health(
            worker_id=self._fixed.worker_id,
            pid=self._fixed.pid,
            status=status,
            broker_up=self._broker.available,
            held=len(self._held),
            written_at=time.time(),
        )

    def beat(self) -> None:
        """Look once."""
        now = self._clock()
        statistics, capacity = self._engine.statistics(), self._engine.capacity()
        if statistics.steps != self._steps or not statistics.running + statistics.waiting:
            self._steps, self._progress_at = statistics.steps, now
        self._measure_rate(now)
        self._metrics.held.set(len(self._held))
        self._metrics.broker_up.set(self._broker.available)
        self._metrics.free_sequences.set(capacity.free_sequences)
        self._metrics.free_tokens.set(capacity.free_tokens)
        self._metrics.total_tokens.set(capacity.total_tokens)
        self._metrics.tokens_per_s.set(self._tokens_per_s)
        if statistics.speculation is not None:
            self._metrics.show_speculation(statistics.speculation)
        if not self._engine.is_alive:
            self._publisher.engine_died.set()
        elif (fallen := self._engine.fallen()) and not self._publisher.engine_died.is_set():
            _logger.critical("the group is broken: %s", fallen)
            self._publisher.engine_died.set()
        orphaned = self._settings.supervisor_pid not in (None, os.getppid())
        if orphaned and not self._drain.requested.is_set():
            self._drain.request("the supervisor is gone")

    def _measure_rate(self, now: float) -> None:
        """An exponentially weighted mean of the tokens generated a second."""
        elapsed, tokens = now - self._measured_at, self._publisher.tokens_out
        if elapsed > 0:
            latest = (tokens - self._measured_tokens) / elapsed
            self._tokens_per_s += _SMOOTHING * (latest - self._tokens_per_s)
            self._measured_at, self._measured_tokens = now, tokens

    async def _iterate(self) -> None:
        self.beat()
        await asyncio.to_thread(self._health_file.write, self.health())  # a slow disk must not hold up the tokens
        await asyncio.sleep(min(self._settings.heartbeat_s, _LOOK_S))
