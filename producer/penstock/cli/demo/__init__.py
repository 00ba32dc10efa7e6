"""`penstock demo`: the whole house at work, one worker killed mid-stream, and the proof that nothing was lost."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from penstock.cli.exits import ExitCode, invalid
from penstock.cli.help import Command

_LEAST_WIDTH, _LEAST_HEIGHT = 70, 22  # below it the dashboard has no room for a stream
app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command(cls=Command, epilog="penstock demo\npenstock demo --json | tail -1 | jq .takeover_s")
def demo(
    as_json: Annotated[
        bool, typer.Option("--json", help="The figures as one JSON object on stdout; the show goes to stderr.")
    ] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Lines of progress instead of the live dashboard.")] = False,
    record: Annotated[
        Path | None, typer.Option("--record", metavar="FILE.svg", help="Save a picture of the takeover and the proof.")
    ] = None,
) -> None:
    """Watch the whole thing work, one worker killed mid-stream, nothing lost.

    Starts a private Redis and two worker processes on the bundled model, streams a few dozen jobs, kills one worker
    with SIGKILL in the middle of its sentences, and proves that every stream went on at its next token: subscribers,
    token logs and results are held against each other, and interrupted jobs are run again for comparison.

    Exit code 0 only if every job completed and every stream was gapless.
    """
    if record is not None and record.suffix != ".svg":
        invalid("--record", f"{record} does not end in .svg")
    from penstock.cli.demo.report import record as figures
    from penstock.cli.demo.report import table
    from penstock.cli.demo.show import perform
    from penstock.cli.processes import ending_on_sigterm, worker_command
    from penstock.cli.screen import console, print_json
    from penstock.cli.terminal import is_terminal

    worker_command()  # refuse before anything is started
    screen = console(stderr=as_json)
    roomy = screen.width >= _LEAST_WIDTH and screen.height >= _LEAST_HEIGHT
    live = is_terminal(sys.stderr if as_json else sys.stdout) and roomy and not plain
    with ending_on_sigterm():
        report = perform(screen, live=live, record=record)
    screen.print(table(report))
    if as_json:
        print_json(figures(report))
    if not report.ok:
        raise typer.Exit(ExitCode.ERROR)
