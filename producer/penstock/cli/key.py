"""`penstock key`: make an API key, and what the gateway's configuration holds of it."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from penstock.cli.exits import invalid
from penstock.cli.help import Command
from penstock.cli.options import JsonOption

app = typer.Typer(rich_markup_mode=None, add_completion=False)
_EXAMPLES = """
penstock key mill
penstock key mill --requests-per-minute 600
penstock key --operator
"""


@app.command(cls=Command, epilog=_EXAMPLES)
def key(
    tenant: Annotated[str | None, typer.Argument(metavar="TENANT", help="Whose jobs the key submits and sees.")] = None,
    operator: Annotated[
        bool, typer.Option("--operator", help="Sees every tenant's jobs, requeues the dead, reads /metrics.")
    ] = False,
    requests_per_minute: Annotated[
        int, typer.Option("--requests-per-minute", metavar="N", min=0, help="At most so many; 0: no limit.")
    ] = 0,
    as_json: JsonOption = False,
) -> None:
    """Make an API key for the gateway.

    Prints the key, which is stored nowhere, and the entry for the file that --api-keys names: it has the key's SHA-256
    only. --json prints both as one object.
    """
    from penstock.gateway.auth import ApiKeys, Caller, digest_of, new_key
    from penstock_core.protocol.errors import InvalidConfiguration
    from penstock_core.protocol.requests import DEFAULT_TENANT

    if tenant is None and not operator:
        invalid("TENANT", "is missing; name a tenant, or make an operator's key with --operator")
    made = new_key()
    digest = digest_of(made)
    caller = Caller(tenant or DEFAULT_TENANT, "operator" if operator else "tenant", requests_per_minute)
    try:
        ApiKeys({digest: caller})
    except InvalidConfiguration as error:
        invalid("TENANT", error.message)
    entry: dict[str, object] = {"tenant": caller.tenant}
    if operator:
        entry["role"] = "operator"
    if requests_per_minute:
        entry["requests_per_minute"] = requests_per_minute
    line = {digest: entry if len(entry) > 1 else caller.tenant}
    if as_json:
        print(json.dumps({"key": made, "entry": line}))
        return
    print("The key, shown this once:", file=sys.stderr)
    print(made)
    print("Its entry in the keys file:", file=sys.stderr)
    print(json.dumps(line, indent=2))
