"""Everything that needs a GPU, in one report: `python -m benchmarks.gpu [--json FILE] [--quick]`.

Runs the tests marked `gpu` and the engine benchmark with `--device cuda --ablate`, and writes hardware, versions,
test outcomes and figures to one file. Ends with status 0 if all passed, 1 if something failed, and 3, having run
nothing and written only that, where there is no GPU. Needs PyTorch 2.11 or newer.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import torch

from benchmarks.cuda_engine import NO_DEVICE, device_report
from benchmarks.report import console, last_object, machine

LEAST_TORCH = (2, 11)


def main() -> None:
    """Run it and exit with the status that the module describes."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("--json", type=Path, default=Path("bench-results/gpu.json"), metavar="FILE", help="the report")
    options.add_argument("--quick", action="store_true", help="smoke-test size")
    options.add_argument("--timeout-s", type=float, default=3600.0, help="longest for the tests, and for the benchmark")
    arguments = options.parse_args()
    report: dict[str, Any] = {"benchmark": "gpu", "machine": machine()}
    status = run(report, arguments)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    console.print(f"{report['outcome']}: {arguments.json}")
    sys.exit(status)


def run(report: dict[str, Any], arguments: argparse.Namespace) -> int:
    """Fill the report; the exit status."""
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if not torch.cuda.is_available() or version < LEAST_TORCH:
        report["outcome"] = (
            f"nothing was run: PyTorch {torch.__version__} finds {torch.cuda.device_count()} CUDA devices, and "
            f"this needs one and PyTorch {'.'.join(map(str, LEAST_TORCH))}"
        )
        return NO_DEVICE
    report["gpu"] = device_report()
    report["tests"] = run_tests(arguments.timeout_s)
    report["engine"] = run_benchmark(arguments.timeout_s, quick=arguments.quick)
    passed = report["tests"]["status"] == 0 and "figures" in report["engine"]
    report["outcome"] = "all passed" if passed else "something failed"
    return 0 if passed else 1


def run_tests(timeout_s: float) -> dict[str, Any]:
    """Outcomes of the tests marked `gpu`, with the messages of those that failed or were skipped."""
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", f"--junitxml={xml}"]
        status = _status(command, timeout_s)
        if not xml.exists():
            return {"status": status, "counts": {}, "remarks": {"pytest": "ended without a report"}}
        return {"status": status, **outcomes(ET.parse(xml).getroot())}  # our own pytest wrote it


def outcomes(root: ET.Element) -> dict[str, Any]:
    """Counts by outcome, and remarks by test, of a JUnit report."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    remarks: dict[str, str] = {}
    for case in root.iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        bad = next((child for tag in ("failure", "error") for child in case.iter(tag)), None)
        skipped = next(case.iter("skipped"), None)
        found = bad if bad is not None else skipped
        counts["failed" if bad is not None else "skipped" if skipped is not None else "passed"] += 1
        if found is not None:
            remarks[name] = (found.get("message") or "")[:2000]
    return {"counts": counts, "remarks": remarks}


def run_benchmark(timeout_s: float, *, quick: bool) -> dict[str, Any]:
    """What the engine benchmark says of itself, or how it ended."""
    command = [sys.executable, "-m", "benchmarks.engine", "--device", "cuda", "--ablate", "--json"]
    try:
        done = subprocess.run(
            [*command, *(["--quick"] if quick else [])],
            stdout=subprocess.PIPE,
            text=True,
            check=False,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {timeout_s} s"}
    return last_object(done.stdout) or {"error": f"ended with status {done.returncode}; its messages are above"}


def _status(command: list[str], timeout_s: float) -> int:
    try:
        return subprocess.run(command, stdout=sys.stderr, check=False, timeout=timeout_s).returncode
    except subprocess.TimeoutExpired:
        return 124


if __name__ == "__main__":
    main()
