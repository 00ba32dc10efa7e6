"""`penstock jobs`: what is running, waiting, done and dead, as a table or as JSON lines."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from penstock.cli.exits import ExitCode, invalid
from penstock.cli.help import Command
from penstock.cli.options import JsonOption, QueueOption, RedisOption

if TYPE_CHECKING:
    from penstock.cli.session import Queue
    from penstock_core.protocol.transitions import JobStatus

_LAST = "worker, or why it ended"
_WIDE = ("job", "state", "p", "tenant", "age", "took", "tokens", "try", _LAST)
_NARROW = ("job", "state", "p", "tenant", "age", "tokens")
app = typer.Typer(rich_markup_mode=None, add_completion=False)
_EXAMPLES = """
penstock jobs
penstock jobs --state running --state queued
penstock jobs --tenant web --limit 100 --json | jq .tokens
"""


@app.command(cls=Command, epilog=_EXAMPLES)
def jobs(
    job_ids: Annotated[
        list[str] | None, typer.Argument(metavar="ID", help="Only these jobs. All states, newest first, when absent.")
    ] = None,
    states: Annotated[
        list[str] | None,
        typer.Option(
            "--state",
            metavar="STATE",
            help="Only queued, running, delayed, completed, failed, cancelled, expired or dead ones; repeatable.",
        ),
    ] = None,
    tenant: Annotated[str | None, typer.Option("--tenant", metavar="NAME", help="Only this tenant's.")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", metavar="N", help="At most this many. [default: 20]")] = 20,
    as_json: JsonOption = False,
    redis: RedisOption = None,
    queue: QueueOption = None,
) -> None:
    """List jobs: running, queued, recent, dead."""
    from penstock.cli.session import open_queue
    from penstock.cli.terminal import note
    from penstock_core.protocol.jobs import JobState

    known = {str(state) for state in JobState}
    for state in states or ():
        if state not in known:
            invalid("--state", f"{state!r} is no state; one of {', '.join(sorted(known))}")
    if not 1 <= limit <= 10_000:
        invalid("--limit", f"{limit} is out of range; 1 to 10000")
    missing: list[str] = []
    with open_queue(redis, queue) as session:
        if job_ids:
            found, missing = _these(session, job_ids)
        else:
            found = _newest(session, states or [], tenant, limit)
        _show(found, session, as_json)
    for job_id in missing:
        note("✗", "red", f"{job_id} unknown: never submitted to this queue, or its retention time has passed")
    if missing:
        raise typer.Exit(ExitCode.NOT_FOUND)


def _newest(queue: Queue, states: list[str], tenant: str | None, limit: int) -> list[JobStatus]:
    from penstock.cli.session import open_client
    from penstock_core.protocol.jobs import JobState

    chosen: list[JobState | None] = [JobState(state) for state in dict.fromkeys(states)]
    with open_client(queue.address) as client:
        found = [
            status for state in chosen or [None] for status in client.jobs(limit=limit, state=state, tenant=tenant)
        ]
    found.sort(key=lambda status: (status.submitted_ms, status.job_id), reverse=True)
    return found[:limit]


def _these(queue: Queue, job_ids: list[str]) -> tuple[list[JobStatus], list[str]]:
    from penstock_core.protocol.transitions import read_jobs

    statuses = queue.run(read_jobs(queue.keys, job_ids))
    found = [status for status in statuses if status is not None]
    return found, [job_id for job_id, status in zip(job_ids, statuses, strict=True) if status is None]


def _show(jobs: list[JobStatus], queue: Queue, as_json: bool) -> None:
    if as_json:
        from penstock.cli.records import status_record
        from penstock.cli.screen import print_json

        for status in jobs:
            print_json(status_record(status))
        return
    from rich.table import Table
    from rich.text import Text

    from penstock.cli.screen import console, duration, state
    from penstock.cli.terminal import note, printable

    if not jobs:
        note("·", "dim", f"no such jobs in queue {queue.address.queue} on {queue.address.shown_url}")
        return
    out = console()
    columns = _NARROW if out.width < 104 else _WIDE
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="label")
    for name in columns:
        numeric = name in ("p", "age", "took", "tokens", "try")
        table.add_column(name, justify="right" if numeric else "left", no_wrap=True, overflow="ellipsis")
    now_ms = int(time.time() * 1000)
    for status in jobs:
        took_ms = (status.finished_ms or now_ms) - status.started_ms if status.started_ms else None
        why = Text(printable(status.failure.message), style="mute") if status.failure else Text(status.owner)
        cells = {
            "job": Text(printable(status.job_id), style="id"),
            "state": state(str(status.state)),
            "p": Text(str(status.priority), style="figure" if status.priority >= 8 else ""),
            "tenant": Text(status.tenant),
            "age": Text(duration(max(0, now_ms - status.submitted_ms) / 1000)),
            "took": Text(duration(max(0, took_ms) / 1000) if took_ms is not None else "-"),
            "tokens": Text(f"{status.tokens:,}" if status.tokens else "-"),
            "try": Text(str(status.attempt), style="takeover" if status.attempt > 1 else ""),
            _LAST: why,
        }
        table.add_row(*(cells[name] for name in columns))
    out.print(table)
