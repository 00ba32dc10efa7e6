"""A suffix automaton that grows by the token: every run of tokens it has read, where it leads, and how often.

Blumer et al. 1985, in the generalised form for many texts. Reading a token takes constant amortised time, and a reader
can follow a new text through everything read before, always knowing the longest run that the two have in common.
"""

from __future__ import annotations

from dataclasses import dataclass

_COUNTED_SUFFIXES = 32
ROOT = 0


@dataclass(slots=True)
class Reader:
    """A place in an automaton: the state of the longest known suffix of what was read, and that suffix's length."""

    state: int = ROOT
    matched: int = 0


class SuffixAutomaton:
    """All runs of the texts read so far.

    Attributes:
        size: tokens read.
    """

    def __init__(self) -> None:
        self._next: list[dict[int, int]] = [{}]
        self._link = [-1]
        self._length = [0]
        self._count = [0]
        self._last = ROOT
        self.size = 0

    @property
    def num_states(self) -> int:
        """At most two per token read."""
        return len(self._next)

    def begin(self) -> None:
        """Start another text: runs do not reach across."""
        self._last = ROOT

    def read(self, token: int) -> None:
        """Append a token to the text."""
        self._last = state = self._extend(self._last, token)
        self.size += 1
        count, link = self._count, self._link
        for _ in range(_COUNTED_SUFFIXES):
            if state <= ROOT:
                break
            count[state] += 1
            state = link[state]

    def advance(self, reader: Reader, token: int) -> None:
        """Move a reader on by a token of its own text."""
        state, follow = reader.state, self._next
        while state != ROOT and token not in follow[state]:
            state = self._link[state]
            reader.matched = self._length[state]
        found = follow[state].get(token)
        if found is None:
            reader.state, reader.matched = ROOT, 0
        else:
            reader.state, reader.matched = found, reader.matched + 1

    def likeliest(self, state: int) -> tuple[int, int, float]:
        """(token, state after it, share) of what followed this state most often; share 0 where nothing did."""
        best_token, best_state, best, total = -1, ROOT, 0, 0
        count = self._count
        for token, state_after in self._next[state].items():
            times = count[state_after] + 1
            total += times
            if times > best:
                best_token, best_state, best = token, state_after, times
        return best_token, best_state, best / (total + 1) if total else 0.0

    def _extend(self, last: int, token: int) -> int:
        follow, link, length = self._next, self._link, self._length
        known = follow[last].get(token)
        if known is not None:
            return known if length[known] == length[last] + 1 else self._split(last, token, known)
        state = self._new_state({}, length[last] + 1)
        at = last
        while at >= 0 and token not in follow[at]:
            follow[at][token] = state
            at = link[at]
        if at < 0:
            link[state] = ROOT
        else:
            known = follow[at][token]
            link[state] = known if length[known] == length[at] + 1 else self._split(at, token, known)
        return state

    def _split(self, at: int, token: int, state: int) -> int:
        """Give the shorter runs of `state` a state of their own, because one of them now also occurs elsewhere."""
        follow, link = self._next, self._link
        shorter = self._new_state(dict(follow[state]), self._length[at] + 1)
        self._count[shorter] = self._count[state]
        link[shorter] = link[state]
        link[state] = shorter
        while at >= 0 and follow[at].get(token) == state:
            follow[at][token] = shorter
            at = link[at]
        return shorter

    def _new_state(self, follow: dict[int, int], length: int) -> int:
        self._next.append(follow)
        self._link.append(ROOT)
        self._length.append(length)
        self._count.append(0)
        return len(self._next) - 1
