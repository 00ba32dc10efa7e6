"""`penstock watch`: the token streams of jobs, from any offset, as often as wanted."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from penstock.cli.exits import invalid
from penstock.cli.help import Command
from penstock.cli.options import JsonOption, QueueOption, RedisOption

app = typer.Typer(rich_markup_mode=None, add_completion=False)
_EXAMPLES = """
penstock watch ID
penstock watch ID --from 120
penstock watch $(penstock jobs --state running --json | jq -r .job_id)
"""


@app.command(cls=Command, epilog=_EXAMPLES)
def watch(
    job_ids: Annotated[list[str], typer.Argument(metavar="ID", help="Jobs to follow.")],
    from_offset: Annotated[
        int, typer.Option("--from", metavar="OFFSET", help="Begin at this token of each choice. [default: 0]")
    ] = 0,
    index: Annotated[
        int | None, typer.Option("--index", metavar="N", help="Only this choice of a job with several.")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option("--timeout", metavar="SECONDS", help="The longest silence to bear (exit code 6).")
    ] = None,
    as_json: JsonOption = False,
    redis: RedisOption = None,
    queue: QueueOption = None,
) -> None:
    """Stream the tokens of one job or several, from any offset.

    Watching takes nothing away: any number of watchers see the same tokens, now or later, while the job is retained.
    """
    from penstock.cli.session import locate, open_client

    if from_offset < 0:
        invalid("--from", f"{from_offset} is negative; 0 is the first token")
    if timeout is not None and not 0 <= timeout < float("inf"):
        invalid("--timeout", f"{timeout} is no number of seconds; give 0 or more")
    address = locate(redis, queue)
    chosen = list(dict.fromkeys(job_ids))
    if len(chosen) == 1:
        from penstock.cli.following import follow

        with open_client(address, answering=True) as client:
            follow(
                client.job(chosen[0]),
                live=True,
                timeout_s=timeout,
                as_json=as_json,
                from_offset=from_offset,
                index=index,
            )
        return
    from penstock.cli.watch_many import watch_many

    code = watch_many(address, chosen, from_offset, index, timeout, as_json)
    sys.stdout.flush()
    if code:
        raise typer.Exit(code)
