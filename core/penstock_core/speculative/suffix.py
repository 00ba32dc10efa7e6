"""Suffix decoding: what followed the longest run of last tokens that this worker has generated before, or just read.

Agents, retries and templates produce the same passages again and again; a suffix automaton over recent outputs predicts
them at the speed of a lookup (Oliaro et al., "SuffixDecoding", 2024). Memory is bounded by generations: when the newer
of two automata is full, the older one is dropped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from penstock_core.batching import SequenceState
from penstock_core.speculative.acceptance import GradedAcceptance
from penstock_core.speculative.automaton import Reader, SuffixAutomaton
from penstock_core.speculative.ngram import NgramProposer
from penstock_core.speculative.proposer import EMPTY, Draft

_SHARES = 4
_LENGTHS = 6  # matches of 1, 2, 4, 8, 16, 32 or more
_LEARNED_PER_CALL = 64
_UNREAD = 256
_REREAD = 32


class _Generation:
    """An automaton and the readers of running sequences in it."""

    def __init__(self) -> None:
        self.automaton = SuffixAutomaton()
        self.readers: dict[SequenceState, tuple[Reader, int]] = {}

    def reader(self, sequence: SequenceState, tokens: list[int]) -> Reader:
        """The sequence's place after all its tokens."""
        reader, read = self.readers.get(sequence) or (Reader(), max(0, len(tokens) - _REREAD))
        for token in tokens[read:]:
            self.automaton.advance(reader, token)
        self.readers[sequence] = reader, len(tokens)
        return reader


class SuffixProposer:
    """Drafts from recent outputs of all sequences, and from the sequence's own text.

    Grades join the length of the match with how often the guess was what followed.
    """

    name = "suffix"

    def __init__(self, min_match: int, max_match: int, learned_tokens: int) -> None:
        """Remember up to `learned_tokens` generated tokens."""
        self._own = NgramProposer(min_match, max_match)
        # Grades: first those of own matches, by length; then those of remembered ones, by length and share.
        remembered = np.linspace(0.6, 1.0, _LENGTHS)[:, None] * np.linspace(0.3, 0.95, _SHARES)
        self.acceptance = GradedAcceptance(np.concatenate([np.linspace(0.4, 0.9, max_match + 1), remembered.ravel()]))
        self._min_match = min_match
        self._max_match = max_match
        self._generation_tokens = learned_tokens // 2
        self._newer, self._older = _Generation(), _Generation()
        self._unread: deque[list[int]] = deque()
        self._reading = 0  # how far into the first of them

    @property
    def num_learned(self) -> int:
        """Generated tokens remembered at the moment."""
        return self._newer.automaton.size + self._older.automaton.size

    def propose(self, sequences: Sequence[SequenceState], depths: Sequence[int], floor: float = 0.0) -> list[Draft]:
        """Drafts of up to `depths[i]` tokens; the longer match, own or remembered, wins."""
        self._learn(_LEARNED_PER_CALL)
        drafts = []
        for sequence, depth, own in zip(sequences, depths, self._own.propose(sequences, depths), strict=True):
            learned, matched = self._remembered(sequence, depth) if depth else (EMPTY, 0)
            closer = own.token_ids and own.grades[0] >= min(matched, self._max_match)
            drafts.append(own if closer or not learned.token_ids else learned)
        return drafts

    def finish(self, sequence: SequenceState) -> None:
        """Note the output for learning, and forget the sequence."""
        output = sequence.output_ids
        worth = sequence.finish_reason is not None and len(output) > self._min_match
        if worth and self._generation_tokens and len(self._unread) < _UNREAD:
            self._unread.append(output[-self._generation_tokens :])
        self._own.finish(sequence)
        for generation in (self._newer, self._older):
            generation.readers.pop(sequence, None)

    def _remembered(self, sequence: SequenceState, depth: int) -> tuple[Draft, int]:
        """A walk along the likeliest tokens from the longest remembered match, and that match's length."""
        tokens = self._own.index(sequence).tokens
        readers = [(generation.reader(sequence, tokens), generation) for generation in (self._newer, self._older)]
        reader, generation = max(readers, key=lambda pair: pair[0].matched)
        if reader.matched < self._min_match:
            return EMPTY, 0
        state, matched = reader.state, reader.matched
        guesses: list[int] = []
        grades: list[int] = []
        for _ in range(depth):
            token, state, share = generation.automaton.likeliest(state)
            if share == 0.0:
                break
            length = min(matched.bit_length(), _LENGTHS) - 1
            guesses.append(token)
            grades.append(self._max_match + 1 + length * _SHARES + int(share * _SHARES))
            matched += 1
        return Draft(guesses, grades), reader.matched

    def _learn(self, budget: int) -> None:
        """Read at most `budget` tokens of the outputs noted, so that no step waits long for it."""
        while self._unread and budget > 0:
            output, automaton = self._unread[0], self._newer.automaton
            if not self._reading:
                automaton.begin()
            part = output[self._reading : self._reading + budget]
            for token in part:
                automaton.read(token)
            budget -= len(part)
            self._reading += len(part)
            if self._reading == len(output):
                self._unread.popleft()
                self._reading = 0
                if automaton.size >= self._generation_tokens:
                    self._older, self._newer = self._newer, _Generation()
