"""`penstock dead`: jobs that were given up, why, and what to do with them."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from penstock.cli.exits import CommandFailed, ExitCode, invalid
from penstock.cli.help import Command, Group
from penstock.cli.options import JsonOption, QueueOption, RedisOption

app = typer.Typer(cls=Group, rich_markup_mode=None, add_completion=False, no_args_is_help=True)
Ids = Annotated[list[str] | None, typer.Argument(metavar="ID", help="Dead jobs.")]
All = Annotated[bool, typer.Option("--all", help="All dead jobs of the queue.")]


@app.callback()
def dead() -> None:
    """Inspect, requeue or purge dead-lettered jobs.

    A job is dead when it crashed its workers too often, or could not be decoded. It waits here until it is requeued,
    purged, or its retention time has passed.
    """


@app.command("list", cls=Command)
def list_letters(
    limit: Annotated[int, typer.Option("--limit", "-n", metavar="N", help="At most this many. [default: 20]")] = 20,
    as_json: JsonOption = False,
    redis: RedisOption = None,
    queue: QueueOption = None,
) -> None:
    """List dead jobs, newest first, with the reason of each."""
    from rich.table import Table
    from rich.text import Text

    from penstock.cli.records import letter_record
    from penstock.cli.screen import console, duration, print_json
    from penstock.cli.session import open_queue
    from penstock.cli.terminal import note, printable
    from penstock_core.protocol.transitions import dead_letters

    if not 1 <= limit <= 10_000:
        invalid("--limit", f"{limit} is out of range; 1 to 10000")
    with open_queue(redis, queue) as session:
        letters = session.run(dead_letters(session.keys, limit=limit))
    if as_json:
        for letter in letters:
            print_json(letter_record(letter))
        return
    if not letters:
        note("✓", "green", "no dead jobs")
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="label")
    for name, style in (("job", "id"), ("died", ""), ("code", "bad"), ("why", "")):
        table.add_column(name, style=style, no_wrap=name != "why", overflow="fold")
    now_ms = time.time() * 1000
    for letter in letters:
        ago = duration(max(0.0, now_ms - letter.at_ms) / 1000)
        cells = (letter.job_id or "(none)", f"{ago} ago", letter.code, letter.message)
        table.add_row(*(Text(printable(cell)) for cell in cells))
    console().print(table)


@app.command("show", cls=Command)
def show(
    job_id: Annotated[str, typer.Argument(metavar="ID", help="A dead job.")],
    as_json: JsonOption = False,
    redis: RedisOption = None,
    queue: QueueOption = None,
) -> None:
    """Show a dead job: its request, its reason, and the text it had produced."""
    from penstock.cli.dead_letter import describe
    from penstock.cli.session import open_queue

    with open_queue(redis, queue) as session:
        describe(session, job_id, as_json)


@app.command("requeue", cls=Command)
def requeue(
    job_ids: Ids = None,
    every: All = False,
    as_json: JsonOption = False,
    redis: RedisOption = None,
    queue: QueueOption = None,
) -> None:
    """Put dead jobs back in line, as new. Exit code 4 when one of them is not dead or unknown."""
    from penstock.cli.screen import print_json
    from penstock.cli.session import open_queue
    from penstock.cli.terminal import note
    from penstock_core.protocol.transitions import dead_letters
    from penstock_core.protocol.transitions import requeue as requeue_call

    _ids_or_all(job_ids, every)
    with open_queue(redis, queue) as session:
        chosen = job_ids or [letter.job_id for letter in session.run(dead_letters(session.keys, limit=10_000))]
        chosen = list(dict.fromkeys(job_id for job_id in chosen if job_id))
        outcomes = session.run(requeue_call(session.keys, chosen)) if chosen else []
    for job_id, outcome in zip(chosen, outcomes, strict=True):
        if as_json:
            print_json({"job_id": job_id, "outcome": outcome})
        elif outcome == "requeued":
            note("✓", "green", f"{job_id} is back in line")
        else:
            note("✗", "red", f"{job_id} {'is not dead' if outcome == 'not_dead' else 'is unknown'}; nothing was done")
    if not chosen and not as_json:
        note("✓", "green", "no dead jobs")
    if job_ids and any(outcome != "requeued" for outcome in outcomes):
        raise typer.Exit(ExitCode.NOT_FOUND)


@app.command("purge", cls=Command)
def purge(
    job_ids: Ids = None,
    every: All = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: JsonOption = False,
    redis: RedisOption = None,
    queue: QueueOption = None,
) -> None:
    """Delete dead jobs for good."""
    import sys

    from penstock.cli.screen import print_json
    from penstock.cli.session import open_queue
    from penstock.cli.terminal import is_terminal, note
    from penstock_core.protocol.transitions import purge_dead

    _ids_or_all(job_ids, every)
    if every and not yes:
        if not is_terminal(sys.stdin):
            invalid("--all", "deletes every dead job; confirm with --yes")
        typer.confirm("Delete all dead jobs of the queue?", abort=True, err=True)
    purged = 0
    with open_queue(redis, queue) as session:
        if job_ids:
            purged = session.run(purge_dead(session.keys, job_ids))
            if purged < len(set(job_ids)) and not as_json:
                note("!", "yellow", f"{len(set(job_ids)) - purged} of them were not dead, or unknown")
        else:
            while batch := session.run(purge_dead(session.keys, None, limit=1000)):
                purged += batch
    if as_json:
        print_json({"purged": purged})
    else:
        note("✓", "green", f"{purged} dead job{'' if purged == 1 else 's'} deleted")
    if job_ids and not purged:
        raise CommandFailed(ExitCode.NOT_FOUND, "job", "none of these is a dead job of this queue")


def _ids_or_all(job_ids: list[str] | None, every: bool) -> None:
    if bool(job_ids) == every:
        invalid("ID", "give job ids or --all" + (", not both" if every else ""))
