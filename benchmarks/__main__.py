"""Run every benchmark in turn: `python -m benchmarks [--quick]`. Each writes its JSON into bench-results/."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.report import console

ALL = ("queue", "engine", "prefix", "speculation", "recovery", "gateway")


def main() -> None:
    """Run them; exit non-zero if one failed."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--quick", action="store_true", help="smoke-test size")
    options.add_argument("names", nargs="*", default=ALL, help=f"some of {', '.join(ALL)}")
    arguments = options.parse_args()
    results = Path("bench-results")
    results.mkdir(exist_ok=True)
    failed = []
    for name in arguments.names:
        console.rule(name)
        command = [sys.executable, "-m", f"benchmarks.{name}", "--json", *(["--quick"] if arguments.quick else [])]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            failed.append(name)
        figures = _figures(done.stdout)
        if figures is not None:  # kept of a failed benchmark too: they say what is wrong
            (results / f"{name}.json").write_text(json.dumps(figures, indent=2) + "\n")
    if failed:
        console.print(f"failed: {', '.join(failed)}")
        sys.exit(1)


def _figures(output: str) -> dict[str, Any] | None:
    """The JSON object on the last line, or None where the benchmark ended before it had one."""
    try:
        found = json.loads(output.strip().splitlines()[-1])
    except (IndexError, ValueError):
        return None
    return found if isinstance(found, dict) else None


if __name__ == "__main__":
    main()
