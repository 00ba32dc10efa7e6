"""`penstock config`: the operator's bounds of a queue: how much may wait, per tenant too, and how fair it is."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from penstock.cli.exits import invalid
from penstock.cli.help import Command, Group
from penstock.cli.options import JsonOption, QueueOption, RedisOption

if TYPE_CHECKING:
    from collections.abc import Mapping

app = typer.Typer(cls=Group, rich_markup_mode=None, add_completion=False, no_args_is_help=True)
TenantOption = Annotated[
    str | None, typer.Option("--tenant", metavar="NAME", help="This tenant's own limits, above the queue's.")
]
_MEANINGS = {
    "max_waiting_jobs": "accepted jobs that do not run yet",
    "max_waiting_bytes": "bytes of their requests",
    "max_queued": "waiting jobs of one tenant",
    "max_running": "running jobs of one tenant",
    "tokens_per_minute": "estimated tokens of one tenant admitted per minute",
    "aging_interval_ms": "waiting this long is worth one priority",
    "patience_ms": "how long a job waits for the worker that has its prefix cached",
    "max_log_bytes": "token log of one job",
    "max_crashes": "a job whose workers died this often is dead-lettered",
    "max_dead": "dead letters kept",
    "dead_ttl_ms": "how long a dead job is kept for requeue",
}


@app.callback()
def config() -> None:
    """Read and change the bounds of a queue.

    They are stored in Redis and hold at once, for every producer, worker and gateway. 0 means no limit.
    """


@app.command("show", cls=Command, epilog="penstock config show\npenstock config show --json | jq .tenants")
def show(as_json: JsonOption = False, redis: RedisOption = None, queue: QueueOption = None) -> None:
    """Show what holds now, and the limits that tenants have of their own."""
    _change({}, None, as_json, redis, queue)


@app.command(
    "set",
    cls=Command,
    epilog="penstock config set max_waiting_jobs=5000\npenstock config set max_running=4 --tenant acme",
)
def set_bounds(
    pairs: Annotated[list[str], typer.Argument(metavar="NAME=VALUE", help="Settings and their new values.")],
    tenant: TenantOption = None,
    as_json: JsonOption = False,
    redis: RedisOption = None,
    queue: QueueOption = None,
) -> None:
    """Change settings; `penstock config show` lists their names."""
    changes: dict[str, int | None] = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign or not value.isdecimal():
            invalid("NAME=VALUE", f"{pair!r} is no setting with a whole number; write for example max_queued=100")
        changes[name] = int(value)
    _change(changes, tenant, as_json, redis, queue)


@app.command(
    "reset",
    cls=Command,
    epilog="penstock config reset max_waiting_jobs\npenstock config reset max_running --tenant acme",
)
def reset(
    names: Annotated[list[str], typer.Argument(metavar="NAME", help="Settings to take back to their defaults.")],
    tenant: TenantOption = None,
    as_json: JsonOption = False,
    redis: RedisOption = None,
    queue: QueueOption = None,
) -> None:
    """Take settings back to their defaults; a tenant's, to the queue's."""
    _change(dict.fromkeys(names), tenant, as_json, redis, queue)


def _change(
    changes: Mapping[str, int | None], tenant: str | None, as_json: bool, redis: str | None, queue: str | None
) -> None:
    """Change settings, and print what holds then. Without changes only prints."""
    from penstock.cli.screen import print_json
    from penstock.cli.session import open_queue
    from penstock_core.protocol.config import TenantLimits
    from penstock_core.protocol.transitions import configure

    with open_queue(redis, queue) as session:
        if tenant is None:
            general, tenants = session.run(configure(session.keys, changes))
        else:
            _, tenants = session.run(configure(session.keys))
            limits = asdict(tenants.get(tenant, TenantLimits()))
            for name in changes:
                if name not in limits:
                    invalid(name, f"no limit of a tenant; those are {', '.join(limits)}")
            own = TenantLimits(**{**limits, **changes})
            general, tenants = session.run(configure(session.keys, tenants={tenant: own}))
    if as_json:
        print_json(asdict(general) | {"tenants": {name: asdict(limits) for name, limits in tenants.items()}})
    else:
        _print(asdict(general), {name: asdict(limits) for name, limits in tenants.items()})


def _print(general: Mapping[str, int], tenants: Mapping[str, Mapping[str, int | None]]) -> None:
    from rich.table import Table
    from rich.text import Text

    from penstock.cli.screen import console
    from penstock.cli.terminal import printable
    from penstock_core.protocol.config import QueueConfig

    defaults = asdict(QueueConfig())
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="label")
    table.add_column("setting", no_wrap=True)
    table.add_column("value", justify="right")
    table.add_column("default", justify="right", style="dim")
    table.add_column("meaning", style="dim", overflow="fold")
    for name, value in general.items():
        table.add_row(name, _bound(name, value), _bound(name, defaults[name]), _MEANINGS[name])
    for tenant, limits in sorted(tenants.items()):
        for name, limit in limits.items():
            if limit is not None:
                own = Text(printable(f"{name} of {tenant}"))
                table.add_row(own, _bound(name, limit), _bound(name, general[name]), _MEANINGS[name])
    console().print(table)


def _bound(name: str, value: int) -> str:
    """A number, or what 0 stands for."""
    return f"{value:,}" if value or name == "patience_ms" else "no limit"
