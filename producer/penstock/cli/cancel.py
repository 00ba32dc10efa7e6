"""`penstock cancel`: a queued job ends at once, a running one within a decode step."""

from __future__ import annotations

from typing import Annotated

import typer

from penstock.cli.exits import ExitCode
from penstock.cli.help import Command
from penstock.cli.options import JsonOption, QueueOption, RedisOption

app = typer.Typer(rich_markup_mode=None, add_completion=False)
_MARKS = {
    "cancelled": ("✓", "green", "cancelled"),
    "cancelling": ("✓", "green", "is asked to stop; it ends within a decode step"),
    "ended": ("·", "dim", "had already ended"),
    "unknown": ("✗", "red", "unknown: never submitted to this queue, or its retention time has passed"),
}


@app.command(
    cls=Command,
    epilog="penstock cancel ID\npenstock jobs --state queued --json | jq -r .job_id | xargs penstock cancel",
)
def cancel(
    job_ids: Annotated[list[str], typer.Argument(metavar="ID", help="Jobs to cancel.")],
    tenant: Annotated[str | None, typer.Option("--tenant", metavar="NAME", help="Only this tenant's jobs.")] = None,
    as_json: JsonOption = False,
    redis: RedisOption = None,
    queue: QueueOption = None,
) -> None:
    """Cancel jobs, queued or running.

    Exit code 4 when one of them is unknown.
    """
    from penstock.cli.screen import print_json
    from penstock.cli.session import open_queue
    from penstock.cli.terminal import note
    from penstock_core.protocol.transitions import cancel as cancel_call

    with open_queue(redis, queue) as session:
        outcomes = session.run(cancel_call(session.keys, job_ids, tenant=tenant))
    for job_id, outcome in zip(job_ids, outcomes, strict=True):
        if as_json:
            print_json({"job_id": job_id, "outcome": outcome})
        else:
            mark, colour, words = _MARKS[outcome]
            note(mark, colour, f"{job_id} {words}")
    if "unknown" in outcomes:
        raise typer.Exit(ExitCode.NOT_FOUND)
