"""BudgetController: dynamic batch resizing. Moves the token budget so that steps take about the target time.

A step's time is modelled as `fixed + per_token * tokens`, fitted by exponentially weighted least squares over the steps
seen; the budget is what the model allows, and moves by at most a quarter per step. Knows no clock: it is told times.
"""

from __future__ import annotations


class BudgetController:
    """Holds a step time by limiting the tokens of a step.

    Args:
        target_s: wanted step time in seconds.
        minimum: least budget in tokens (running sequences must not starve).
        maximum: greatest budget in tokens.
    """

    DECAY = 0.95  # weight of the past: about the last twenty steps count
    SLEW = 1.25  # the budget moves by at most this factor per step

    def __init__(self, target_s: float, minimum: int, maximum: int) -> None:
        self.target_s = target_s
        self.minimum = minimum
        self.maximum = maximum
        self._budget = float(maximum)
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    @property
    def budget(self) -> int:
        """Tokens the next step may hold."""
        return int(self._budget)

    def observe(self, num_tokens: int, step_s: float) -> None:
        """Learn from a step of `num_tokens` that took `step_s` seconds."""
        decay, tokens = self.DECAY, float(num_tokens)
        self._weight = self._weight * decay + 1.0
        self._x = self._x * decay + tokens
        self._y = self._y * decay + step_s
        self._xx = self._xx * decay + tokens * tokens
        self._xy = self._xy * decay + tokens * step_s
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        variance = self._xx / self._weight - mean_x * mean_x
        slope = (self._xy / self._weight - mean_x * mean_y) / variance if variance > 0.5 else 0.0
        if slope > 0.0:
            wanted = mean_x + (self.target_s - mean_y) / slope
        else:  # all steps alike, or noise: feel the way
            wanted = self._budget * (self.SLEW if mean_y < self.target_s else 1.0 / self.SLEW)
        wanted = min(max(wanted, self._budget / self.SLEW), self._budget * self.SLEW)
        self._budget = min(max(wanted, float(self.minimum)), float(self.maximum))
