"""AdaptiveBatchTimeout: should an idle engine wait a moment for company before it starts on a lone request?

Waiting pays only if another request is likely to come within the wait. Arrivals are assumed to be as dense as the
recent ones (an exponentially weighted mean gap); without that expectation a lone request starts at once.
"""

from __future__ import annotations


class AdaptiveBatchTimeout:
    """Decides how long to hold the first request of an idle engine.

    Args:
        max_wait_s: longest wait in seconds.
    """

    def __init__(self, max_wait_s: float) -> None:
        self.max_wait_s = max_wait_s
        self._last_s: float | None = None
        self._mean_gap_s = float("inf")

    def arrived(self, now_s: float) -> None:
        """Record an arrival."""
        if self._last_s is not None:
            gap = max(0.0, now_s - self._last_s)
            known = self._mean_gap_s
            self._mean_gap_s = gap if known == float("inf") else 0.8 * known + 0.2 * gap
        self._last_s = now_s

    def wait_s(self, now_s: float, first_arrival_s: float) -> float:
        """Seconds still to wait for company of a request that came at `first_arrival_s`; 0 to start at once."""
        if self._last_s is None or self._mean_gap_s > self.max_wait_s:
            return 0.0
        lull_s = self._last_s + 2.0 * self._mean_gap_s  # by then company should have come; it may not come at all
        return max(0.0, min(first_arrival_s + self.max_wait_s, lull_s) - now_s)
