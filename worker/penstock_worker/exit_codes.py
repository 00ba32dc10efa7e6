"""The worker's exit codes, which supervisors and init systems act on.

A code that a restart cannot cure (`USAGE`, `BROKER`, `MODEL`) is not restarted by the supervisor.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Why the process ended."""

    OK = 0  # drained: every job finished or was handed back
    CRASH = 1  # an unexpected error: a bug, or the machine
    USAGE = 2  # a flag or an environment variable is wrong
    BROKER = 3  # Redis answers but cannot be used: wrong password, too old, missing permission
    MODEL = 4  # the model cannot be found, read or fitted into memory
    ENGINE = 5  # the engine thread died; jobs were handed back

    @property
    def is_permanent(self) -> bool:
        """Whether starting again with the same settings must fail again."""
        return self in (ExitCode.USAGE, ExitCode.BROKER, ExitCode.MODEL)
