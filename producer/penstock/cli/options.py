"""Options that several commands share, declared once: the broker, the queue, the tenant, JSON output."""

from __future__ import annotations

from typing import Annotated

import typer

REDIS_VARIABLE = "PENSTOCK_REDIS_URL"
QUEUE_VARIABLE = "PENSTOCK_QUEUE"
BROKER = "Broker"

RedisOption = Annotated[
    str | None,
    typer.Option(
        "--redis",
        metavar="URL",
        envvar=REDIS_VARIABLE,
        rich_help_panel=BROKER,
        help="The broker. [default: the running `penstock serve`, else redis://127.0.0.1:6379]",
    ),
]
QueueOption = Annotated[
    str | None,
    typer.Option(
        "--queue",
        metavar="NAME",
        envvar=QUEUE_VARIABLE,
        rich_help_panel=BROKER,
        help="The queue, named after the model it serves. [default: penstock-story]",
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="JSON on stdout, one object per line; everything else goes to stderr.")
]
