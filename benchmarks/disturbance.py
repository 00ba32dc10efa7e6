"""Everything that goes wrong, on demand: a broker that is killed, workers that die or freeze, a network that drops.

Used by `benchmarks.recovery`. The broker is a real redis-server with an append-only file that is synced before every
reply; the workers are real processes; between them stands a TCP proxy that can cut, delay or deafen any connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import redis

from penstock.embedded import find_server
from penstock_core.protocol.keys import QueueKeys
from penstock_core.protocol.transitions import run, snapshot

START_TIMEOUT_S = 120.0
_WEIGHTS = {"kill": 4, "freeze": 2, "restart redis": 1, "drop": 3, "deafen": 2, "delay": 3}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class BrokerProcess:
    """One redis-server on a port of its own."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Return when it answers, its data loaded."""
        command = [str(find_server().path), "--port", str(self.port), "--bind", "127.0.0.1"]
        command += ["--dir", str(self._folder), "--appendonly", "yes", "--appendfsync", "always", "--save", ""]
        with (self._folder / "redis.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        give_up = time.monotonic() + START_TIMEOUT_S
        with redis.Redis(port=self.port, socket_timeout=5) as client:
            while True:
                with contextlib.suppress(redis.RedisError):
                    client.ping()
                    return
                if time.monotonic() > give_up:
                    raise SystemExit(f"redis-server does not answer; see {self._folder / 'redis.log'}")
                time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


@dataclass(eq=False)
class _Link:
    """One proxied connection."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    held_until: float = 0.0
    deaf: bool = False

    def cut(self) -> None:
        for writer in (self.client, self.server):
            writer.transport.abort()


class Proxy:
    """Passes connections on to the broker, on a thread of its own, and mistreats them when told to."""

    def __init__(self, upstream_port: int) -> None:
        self.port = 0
        self._upstream_port = upstream_port
        self._links: set[_Link] = set()
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._run, daemon=True).start()
        self._ready.wait()
        self.url = f"redis://127.0.0.1:{self.port}"

    def _run(self) -> None:
        server = self._loop.run_until_complete(asyncio.start_server(self._accept, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            upstream, server = await asyncio.open_connection("127.0.0.1", self._upstream_port)
        except OSError:
            writer.transport.abort()
            return
        link = _Link(writer, server)
        self._links.add(link)
        try:
            await asyncio.gather(self._pump(link, reader, server, False), self._pump(link, upstream, writer, True))
        finally:
            self._links.discard(link)

    async def _pump(self, link: _Link, source: asyncio.StreamReader, sink: asyncio.StreamWriter, replies: bool) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                await asyncio.sleep(max(0.0, link.held_until - time.monotonic()))
                if replies and link.deaf:  # what was asked has been done, and nobody will ever know
                    break
                sink.write(data)
                await sink.drain()
        link.cut()

    def _choose(self, rng: random.Random, most: int) -> list[_Link]:
        links = list(self._links)
        return rng.sample(links, min(len(links), rng.randint(1, most)))

    def drop(self, rng: random.Random) -> None:
        """Cut some connections."""
        for link in self._choose(rng, 3):
            self._loop.call_soon_threadsafe(link.cut)

    def deafen(self, rng: random.Random) -> None:
        """Of some connections, swallow the next reply, and cut."""
        for link in self._choose(rng, 3):
            link.deaf = True

    def delay(self, rng: random.Random, longest_s: float) -> None:
        """Hold everything that some connections carry for a while."""
        for link in self._choose(rng, 3):
            link.held_until = time.monotonic() + rng.uniform(0.05, longest_s)

    def close(self) -> None:
        """Stop passing anything on."""
        self._loop.call_soon_threadsafe(self._loop.stop)


class Worker:
    """One worker process's life."""

    def __init__(self, worker_id: str, url: str, queue: str, folder: Path, options: list[str]) -> None:
        self.worker_id = worker_id
        self.frozen_until = 0.0
        command = [sys.executable, "-m", "penstock_worker", "--redis-url", url, "--queue", queue]
        command += ["--worker-id", worker_id, "--log-format", "json", *options]
        environment = {**os.environ, "PENSTOCK_HEALTH_DIR": str(folder)}
        with (folder / f"{worker_id}.log").open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()

    def freeze(self, seconds: float) -> None:
        """SIGSTOP; to be thawed after `seconds`."""
        self.process.send_signal(signal.SIGSTOP)
        self.frozen_until = time.monotonic() + seconds

    def thaw(self) -> None:
        """SIGCONT."""
        self.process.send_signal(signal.SIGCONT)
        self.frozen_until = 0.0

    def end(self) -> None:
        """Drain, and kill what does not."""
        if self.frozen_until:
            self.thaw()
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.kill()


class Crew:
    """So many workers of one queue; whoever is gone is replaced."""

    def __init__(self, size: int, url: str, queue: str, folder: Path, options: list[str]) -> None:
        self._start = (url, queue, folder, options)
        self._lives = 0
        self.unexpected_exits = 0
        self.workers = [self._new() for _ in range(size)]

    def _new(self) -> Worker:
        self._lives += 1
        return Worker(f"{self._start[1]}-w{self._lives}", *self._start)

    def replace(self, worker: Worker) -> None:
        """A new life in the place of one that is over."""
        self.workers[self.workers.index(worker)] = self._new()

    def revive(self) -> None:
        """Replace workers that ended by themselves; they should not."""
        for worker in list(self.workers):
            if worker.process.poll() is not None:
                self.unexpected_exits += 1
                self.replace(worker)

    def ready(self, admin: redis.Redis, queue: str) -> list[Worker]:
        """Those that have been heard of, and are not frozen."""
        known = {view.worker_id for view in run(admin, snapshot(QueueKeys(queue))).workers}
        return [worker for worker in self.workers if worker.worker_id in known and not worker.frozen_until]

    def wait_until_ready(self, admin: redis.Redis, queue: str) -> None:
        """Until all of them beat."""
        give_up = time.monotonic() + START_TIMEOUT_S
        while len(self.ready(admin, queue)) < len(self.workers):
            ended = [worker for worker in self.workers if worker.process.poll() is not None]
            if ended or time.monotonic() > give_up:
                said = (self._start[2] / f"{(ended or self.workers)[0].worker_id}.log").read_text()
                raise SystemExit(f"the workers do not start: {said[-2000:]}")
            time.sleep(0.05)

    def end(self) -> None:
        """Drain all."""
        with contextlib.suppress(ProcessLookupError):
            for worker in self.workers:
                worker.process.terminate()
        for worker in self.workers:
            worker.end()


@dataclass(frozen=True, slots=True)
class Interruption:
    """A job that had published tokens when its worker was killed, `at` seconds since 1970."""

    job_id: str
    attempt: int
    at: float


@dataclass
class Disturber:
    """Does one of the above every now and then, until told to stop; deterministic in what it draws, not in timing.

    Attributes:
        interruptions: jobs whose workers were killed.
        reclaims_s: how long each killed worker's jobs were still its.
        done: how often each was done.
    """

    rng: random.Random
    broker: BrokerProcess
    proxy: Proxy
    crew: Crew
    queue: str
    lease_s: float
    every_s: float
    interruptions: list[Interruption] = field(default_factory=list)
    reclaims_s: list[float] = field(default_factory=list)
    _dead: dict[str, float] = field(default_factory=dict)
    done: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_WEIGHTS, 0))
    stopped: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Until `stopped`; at the end everything is up again."""
        with redis.Redis(port=self.broker.port, socket_timeout=5) as admin:
            at = time.monotonic() + self.rng.expovariate(1 / self.every_s)
            while not self.stopped.wait(0.05):
                self._restore()
                with contextlib.suppress(redis.RedisError):
                    self._note_reclaims(admin)
                if time.monotonic() >= at:
                    kind = self.rng.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
                    with contextlib.suppress(redis.RedisError):
                        self.done[kind] += self._disturb(kind, admin)
                    at = time.monotonic() + self.rng.expovariate(1 / self.every_s)
            for worker in self.crew.workers:
                worker.frozen_until = min(worker.frozen_until, time.monotonic())
            self._restore()

    def _restore(self) -> None:
        self.crew.revive()
        for worker in self.crew.workers:
            if worker.frozen_until and time.monotonic() >= worker.frozen_until:
                worker.thaw()

    def _note_reclaims(self, admin: redis.Redis) -> None:
        """Of dead workers that held jobs: when they hold none any more."""
        keys = QueueKeys(self.queue)
        for worker_id, at in list(self._dead.items()):
            if not admin.exists(keys.held(worker_id)):
                self.reclaims_s.append(time.time() - at)
                del self._dead[worker_id]

    def _disturb(self, kind: str, admin: redis.Redis) -> bool:
        """Whether it was done: a worker is only killed or frozen while another is there to take over."""
        match kind:
            case "kill" | "freeze":
                ready = self.crew.ready(admin, self.queue)
                if len(ready) < 2:
                    return False
                worker = self.rng.choice(ready)
                if kind == "kill":
                    self._kill(worker, admin)
                else:
                    worker.freeze(self.rng.uniform(0.2, self.lease_s + 3))
            case "restart redis":
                self.broker.kill()
                self.stopped.wait(self.rng.uniform(0, 2))
                self.broker.start()
            case "drop":
                self.proxy.drop(self.rng)
            case "deafen":
                self.proxy.deafen(self.rng)
            case "delay":
                self.proxy.delay(self.rng, 6.0)
        return True

    def _kill(self, worker: Worker, admin: redis.Redis) -> None:
        at = time.time()
        worker.kill()
        self.crew.replace(worker)
        keys = QueueKeys(self.queue)
        held: set[bytes] = admin.smembers(keys.held(worker.worker_id))  # type: ignore[assignment]
        if held:
            self._dead[worker.worker_id] = at
        for member in held:
            attempt, tokens = admin.hmget(keys.job(member.decode()), "attempt", "tokens")
            if attempt is not None and int(tokens or 0) > 0:
                self.interruptions.append(Interruption(member.decode(), int(attempt), at))
