"""The demo's proof finds what it claims to find: every kind of fault, one at a time."""

from __future__ import annotations

import pytest

from penstock.cli.demo.proof import Audit, Evidence, judge
from penstock_core.protocol.events import TokenChunk
from penstock_core.protocol.jobs import Choice, FinishReason, JobResult


def chunk(offset: int, *tokens: int, attempt: int = 1) -> TokenChunk:
    return TokenChunk(attempt, 0, offset, tokens, tuple(f"<{token}>" for token in tokens))


def audit(*chunks: TokenChunk, ends: int = 1) -> Audit:
    made = Audit(ends=ends)
    for each in chunks:
        made.take(each)
    return made


def result(*tokens: int) -> JobResult:
    text = "".join(f"<{token}>" for token in tokens)
    return JobResult((Choice(0, text, tokens, FinishReason.STOP),))


GOOD = (chunk(0, 5, 6), chunk(2, 7, attempt=2))


def evidence(**changes) -> Evidence:
    made = Evidence("j", "a job", audit(*GOOD), result(5, 6, 7), audit(*GOOD), result(5, 6, 7), must_compare=True)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def test_an_intact_job_proves_everything():
    verdict = judge([evidence(), evidence()])
    assert verdict.holds
    assert (verdict.jobs, verdict.completed, verdict.lost, verdict.compared) == (2, 2, 0, 2)
    assert (verdict.duplicate_tokens, verdict.missing_tokens, verdict.wrong_output) == (0, 0, 0)


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"result": None}, "lost", "has no completed result"),
        ({"received": audit(chunk(0, 5, 6), chunk(1, 6, 7))}, "duplicate_tokens", None),
        ({"received": audit(chunk(0, 5), chunk(2, 7))}, "missing_tokens", "reached its subscriber with other tokens"),
        ({"received": audit(chunk(0, 5, 6))}, "missing_tokens", "reached its subscriber with other tokens"),
        ({"received": audit(chunk(0, 5, 9, 7))}, "wrong_output", "reached its subscriber with other tokens"),
        ({"logged": audit(chunk(0, 5, 6), chunk(2, 8))}, "wrong_output", "has other tokens in its log"),
        ({"logged": audit(*GOOD, ends=2)}, "wrong_output", "has 2 terminal events"),
        ({"logged": audit(*GOOD, ends=0)}, "wrong_output", "has 0 terminal events"),
        ({"logged": None}, "wrong_output", "has no token log"),
        ({"undisturbed": result(5, 6, 8)}, "wrong_output", "gave other tokens than the same request gave undisturbed"),
        ({"undisturbed": None}, "wrong_output", "could not be run again"),
    ],
    ids=str,
)
def test_each_fault_is_found(changes: dict, field: str, words: str | None):
    verdict = judge([evidence(), evidence(**changes)])
    assert not verdict.holds
    assert getattr(verdict, field) > 0
    if words is not None:
        assert any(words in fault for fault in verdict.faults)


def test_an_uninterrupted_job_needs_no_second_run():
    job = evidence(undisturbed=None, must_compare=False)
    assert judge([job]).holds


def test_empty_chunks_neither_repeat_nor_skip():
    made = audit(chunk(0, 5), chunk(1), chunk(1, 6))
    assert (made.token_ids, made.duplicate_tokens, made.missing_tokens) == ([5, 6], 0, 0)
