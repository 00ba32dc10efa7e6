"""Without a GPU the GPU's commands say so and end with their own status; what tests did is counted rightly."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

from benchmarks.cuda_engine import NO_DEVICE, Workload
from benchmarks.gpu import outcomes

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", [["gpu", "--json", "{}"], ["engine", "--device", "cuda", "--quick"]])
def test_without_a_gpu_the_status_says_so(command: list[str], tmp_path: Path) -> None:
    report = tmp_path / "results" / "gpu.json"
    arguments = [part.format(report) for part in command]
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{arguments[0]}", *arguments[1:]],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == NO_DEVICE, done.stderr
    assert "CUDA device" in done.stderr
    if command[0] == "gpu":
        written = json.loads(report.read_text())
        assert "nothing was run" in written["outcome"]
        assert written["machine"]["torch"] == torch.__version__


def test_outcomes_are_counted_with_what_went_wrong() -> None:
    report = """<testsuites><testsuite>
      <testcase classname="a" name="fine"/>
      <testcase classname="a" name="bad"><failure message="1 is not 2">trace</failure></testcase>
      <testcase classname="a" name="broken"><error message="no fixture"/></testcase>
      <testcase classname="b" name="left"><skipped message="fewer than two CUDA devices"/></testcase>
    </testsuite></testsuites>"""
    found = outcomes(ET.fromstring(report))
    assert found["counts"] == {"passed": 1, "failed": 2, "skipped": 1}
    assert found["remarks"]["a::bad"] == "1 is not 2"
    assert found["remarks"]["b::left"] == "fewer than two CUDA devices"


def test_the_workload_is_the_same_every_time() -> None:
    one, two = Workload.drawn(256, 100, 1024, 2000), Workload.drawn(256, 100, 1024, 2000)
    assert one == two
    assert {len(one.prompts), len(one.outputs)} == {256}
    assert all(100 <= len(prompt) <= 1024 for prompt in one.prompts)
    assert all(100 <= new <= 1024 for new in one.outputs)
