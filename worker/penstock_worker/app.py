"""One worker process: an asyncio loop with the roles, and beside it the engine's thread.

Start: Redis answers, the model is loaded, the roles run. End: a drain, or the engine's death. What each role does is in
its own file; here is only how they are put together, in which order they start, and in which they stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import redis.asyncio
from redis import exceptions

from penstock_core.models import BrokenCheckpoint, UnsupportedModel
from penstock_core.pipeline import PipelineConfig
from penstock_core.protocol import transitions
from penstock_core.protocol.broker_check import check_broker_async
from penstock_core.protocol.connection import broker_errors, connect_async, masked
from penstock_core.protocol.errors import BrokerUnavailable, EngineFailed, InvalidConfiguration, InvalidRequest
from penstock_core.protocol.jobs import FinishReason
from penstock_core.protocol.keys import QueueKeys
from penstock_worker.broker import Broker
from penstock_worker.claim import Claimer
from penstock_worker.doorbell import Doorbell
from penstock_worker.drain import Drain
from penstock_worker.engine import Engine
from penstock_worker.exit_codes import ExitCode
from penstock_worker.health import Health, HealthFile
from penstock_worker.held import HeldJobs
from penstock_worker.load import in_daemon_thread, load_engine, pipeline_config
from penstock_worker.mend import Mender
from penstock_worker.metrics import WorkerMetrics
from penstock_worker.models import ModelUnavailable, resolve
from penstock_worker.presence import Presence
from penstock_worker.publish import Publisher
from penstock_worker.pulse import Pulse
from penstock_worker.reclaim import Reclaimer, take_back_from
from penstock_worker.renew import Renewer
from penstock_worker.role import Backoff, RoleLoop
from penstock_worker.settings import WorkerSettings, new_worker_id
from penstock_worker.status_server import StatusServer
from penstock_worker.writes import Writer

_logger = logging.getLogger(__name__)

Load = Callable[[PipelineConfig], Engine]
T = TypeVar("T")

_LISTEN_S = 10.0
_DOORBELL_WITHIN_S = 5.0
"""A worker whose doorbell cannot connect, for want of a right perhaps, works all the same."""
_REFUSALS = (
    exceptions.AuthenticationError,
    exceptions.AuthenticationWrongNumberOfArgsError,
    exceptions.AuthorizationError,
    exceptions.NoPermissionError,
)


class Stop(Exception):
    """The worker cannot start, or is asked to stop before it has; carries the exit code."""

    def __init__(self, code: ExitCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code


SWITCH_INTERVAL_S = 0.0005
"""How long the engine's thread may keep the interpreter from the event loop, which has tokens to send (usual: 5 ms)."""


def run(settings: WorkerSettings, load: Load = load_engine) -> ExitCode:
    """Run one worker until it is drained; `load` makes its engine."""
    if settings.worker_id is None:
        settings = settings.model_copy(update={"worker_id": new_worker_id()})
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    return asyncio.run(_run(settings, load))


async def _run(settings: WorkerSettings, load: Load) -> ExitCode:
    drain = Drain()
    drain.install()
    health_file = HealthFile(settings.health_dir, settings.worker_id or "")
    loading = RoleLoop("loading", lambda: _say_loading(health_file, settings, drain), lambda role: None)
    loading.start()
    client = bell = broker = None
    try:
        client = connect_async(settings.redis_url)
        bell = connect_async(settings.redis_url, timeout_s=_LISTEN_S)
        broker = Broker(client, settings.redis_url)
        await _unless_drained(drain, _await_broker(broker, settings))
        served_name, engine = await _unless_drained(drain, _load(settings, load))
        _spare_the_collector()
        keys = QueueKeys(settings.queue or served_name)
        await _unless_drained(drain, _set_max_crashes(broker, keys, settings.max_crashes))
        worker = Worker(settings, served_name, keys, engine, broker, bell, drain, health_file)
        await loading.shutdown()
        try:
            return await worker.run()
        finally:
            await asyncio.to_thread(_stop, engine)
    except Stop as stop:
        _logger.log(logging.INFO if stop.code is ExitCode.OK else logging.ERROR, "%s", stop)
        return stop.code
    except (InvalidConfiguration, InvalidRequest) as error:
        _logger.error("%s", error)
        return ExitCode.USAGE
    finally:
        await loading.shutdown()
        health_file.remove()
        drain.uninstall()
        if broker is not None:
            broker.close()
        for connection in (client, bell):
            if connection is not None:
                await connection.aclose()


async def _say_loading(health_file: HealthFile, settings: WorkerSettings, drain: Drain) -> None:
    if settings.supervisor_pid not in (None, os.getppid()) and not drain.requested.is_set():
        drain.request("the supervisor is gone")
    health = Health(settings.worker_id or "", os.getpid(), "loading", True, 0, time.time())
    await asyncio.to_thread(health_file.write, health)
    await asyncio.sleep(settings.heartbeat_s)


