"""What every proposer is to the SpeculativeDecoder: guesses at the next tokens, and a word on what they rest on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from penstock_core.batching import SequenceState
from penstock_core.speculative.acceptance import GradedAcceptance


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens guessed to follow a sequence, [depth], and the grade of each guess, [depth]; see `acceptance.py`."""

    token_ids: list[int]
    grades: list[int]


EMPTY = Draft([], [])


class Proposer(Protocol):
    """A source of drafts. Called between steps only, from the step loop."""

    @property
    def name(self) -> str:
        """For statistics."""
        ...

    @property
    def acceptance(self) -> GradedAcceptance:
        """What its grades have meant so far; the decoder keeps it up to date."""
        ...

    def propose(self, sequences: Sequence[SequenceState], depths: Sequence[int], floor: float = 0.0) -> list[Draft]:
        """Drafts of up to `depths[i]` tokens for each sequence; fewer or none where it has no good guess.

        A proposer for which every guess costs stops where the chance that all are right falls below `floor`.
        """
        ...

    def finish(self, sequence: SequenceState) -> None:
        """The sequence ended or lost its place: learn from it, and give up what is kept for it."""
        ...
