"""`penstock worker`: becomes `python -m penstock_worker` with the same arguments.

The producer side never imports the worker: this process is replaced by it, so signals, exit codes and --help are the
worker's own.
"""

from __future__ import annotations

import importlib.util
import os
import sys

import typer

from penstock.cli.exits import CommandFailed, ExitCode
from penstock.cli.help import Command

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command(
    cls=Command,
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def worker(ctx: typer.Context) -> None:
    """Start one worker: a model on a device, pulling jobs as it has room."""
    command = [*worker_command(), *ctx.args]
    sys.stdout.flush()
    os.execv(command[0], command)  # noqa: S606 - the point of this command is to become the worker


def worker_command() -> list[str]:
    """How to start a worker process on this machine; refuses when the `worker` extra is not installed."""
    for package in ("penstock_worker", "torch"):
        if importlib.util.find_spec(package) is None:
            raise CommandFailed(
                ExitCode.ERROR, "worker", f"{package} is not installed; install it with: pip install 'penstock[worker]'"
            )
    return [sys.executable, "-m", "penstock_worker"]
