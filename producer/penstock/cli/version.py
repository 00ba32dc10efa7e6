"""`penstock version`: the version, and with --json those of what it stands on."""

from __future__ import annotations

import typer

from penstock.cli.help import Command
from penstock.cli.options import JsonOption

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command(cls=Command)
def version(as_json: JsonOption = False) -> None:
    """Print the version."""
    print_version(as_json)


def print_version(as_json: bool) -> None:
    """Print the installed version, as text or as one JSON object."""
    import platform
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as version_of

    def installed(name: str) -> str | None:
        try:
            return version_of(name)
        except PackageNotFoundError:
            return None

    own = installed("penstock") or "unknown"
    if not as_json:
        print(f"penstock {own}")
        return
    import json

    names = ("redis", "msgpack", "pydantic", "torch", "typer", "rich")
    print(
        json.dumps({"penstock": own, "python": platform.python_version()} | {name: installed(name) for name in names})
    )
