"""SequenceState: one choice of one request, on its way through the batcher.

`num_computed` chases `num_tokens`: prefill, chunked prefill, decode, prefix hits, recompute after preemption and resume
after a crash are all this one rule. The pipeline creates it, the batcher moves it, nobody else writes to it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from penstock_core.protocol.jobs import FinishReason

WAITING = -1  # `row` of a sequence that holds no row


@dataclass(slots=True, eq=False)
class SequenceState:
    """A sequence of tokens to be continued.

    Attributes:
        request_id, index: whose choice this is.
        prompt_ids: int32 [num_prompt].
        max_new_tokens: output limit, context length included.
        urgency: order of service, least first; see `BatchingConfig`. `arrival` breaks ties.
        deadline_s: clock time at which it expires.
        root: digest that starts its chain of page names (the tenant's salt).
        stop_ids: tokens that end it, once it has `min_tokens`.
        wants_prompt_logits: its prompt must be computed, not taken from the prefix cache.
        output_ids: the tokens produced so far; a resumed sequence starts with some.
        draft_ids: guesses at what follows, checked by the next step that has room for them.
        num_computed: leading tokens whose keys and values are in its pages.
        row: its row in the persistent arrays, or WAITING.
        pages: its page numbers in order. num_indexed: how many of them the prefix cache knows.
        digests: names of its full pages, extended as tokens come.
        siblings: all choices of the request; they share the prompt's pages.
        in_flight: steps that it is part of and that have not been updated yet.
        pending: tokens that such a step has chosen but nobody has read; at most one when a step is scheduled.
        place: that of its pending token among those that the step chooses.
        cached_tokens: prompt tokens its first admission found in the cache.
        preemptions: times it lost its pages. admitted_step: the step that last gave it a row.
        admitted_s: clock time of its first admission, None before.
    """

    request_id: str
    index: int
    prompt_ids: npt.NDArray[np.int32]
    max_new_tokens: int
    urgency: float
    arrival: int
    root: bytes
    deadline_s: float | None = None
    stop_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    wants_prompt_logits: bool = False
    output_ids: list[int] = field(default_factory=list)
    draft_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    row: int = WAITING
    pages: list[int] = field(default_factory=list)
    num_indexed: int = 0
    digests: list[bytes] = field(default_factory=list)
    siblings: list[SequenceState] = field(default_factory=list)
    in_flight: int = 0
    pending: int = 0
    place: int = 0
    finish_reason: FinishReason | None = None
    cached_tokens: int | None = None
    preemptions: int = 0
    admitted_step: int = 0
    admitted_s: float | None = None

    @property
    def num_prompt(self) -> int:
        """Prompt length in tokens."""
        return len(self.prompt_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens there are: prompt and output, pending ones included, drafts not."""
        return len(self.prompt_ids) + len(self.output_ids) + self.pending

    @property
    def is_closing(self) -> bool:
        """Whether its pending token is its last, whatever it will be."""
        return self.pending > 0 and len(self.output_ids) + self.pending >= self.max_new_tokens

    @property
    def is_running(self) -> bool:
        """Whether it holds a row and pages."""
        return self.row >= 0

    @property
    def order(self) -> tuple[float, int]:
        """Sort key of service: most urgent first, then first come."""
        return self.urgency, self.arrival

    def propose(self, tokens: list[int]) -> None:
        """Give drafts of what follows, most likely right first; those beyond the length limit are left out."""
        room = self.max_new_tokens - len(self.output_ids) - 1
        self.draft_ids = tokens[: max(0, room)]

    def append(self, tokens: list[int]) -> int:
        """Append what the sampler chose, up to where a stop id or the length limit ends it; the number kept.

        Sets `finish_reason` where it ends. A negative token means that none could be chosen, and ends it with an error.
        """
        output = self.output_ids
        for kept, token in enumerate(tokens, 1):
            if token < 0:
                self.finish_reason = FinishReason.ERROR
                return kept - 1
            output.append(token)
            if token in self.stop_ids and len(output) > self.min_tokens:
                self.finish_reason = FinishReason.STOP
                return kept
            if len(output) >= self.max_new_tokens:
                self.finish_reason = FinishReason.LENGTH
                return kept
        return len(tokens)
