"""The penstock command.

`main` is the console script. It needs the `cli` extra (typer, rich) and says so in one line when that is missing.
Imports here are few on purpose: a command's own imports happen when that command runs.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

_REMEDY = "error: the command line needs {name}; install it with: pip install 'penstock[cli]'"


def main() -> None:
    """Run the command line in `sys.argv`, and exit."""
    for name in ("typer", "rich"):
        if find_spec(name) is None:
            print(_REMEDY.format(name=name), file=sys.stderr)
            sys.exit(1)
    from penstock.cli.app import command_line

    command_line().main(prog_name="penstock")
