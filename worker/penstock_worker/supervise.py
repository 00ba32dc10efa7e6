"""`--processes N`: one parent, N worker processes; a crashed one is replaced, and its jobs are taken back at once.

The parent never touches the engine. It knows of a child's death from the operating system, which is sooner and surer
than any heartbeat, so the dead worker's jobs wait for no lease. Each life of a child is a new worker with an id of its
own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from penstock_core.protocol.connection import connect_async
from penstock_core.protocol.errors import BrokerUnavailable, InvalidConfiguration, InvalidRequest
from penstock_core.protocol.keys import QueueKeys
from penstock_worker import flags, models
from penstock_worker.broker import Broker
from penstock_worker.exit_codes import ExitCode
from penstock_worker.reclaim import take_back_from
from penstock_worker.role import Backoff
from penstock_worker.settings import WorkerSettings, new_worker_id

_logger = logging.getLogger(__name__)

_STABLE_AFTER_S = 60.0
_RESTART_BASE_S = 0.5
_RESTART_CAP_S = 30.0


class Supervisor:
    """Keeps one worker process running per slot, until told to stop.

    `bury` is called with the worker id of every child that died without draining; it takes that worker's jobs back.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        bury: Callable[[str], Awaitable[None]],
        command: tuple[str, ...] = (sys.executable, "-m", "penstock_worker"),
    ) -> None:
        self._settings = settings
        self._bury = bury
        self._command = command
        self._children: dict[int, asyncio.subprocess.Process] = {}
        self._stopping = asyncio.Event()
        self._failure: ExitCode | None = None

    async def run(self) -> ExitCode:
        """Supervise until every slot has ended.

        Returns `OK` after a drain, or the code of a child that no restart can help.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        try:
            await asyncio.gather(*(self._keep_running(slot) for slot in range(self._settings.processes)))
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
        return self._failure or ExitCode.OK

    def stop(self) -> None:
        """Pass a stop signal on; the children count them: the first drains, the second hands back at once."""
        self._stopping.set()
        for child in self._children.values():
            if child.returncode is None:
                child.send_signal(signal.SIGTERM)

    async def _keep_running(self, slot: int) -> None:
        backoff = Backoff(_RESTART_BASE_S, _RESTART_CAP_S)
        while not self._stopping.is_set():
            started = time.monotonic()
            worker_id = self._new_id(slot)
            code = await self._run_child(slot, worker_id)
            if code == ExitCode.OK:
                return
            await self._bury(worker_id)
            if self._stopping.is_set():
                return
            if code in tuple(ExitCode) and ExitCode(code).is_permanent:
                self._failure = ExitCode(code)
                self.stop()
                return
            if time.monotonic() - started > _STABLE_AFTER_S:
                backoff.reset()
            wait_s = backoff.next_s()
            _logger.warning(
                "a worker died; starting another", extra={"died": worker_id, "code": code, "wait_s": wait_s}
            )
            await self._pause(wait_s)

    async def _run_child(self, slot: int, worker_id: str) -> int:
        settings = self._child_settings(slot, worker_id)
        # The URL may hold a password, and a command line is public: it goes in the environment.
        child = await asyncio.create_subprocess_exec(
            *self._command,
            *flags.arguments(settings, leave_out=("redis_url",)),
            env={**os.environ, flags.variable("redis_url"): settings.redis_url},
            stdin=asyncio.subprocess.DEVNULL,
            process_group=0,  # Ctrl-C reaches the parent only, which passes it on: once, not twice
        )
        self._children[slot] = child
        if self._stopping.is_set():
            child.send_signal(signal.SIGTERM)
        _logger.info("started a worker", extra={"slot": slot, "started": worker_id, "pid": child.pid})
        return await child.wait()

    async def _pause(self, wait_s: float) -> None:
        try:
            async with asyncio.timeout(wait_s):
                await self._stopping.wait()
        except TimeoutError:
            pass

    def _new_id(self, slot: int) -> str:
        if self._settings.worker_id is None:
            return new_worker_id(slot)
        return f"{self._settings.worker_id}-{slot}-{new_worker_id().rsplit('-', 1)[-1]}"

    def _child_settings(self, slot: int, worker_id: str) -> WorkerSettings:
        settings = self._settings
        changes: dict[str, object] = {
            "processes": 1,
            "worker_id": worker_id,
            "supervisor_pid": os.getpid(),
            "threads": settings.threads or max(1, (os.cpu_count() or 1) // settings.processes),
            "device": device_of(settings.device, slot, visible_gpus()),
        }
        if settings.metrics_port:
            changes["metrics_port"] = settings.metrics_port + slot
        return settings.model_copy(update=changes)


def visible_gpus() -> int:
    """GPUs this process may use, without loading a CUDA library into the parent."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return len([name for name in chosen.split(",") if name.strip() not in ("", "-1")])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def device_of(device: str, slot: int, gpus: int) -> str:
    """The device of the worker in `slot`: one GPU each, round robin, where the device was left open."""
    if gpus and device in ("auto", "cuda"):
        return f"cuda:{slot % gpus}"
    return device


def run(settings: WorkerSettings) -> ExitCode:
    """Supervise `settings.processes` workers until they are drained."""
    return asyncio.run(_run(settings))


async def _run(settings: WorkerSettings) -> ExitCode:
    try:
        served_name = settings.served_name or models.served_name(settings.model)
        keys = QueueKeys(settings.queue or served_name)
        client = connect_async(settings.redis_url)
    except (models.ModelUnavailable, InvalidConfiguration, InvalidRequest) as error:
        _logger.error("%s", error)
        return ExitCode.MODEL if isinstance(error, models.ModelUnavailable) else ExitCode.USAGE
    broker = Broker(client, settings.redis_url)

    async def bury(worker_id: str) -> None:
        """Take back the jobs of a child that is dead for sure; the lease does it where Redis is away."""
        with contextlib.suppress(BrokerUnavailable):
            outcome = await take_back_from(broker, keys, worker_id)
            fields = {"gone": worker_id, "requeued": len(outcome.requeued), "dead": outcome.dead}
            _logger.info("took back the jobs of a dead worker", extra=fields)

    try:
        return await Supervisor(settings, bury).run()
    finally:
        await client.aclose()
