"""Reading a token log: whole choices, or a reason why it cannot be continued."""

from __future__ import annotations

import pytest

from penstock_core.protocol.codec import encode_event
from penstock_core.protocol.events import JobEnded, TokenChunk
from penstock_core.protocol.jobs import FinishReason, JobState, TokenLogprob
from penstock_worker.resume import UnresumableLog, read_log

STOP = FinishReason.STOP


def record(offset: int, *tokens: int, index: int = 0, attempt: int = 1, **more: object) -> bytes:
    pieces = tuple(f"<{token}>" for token in tokens) or ("tail",)
    return encode_event(TokenChunk(attempt, index, offset, tokens, pieces, **more))  # type: ignore[arg-type]


def test_an_empty_log_has_no_choices() -> None:
    assert read_log([]) == []


def test_choices_are_laid_end_to_end_over_attempts() -> None:
    log = [record(0, 1, 2), record(0, 9, index=1), record(2, 3, attempt=2), record(1, index=1, finish_reason=STOP)]
    first, second = read_log(log)
    assert (first.token_ids, first.finish_reason, first.index) == ([1, 2, 3], None, 0)
    assert first.resumed().token_ids == (1, 2, 3)
    assert second.finished().text == "<9>tail"
    assert second.finished().finish_reason is STOP


def test_log_probabilities_come_along() -> None:
    scored = TokenLogprob(-0.5, ((7, -0.5),))
    (choice,) = read_log([record(0, 7, logprobs=(scored,)), record(1, 8, logprobs=(scored,))])
    assert choice.resumed().logprobs == (scored, scored)


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ([b"\xc1"], "record 0 of the token log cannot be read"),
        ([record(0, 1), record(2, 3)], "has 1 tokens, then a chunk at offset 2"),
        ([record(0, 1, 2), record(1, 2)], "has 2 tokens, then a chunk at offset 1"),
        ([record(0, 1, finish_reason=STOP), record(1, 2)], "goes on after its end"),
        ([encode_event(JobEnded(JobState.FAILED, 1))], "record 0 of the token log is a JobEnded"),
    ],
)
def test_a_log_that_cannot_be_continued_says_why(log: list[bytes], reason: str) -> None:
    with pytest.raises(UnresumableLog, match=reason):
        read_log(log)
