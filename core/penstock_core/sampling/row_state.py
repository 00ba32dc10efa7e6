"""What a sequence remembers to honour its options: token counts, the tail bad words watch, a grammar's position.

Only sequences with such options have one. Drafted tokens are pushed while their positions are checked and popped
afterwards, so every position sees exactly the tokens before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from penstock_core.sampling.edits import LogitEdits
from penstock_core.sampling.grammar import GrammarState
from penstock_core.sampling.noise import Int64
from penstock_core.sampling.rules import SamplingRules


class TokenCounts:
    """Which tokens a sequence has seen, and how often it produced them; grows with its distinct tokens only."""

    def __init__(self, prompt: Iterable[int] = ()) -> None:
        distinct = np.unique(np.fromiter(prompt, dtype=np.int64))
        self._slots = {int(token): slot for slot, token in enumerate(distinct)}
        self._ids = np.concatenate([distinct, np.zeros(64, dtype=np.int64)])
        self._counts = np.zeros(len(self._ids), dtype=np.int64)
        self._size = self._prompt_size = len(distinct)

    @property
    def ids(self) -> Int64:
        """Distinct tokens, [size]."""
        return self._ids[: self._size]

    @property
    def counts(self) -> Int64:
        """How often each was produced; 0 for those only in the prompt, [size]."""
        return self._counts[: self._size]

    def add(self, token: int) -> None:
        """Count one produced token."""
        slot = self._slots.get(token)
        if slot is None:
            if self._size == len(self._ids):
                self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            slot = self._slots[token] = self._size
            self._ids[slot], self._counts[slot] = token, 0
            self._size += 1
        self._counts[slot] += 1

    def remove(self, token: int) -> None:
        """Undo the latest `add`, which must have been of `token`."""
        slot = self._slots[token]
        self._counts[slot] -= 1
        if self._counts[slot] == 0 and slot >= self._prompt_size:
            del self._slots[token]
            self._size -= 1


class RowState:
    """The state of one sequence of a request with options that look at its tokens or change its logits."""

    def __init__(
        self, rules: SamplingRules, prompt: Sequence[int], output: Sequence[int], grammar: GrammarState | None
    ) -> None:
        """Begin after `output`, which `grammar` has replayed already."""
        self._rules = rules
        self._grammar = grammar
        self._output = list(output)
        self._steps: list[bool] = []  # of pushed tokens: whether the grammar took it
        self._counts: TokenCounts | None = None
        if rules.counts_tokens:
            self._counts = TokenCounts(prompt if rules.params.repetition_penalty != 1.0 else ())
            for token in output:
                self._counts.add(token)

    @property
    def complete(self) -> bool:
        """Whether the grammar is satisfied and cannot go on."""
        return self._grammar is not None and self._grammar.complete

    def append(self, token: int) -> None:
        """Advance by a token that was chosen; it cannot be taken back."""
        self._output.append(token)
        if self._counts is not None:
            self._counts.add(token)
        if self._grammar is not None:
            self._grammar.accept(token)

    def push(self, token: int) -> None:
        """Advance by a drafted token."""
        self._output.append(token)
        if self._counts is not None:
            self._counts.add(token)
        # After a token that the grammar refuses nothing can be accepted, so what follows need not be right.
        self._steps.append(self._grammar is not None and all(self._steps) and self._grammar.accept(token))

    def pop(self, count: int | None = None) -> None:
        """Take the last `count` drafted tokens back; None: all."""
        count = len(self._steps) if count is None else count
        if not count:
            return
        if self._counts is not None:
            for token in reversed(self._output[-count:]):
                self._counts.remove(token)
        if self._grammar is not None:
            self._grammar.rollback(sum(self._steps[-count:]))
        del self._output[-count:], self._steps[-count:]

    def edit(self, edits: LogitEdits, row: int, position: int, vocab_size: int) -> None:
        """Add this sequence's edits for the logits `row`, which choose output token `position`."""
        rules, params = self._rules, self._rules.params
        if self._counts is not None and len(self._counts.ids):
            counts = self._counts.counts
            subtract = params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
            edits.penalise(row, self._counts.ids.copy(), subtract.astype(np.float32), params.repetition_penalty)
        if len(rules.bias_ids):
            edits.bias(row, rules.bias_ids, rules.bias)
        banned = [word[-1] for word in rules.bad_words if self._would_complete(word)]
        if banned:
            edits.ban(row, np.array(banned, dtype=np.int64))
        late = rules.late_ids if position < params.min_tokens else rules.late_ids[:0]
        mask = rules.allowed_mask(vocab_size) if self._grammar is None else self._grammar.allowed(vocab_size)
        if mask is not None:
            edits.keep(row, mask)
            if self._grammar is not None and len(late) and mask[late].sum() == mask.sum():
                late = late[:0]  # the grammar ends here: min_tokens cannot make it go on
        if len(late):
            edits.ban(row, late)

    def _would_complete(self, word: tuple[int, ...]) -> bool:
        before = len(word) - 1
        return before == 0 or tuple(self._output[-before:]) == word[:-1]
