"""Several workers under one parent (`--processes`, `--ranks`, `--gpus`): a group that dies is replaced.

Each child is one worker: rank 0 of its group, which starts its own followers. The parent never touches the engine. It
knows of a child's death from the operating system, which is sooner and surer than any heartbeat, so the dead worker's
jobs wait for no lease. Each life of a group is a new worker with an id of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from penstock_core.protocol.connection import connect_async
from penstock_core.protocol.errors import BrokerUnavailable, InvalidConfiguration, InvalidRequest
from penstock_core.protocol.keys import QueueKeys
from penstock_worker import flags, models
from penstock_worker.broker import Broker
from penstock_worker.exit_codes import ExitCode
from penstock_worker.groups import Group, deal, visible_gpus
from penstock_worker.health import HealthFile, default_folder
from penstock_worker.reclaim import take_back_from
from penstock_worker.role import Backoff
from penstock_worker.settings import WorkerSettings, new_worker_id
from penstock_worker.standing import GroupStanding, Standing, StandingMetrics
from penstock_worker.status_server import StatusServer

_logger = logging.getLogger(__name__)

_STABLE_AFTER_S = 60.0
_RESTART_BASE_S = 0.5
_RESTART_CAP_S = 30.0
_LOOK_EVERY_S = 0.25
_FOLLOWERS_WITHIN_S = 5.0


class Supervisor:
    """Keeps one worker process running per group, until told to stop.

    `bury` is called with the worker id of every child that died without draining; it takes that worker's jobs back.

    Attributes:
        standing: how the groups fare.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        groups: Sequence[Group],
        bury: Callable[[str], Awaitable[None]],
        command: tuple[str, ...] = (sys.executable, "-m", "penstock_worker"),
    ) -> None:
        self._settings = settings
        self._groups = groups
        self._bury = bury
        self._command = command
        self._children: dict[int, asyncio.subprocess.Process] = {}
        self._stopping = asyncio.Event()
        self._failure: ExitCode | None = None
        self.standing = Standing(
            settings.worker_id or new_worker_id("supervisor"),
            [GroupStanding(group.slot) for group in groups],
            settings.health_dir or default_folder(),
        )

    async def run(self) -> ExitCode:
        """Supervise until every group has ended.

        Returns `OK` after a drain, or the code of a child that never served and that no restart can help.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        watch = asyncio.create_task(self._watch())
        try:
            await asyncio.gather(*(self._keep_running(group) for group in self._groups))
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
        return self._failure or ExitCode.OK

    def stop(self) -> None:
        """Pass a stop signal on; the children count them: the first drains, the second hands back at once."""
        self._stopping.set()
        self.standing.draining = True
        for child in self._children.values():
            if child.returncode is None:
                child.send_signal(signal.SIGTERM)

    async def _keep_running(self, group: Group) -> None:
        backoff = Backoff(_RESTART_BASE_S, _RESTART_CAP_S)
        while not self._stopping.is_set():
            started = time.monotonic()
            worker_id = self._new_id(group.slot)
            child = await self._start_child(group, worker_id)
            code = await child.wait()
            if code == ExitCode.OK:
                self.standing.ended(group.slot)
                return
            never_served = not self.standing.died(group.slot, f"{worker_id} {_manner(code)}")
            await asyncio.gather(self._bury(worker_id), _end_followers(child.pid))
            if self._stopping.is_set():
                return
            if never_served and code in tuple(ExitCode) and ExitCode(code).is_permanent:
                self._failure = ExitCode(code)
                self.stop()
                return
            if time.monotonic() - started > _STABLE_AFTER_S:
                backoff.reset()
            wait_s = backoff.next_s()
            _logger.warning(
                "a worker died; starting another", extra={"died": worker_id, "code": code, "wait_s": round(wait_s, 3)}
            )
            await self._pause(wait_s)

    async def _start_child(self, group: Group, worker_id: str) -> asyncio.subprocess.Process:
        settings = self._child_settings(group, worker_id)
        child = await asyncio.create_subprocess_exec(
            *self._command,
            *flags.arguments(settings, leave_out=("redis_url",)),
            env=self._child_environment(group),
            stdin=asyncio.subprocess.DEVNULL,
            process_group=0,  # Ctrl-C reaches the parent only, which passes it on: once, not twice
        )
        self._children[group.slot] = child
        self.standing.started(group.slot, worker_id)
        if self._stopping.is_set():
            child.send_signal(signal.SIGTERM)
        _logger.info("started a worker", extra={"slot": group.slot, "started": worker_id, "pid": child.pid})
        return child

    async def _watch(self) -> None:
        """Follow how the groups fare, and write the supervisor's health file whenever that changes."""
        settings = self._settings
        file = HealthFile(settings.health_dir, self.standing.worker_id)
        status, written = "", 0.0
        try:
            while True:
                for group in self.standing.look():
                    fields = {"slot": group.slot, "back": group.worker_id, "after_s": round(self.standing.outage_s, 2)}
                    _logger.info("a group serves again", extra=fields)
                health, now = self.standing.health(), time.monotonic()
                if health.status != status or now - written > min(settings.heartbeat_s, 5.0):
                    await asyncio.to_thread(file.write, health)  # a slow disk must not hold up the signals
                    status, written = health.status, now
                await asyncio.sleep(_LOOK_EVERY_S)
        finally:
            file.remove()

    async def _pause(self, wait_s: float) -> None:
        try:
            async with asyncio.timeout(wait_s):
                await self._stopping.wait()
        except TimeoutError:
            pass

    def _new_id(self, slot: int) -> str:
        if self._settings.worker_id is None:
            return new_worker_id(str(slot))
        return f"{self._settings.worker_id}-{slot}-{new_worker_id().rsplit('-', 1)[-1]}"

    def _child_settings(self, group: Group, worker_id: str) -> WorkerSettings:
        changes: dict[str, object] = {
            "processes": 1,
            "ranks": None,
            "gpus": None,
            "worker_id": worker_id,
            "supervisor_pid": os.getpid(),
            "threads": group.threads,
            "device": group.device,
        }
        if self._settings.metrics_port:
            changes["metrics_port"] = self._settings.metrics_port + 1 + group.slot
        return self._settings.model_copy(update=changes)

    def _child_environment(self, group: Group) -> dict[str, str]:
        """Ours, without the settings: the command line has those, but for the URL, whose password would be public."""
        settings = {flags.variable(name) for name in WorkerSettings.model_fields}
        environment = {name: value for name, value in os.environ.items() if name not in settings}
        environment[flags.variable("redis_url")] = self._settings.redis_url
        if group.visible is not None:
            environment["CUDA_VISIBLE_DEVICES"] = group.visible
        return environment


