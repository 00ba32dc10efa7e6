"""Small differences on a noisy machine: each contestant between two runs of the reference, and the ratio to those.

What a machine does to several runs in a row, it does to neighbours alike; over rounds the median ratio stays, and its
spread says how far it can be trusted. The reference measured against itself in the same way is the noise floor.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from rich.progress import Progress

from benchmarks.report import console


@dataclass(frozen=True, slots=True)
class Interval:
    """The median of figures, and bounds that hold the true one in nine of ten cases, from five figures on."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, figures: list[float]) -> Interval:
        """The bounds are the second least and the second largest, or the outermost where there are few."""
        ordered = sorted(figures)
        spared = 1 if len(ordered) > 7 else 0
        return cls(statistics.median(ordered), ordered[spared], ordered[-1 - spared])

    def as_dict(self) -> dict[str, float]:
        """For a report."""
        return {"median": self.median, "low": self.low, "high": self.high}

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


@dataclass(slots=True)
class Comparison:
    """One contestant's rounds: its speed, its speed over the reference's, and its processor time over the reference's.

    Attributes:
        first: speed over the reference's in the round before those that count.
    """

    per_s: list[float] = field(default_factory=list)
    speed: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    first: float = 1.0


def compare(
    reference: Callable[[int], int], contestants: Mapping[str, Callable[[int], int]], rounds: int, title: str
) -> tuple[float, dict[str, Comparison]]:
    """The reference's median speed, and how the contestants fared beside it.

    Args:
        reference, contestants: do the work of the round with that number, and return how much it was (in tokens, ...).
        rounds: that count; one more comes before them, in which everything meets everything for the first time.
        title: for the progress bar.
    """
    found = {name: Comparison() for name in contestants}
    speeds: list[float] = []

    def timed(work: Callable[[int], int], number: int) -> tuple[float, float]:
        used, began = time.process_time(), time.perf_counter()
        amount = work(number)
        seconds = time.perf_counter() - began
        return seconds / amount, (time.process_time() - used) / amount

    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(title, total=(rounds + 1) * len(contestants))
        for number in range(rounds + 1):
            names = list(contestants)[:: 1 if number % 2 else -1]
            before = timed(reference, number)
            for first in range(0, len(names), 2):
                pair = names[first : first + 2]
                own = []
                for name in pair:
                    progress.update(task, description=f"{title}: {name}", advance=1)
                    own.append(timed(contestants[name], number))
                after = timed(reference, number)
                for name, mine in zip(pair, own, strict=True):
                    speed, processor = (
                        (one + other) / 2 / this for one, other, this in zip(before, after, mine, strict=True)
                    )
                    if not number:
                        found[name].first = speed
                        continue
                    found[name].per_s.append(1 / mine[0])
                    found[name].speed.append(speed)
                    found[name].processor.append(1 / processor)
                before = after
                if number:
                    speeds.append(1 / after[0])
    return statistics.median(speeds), found
