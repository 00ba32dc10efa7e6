"""`penstock top`: the fleet as it lives, redrawn every second; with --json one snapshot a line."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer

from penstock.cli.exits import invalid
from penstock.cli.help import Command
from penstock.cli.options import JsonOption, QueueOption, RedisOption

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command(cls=Command, epilog="penstock top\npenstock top --all\npenstock top --once --json | jq .waiting")
def top(
    ctx: typer.Context,
    interval: Annotated[
        float, typer.Option("--interval", "-i", metavar="SECONDS", help="Time between pictures. [default: 1]")
    ] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="One picture, then end.")] = False,
    all_queues: Annotated[
        bool, typer.Option("--all", "-a", help="Every queue of this broker: all models and their workers.")
    ] = False,
    as_json: JsonOption = False,
    redis: RedisOption = None,
    queue: QueueOption = None,
) -> None:
    """A live view of queues, workers and tokens per second.

    Ctrl-C ends it.
    """
    from penstock.cli.fleet import read_fleet
    from penstock.cli.session import open_queue
    from penstock.cli.terminal import is_terminal

    if not 0.1 <= interval <= 3600:
        invalid("--interval", f"{interval} is out of range; 0.1 to 3600 seconds")
    source = ctx.get_parameter_source("queue")
    if all_queues and source is not None and source.name == "COMMANDLINE":
        invalid("--all", "shows every queue, and --queue names one; give one of the two")
    live = is_terminal(sys.stdout) and not once and not as_json
    with open_queue(redis, queue) as session:
        if live:
            from penstock.cli.top_view import run_live

            run_live(session, interval, all_queues=all_queues)
            return
        while True:
            fleet = read_fleet(session, all_queues=all_queues)
            if as_json:
                from penstock.cli.records import snapshot_record
                from penstock.cli.screen import print_json

                for name, seen in fleet.queues.items():
                    print_json(snapshot_record(seen, name))
            else:
                from penstock.cli.screen import console
                from penstock.cli.top_view import History, picture

                out = console()
                history = History()
                history.add(fleet)
                out.print(picture(session, fleet, history, out.width))
            if once or not as_json:
                return
            time.sleep(interval)
