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
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

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


class WorkerProcess:
    """One `python -m penstock_worker`, its log kept aside for the case that it fails."""

    def __init__(self, url: str, flags: Sequence[str], *, log: IO[bytes] | None = None) -> None:
        self._log = log if log is not None else tempfile.TemporaryFile()  # noqa: SIM115 - closed in `close`
        self._keeps_log = log is None
        self._log_start = self._log.tell() if self._keeps_log else 0
        self._process = subprocess.Popen(
            [*worker_command(), *flags, f"--supervisor-pid={os.getpid()}"],
            env={**os.environ, "PENSTOCK_REDIS_URL": url},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            process_group=0,  # Ctrl-C reaches this command only, which decides what becomes of the worker
        )

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
        """The end of its log."""
        if not self._keeps_log:
            return ""
        with contextlib.suppress(OSError, ValueError):
            self._log.flush()
            self._log.seek(self._log_start)
            text = self._log.read().decode(errors="replace")
            return " | ".join(line.strip() for line in text.strip().splitlines()[-lines:])
        return ""

    def close(self, grace_s: float = 10.0) -> None:
        """Drain it (SIGTERM), or kill it after `grace_s`."""
        self.send(signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        if self.wait(max(0.0, deadline - time.monotonic())) is None:
            self.kill()
        if self._keeps_log:
            self._log.close()
