"""`penstock worker`: becomes `python -m penstock_worker` with the same arguments.

The producer side never imports the worker: this process is replaced by it, so signals, exit codes and --help are the
worker's own.
"""

from __future__ import annotations

import os
import sys

import typer

from penstock.cli.help import Command
from penstock.cli.options import REDIS_VARIABLE

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command(
    cls=Command,
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def worker(ctx: typer.Context) -> None:
    """Start one worker: a model on a device, pulling jobs as it has room."""
    from penstock.cli.processes import worker_command
    from penstock.served import find_served

    told = any(argument.partition("=")[0] in ("--redis", "--redis-url") for argument in ctx.args)
    if not told and not os.environ.get(REDIS_VARIABLE) and (served := find_served()) is not None:
        os.environ[REDIS_VARIABLE] = served.url  # not on the command line, which others can read
    command = [*worker_command(), *ctx.args]
    sys.stdout.flush()
    os.execv(command[0], command)  # noqa: S606 - the point of this command is to become the worker
