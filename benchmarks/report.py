"""What all benchmarks share: the command line, the machine's description, alternating runs, and the report.

The last line on stdout is one JSON object when `--json` is given; everything for people goes to stderr.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

console = Console(stderr=True)
"""For people: tables, progress bars and notes."""

_tables: list[dict[str, Any]] = []
_charts: list[dict[str, Any]] = []


def parser(description: str | None) -> argparse.ArgumentParser:
    """An argument parser with the options every benchmark takes."""
    made = argparse.ArgumentParser(
        description=(description or "").strip(), formatter_class=argparse.RawTextHelpFormatter
    )
    made.add_argument("--quick", action="store_true", help="smoke-test size, under a minute")
    made.add_argument("--json", action="store_true", help="one JSON object as the last line of stdout")
    made.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads for every contestant")
    made.add_argument("--runs", type=int, default=3, help="alternating runs of each contestant")
    return made


def machine() -> dict[str, Any]:
    """Processor, cores, memory and the versions of what was measured."""
    cpu = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    flags = next((line for line in _lines("/proc/cpuinfo") if line.startswith("flags")), "")
    memory_kib = next((int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    packages = ("penstock", "torch", "transformers", "redis", "numpy", "tokenizers")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "isa": [name for name in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8") if name in flags],
        "memory_gib": round(memory_kib / 2**20, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: version for name in packages if (version := version_of(name))},
    }


def version_of(package: str) -> str | None:
    """Installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def alternate(
    contestants: Mapping[str, Callable[[], Mapping[str, float]]], runs: int, title: str
) -> dict[str, dict[str, float]]:
    """Run the contestants in turn, `runs` times (A B A B ...), and return the median of each figure of each.

    Alternation spreads the machine's drift over all of them; the first call of each is a warm-up and not counted.
    """
    samples: dict[str, list[Mapping[str, float]]] = {name: [] for name in contestants}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(title, total=(runs + 1) * len(contestants))
        for turn in range(runs + 1):
            for name, measure in contestants.items():
                progress.update(task, description=f"{title}: {name}")
                figures = measure()
                if turn:
                    samples[name].append(figures)
                progress.advance(task)
    return {
        name: {key: statistics.median(run[key] for run in taken) for key in taken[0]} for name, taken in samples.items()
    }


def last_object(output: str) -> dict[str, Any] | None:
    """The JSON object on the last line, or None where the benchmark ended before it had one."""
    try:
        found = json.loads(output.strip().splitlines()[-1])
    except (IndexError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table for people, and keep it for the report."""
    cells = [[shown(cell) for cell in row] for row in rows]
    _tables.append({"title": title, "columns": list(columns), "rows": cells})
    drawn = Table(title=title, title_justify="left")
    for position, column in enumerate(columns):
        drawn.add_column(column, justify="left" if position == 0 else "right")
    for row in cells:
        drawn.add_row(*row)
    console.print(drawn)


def shown(cell: object) -> str:
    """Three digits, or a whole number where that takes more."""
    if not isinstance(cell, float):
        return str(cell)
    return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.3g}"


def chart(title: str, bars: Mapping[str, float]) -> None:
    """Keep one value per contestant for the report, to be drawn as bars; the first is ours."""
    _charts.append({"title": title, "bars": dict(bars)})


def publish(name: str, figures: Mapping[str, Any], *, as_json: bool) -> None:
    """End a benchmark: with `as_json`, print the one JSON object that is its result."""
    if as_json:
        report = {"benchmark": name, "machine": machine(), **figures, "tables": _tables, "charts": _charts}
        sys.stdout.write(json.dumps(report) + "\n")
        sys.stdout.flush()
