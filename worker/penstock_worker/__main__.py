"""`python -m penstock_worker`: one worker, or with `--processes` a supervised group of them."""

from __future__ import annotations

import os
import sys

from penstock_core.protocol.errors import InvalidConfiguration, InvalidRequest
from penstock_worker import flags, structured_log
from penstock_worker.exit_codes import ExitCode
from penstock_worker.settings import WorkerSettings, new_worker_id


def main() -> int:
    """Parse, then become a worker or a supervisor; returns the exit code."""
    try:
        settings = flags.parse(sys.argv[1:], os.environ)
    except (InvalidConfiguration, InvalidRequest) as error:
        sys.stderr.write(f"penstock worker: {error}\n")
        return ExitCode.USAGE
    if settings.worker_id is None and settings.processes == 1:
        settings = settings.model_copy(update={"worker_id": new_worker_id()})
    structured_log.configure(settings.log_level, settings.log_format, settings.worker_id or "supervisor")
    return _supervise(settings) if settings.processes > 1 else _work(settings)


def _work(settings: WorkerSettings) -> ExitCode:
    from penstock_worker.app import run  # torch is loaded here, and only here

    return run(settings)


def _supervise(settings: WorkerSettings) -> ExitCode:
    from penstock_worker.supervise import run

    return run(settings)


if __name__ == "__main__":
    sys.exit(main())
