"""Worker processes started by `serve` and `demo`: how they are begun, watched and ended.

The broker's URL holds a password, so it travels in the environment, never on a command line. Each worker is told its
supervisor's process id and leaves when that process is gone, so no worker outlives the command that began it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from penstock.cli.exits import CommandFailed, ExitCode


def worker_command() -> list[str]:
    """How to start a worker process on this machine; refuses when the `worker` extra is not installed."""
    for package in ("penstock_worker", "torch"):
        if importlib.util.find_spec(package) is None:
            raise CommandFailed(
                ExitCode.ERROR, "worker", f"{package} is not installed; install it with: pip install 'penstock[worker]'"
            )
    return [sys.executable, "-m", "penstock_worker"]


def bundled_model(name: str = "penstock-story") -> Path | None:
    """Folder of a model that comes with the worker, without importing the worker."""
    found = importlib.util.find_spec("penstock_worker")
    for place in (found.submodule_search_locations or ()) if found is not None else ():
        folder = Path(place) / "bundled" / name
        if (folder / "config.json").is_file():
            return folder
    return None


@contextlib.contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end the body as Ctrl-C does, so that what it started is ended too."""

    def end(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class WorkerProcess:
    """One `python -m penstock_worker` and the lines it logs: the last ones are kept, all are passed to `on_line`."""

    def __init__(self, url: str, flags: Sequence[str], *, on_line: Callable[[str], None] | None = None) -> None:
        self._on_line = on_line
        self._tail: deque[str] = deque(maxlen=20)
        self._process = subprocess.Popen(
            [*worker_command(), *flags, f"--supervisor-pid={os.getpid()}"],
            env={**os.environ, "PENSTOCK_REDIS_URL": url},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            process_group=0,  # Ctrl-C reaches this command only, which decides what becomes of the worker
            text=True,
            errors="replace",
        )
        self._listener = threading.Thread(target=self._listen, name="penstock-worker-log", daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._tail.append(line.rstrip())
            if self._on_line is not None:
                self._on_line(line.rstrip())

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative: the signal that ended it."""
        return self._process.poll()

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if it still runs."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        self.send(signal.SIGKILL)
        self._process.wait()

    def wait(self, timeout_s: float) -> int | None:
        """Its exit code, or None if it still runs after `timeout_s`."""
        try:
            return self._process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def last_words(self, lines: int = 3) -> str:
        """The end of its log, once it has ended."""
        self._listener.join(timeout=1.0)
        return " | ".join(list(self._tail)[-lines:])

    def close(self, grace_s: float = 10.0) -> None:
        """Drain it (SIGTERM), or kill it after `grace_s`."""
        self.send(signal.SIGTERM)
        if self.wait(grace_s) is None:
            self.kill()
        self._listener.join(timeout=1.0)
