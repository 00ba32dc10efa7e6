"""Run every benchmark in turn: `python -m benchmarks [--quick] [NAME ...]`.

In full, each writes its JSON into docs/benchmarks/ and the page docs/benchmarks.md is filled in from there; with
`--quick` the JSON goes to bench-results/ and the page stays.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks import page
from benchmarks.report import console, last_object

ALL = {
    "queue": "queue",
    "engine": "engine",
    "engine-int8": "engine --quantization int8 --kv-dtype float16",
    "step": "step",
    "prefix": "prefix",
    "speculation": "speculation",
    "distributed": "distributed",
    "recovery": "recovery",
    "gateway": "gateway",
    "end-to-end": "end_to_end",
    "end-to-end-int8": "end_to_end --quantization int8",
    "startup": "startup",
}
"""Name of the results, and the module with its options."""


def main() -> None:
    """Run them; exit non-zero if one failed."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("--quick", action="store_true", help="smoke-test size")
    options.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(ALL)}; default: all")
    arguments = options.parse_args()
    if unknown := [name for name in arguments.names if name not in ALL]:
        options.error(f"there is no {', '.join(unknown)}; choose from {', '.join(ALL)}")
    results = Path("bench-results") if arguments.quick else page.RESULTS
    results.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in arguments.names or ALL:
        console.rule(name)
        module, *own = ALL[name].split()
        quick = ["--quick"] if arguments.quick else []
        command = [sys.executable, "-m", f"benchmarks.{module}", *own, "--json", *quick]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            failed.append(name)
        figures = last_object(done.stdout)
        if figures is not None:  # kept of a failed benchmark too: they say what is wrong
            (results / f"{name}.json").write_text(json.dumps(figures, indent=2) + "\n")
    if not arguments.quick:
        page.main()
    if failed:
        console.print(f"failed: {', '.join(failed)}")
        sys.exit(1)


if __name__ == "__main__":
    main()
