"""`python -m penstock_worker`: one worker, or with `--processes`, `--ranks` or `--gpus` several, supervised.

Where torchrun started several of these together, rank 0 is the worker and the others follow it.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from types import FrameType

from penstock_core.protocol.errors import InvalidConfiguration, InvalidRequest
from penstock_worker import flags, follow, structured_log
from penstock_worker.exit_codes import ExitCode
from penstock_worker.settings import WorkerSettings, new_worker_id


def main() -> int:
    """Parse, then become a worker or a supervisor; returns the exit code."""
    try:
        settings = flags.parse(sys.argv[1:], os.environ)
    except (InvalidConfiguration, InvalidRequest) as error:
        sys.stderr.write(f"penstock worker: {error}\n")
        return ExitCode.USAGE
    if settings.worker_id is None and not settings.is_supervised:
        settings = settings.model_copy(update={"worker_id": new_worker_id()})
    if (problem := follow.mismatch(settings, os.environ)) is not None:
        sys.stderr.write(f"penstock worker: {problem}\n")
        return ExitCode.USAGE
    structured_log.configure(settings.log_level, settings.log_format, settings.worker_id or "supervisor")
    return _supervise(settings) if settings.is_supervised else _work(settings)


def _leave_when_told() -> None:
    """End in good order when told to while PyTorch is being imported: nothing is held yet. Later the loop is told."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(ExitCode.OK)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)


def _work(settings: WorkerSettings) -> ExitCode:
    if follow.is_follower(os.environ):
        return follow.run(settings)
    _leave_when_told()
    from penstock_worker.app import run  # torch is loaded here, and only here

    code = run(settings)
    if code is ExitCode.ENGINE:
        # Its thread may be stuck in a collective with a rank that is gone, and keep the interpreter from ending.
        logging.shutdown()
        os._exit(code)
    return code


def _supervise(settings: WorkerSettings) -> ExitCode:
    _leave_when_told()
    from penstock_worker.supervise import run

    return run(settings)


if __name__ == "__main__":
    sys.exit(main())
