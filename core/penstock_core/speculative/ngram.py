"""Prompt lookup: what followed the last tokens when they occurred before, in the sequence's own prompt and output.

Costs microseconds and no memory to speak of, and is right whenever a text copies itself: code edits, quotes, summaries,
tables (Saxena, "Prompt Lookup Decoding", 2023).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from penstock_core.batching import SequenceState
from penstock_core.speculative.acceptance import GradedAcceptance
from penstock_core.speculative.proposer import EMPTY, Draft

_CANDIDATES = 8


class NgramIndex:
    """Where each short run of one sequence's tokens ends; grows with the sequence.

    Attributes:
        tokens: prompt and output.
    """

    def __init__(self, prompt: Sequence[int], min_match: int) -> None:
        self.tokens: list[int] = []
        self._size = min_match
        self._ends: dict[tuple[int, ...], list[int]] = {}
        self.extend(prompt)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens."""
        known, size, ends = self.tokens, self._size, self._ends
        start = len(known)
        known.extend(tokens)
        # A run is indexed once something follows it, so that a lookup never finds the end of the text itself.
        for end in range(max(start, size), len(known)):
            ends.setdefault(tuple(known[end - size : end]), []).append(end)

    def find(self, max_match: int) -> tuple[int, int]:
        """The longest earlier match of the last tokens, the latest of equals: (where it goes on, its length).

        (0, 0) where there is none.
        """
        known, size = self.tokens, self._size
        best, longest, end = 0, 0, len(known)
        for place in reversed(self._ends.get(tuple(known[end - size :]), ())[-_CANDIDATES:]):
            length, limit = size, min(max_match, place)
            while length < limit and known[place - 1 - length] == known[end - 1 - length]:
                length += 1
            if length > longest:
                best, longest = place, length
                if length >= max_match:
                    break
        return best, longest

    def follow(self, place: int, depth: int) -> list[int]:
        """The `depth` tokens from `place` on; a run that reaches the end is taken to repeat."""
        known = self.tokens
        found = known[place : place + depth]
        period = len(known) - place
        while len(found) < depth:
            found.append(found[len(found) - period])
        return found


class NgramProposer:
    """Drafts by prompt lookup. Grades are match lengths."""

    name = "ngram"

    def __init__(self, min_match: int, max_match: int) -> None:
        self._min_match = min_match
        self._max_match = max_match
        self.acceptance = GradedAcceptance(np.linspace(0.4, 0.9, max_match + 1))
        self._indices: dict[SequenceState, NgramIndex] = {}

    def index(self, sequence: SequenceState) -> NgramIndex:
        """The index of a sequence, brought up to date."""
        index = self._indices.get(sequence)
        if index is None:
            index = self._indices[sequence] = NgramIndex(sequence.prompt_ids.tolist(), self._min_match)
        output = len(index.tokens) - sequence.num_prompt
        if output < len(sequence.output_ids):
            index.extend(sequence.output_ids[output:])
        return index

    def propose(self, sequences: Sequence[SequenceState], depths: Sequence[int], floor: float = 0.0) -> list[Draft]:
        """Drafts of up to `depths[i]` tokens, or none where nothing matches."""
        drafts = []
        for sequence, depth in zip(sequences, depths, strict=True):
            index = self.index(sequence)
            place, length = index.find(self._max_match)
            if not length or not depth:
                drafts.append(EMPTY)
            else:
                drafts.append(Draft(index.follow(place, depth), [length] * depth))
        return drafts

    def finish(self, sequence: SequenceState) -> None:
        """Forget the sequence."""
        self._indices.pop(sequence, None)
