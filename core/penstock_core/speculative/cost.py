"""StepCost: how long a step takes by the number of tokens in it, learned from the steps themselves.

The curve is what decides whether a draft pays: flat while weights dominate (drafts are nearly free), steep once
arithmetic does. It belongs to the machine and the load of this moment, so it is never assumed, only measured.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque

import numpy as np

from penstock_core.sampling.noise import Float64

_EDGES = [*range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256]
_EDGES += [320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048, 3072, 4096, 8192, 16384]
_SAMPLES = 9
_TRUSTED = 3  # steps of a size that are no accident
_STALE_STEPS = 2000
_REFRESH_STEPS = 16


class _Bin:
    """The latest steps of about one size."""

    __slots__ = ("seconds", "step", "tokens", "usual_s")

    def __init__(self) -> None:
        self.seconds: deque[float] = deque(maxlen=_SAMPLES)
        self.tokens = 0.0
        self.usual_s = 0.0
        self.step = 0

    def add(self, tokens: int, seconds: float, step: int) -> None:
        self.seconds.append(seconds)
        self.tokens += (tokens - self.tokens) / len(self.seconds)
        self.usual_s = sorted(self.seconds)[len(self.seconds) // 4]  # what disturbs a step only makes it longer
        self.step = step


class StepCost:
    """Usual seconds of a step by its number of tokens: the lower quartile of the latest of about that size.

    No size is taken to cost more per token than the one below it: disturbed steps must not hide what a size costs.
    Sizes hardly seen are taken at their best, which a few tries correct: beyond the largest seen the curve is no
    steeper than so far, and a smaller one than the smallest seen costs its share of that. A size not seen for long is
    forgotten, so that a curve measured under another load is tried again.

    Attributes:
        largest: number of tokens of the largest size that is known for sure; 0: none is.
    """

    def __init__(self) -> None:
        self._bins: dict[int, _Bin] = {}
        self._tried: set[int] = set()
        self._steps = 0
        self._table: list[float] = []  # seconds by number of tokens; empty: to be made anew
        self.largest = 0

    def observe(self, tokens: int, seconds: float) -> None:
        """Learn from a step."""
        self._steps += 1
        edge = bisect_right(_EDGES, tokens)
        found = self._bins.get(edge)
        if found is None:
            if edge not in self._tried:
                self._tried.add(edge)  # the first step of a size sets up what later ones reuse
                return
            found = self._bins[edge] = _Bin()
            self._table = []
        found.add(tokens, seconds, self._steps)
        if len(found.seconds) == _TRUSTED:
            self._table = []
            self.largest = max(self.largest, tokens)
        if self._steps % _REFRESH_STEPS == 0:
            fresh = self._steps - _STALE_STEPS
            if any(found.step <= fresh for found in self._bins.values()):
                self._bins = {edge: found for edge, found in self._bins.items() if found.step > fresh}
                sure = [found.tokens for found in self._bins.values() if len(found.seconds) >= _TRUSTED]
                self.largest = int(max(sure, default=0))
            self._table = []

    @property
    def known(self) -> bool:
        """Whether the cost of any size is known."""
        return bool(self._bins)

    def at(self, tokens: int) -> float:
        """Seconds of a step of `tokens` tokens. Needs an observation."""
        return self.curve(tokens, 1)[0]

    def curve(self, first: int, count: int, stride: int = 1) -> list[float]:
        """Seconds of steps of `first`, `first + stride`, ... tokens, [count]; never falling. Needs an observation."""
        end = first + (count - 1) * stride + 1
        if len(self._table) < end:
            self._table = self._tabulate(max(256, 2 * end))
        return self._table[first:end:stride]

    def _tabulate(self, size: int) -> list[float]:
        bins = [self._bins[edge] for edge in sorted(self._bins)]
        bins = [found for found in bins if len(found.seconds) >= _TRUSTED] or bins
        sizes = np.array([found.tokens for found in bins])
        seconds = np.maximum.accumulate([found.usual_s for found in bins])
        for place in range(1, len(bins)):
            seconds[place] = min(seconds[place], seconds[place - 1] * sizes[place] / sizes[place - 1])
        tokens = np.arange(size, dtype=np.float64)
        slope = (seconds[-1] - seconds[0]) / max(1.0, sizes[-1] - sizes[0])
        within: Float64 = np.interp(tokens, sizes, seconds) * np.minimum(1.0, tokens / sizes[0])
        table: list[float] = (within + slope * np.maximum(0.0, tokens - sizes[-1])).tolist()
        return table
