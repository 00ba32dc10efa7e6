"""From a job's token log to the point where its next attempt goes on.

The published chunks are the checkpoint. Each choice's tokens, text and log-probabilities are its chunks laid end to
end; stop strings, grammar state and penalties are rebuilt by the engine, which replays the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from penstock_core.pipeline import ResumedChoice
from penstock_core.protocol.codec import decode_event
from penstock_core.protocol.errors import PenstockError, UndecodableRecord
from penstock_core.protocol.events import TokenChunk
from penstock_core.protocol.jobs import Choice, FinishReason, TokenLogprob


class UnresumableLog(PenstockError):
    """The token log cannot be continued, and says why. Starting over would contradict tokens already published."""


@dataclass(slots=True)
class LoggedChoice:
    """What the log holds of one choice."""

    index: int
    token_ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None

    def resumed(self) -> ResumedChoice:
        """The choice as the engine takes it."""
        return ResumedChoice(
            index=self.index,
            token_ids=tuple(self.token_ids),
            logprobs=None if self.logprobs is None else tuple(self.logprobs),
            finish_reason=self.finish_reason,
        )

    def finished(self) -> Choice:
        """The choice as a result holds it; only for one that has its finish reason."""
        assert self.finish_reason is not None
        return Choice(
            index=self.index,
            text="".join(self.pieces),
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish_reason,
            logprobs=None if self.logprobs is None else tuple(self.logprobs),
        )


def read_log(log: Sequence[bytes]) -> list[LoggedChoice]:
    """Lay the chunks of `log` end to end, choice by choice.

    Raises:
        UnresumableLog: a chunk cannot be decoded, leaves a gap, or follows its choice's end.
    """
    choices: dict[int, LoggedChoice] = {}
    for position, record in enumerate(log):
        try:
            event = decode_event(record)
        except UndecodableRecord as error:
            raise UnresumableLog(f"record {position} of the token log cannot be read: {error}") from error
        if not isinstance(event, TokenChunk):
            raise UnresumableLog(f"record {position} of the token log is a {type(event).__name__}, not tokens")
        _append(choices.setdefault(event.index, LoggedChoice(event.index)), event)
    return [choices[index] for index in sorted(choices)]


def _append(choice: LoggedChoice, chunk: TokenChunk) -> None:
    if chunk.offset != len(choice.token_ids):
        raise UnresumableLog(
            f"choice {chunk.index} of the token log has {len(choice.token_ids)} tokens, "
            f"then a chunk at offset {chunk.offset}"
        )
    if choice.finish_reason is not None:
        raise UnresumableLog(f"choice {chunk.index} of the token log goes on after its end")
    if chunk.logprobs is not None:
        if choice.logprobs is None:
            choice.logprobs = []
        choice.logprobs.extend(chunk.logprobs)
    choice.token_ids.extend(chunk.token_ids)
    choice.pieces.extend(chunk.pieces)
    choice.finish_reason = chunk.finish_reason
