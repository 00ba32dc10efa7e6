"""`penstock gateway`: serve the queue over HTTP."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from penstock.cli.exits import CommandFailed, ExitCode, invalid
from penstock.cli.help import Command
from penstock.cli.options import QueueOption, RedisOption

if TYPE_CHECKING:
    from penstock.gateway.auth import ApiKeys
    from penstock.gateway.settings import GatewaySettings

_KEYS_VARIABLE = "PENSTOCK_API_KEYS"

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
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="Listen here. [default: 127.0.0.1]")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", metavar="N", min=0, max=65_535, help="And on this port. [default: 8000]")
    ] = 8000,
    api_keys: Annotated[
        Path | None,
        typer.Option(
            "--api-keys",
            metavar="FILE",
            envvar="PENSTOCK_API_KEYS_FILE",
            help="JSON: digests of keys and their tenants; see 'penstock key'. Or $PENSTOCK_API_KEYS: the JSON.",
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option("--cors-origin", metavar="URL", help="Browsers may call from here; repeatable.")
    ] = None,
    max_body_bytes: Annotated[
        int, typer.Option("--max-body-bytes", metavar="N", min=1024, help="Largest request body. [default: 8 MiB]")
    ] = 8 * 1024 * 1024,
    request_timeout: Annotated[
        float,
        typer.Option(
            "--request-timeout",
            metavar="SECONDS",
            help="Longest wait for a job; then 504, the job goes on. [default: 600]",
        ),
    ] = 600.0,
    max_connections: Annotated[
        int, typer.Option("--max-connections", metavar="N", min=1, help="Connections held at once. [default: 16384]")
    ] = 16_384,
    keep_on_disconnect: Annotated[
        bool, typer.Option("--keep-on-disconnect", help="A client that hangs up does not cancel its request.")
    ] = False,
    grace: Annotated[
        float,
        typer.Option(
            "--grace",
            metavar="SECONDS",
            help="On SIGTERM, time for requests to end; streams that can be resumed end at once. [default: 10]",
        ),
    ] = 10.0,
    log_level: Annotated[
        str, typer.Option("--log-level", metavar="LEVEL", help="debug, info, warning, error. [default: info]")
    ] = "info",
    access_log: Annotated[bool, typer.Option("--access-log", help="Log every request.")] = False,
) -> None:
    """Serve the queue over HTTP: JSON, event streams, health, metrics.

    All state is in Redis: any number of gateways serve one queue, and a restart loses nothing.
    """
    if log_level not in ("debug", "info", "warning", "error"):
        invalid("--log-level", f"{log_level!r} is unknown; debug, info, warning or error")
    try:
        from penstock.gateway.server import serve
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {"fastapi", "uvicorn", "starlette", "httptools"}:
            raise
        raise CommandFailed(
            ExitCode.ERROR, "gateway", f"needs {error.name}; install it with: pip install 'penstock[gateway]'"
        ) from None
    from penstock.cli.session import locate
    from penstock.gateway.settings import GatewaySettings, Limits

    address = locate(redis, queue)
    settings = GatewaySettings(
        url=address.url,
        queue=address.queue,
        keys=_keys(api_keys),
        limits=Limits(
            max_body_bytes=max_body_bytes, request_timeout_s=request_timeout, max_connections=max_connections
        ),
        cancel_on_disconnect=not keep_on_disconnect,
        cors_origins=tuple(cors_origin or ()),
        grace_s=grace,
    )
    _say_who_may(settings, host)
    _allow_connections(max_connections)
    serve(settings, host=host, port=port, log_level=log_level, access_log=access_log)


def _keys(path: Path | None) -> ApiKeys:
    from penstock.gateway.auth import ApiKeys

    text = os.environ.get(_KEYS_VARIABLE)
    if text and path is not None:
        invalid("--api-keys", f"given together with ${_KEYS_VARIABLE}; use one")
    if text:
        return ApiKeys.parse(text, f"${_KEYS_VARIABLE}")
    return ApiKeys({}) if path is None else ApiKeys.load(path)


def _say_who_may(settings: GatewaySettings, host: str) -> None:
    """On stderr, whatever the log level: an open gateway is a decision."""
    keys = settings.keys
    if keys.required:
        said = f"API keys of {keys.tenants} tenants and {keys.operators} operators"
        if not keys.operators:
            said += "; without an operator's key nobody reads /metrics or requeues dead jobs"
    else:
        said = (
            f"no API keys: whoever reaches {host} may submit, read and cancel the jobs of every tenant, requeue the "
            "dead, and set limits; --api-keys closes it"
        )
    print(f"penstock gateway: {said}", file=sys.stderr, flush=True)


def _allow_connections(wanted: int) -> None:
    """Raise the soft limit of open files towards what the connections need: often it is 1024."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + 256
    if soft != resource.RLIM_INFINITY and soft < needed:
        most = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        if most < needed:
            print(
                f"penstock gateway: the system allows {most} open files, so fewer than {wanted} connections "
                "(--max-connections); raise the hard limit (ulimit -Hn)",
                file=sys.stderr,
            )
