"""Is the worker on this machine healthy? `python -m penstock_worker.health` answers with its exit code.

Each worker process writes a small file at every heartbeat, and so does a supervisor. Healthy means: some worker lives,
and every live one has written lately that its loop turns, its engine's thread lives and makes progress, and of a
supervisor that no group of its is down. A worker whose Redis is away is healthy: restarting it would lose what it
buffers. Imports nothing heavy: a container runs this every few seconds.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

STALE_AFTER_S = 20.0
"""A worker that has not written for so long hangs: its loop has not turned for many heartbeats."""


@dataclass(frozen=True, slots=True)
class Health:
    """One worker process, as it describes itself.

    Attributes:
        status: `loading`, `ready`, `draining`, `stalled` (the engine has work and makes no progress), or of a
            supervisor `degraded` (a group is down).
        written_at: epoch seconds.
        born_ticks: the process's start, as the kernel counts it: a restarted container uses its process ids again.
    """

    worker_id: str
    pid: int
    status: str
    broker_up: bool
    held: int
    written_at: float
    born_ticks: int = 0
    detail: str = ""

    @property
    def is_healthy(self) -> bool:
        """Whether the process does, or will soon do, its work."""
        return self.status not in ("stalled", "degraded") and time.time() - self.written_at < STALE_AFTER_S


def default_folder() -> Path:
    """Where this user's workers write, unless told otherwise."""
    return Path(tempfile.gettempdir()) / f"penstock-worker-{os.getuid()}"


class HealthFile:
    """The file of one worker process."""

    def __init__(self, folder: Path | None, worker_id: str) -> None:
        self._path = (folder or default_folder()) / f"{worker_id}.json"
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)

        self._lock = threading.Lock()  # the worker writes in threads of its own: disks are slow
        self._removed = False

    def write(self, health: Health) -> None:
        """Replace the file in one move, so that no reader sees half of it."""
        fresh = self._path.with_suffix(".new")
        with self._lock:
            if not self._removed:
                fresh.write_text(json.dumps(asdict(replace(health, born_ticks=born_ticks(health.pid)))))
                fresh.replace(self._path)

    def remove(self) -> None:
        """The worker ends; a write still under way comes to nothing."""
        with self._lock:
            self._removed = True
            self._path.unlink(missing_ok=True)


def read_all(folder: Path) -> list[Health]:
    """Every worker that lives, or lived until it was killed a moment ago; files of dead processes are removed."""
    found: list[Health] = []
    for path in sorted(folder.glob("*.json")):
        health = _read(path)
        if health is None:
            continue
        if _lives(health):
            found.append(health)
        else:
            path.unlink(missing_ok=True)
    return found


def read_one(folder: Path, worker_id: str) -> Health | None:
    """What one worker wrote last; None before its first word."""
    return _read(folder / f"{worker_id}.json")


def _read(path: Path) -> Health | None:
    try:
        return Health(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def born_ticks(pid: int) -> int:
    """When a process started, in the kernel's ticks since boot; 0 where the system does not tell."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


def _lives(health: Health) -> bool:
    try:
        os.kill(health.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return born_ticks(health.pid) == health.born_ticks


def main() -> int:
    """Print a line per worker; 0 where all is well, 1 otherwise."""
    folder = Path(os.environ.get("PENSTOCK_HEALTH_DIR") or default_folder())
    workers = read_all(folder)
    for worker in workers:
        age_s = time.time() - worker.written_at
        state = "healthy" if worker.is_healthy else "UNHEALTHY"
        redis = "" if worker.broker_up else ", Redis is away"
        detail = f" ({worker.detail})" if worker.detail else ""
        sys.stdout.write(
            f"{worker.worker_id}: {state}, {worker.status}{detail}, {worker.held} jobs, {age_s:.1f} s ago{redis}\n"
        )
    if not workers:
        sys.stdout.write(f"no worker has written to {folder}\n")
    return 0 if workers and all(worker.is_healthy for worker in workers) else 1


if __name__ == "__main__":
    sys.exit(main())
