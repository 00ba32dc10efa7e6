"""`penstock serve`: a private, durable Redis and supervised workers in one command, for one machine.

The other commands of the same user find it without a URL. Ctrl-C drains; a second Ctrl-C hands running jobs back at
once: they stay in the data folder and go on with the next `penstock serve`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from penstock.cli.exits import CommandFailed, ExitCode, invalid
from penstock.cli.help import Command
from penstock.cli.options import REDIS_VARIABLE

if TYPE_CHECKING:
    from rich.console import Console

    from penstock.cli.processes import WorkerProcess
    from penstock.cli.session import Queue
    from penstock.embedded import EmbeddedBroker

app = typer.Typer(rich_markup_mode=None, add_completion=False)
_WORKER_USAGE = 2  # the worker's exit code for a wrong flag
DEFAULT_MODEL = "penstock-story"
_EXAMPLES = """
penstock serve
penstock serve --workers 2 --model ./my-checkpoint
# anything else goes to the workers
penstock serve --max-num-sequences 16 --log-level info
"""


@app.command(cls=Command, epilog=_EXAMPLES, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    ctx: typer.Context,
    workers: Annotated[int, typer.Option("--workers", "-w", metavar="N", help="Worker processes. [default: 1]")] = 1,
    model: Annotated[
        str,
        typer.Option("--model", metavar="MODEL", help="Bundled name, folder or hub id. [default: penstock-story]"),
    ] = DEFAULT_MODEL,
    queue: Annotated[
        str | None, typer.Option("--queue", metavar="NAME", help="Name of the queue. [default: the model's]")
    ] = None,
    port: Annotated[
        int | None, typer.Option("--port", metavar="N", help="Port of the broker. [default: a free one]")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="DIR", help="The broker's data. [default: ~/.local/share/penstock]"),
    ] = None,
    ephemeral: Annotated[bool, typer.Option("--ephemeral", help="Keep nothing: the data goes when this ends.")] = False,
) -> None:
    """Start a private Redis and workers in one command.

    The other commands find it by themselves while it runs. Ctrl-C drains: running jobs finish first, the rest waits in
    the data folder for the next time.
    """
    from penstock.cli.processes import WorkerProcess, worker_command
    from penstock.cli.screen import console
    from penstock.cli.session import open_queue
    from penstock.embedded import EmbeddedBroker
    from penstock.served import announced

    if not 1 <= workers <= 256:
        invalid("--workers", f"{workers} is out of range; 1 to 256")
    if port is not None and not 1 <= port <= 65_535:
        invalid("--port", f"{port} is no port; 1 to 65535")
    if ephemeral and data is not None:
        invalid("--ephemeral", "keeps nothing, and --data names a folder to keep it in; give one")
    worker_command()  # refuse before anything is started
    name = queue or (Path(model).expanduser().resolve().name if Path(model).expanduser().is_dir() else model)
    folder = None if ephemeral else data or _data_folder()
    screen = console(stderr=True)
    stop = _StopSignal()
    with EmbeddedBroker(folder, port=port) as broker, announced(broker.url, name):
        flags = [f"--model={model}", f"--queue={name}", f"--processes={workers}", *ctx.args]
        if not any(argument.startswith("--log-level") for argument in ctx.args):
            flags.append("--log-level=warning")
        if not any(argument.startswith("--log-format") for argument in ctx.args):
            flags.append("--log-format=text")
        process = WorkerProcess(broker.url, flags, on_line=lambda line: print(line, file=sys.stderr, flush=True))
        try:
            with open_queue(broker.url, name) as session:
                _wait_until_ready(screen, session, process, workers, stop)
                if not stop.is_set:
                    _welcome(screen, broker, session, workers, model, folder)
            _run_until_stopped(screen, process, stop)
        finally:
            process.close(grace_s=5.0)


class _StopSignal:
    """SIGINT and SIGTERM, counted."""

    def __init__(self) -> None:
        self.count = 0
        self._event = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._received)

    def _received(self, number: int, frame: object) -> None:
        self.count += 1
        self._event.set()

    @property
    def is_set(self) -> bool:
        """Whether a signal came since `clear`."""
        return self._event.is_set()

    def wait(self, timeout_s: float) -> bool:
        """Wait for a signal."""
        return self._event.wait(timeout_s)

    def clear(self) -> None:
        """Look out for the next one."""
        self._event.clear()


def _data_folder() -> Path:
    try:
        base = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    except RuntimeError:
        invalid("--data", "this user has no home to keep it in; name a folder, or set HOME or XDG_DATA_HOME")
    return base / "penstock"


def _wait_until_ready(screen: Console, session: Queue, process: WorkerProcess, workers: int, stop: _StopSignal) -> None:
    from penstock_core.protocol.transitions import snapshot

    started = time.monotonic()
    what = "worker" if workers == 1 else f"{workers} workers"
    with screen.status(f"starting {what}: loading the model", spinner="dots"):
        while not stop.is_set:
            if (code := process.exit_code) is not None:
                usage = ExitCode.INVALID if code == _WORKER_USAGE else ExitCode.ERROR
                raise CommandFailed(usage, "worker", f"ended with status {code} while starting; see above")
            alive = [view for view in session.run(snapshot(session.keys)).workers if view.record is not None]
            if len(alive) >= workers:
                break
            stop.wait(0.1)
    if not stop.is_set:
        screen.print(f"[good]✓[/] {what} ready after {time.monotonic() - started:.1f} s")


def _welcome(
    screen: Console, broker: EmbeddedBroker, session: Queue, workers: int, model: str, folder: Path | None
) -> None:
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    from penstock_core.protocol.transitions import snapshot

    records = [view.record for view in session.run(snapshot(session.keys)).workers if view.record is not None]
    device = records[0].device if records else "?"
    binary = broker.binary
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="label")
    grid.add_column(overflow="fold")
    flavour = f"{binary.flavour} {'.'.join(map(str, binary.version))}" if binary is not None else "redis"
    kept = f"append-only file in {folder}" if folder is not None else "kept nowhere: --ephemeral"
    grid.add_row("broker", Text(f"{flavour}, {kept}"))
    grid.add_row("url", Text(broker.url, style="id"))
    grid.add_row("queue", Text(session.address.queue, style="id"))
    grid.add_row("workers", f"{workers} × {model} on {device}")
    screen.print(Panel(grid, title="[brand]≋ penstock[/] [bold]serve[/]", title_align="left", border_style="frame"))
    screen.print("In another terminal:", style="label")
    screen.print(
        '  [brand]penstock submit --chat --stream "Tell me a story about a fox who wants to see the sea."[/]',
        soft_wrap=True,
    )
    screen.print("  [brand]penstock top[/]")
    screen.print("From Python:", style="label")
    for line in (
        "from penstock import Client",
        'for chunk in Client().submit("Once upon a time").stream():',
        '    print(chunk.text, end="", flush=True)',
    ):
        screen.print(Text(f"  {line}"), soft_wrap=True)
    if os.environ.get(REDIS_VARIABLE):
        screen.print(
            f"{REDIS_VARIABLE} is set here and wins over this broker: unset it, or give --redis.", style="warn"
        )
    screen.print("Ctrl-C drains and ends it.", style="mute")


def _run_until_stopped(screen: Console, process: WorkerProcess, stop: _StopSignal) -> None:
    while not stop.is_set:
        if (code := process.exit_code) is not None:
            raise CommandFailed(ExitCode.ERROR, "worker", f"ended with status {code}; see its last lines above")
        stop.wait(0.2)
    stop.clear()
    screen.print("\n[warn]…[/] draining: running jobs finish first; Ctrl-C again hands them back at once")
    process.send(signal.SIGTERM)
    while process.exit_code is None:
        if stop.wait(0.1):
            stop.clear()
            process.send(signal.SIGTERM)
    screen.print("[good]✓[/] drained; every unfinished job is stored")
