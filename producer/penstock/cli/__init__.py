"""The penstock command.

`main` is the console script. It needs the `cli` extra (typer, rich) and says so in one line when that is missing.
Imports here are few on purpose: a command's own imports happen when that command runs.
"""

from __future__ import annotations

import sys

_REMEDY = "error: the command line needs {name}; install it with: pip install 'penstock[cli]'"


def main() -> None:
    """Run the command line in `sys.argv`, and exit."""
    try:
        from penstock.cli.app import command_line
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {"typer", "rich", "click", "shellingham"}:
            raise
        print(_REMEDY.format(name=error.name), file=sys.stderr)
        sys.exit(1)
    command_line().main(prog_name="penstock")
