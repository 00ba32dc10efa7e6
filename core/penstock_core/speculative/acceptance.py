"""How likely a draft is right: learned per kind of evidence, and corrected per sequence.

A proposer says what a draft rests on as a small number, its grade (the length of a match, the probability the draft
model gave). Grades mean what they turn out to mean: the share of drafts of that grade that were accepted lately. A
sequence that does better or worse than its grades say shifts its own estimates.
"""

from __future__ import annotations

import numpy as np

from penstock_core.sampling.noise import Float64, Int64

_PRIOR_DRAFTS = 4.0
_MEMORY_DRAFTS = 400.0
_SEQUENCE_MEMORY = 24.0
_LIMITS = 0.02, 0.98


class GradedAcceptance:
    """Acceptance by grade, an exponentially fading average; one per proposer.

    Args:
        prior: by grade, what to expect before anything was seen.
    """

    def __init__(self, prior: Float64) -> None:
        self._accepted = prior * _PRIOR_DRAFTS
        self._drafted = np.full(len(prior), _PRIOR_DRAFTS)
        self._any_accepted, self._any_drafted = float(prior.mean()) * _PRIOR_DRAFTS, _PRIOR_DRAFTS

    def rates(self, grades: Int64) -> Float64:
        """Chance that a draft of each grade is accepted, given that those before it are."""
        rates: Float64 = self._accepted[grades] / self._drafted[grades]
        return rates

    def rate(self, grade: int) -> float:
        """The same for one grade."""
        return float(self._accepted[grade] / self._drafted[grade])

    def all_rates(self) -> Float64:
        """The same for every grade."""
        rates: Float64 = self._accepted / self._drafted
        return rates

    @property
    def mean(self) -> float:
        """Over all grades, weighted by how often they occurred lately."""
        return self._any_accepted / self._any_drafted

    def observe(self, grade: int, accepted: bool) -> None:
        """Learn from one verified draft."""
        keep = 1.0 - 1.0 / _MEMORY_DRAFTS if self._drafted[grade] >= _MEMORY_DRAFTS else 1.0
        self._drafted[grade] = self._drafted[grade] * keep + 1.0
        self._accepted[grade] = self._accepted[grade] * keep + accepted
        keep = 1.0 - 1.0 / _MEMORY_DRAFTS if self._any_drafted >= _MEMORY_DRAFTS else 1.0
        self._any_drafted = self._any_drafted * keep + 1.0
        self._any_accepted = self._any_accepted * keep + accepted


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

    def adjust(self, rates: Float64) -> Float64:
        """The sequence's own estimates."""
        adjusted: Float64 = np.clip(1.0 - (1.0 - rates) * (self._rejected / self._expected), *_LIMITS)
        return adjusted
