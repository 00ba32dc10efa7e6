"""`penstock top`: the queue as it lives, redrawn every second; with --json one snapshot a line."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer

from penstock.cli.exits import invalid
from penstock.cli.help import Command
from penstock.cli.options import JsonOption, QueueOption, RedisOption

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command(cls=Command, epilog="penstock top\npenstock top --once --json | jq .waiting")
def top(
    interval: Annotated[
        float, typer.Option("--interval", "-i", metavar="SECONDS", help="Time between pictures. [default: 1]")
    ] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="One picture, then end.")] = False,
    as_json: JsonOption = False,
    redis: RedisOption = None,
    queue: QueueOption = None,
) -> None:
    """A live view of queues, workers and tokens per second.

    Ctrl-C ends it.
    """
    from penstock.cli.session import open_queue
    from penstock.cli.terminal import is_terminal
    from penstock_core.protocol.transitions import snapshot

    if not 0.1 <= interval <= 3600:
        invalid("--interval", f"{interval} is out of range; 0.1 to 3600 seconds")
    live = is_terminal(sys.stdout) and not once and not as_json
    with open_queue(redis, queue) as session:
        if live:
            from penstock.cli.top_view import run_live

            run_live(session, interval)
            return
        while True:
            seen = session.run(snapshot(session.keys))
            if as_json:
                from penstock.cli.records import snapshot_record
                from penstock.cli.screen import print_json

                print_json(snapshot_record(seen, session.address.queue))
            else:
                from penstock.cli.screen import console
                from penstock.cli.top_view import History, picture

                out = console()
                history = History()
                history.add(seen)
                out.print(picture(session, seen, history, out.width))
            if once or not as_json:
                return
            time.sleep(interval)