async def _end_followers(leader: int) -> None:
    """Kill what is left of a dead worker's process group, and wait until it is gone: the next life needs its memory.

    Followers end by themselves with their rank 0; one that is stuck in a collective might take its time.
    """
    give_up = time.monotonic() + _FOLLOWERS_WITHIN_S
    while (left := _running(leader)) and time.monotonic() < give_up:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await asyncio.sleep(0.02)


def _running(process_group: int) -> list[int]:
    """Processes of a group that have not ended; a zombie has, whoever is to reap it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            state, _, group = path.read_text().rpartition(")")[2].split()[:3]
            if int(group) == process_group and state not in "ZX":
                found.append(int(path.parent.name))
    return found


def _manner(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def run(settings: WorkerSettings) -> ExitCode:
    """Supervise workers until they are drained."""
    return asyncio.run(_run(settings))


async def _run(settings: WorkerSettings) -> ExitCode:
    try:
        groups = deal(settings, visible_gpus(), os.cpu_count() or 1)
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

    supervisor = Supervisor(settings, groups, bury)
    status_server: StatusServer | None = None
    try:
        if settings.metrics_port is not None:
            metrics = StandingMetrics(supervisor.standing, keys.queue, served_name)
            status_server = StatusServer(
                metrics.registry, supervisor.standing.health, None, settings.metrics_host, settings.metrics_port
            )
            try:
                await status_server.start()
            except OSError as error:
                _logger.error("--metrics-port: cannot listen: %s; choose another port", error)
                return ExitCode.USAGE
        return await supervisor.run()
    finally:
        if status_server is not None:
            await status_server.shutdown()
        broker.close()
        await client.aclose()
