"""What speculation did: counters of a decoder and of a sequence, and the share of time it saved."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from penstock_core.protocol.jobs import Speculation


@dataclass(frozen=True, slots=True)
class SpeculationStatistics:
    """Sums since the start; two readings can be subtracted.

    Attributes:
        drafted, accepted: tokens checked by the model, and found right.
        drafted_at, accepted_at: the same by position in the draft.
        depths: sequences by number of drafts checked in a step; 0 where none was found. Steps for which nobody was
            asked are not among them.
        drafted_by, accepted_by: by proposer.
        propose_s: seconds spent on drafting. step_s: on steps that decoded.
        plain_s: predicted seconds of the same tokens without speculation.
    """

    drafted: int
    accepted: int
    drafted_at: tuple[int, ...]
    accepted_at: tuple[int, ...]
    depths: tuple[int, ...]
    drafted_by: dict[str, int]
    accepted_by: dict[str, int]
    propose_s: float
    step_s: float
    plain_s: float

    @property
    def acceptance_rate(self) -> float:
        """Share of checked drafts that were right, 0 to 1."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def gain(self) -> float:
        """Speed against plain decoding, as measured step times predict it; 1 is no difference."""
        spent = self.propose_s + self.step_s
        return self.plain_s / spent if spent else 1.0


class DraftTally:
    """The same of one sequence, written by the decoder.

    Attributes:
        drafted_at, accepted_at: by position in the draft.
        depths: steps by number of drafts checked, those included for which nobody found any.
        saved_s: estimated seconds that it would have taken longer plainly; below 0 where drafting lost time.
    """

    __slots__ = ("accepted_at", "depths", "drafted_at", "saved_s")

    def __init__(self, max_depth: int) -> None:
        self.drafted_at = [0] * max_depth
        self.accepted_at = [0] * max_depth
        self.depths = [0] * (max_depth + 1)
        self.saved_s = 0.0

    def count(self, drafted: int, accepted: int) -> None:
        """Count the drafts of a step."""
        for place in range(drafted):
            self.drafted_at[place] += 1
        for place in range(accepted):
            self.accepted_at[place] += 1


def summary(tallies: Sequence[DraftTally]) -> Speculation:
    """The sum of several sequences' tallies, without the depths that none of them reached."""
    return Speculation(
        _sums(tally.drafted_at for tally in tallies),
        _sums(tally.accepted_at for tally in tallies),
        _sums(tally.depths for tally in tallies),
        round(sum(tally.saved_s for tally in tallies) * 1e3, 3),
    )


def _sums(counts: Iterable[list[int]]) -> tuple[int, ...]:
    sums = [sum(column) for column in zip(*counts, strict=True)]
    while sums and not sums[-1]:
        sums.pop()
    return tuple(sums)


class SpeculationMeter(DraftTally):
    """The counters behind `SpeculationStatistics`."""

    __slots__ = ("accepted_by", "drafted_by", "plain_s", "propose_s", "step_s")

    def __init__(self, max_depth: int, proposers: list[str]) -> None:
        super().__init__(max_depth)
        self.drafted_by = dict.fromkeys(proposers, 0)
        self.accepted_by = dict.fromkeys(proposers, 0)
        self.propose_s = 0.0
        self.step_s = 0.0
        self.plain_s = 0.0

    def count_by(self, proposer: str, drafted: int, accepted: int) -> None:
        """Count one sequence's drafts of a step."""
        self.count(drafted, accepted)
        self.drafted_by[proposer] += drafted
        self.accepted_by[proposer] += accepted

    def read(self, plain_s: float) -> SpeculationStatistics:
        """The counters as they are, with the seconds of plain steps that are not counted yet."""
        return SpeculationStatistics(
            drafted=sum(self.drafted_at),
            accepted=sum(self.accepted_at),
            drafted_at=tuple(self.drafted_at),
            accepted_at=tuple(self.accepted_at),
            depths=tuple(self.depths),
            drafted_by=dict(self.drafted_by),
            accepted_by=dict(self.accepted_by),
            propose_s=self.propose_s,
            step_s=self.step_s + plain_s,
            plain_s=self.plain_s + plain_s,
        )
