"""Where the processor time goes: seconds used so far by a process, or by its main thread and its others, from /proc."""

from __future__ import annotations

import os
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


def of_process(pid: int) -> float:
    """Seconds of all its threads, ended ones included."""
    return _seconds(Path(f"/proc/{pid}/stat"))


def of_threads(pid: int) -> tuple[float, float]:
    """Seconds of its main thread, and of its other living threads together."""
    threads = {int(task.name): _seconds(task / "stat") for task in Path(f"/proc/{pid}/task").iterdir()}
    main = threads.pop(pid)
    return main, sum(threads.values())


def _seconds(stat: Path) -> float:
    fields = stat.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS
