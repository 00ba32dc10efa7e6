"""Real worker processes for tests: started on a broker, killed, frozen, thawed or drained on demand."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import penstock
from penstock_core.protocol.connection import connect
from penstock_core.protocol.keys import QueueKeys
from penstock_core.protocol.transitions import QueueSnapshot

PATIENCE_S = 180.0


def until(condition: Callable[[], object], what: str, patience_s: float = PATIENCE_S) -> None:
    """Poll until `condition` is true; fail, saying `what` was awaited, when it never is."""
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {patience_s:.0f} s for {what}"
        time.sleep(0.02)


def hear_interrupts() -> None:
    """For `preexec_fn`: a shell starts what it runs in the background deaf to SIGINT, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class WorkerProcess:
    """One `python -m <module>`; by default on the bundled model, one thread, quick to notice a death."""

    def __init__(self, redis_url: str, folder: Path, name: str, *options: str, module: str = "penstock_worker") -> None:
        self.worker_id = name
        self._log = folder / f"{name}.log"
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", module, "--redis-url", redis_url, "--worker-id", name]
        command += ["--threads", "1", "--log-format", "json", *options]
        environment = {**os.environ, "PENSTOCK_HEALTH_DIR": str(folder)}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def wait_until_ready(self, client: penstock.Client) -> None:
        """Until its heartbeat is in Redis."""

        def ready() -> bool:
            assert self.is_running, self.log
            return any(worker.worker_id == self.worker_id for worker in snapshot(client).workers)

        until(ready, f"worker {self.worker_id}")

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.wait()

    def freeze(self) -> None:
        """SIGSTOP: it does nothing, and does not know it."""
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        self._process.send_signal(signal.SIGCONT)

    def terminate(self) -> None:
        """SIGTERM: drain."""
        self._process.terminate()

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        """Exit code."""
        return self._process.wait(timeout_s)

    def end(self) -> None:
        """Whatever state it is in, gone."""
        if self.is_running:
            self.thaw()
            self.kill()


def snapshot(client: penstock.Client) -> QueueSnapshot:
    """The queue, with its counters."""
    return client.queue_snapshot()


def holders(client: penstock.Client, worker_id: str) -> int:
    """How many running jobs a worker holds, as Redis knows it."""
    with connect(client.settings.url) as connection:
        return int(connection.scard(QueueKeys(client.settings.queue).held(worker_id)))  # type: ignore[arg-type]


def end_leases(client: penstock.Client, worker_id: str) -> None:
    """The leases of a worker run out now: as if time had passed, which a short lease would leave to chance."""
    keys = QueueKeys(client.settings.queue)
    with connect(client.settings.url) as connection:
        held = connection.smembers(keys.held(worker_id))
        assert held, f"{worker_id} holds no job"
        connection.zadd(keys.leases, dict.fromkeys(held, 1), xx=True)  # type: ignore[arg-type]
