"""`penstock gateway`: serve the queue over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from penstock.cli.exits import CommandFailed, ExitCode, invalid
from penstock.cli.help import Command
from penstock.cli.options import QueueOption, RedisOption

app = typer.Typer(rich_markup_mode=None, add_completion=False)
_EXAMPLES = """
penstock gateway
penstock gateway --host 0.0.0.0 --port 8000 --api-keys keys.json
curl localhost:8000/v1/generate -H 'Content-Type: application/json' -d '{"prompt": "The miller", "max_tokens": 40}'
"""


@app.command(cls=Command, epilog=_EXAMPLES)
def gateway(
    redis: RedisOption = None,
    queue: QueueOption = None,
    host: Annotated[str, typer.Option("--host", metavar="ADDRESS", help="Listen here.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", metavar="N", min=0, max=65_535, help="And on this port.")] = 8000,
    api_keys: Annotated[
        Path | None,
        typer.Option(
            "--api-keys", metavar="FILE", envvar="PENSTOCK_API_KEYS_FILE", help='JSON: {"<key>": "<tenant>", ...}.'
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option("--cors-origin", metavar="URL", help="Browsers may call from here; repeatable.")
    ] = None,
    max_body_bytes: Annotated[
        int, typer.Option("--max-body-bytes", metavar="N", min=1024, help="Largest request body.")
    ] = 8 * 1024 * 1024,
    keep_on_disconnect: Annotated[
        bool, typer.Option("--keep-on-disconnect", help="A client that hangs up does not cancel its request.")
    ] = False,
    log_level: Annotated[
        str, typer.Option("--log-level", metavar="LEVEL", help="debug, info, warning, error.")
    ] = "info",
) -> None:
    """Serve the queue over HTTP: JSON, event streams, health, metrics.

    All state is in Redis: any number of gateways serve one queue, and a restart loses nothing.
    """
    if log_level not in ("debug", "info", "warning", "error"):
        invalid("--log-level", f"{log_level!r} is unknown; debug, info, warning or error")
    try:
        import uvicorn

        from penstock.gateway.app import create_app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {"fastapi", "uvicorn", "starlette"}:
            raise
        raise CommandFailed(
            ExitCode.ERROR, "gateway", f"needs {error.name}; install it with: pip install 'penstock[gateway]'"
        ) from None
    from penstock.cli.session import locate
    from penstock.gateway.auth import ApiKeys
    from penstock.gateway.settings import GatewaySettings

    address = locate(redis, queue)
    settings = GatewaySettings(
        url=address.url,
        queue=address.queue,
        keys=ApiKeys.load(api_keys) if api_keys is not None else ApiKeys({}),
        max_body_bytes=max_body_bytes,
        cancel_on_disconnect=not keep_on_disconnect,
        cors_origins=tuple(cors_origin or ()),
    )
    uvicorn.run(create_app(settings), host=host, port=port, log_level=log_level, timeout_graceful_shutdown=10)
