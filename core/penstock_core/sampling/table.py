"""SamplingTable: the sampling options of all running sequences, one fixed row each, gathered by row every step.

Plain options live in arrays; sequences whose options look at their tokens also have a `RowState`. The pipeline adds a
row when a sequence is admitted (with its output so far, if it was preempted or resumed), appends the tokens it accepts
and clears the row at the end. The draft model samples from a table of its own kind, with the same noise.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from penstock_core.protocol.errors import InvalidRequest
from penstock_core.protocol.requests import SamplingParams
from penstock_core.sampling.edits import LogitEdits
from penstock_core.sampling.grammar import GrammarCompiler, check_response_format
from penstock_core.sampling.noise import Int64, stream_key
from penstock_core.sampling.row_state import RowState
from penstock_core.sampling.rules import Encoder, SamplingRules

NO_DRAFT = -1


class SamplingTable:
    """Persistent sampling state, [num_rows].

    Attributes:
        greedy: rows that take the most likely token.
        filtered: rows with top-k, top-p or min-p.
        temperature, top_k, top_p, min_p: as in `SamplingParams`; a greedy row's temperature reads 1.
        stream: keys of the rows' noise streams.
        logprobs: alternatives reported per token; -1 where no log-probabilities are asked for.
    """

    def __init__(
        self,
        num_rows: int,
        vocab_size: int,
        *,
        eos_token_ids: Iterable[int] = (),
        tokenizer: Encoder | None = None,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        """An empty table.

        Args:
            num_rows: sequences at once.
            vocab_size: width of the logits.
            eos_token_ids: tokens that end a text.
            tokenizer: for `bad_words`; without it they are refused.
            grammars: for `response_format`; without it that is refused.
        """
        self.vocab_size = vocab_size
        self.greedy = np.zeros(num_rows, dtype=np.bool_)
        self.filtered = np.zeros(num_rows, dtype=np.bool_)
        self.temperature = np.ones(num_rows)
        self.top_k = np.zeros(num_rows, dtype=np.int64)
        self.top_p = np.ones(num_rows)
        self.min_p = np.zeros(num_rows)
        self.stream = np.zeros(num_rows, dtype=np.int64)
        self.logprobs = np.full(num_rows, -1, dtype=np.int64)
        self._eos = tuple(eos_token_ids)
        self._tokenizer = tokenizer
        self._grammars = grammars
        self._states: list[RowState | None] = [None] * num_rows
        self._stateful = np.zeros(num_rows, dtype=np.bool_)
        self._latest: SamplingRules | None = None

    def check(self, params: SamplingParams) -> SamplingRules:
        """Raise `InvalidRequest` if this model cannot honour `params`; called before a request is accepted."""
        if self._latest is not None and self._latest.params is params:
            return self._latest  # the choices of one request come one after another
        rules = SamplingRules.compile(params, self.vocab_size, self._eos, self._tokenizer)
        if params.response_format is not None:
            if self._grammars is None:
                raise InvalidRequest("sampling.response_format", "needs a tokenizer, and this model has none")
            check_response_format(params.response_format)
        self._latest = rules
        return rules

    def add(
        self,
        row: int,
        params: SamplingParams,
        seed: int,
        choice_index: int,
        prompt_ids: Sequence[int] = (),
        output_ids: Sequence[int] = (),
    ) -> None:
        """Give `row` to a sequence that has produced `output_ids` so far; raises `InvalidRequest`."""
        rules = self.check(params)
        state = None
        if rules.edits_logits:
            grammar = None
            if params.response_format is not None and self._grammars is not None:
                grammar = self._grammars.start(params.response_format, output_ids)
            state = RowState(rules, prompt_ids, output_ids, grammar)
        self._states[row], self._stateful[row] = state, state is not None
        self.greedy[row] = rules.greedy
        self.temperature[row] = 1.0 if rules.greedy else params.temperature
        self.top_k[row] = params.top_k if params.top_k < self.vocab_size else 0
        self.top_p[row] = params.top_p
        self.min_p[row] = params.min_p
        self.filtered[row] = self.top_k[row] > 0 or params.top_p < 1.0 or params.min_p > 0.0
        self.stream[row] = stream_key(seed, choice_index)
        self.logprobs[row] = -1 if params.logprobs is None else params.logprobs

    def append(self, rows: Sequence[int] | Int64, tokens: Sequence[int] | Int64) -> None:
        """Advance rows by the tokens that were accepted; a row may occur several times, its tokens in order."""
        for row, token in zip(rows, tokens, strict=True):
            state = self._states[row]
            if state is not None:
                state.append(int(token))

    def push(self, rows: Sequence[int] | Int64, tokens: Sequence[int] | Int64) -> None:
        """Advance rows by guesses, for a draft model that samples one position after another; see `pop`."""
        for row, token in zip(rows, tokens, strict=True):
            state = self._states[row]
            if state is not None:
                state.push(int(token))

    def pop(self, rows: Sequence[int] | Int64) -> None:
        """Take all guesses back that were pushed to rows."""
        for row in rows:
            state = self._states[row]
            if state is not None:
                state.pop()

    def complete(self, row: int) -> bool:
        """Whether the row's grammar is satisfied and nothing can follow: its choice ends with `stop`."""
        state = self._states[row]
        return state is not None and state.complete

    def clear(self, row: int) -> None:
        """Free the row."""
        self._states[row] = None
        self._stateful[row] = False
        self.greedy[row] = self.filtered[row] = False
        self.logprobs[row] = -1

    def stateful(self, rows: Int64) -> npt.NDArray[np.bool_]:
        """Which of `rows` change logits or depend on the tokens before, [len(rows)]."""
        return self._stateful[rows]

    def edits(self, rows: Int64, positions: Int64, drafts: Int64) -> LogitEdits:
        """What the rows' options change in logits [len(rows), vocab]; see `Sampler.sample` for the arguments."""
        edits = LogitEdits()
        current: RowState | None = None
        pushed = 0
        for index in np.flatnonzero(self._stateful[rows]):
            state = self._states[rows[index]]
            if state is None:
                continue
            if drafts[index] == NO_DRAFT:
                if current is not None:
                    current.pop(pushed)
                current, pushed = state, 0
            else:
                state.push(int(drafts[index]))
                pushed += 1
            state.edit(edits, int(index), int(positions[index]), self.vocab_size)
        if current is not None:
            current.pop(pushed)
        return edits
