"""Exit codes of the command line, and the one line that explains each failure.

| code | meaning |
|---|---|
| 0 | done |
| 1 | an error of ours, or a failed check (`doctor`, `demo`) |
| 2 | the request or the command line is invalid; nothing was stored |
| 3 | the queue is full |
| 4 | no such job |
| 5 | the job ended without completing: failed, dead, cancelled or expired |
| 6 | gave up waiting; the job goes on |
| 7 | the broker cannot be reached |
| 130 | interrupted with Ctrl-C |
"""

from __future__ import annotations

import os
import sys
import traceback
from enum import IntEnum
from typing import NoReturn

from penstock.cli.terminal import coloured, paint, say


class ExitCode(IntEnum):
    """See the table above."""

    OK = 0
    ERROR = 1
    INVALID = 2
    QUEUE_FULL = 3
    NOT_FOUND = 4
    JOB_FAILED = 5
    TIMEOUT = 6
    BROKER = 7
    INTERRUPTED = 130


EXIT_CODES = (
    "0 done, 1 an error or a failed check, 2 invalid request or usage, 3 queue full, 4 no such job, "
    "5 job ended without completing, 6 gave up waiting, 7 broker unavailable, 130 interrupted"
)


class CommandFailed(Exception):
    """A command cannot go on; carries the line to print and the code to exit with."""

    def __init__(self, code: ExitCode, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}" if field else message)
        self.code = code


def invalid(field: str, message: str) -> NoReturn:
    """Refuse the command line: `error: field: message`, exit code 2."""
    raise CommandFailed(ExitCode.INVALID, field, message)


def explain(error: BaseException) -> tuple[ExitCode, str]:
    """The exit code and the sentence for an exception."""
    from penstock_core.protocol import errors

    if isinstance(error, CommandFailed):
        return error.code, str(error)
    if isinstance(error, (errors.InvalidRequest, errors.InvalidConfiguration)):
        return ExitCode.INVALID, str(error)
    if isinstance(error, errors.QueueFull):
        wait = f"; try again in {error.retry_after_s:.1f} s" if error.retry_after_s > 0 else ""
        return ExitCode.QUEUE_FULL, f"queue: {error}{wait}"
    if isinstance(error, errors.JobNotFound):
        return ExitCode.NOT_FOUND, f"job: {error}"
    if isinstance(error, errors.JobError):
        return ExitCode.JOB_FAILED, f"{error} ({error.code})"
    if isinstance(error, errors.ResultTimeout):
        return ExitCode.TIMEOUT, f"timeout: {error}"
    if isinstance(error, errors.BrokerUnavailable):
        return ExitCode.BROKER, f"broker: {error}"
    if isinstance(error, errors.PenstockError):
        return ExitCode.ERROR, str(error)
    return _unexpected(error)


def _unexpected(error: BaseException) -> tuple[ExitCode, str]:
    if type(error).__module__.startswith("redis."):
        import redis

        if isinstance(error, (redis.ConnectionError, redis.TimeoutError)):
            return ExitCode.BROKER, f"broker: {error}; start one with `penstock serve` or name yours with --redis"
        return ExitCode.ERROR, f"redis: {error}"
    if os.environ.get("PENSTOCK_DEBUG"):
        traceback.print_exception(error)
    kind = type(error).__name__
    return ExitCode.ERROR, f"{kind}: {error}; set PENSTOCK_DEBUG=1 for the traceback and report it"


def fail(code: ExitCode, message: str) -> None:
    """Print the one line that explains a failure."""
    on = coloured(sys.stderr)
    first = " ".join(message.split())
    say(f"{paint('error', 'red', 'bold', on=on)}{paint(':', 'bold', on=on)} {first}")
