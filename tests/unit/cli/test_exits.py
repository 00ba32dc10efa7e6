"""Every failure is one line and one documented exit code; none is a traceback."""

from __future__ import annotations

import pytest
import redis

from penstock.cli.exits import CommandFailed, ExitCode, explain
from penstock_core.protocol import errors


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (errors.InvalidRequest("priority", "12 is above 9"), 2, "priority: 12 is above 9"),
        (errors.InvalidConfiguration("redis", "no URL"), 2, "redis: no URL"),
        (errors.QueueFull("queue q: 5 jobs wait", 1.25), 3, "queue: queue q: 5 jobs wait; try again in 1.2 s"),
        (errors.JobNotFound("no job x"), 4, "job: no job x"),
        (errors.JobFailed("x", "boom", "worker_error"), 5, "job x: boom (worker_error)"),
        (errors.JobDead("x", "poison", "poison"), 5, "job x: poison (poison)"),
        (errors.JobCancelled("x", "by request", "cancelled"), 5, "job x: by request (cancelled)"),
        (errors.JobExpired("x", "too late", "deadline"), 5, "job x: too late (deadline)"),
        (errors.ResultTimeout("after 3 s"), 6, "timeout: after 3 s"),
        (errors.BrokerUnavailable("gone"), 7, "broker: gone"),
        (redis.ConnectionError("refused"), 7, "broker: refused; start one with `penstock serve`"),
        (redis.ResponseError("ERR odd"), 1, "redis: ERR odd"),
        (CommandFailed(ExitCode.ERROR, "worker", "ended"), 1, "worker: ended"),
        (ZeroDivisionError("x"), 1, "ZeroDivisionError: x; set PENSTOCK_DEBUG=1"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_error_has_its_exit_code_and_sentence(error: Exception, code: int, words: str):
    found, sentence = explain(error)
    assert found == code
    assert sentence.startswith(words)


def test_every_error_of_the_sdk_has_a_code_of_its_own_kind():
    """A new error class must be given a place here, not fall through to `report it`."""
    for name, kind in vars(errors).items():
        if isinstance(kind, type) and issubclass(kind, errors.PenstockError):
            made = kind.__new__(kind)
            Exception.__init__(made, "words")
            for field, value in {"retry_after_s": 0.0, "code": "c", "field": "f", "message": "m"}.items():
                setattr(made, field, value)
            assert "report it" not in explain(made)[1], name
