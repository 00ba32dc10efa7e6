"""The note a running `penstock serve` leaves, so that clients and commands of the same user find it without a URL.

A small file in a folder only this user can read, because the URL holds the broker's password. A note whose process is
gone counts for nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Served:
    """What a running `penstock serve` offers."""

    url: str
    queue: str
    pid: int


def note_path(environment: Mapping[str, str] = os.environ) -> Path:
    """Where the note lies."""
    runtime = environment.get("XDG_RUNTIME_DIR")
    folder = Path(runtime) / "penstock" if runtime else Path(tempfile.gettempdir()) / f"penstock-{os.getuid()}"
    return folder / "serve.json"


def find_served(environment: Mapping[str, str] = os.environ) -> Served | None:
    """What this user's `penstock serve` offers, if one runs."""
    path = note_path(environment)
    try:
        for place in (path.parent, path):
            found = place.lstat()
            if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077 or stat.S_ISLNK(found.st_mode):
                return None  # not ours, or others could have written it
        values = json.loads(path.read_text("utf-8"))
        served = Served(str(values["url"]), str(values["queue"]), int(values["pid"]))
        os.kill(served.pid, 0)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return served


@contextmanager
def announced(url: str, queue: str) -> Iterator[None]:
    """Leave the note while the body runs."""
    path = note_path()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fresh = path.with_suffix(f".{os.getpid()}")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as note:
        json.dump({"url": url, "queue": queue, "pid": os.getpid()}, note)
    fresh.replace(path)
    try:
        yield
    finally:
        served = find_served()
        if served is not None and served.pid == os.getpid():
            with contextlib.suppress(OSError):
                path.unlink()
