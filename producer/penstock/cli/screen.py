"""Rich consoles and the look they share: colours by meaning, marks of states, and numbers for people.

Import it inside a command, never at the top of a module that `penstock --help` loads.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console
from rich.text import Text
from rich.theme import Theme

from penstock.cli.terminal import is_terminal

THEME = Theme(
    {
        "brand": "bold #5fafff",
        "good": "bold #87d787",
        "bad": "bold #ff5f5f",
        "warn": "bold #ffd75f",
        "mute": "#8a8a8a",
        "label": "#8a8a8a",
        "figure": "bold #eeeeee",
        "id": "#d7afff",
        "frame": "#4e4e4e",
        "title": "bold #d0d0d0",
        "takeover": "bold #ff5fd7",
        "handover": "bold #1c1c1c on #ff5fd7",
        "state.queued": "#8a8a8a",
        "state.delayed": "#8a8a8a",
        "state.running": "bold #5fafff",
        "state.completed": "bold #87d787",
        "state.failed": "bold #ff5f5f",
        "state.dead": "bold #ff5f5f",
        "state.cancelled": "#ffd75f",
        "state.expired": "#ffd75f",
    }
)
# Hues for workers, by order of appearance: readable on dark and light grounds, told apart by the colour-blind.
WORKER_COLOURS = ("#ffaf5f", "#5fd7d7", "#af87ff", "#87d75f", "#ff87af", "#d7d75f", "#5f87ff", "#d78700")
STATE_MARKS = {
    "queued": "◌",
    "delayed": "◔",
    "running": "●",
    "completed": "✓",
    "failed": "✗",
    "dead": "†",
    "cancelled": "⊘",
    "expired": "◷",
}


def console(*, stderr: bool = False, record: bool = False, width: int | None = None) -> Console:
    """A console of the house's look on stdout or stderr."""
    watched = is_terminal(sys.stderr if stderr else sys.stdout)
    return Console(
        stderr=stderr, theme=THEME, highlight=False, record=record, width=width,
        force_interactive=None if watched else False,  # FORCE_COLOR into a file asks for colours, not for animation
    )  # fmt: skip


def print_json(value: Any) -> None:
    """One JSON object on one line of stdout."""
    print(json.dumps(value, ensure_ascii=False, allow_nan=False), file=sys.stdout, flush=True)


def state(name: str) -> Text:
    """A state with its mark, in its colour."""
    return Text(f"{STATE_MARKS.get(name, '·')} {name}", style=f"state.{name}")


def duration(seconds: float | None) -> str:
    """`840 ms`, `3.2 s`, `4 min 05 s`, `3 h 20 min`, `2 d 4 h`."""
    if seconds is None:
        return "-"
    if seconds < 1:
        return f"{max(0.0, seconds) * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    if seconds < 86_400:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"
    return f"{int(seconds // 86_400)} d {int(seconds % 86_400 // 3600)} h"


def size(num_bytes: float) -> str:
    """`512 B`, `3.4 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def bar(fraction: float, cells: int, style: str, ground: str = "frame") -> Text:
    """A horizontal bar with eighth-cell precision."""
    eighths = round(max(0.0, min(1.0, fraction)) * cells * 8)
    full, rest = divmod(eighths, 8)
    text = Text("█" * full, style=style)
    if rest and full < cells:
        text.append(" ▏▎▍▌▋▊▉"[rest], style=style)
        full += 1
    text.append("·" * (cells - full), style=ground)
    return text


def sparkline(values: list[float], cells: int, top: float | None = None) -> str:
    """The last `cells` values as bars of eight heights."""
    tail = values[-cells:]
    peak = top or max(tail, default=0.0)
    if peak <= 0:
        return "▁" * len(tail)
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(value / peak * 7.999))] for value in tail)
