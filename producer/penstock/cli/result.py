"""`penstock result`: what a job left behind."""

from __future__ import annotations

from typing import Annotated

import typer

from penstock.cli.exits import invalid
from penstock.cli.help import Command
from penstock.cli.options import JsonOption, QueueOption, RedisOption

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command(cls=Command, epilog="penstock result ID\npenstock result ID --timeout 0 --json | jq -r .text")
def result(
    job_id: Annotated[str, typer.Argument(metavar="ID", help="The job.")],
    timeout: Annotated[
        float | None,
        typer.Option(
            "--timeout", metavar="SECONDS", help="Wait no longer (exit code 6); 0 only looks. [default: no limit]"
        ),
    ] = None,
    as_json: JsonOption = False,
    redis: RedisOption = None,
    queue: QueueOption = None,
) -> None:
    """Print the result of a job, waiting for it if it still runs.

    A job that did not complete gives exit code 5 and what it had produced until then.
    """
    from penstock.cli.following import follow
    from penstock.cli.session import locate, open_client

    if timeout is not None and not 0 <= timeout < float("inf"):
        invalid("--timeout", f"{timeout} is no number of seconds; give 0 or more")
    with open_client(locate(redis, queue), answering=True) as client:
        follow(client.job(job_id), live=False, timeout_s=timeout, as_json=as_json)
