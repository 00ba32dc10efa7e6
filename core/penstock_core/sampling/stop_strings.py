"""Finding stop strings in a growing text, one character at a time, whatever the pieces it arrives in.

An Aho-Corasick automaton (Aho, Corasick 1975) of all stop strings: constant time per character, and its state says how
much of the text's end could still become a stop string and must be held back.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache


class StopMatcher:
    """The automaton of some stop strings; immutable, so streams share it.

    Attributes:
        held: by state, length of the longest suffix of the text that a stop string could begin with.
        matched: by state, length of the longest stop string that ends here, or 0.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        depth = [0]
        self.matched = [0]
        for string in strings:
            state = 0
            for character in string:
                if character not in self._next[state]:
                    self._next[state][character] = len(self._next)
                    depth.append(depth[state] + 1)
                    self._next.append({})
                    self.matched.append(0)
                state = self._next[state][character]
            self.matched[state] = len(string)
        self._fallback = [0] * len(self._next)
        self.held = [0] * len(self._next)
        queue = list(self._next[0].values())
        for state in queue:  # by depth, so a fallback is always finished before it is needed
            shorter = self._fallback[state]
            self.matched[state] = self.matched[state] or self.matched[shorter]
            self.held[state] = depth[state] if self._next[state] else self.held[shorter]
            for character, child in self._next[state].items():
                self._fallback[child] = self.advance(shorter, character)
                queue.append(child)

    def advance(self, state: int, character: str) -> int:
        """The state after one more character; 0 is the state of an empty text."""
        while state and character not in self._next[state]:
            state = self._fallback[state]
        return self._next[state].get(character, 0)


@lru_cache(maxsize=256)
def stop_matcher(strings: tuple[str, ...]) -> StopMatcher:
    """The automaton of `strings`; the choices of a request, and alike requests, share one."""
    return StopMatcher(strings)
