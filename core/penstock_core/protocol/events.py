"""What a subscriber sees of a job: chunks of tokens, then exactly one terminal event.

Chunks are also the checkpoint: the chunks of a job, in order, are the tokens a next attempt resumes from. A chunk is
identified by (choice index, offset), so a reader can drop what it has and notice what it lacks.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock_core.protocol.jobs import FinishReason, JobFailure, JobResult, JobState, TokenLogprob
from penstock_core.protocol.records import quick


@quick
@dataclass(frozen=True, slots=True)
class TokenChunk:
    """Consecutive tokens of one choice.

    Attributes:
        attempt: the attempt that produced them (1 for the first).
        index: the choice.
        offset: position of the first token in the choice's output.
        token_ids: the tokens. May be empty where only held-back text or a finish reason is released.
        pieces: per token, the text released when it was appended (a token may complete a character begun earlier, or
            release text held back for a stop string). `len(pieces) == len(token_ids)`, or 1 when `token_ids` is empty.
        finish_reason: set on the choice's last chunk.
        logprobs: per token, where asked for.
    """

    attempt: int
    index: int
    offset: int
    token_ids: tuple[int, ...]
    pieces: tuple[str, ...]
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None

    @property
    def text(self) -> str:
        """The text this chunk adds."""
        return "".join(self.pieces)

    @property
    def end(self) -> int:
        """Offset after the last token."""
        return self.offset + len(self.token_ids)


@quick
@dataclass(frozen=True, slots=True)
class JobEnded:
    """The terminal event: the state, and the result or the failure (an expired or cancelled job may have both)."""

    state: JobState
    attempt: int
    result: JobResult | None = None
    failure: JobFailure | None = None


Event = TokenChunk | JobEnded
