"""How likely a draft is right: learned per kind of evidence, and corrected per sequence.

A proposer says what a draft rests on as a small number, its grade (the length of a match, the probability the draft
model gave). Grades mean what they turn out to mean: the share of drafts of that grade that were accepted lately. A
sequence that does better or worse than its grades say shifts its own estimates.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from penstock_core.sampling.noise import Float64

_PRIOR_DRAFTS = 4.0
_MEMORY_DRAFTS = 400.0
_FADE = 1.0 - 1.0 / _MEMORY_DRAFTS
_SEQUENCE_MEMORY = 24.0
_LEAST, _MOST = 0.02, 0.98


class GradedAcceptance:
    """Acceptance by grade, an exponentially fading average; one per proposer.

    Args:
        prior: by grade, what to expect before anything was seen.

    Attributes:
        rates: by grade, the chance that a draft is accepted, given that those before it are. Read only.
        mean: the same over all grades, weighted by how often they occurred lately.
    """

    def __init__(self, prior: Float64) -> None:
        self.rates: Float64 = prior.astype(np.float64)
        self.mean = float(prior.mean())
        self._accepted: list[float] = (prior * _PRIOR_DRAFTS).tolist()
        self._drafted = [_PRIOR_DRAFTS] * len(prior)
        self._any_accepted, self._any_drafted = self.mean * _PRIOR_DRAFTS, _PRIOR_DRAFTS

    def rate(self, grade: int) -> float:
        """The chance for one grade."""
        return self._accepted[grade] / self._drafted[grade]

    def observe(self, grade: int, accepted: bool) -> None:
        """Learn from one verified draft."""
        drafted, right = self._drafted[grade], self._accepted[grade]
        if drafted >= _MEMORY_DRAFTS:
            drafted, right = drafted * _FADE, right * _FADE
        self._drafted[grade], self._accepted[grade] = drafted + 1.0, right + accepted
        self.rates[grade] = (right + accepted) / (drafted + 1.0)
        if self._any_drafted >= _MEMORY_DRAFTS:
            self._any_drafted *= _FADE
            self._any_accepted *= _FADE
        self._any_drafted += 1.0
        self._any_accepted += accepted
        self.mean = self._any_accepted / self._any_drafted


class SequenceBias:
    """How a sequence's drafts fare against expectation: a factor on the chance of rejection."""

    __slots__ = ("_expected", "_rejected")

    def __init__(self) -> None:
        self._expected = self._rejected = 2.0

    def observe(self, rate: float, accepted: bool) -> None:
        """One verified draft that was expected to be accepted with chance `rate`."""
        if self._expected > _SEQUENCE_MEMORY:
            self._expected *= 0.5
            self._rejected *= 0.5
        self._expected += 1.0 - rate
        self._rejected += not accepted

    def adjust(self, rates: Sequence[float]) -> list[float]:
        """The sequence's own estimates."""
        factor = self._rejected / self._expected
        return [min(max(1.0 - (1.0 - rate) * factor, _LEAST), _MOST) for rate in rates]
