"""The tree of commands: what `penstock --help` shows, and where each command lives."""

from __future__ import annotations

from typing import Any

import typer
import typer.main

from penstock.cli.exits import EXIT_CODES
from penstock.cli.help import Entry, Group

_JOBS, _RUN, _SEE = "Jobs", "Run", "See"
ENTRIES = (
    Entry("demo", _SEE, "Watch the whole thing work, one worker killed mid-stream, nothing lost.", "penstock.cli.demo"),
    Entry("submit", _JOBS, "Submit a prompt; wait for the answer or stream it live.", "penstock.cli.submit"),
    Entry("batch", _JOBS, "Run a file of requests; answers in its order, resumable.", "penstock.cli.batch"),
    Entry("watch", _JOBS, "Stream the tokens of one job or several, from any offset.", "penstock.cli.watch"),
    Entry("result", _JOBS, "Print the result of a job, waiting for it if it still runs.", "penstock.cli.result"),
    Entry("cancel", _JOBS, "Cancel jobs, queued or running.", "penstock.cli.cancel"),
    Entry("jobs", _JOBS, "List jobs: running, queued, recent, dead.", "penstock.cli.jobs"),
    Entry("dead", _JOBS, "Inspect, requeue or purge dead-lettered jobs.", "penstock.cli.dead"),
    Entry("serve", _RUN, "Start a private Redis and workers in one command.", "penstock.cli.serve"),
    Entry("worker", _RUN, "Start one worker: a model on a device, pulling jobs as it has room.", "penstock.cli.worker"),
    Entry(
        "gateway",
        _RUN,
        "Serve the queue over HTTP: JSON, event streams, health, metrics.",
        "penstock.cli.gateway",
    ),
    Entry("config", _RUN, "Read and change the bounds of a queue.", "penstock.cli.config"),
    Entry("key", _RUN, "Make an API key for the gateway.", "penstock.cli.key"),
    Entry("top", _SEE, "A live view of queues, workers and tokens per second.", "penstock.cli.top"),
    Entry(
        "doctor", _SEE, "Check this machine and the broker; each problem comes with its remedy.", "penstock.cli.doctor"
    ),
    Entry("version", _SEE, "Print the version.", "penstock.cli.version"),
)


_EXAMPLES = """
penstock demo
penstock serve
penstock submit --chat --stream "Tell me a story about a fox who wants to see the sea."
"""


class Root(Group):
    """`penstock` itself."""

    entries = ENTRIES
    notes = (("Exit codes", EXIT_CODES),)


app = typer.Typer(cls=Root, name="penstock", no_args_is_help=True, rich_markup_mode=None, epilog=_EXAMPLES)


def _version(wanted: bool) -> None:
    if wanted:
        from penstock.cli.version import print_version

        print_version(as_json=False)
        raise typer.Exit


@app.callback()
def penstock(
    version: bool = typer.Option(False, "--version", "-V", is_eager=True, callback=_version, help="Print the version."),
) -> None:
    """A durable LLM-generation queue: Redis Streams in, token streams out, nothing lost in between."""


def command_line() -> Any:
    """The command tree, ready to run."""
    return typer.main.get_command(app)