async def _unless_drained(drain: Drain, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; raises `Stop` where the worker is told to stop first."""
    task = asyncio.create_task(work)
    stop = asyncio.create_task(drain.requested.wait())
    try:
        await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Stop(ExitCode.OK, "stopped before it had started")
    finally:
        task.cancel()
        stop.cancel()
        await asyncio.gather(task, stop, return_exceptions=True)


async def _await_broker(broker: Broker, settings: WorkerSettings) -> None:
    """Return once Redis answers; raises `Stop` where waiting cannot help."""
    backoff = Backoff(base_s=0.2, cap_s=5.0)
    while True:
        try:
            with broker_errors(settings.redis_url):
                await broker.client.ping()
                warnings = await check_broker_async(broker.client)
            await broker.compare_clocks()
            break
        except BrokerUnavailable as error:
            if isinstance(error.__cause__, _REFUSALS):
                raise Stop(ExitCode.BROKER, str(error)) from error
            wait_s = backoff.next_s()
            _logger.warning("waiting for Redis", extra={"reason": str(error), "again_in_s": round(wait_s, 1)})
            await asyncio.sleep(wait_s)
    for warning in warnings:
        if warning.severity == "error":
            raise Stop(ExitCode.BROKER, f"Redis at {masked(settings.redis_url)}: {warning.message}")
        _logger.warning(warning.message, extra={"code": warning.code})


async def _set_max_crashes(broker: Broker, keys: QueueKeys, wanted: int | None) -> None:
    """Store what `--max-crashes` says in the queue's configuration, which all workers and supervisors go by."""
    if wanted is None:
        return
    backoff = Backoff()
    while True:
        try:
            config, _ = await broker.run(transitions.configure(keys))
            if config.max_crashes != wanted:
                fields = {"queue": keys.queue, "was": config.max_crashes, "is": wanted}
                _logger.warning("--max-crashes changes the queue's max_crashes, for all its workers", extra=fields)
                await broker.run(transitions.configure(keys, {"max_crashes": wanted}))
            return
        except BrokerUnavailable:
            await asyncio.sleep(backoff.next_s())


async def _load(settings: WorkerSettings, load: Load) -> tuple[str, Engine]:
    """The served name and the engine; raises `Stop` where the model cannot be had."""

    def work() -> tuple[str, Engine]:
        checkpoint = resolve(settings.model)
        try:
            config = pipeline_config(settings, checkpoint)
        except InvalidConfiguration as error:
            raise Stop(ExitCode.USAGE, str(error)) from error
        started = time.monotonic()
        engine = load(config)
        _logger.info("model loaded", extra={"model": config.name, "seconds": round(time.monotonic() - started, 2)})
        return config.name, engine

    try:
        return await in_daemon_thread(work)
    except (ModelUnavailable, BrokenCheckpoint, UnsupportedModel, InvalidConfiguration) as error:
        raise Stop(ExitCode.MODEL, str(error)) from error
    except EngineFailed as error:  # a rank did not come up, or fell meanwhile
        raise Stop(ExitCode.ENGINE, str(error)) from error
    except (MemoryError, OSError, RuntimeError) as error:
        raise Stop(ExitCode.MODEL, f"--model: cannot load {settings.model}: {type(error).__name__}: {error}") from error


def _spare_the_collector() -> None:
    """Leave out of every later collection what lives as long as the process: walking torch's modules again and again
    cost a third of a worker's time at thousands of jobs a second, in pauses of a quarter of a second."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


def _stop(engine: Engine) -> None:
    try:
        engine.shutdown(timeout_s=10.0 if engine.fallen() is None else 1.0)
    except TimeoutError as error:
        _logger.warning("the engine did not stop", extra={"reason": str(error)})


async def _first_of(*events: asyncio.Event) -> None:
    """Return when any of the events is set."""
    waits = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


class Worker:
    """A worker with a loaded engine and a Redis that answers.

    `bell` is the doorbell's own client: a subscribed connection can do nothing else.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        served_name: str,
        keys: QueueKeys,
        engine: Engine,
        broker: Broker,
        bell: redis.asyncio.Redis,
        drain: Drain,
        health_file: HealthFile,
    ) -> None:
        worker_id = settings.worker_id or ""
        self._settings = settings
        self._served_name = served_name
        self._worker_id = worker_id
        self._keys = keys
        self._engine = engine
        self._broker = broker
        self._drain = drain
        self._metrics = metrics = WorkerMetrics(keys.queue, served_name)
        self._held = held = HeldJobs(engine.abort)
        self._publisher = Publisher(
            broker,
            Writer(broker, keys, held, metrics, worker_id=worker_id),
            held,
            metrics,
            engine,
            worker_id=worker_id,
            served_name=served_name,
            interval_s=settings.publish_interval_ms / 1000,
            max_buffered_tokens=settings.max_buffered_tokens,
            on_freed=lambda: self._claimer.freed(),
        )
        self._claimer = Claimer(
            broker,
            keys,
            engine,
            held,
            self._publisher,
            metrics,
            worker_id=worker_id,
            served_name=served_name,
            lease_ms=settings.lease_ms,
        )
        self._doorbell = Doorbell(
            bell,
            keys.bell,
            worker_id,
            metrics,
            on_job=self._claimer.rung,
            on_cancel=self._on_cancel,
            on_connected=self._on_bell_connected,
        )
        self._pulse = Pulse(
            settings,
            served_name,
            broker,
            engine,
            held,
            self._publisher,
            self._doorbell,
            drain,
            metrics,
            health_file,
        )
        self._renewer = Renewer(
            broker,
            keys,
            held,
            metrics,
            worker_id=worker_id,
            lease_ms=settings.lease_ms,
            heartbeat_s=settings.heartbeat_s,
            describe=self._pulse.describe,
        )
        self._reclaimer = Reclaimer(
            broker,
            keys,
            Presence(broker, keys, self._doorbell, worker_id=worker_id, heartbeat_s=settings.heartbeat_s),
            metrics,
            tick_s=settings.reclaim_tick_s,
        )
        self._mender = Mender(broker, keys, metrics)
        self._status_server: StatusServer | None = None
        if settings.metrics_port is not None:
            self._status_server = StatusServer(
                metrics.registry, self._pulse.health, self._read_queue, settings.metrics_host, settings.metrics_port
            )

    async def run(self) -> ExitCode:
        """Work until drained, or until the engine dies."""
        if self._status_server is not None:
            try:
                await self._status_server.start()
            except OSError as error:
                raise Stop(ExitCode.USAGE, f"--metrics-port: cannot listen: {error}; choose another port") from error
        self._engine.start(self._publisher.on_outputs)
        for first in (self._doorbell, self._publisher, self._pulse, self._reclaimer, self._mender):
            first.start()
        # The first heartbeat names the doorbell's connection: a worker that dies a moment later is missed by it.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DOORBELL_WITHIN_S):
                await _first_of(self._doorbell.connected, self._drain.requested)
        self._renewer.start()
        await _first_of(self._renewer.registered, self._drain.requested)
        if not self._drain.requested.is_set():
            self._claimer.start()
        _logger.info(
            "ready",
            extra={
                "queue": self._keys.queue,
                "model": self._served_name,
                "kv_tokens": self._engine.capacity().total_tokens,
            },
        )
        engine_died = self._publisher.engine_died
        await _first_of(self._drain.requested, engine_died)
        await self._claimer.shutdown()
        if not engine_died.is_set():
            await self._drain.finish_jobs(self._held, self._settings.grace_s, engine_died)
        if engine_died.is_set():
            await self._give_up_jobs()
        else:
            await self._drain.hand_back(self._held, self._publisher)
        for role in (self._mender, self._reclaimer, self._renewer, self._publisher, self._doorbell, self._pulse):
            await role.shutdown()
        if not engine_died.is_set():
            await self._drain.insist(self._deregister)
        if self._status_server is not None:
            await self._status_server.shutdown()
        _logger.info("stopped")
        return ExitCode.ENGINE if engine_died.is_set() else ExitCode.OK

    async def _give_up_jobs(self) -> None:
        """The engine died: write what there is, and have the jobs taken back as from a crashed worker.

        A release would spend nothing, and a request that kills every engine would go round for ever.
        """
        _logger.critical("the engine's thread died; giving the jobs to other workers", extra={"held": len(self._held)})
        await self._renewer.shutdown()
        await self._drain.insist(self._publisher.flush_all)

        async def take_back() -> None:
            await take_back_from(self._broker, self._keys, self._worker_id)

        await self._drain.insist(take_back)

    async def _deregister(self) -> None:
        given = await self._broker.run(transitions.deregister(self._keys, self._worker_id))
        if given:
            _logger.warning("handed back jobs on leaving", extra={"jobs": len(given)})

    def _on_cancel(self, job_id: str) -> None:
        job = self._held.by_job(job_id)
        if job is not None:
            self._held.stop(job, FinishReason.CANCELLED)

    def _on_bell_connected(self) -> None:
        """Rings may have been missed: look for jobs and for cancellations, and tell the others our new connection."""
        self._claimer.rung()
        self._renewer.hurry()

    async def _read_queue(self) -> None:
        """Bring the queue's gauges up to date, where Redis answers."""
        with contextlib.suppress(BrokerUnavailable):
            self._metrics.show_queue(await self._broker.run(transitions.snapshot(self._keys)))
