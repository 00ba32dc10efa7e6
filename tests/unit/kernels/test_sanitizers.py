"""The kernels' own tests, run once more on a library built with AddressSanitizer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from penstock_core.kernels import native

FLAGS = ("-fsanitize=address", "-g")


def runtime(name: str) -> str:
    """The sanitizer's library, which must be loaded before Python; empty where the compiler has none."""
    try:
        done = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    path = done.stdout.strip()
    return path if os.path.isabs(path) else ""


@pytest.mark.integration
@pytest.mark.skipif(native.kernels() is None or not runtime("libasan.so"), reason="no gcc with sanitizers here")
def test_no_kernel_reads_or_writes_out_of_bounds(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "penstock_core.kernels.build", tmp_path / "penstock" / "kernels", *FLAGS]
    subprocess.run(build, check=True)
    environment = os.environ | {
        "XDG_CACHE_HOME": str(tmp_path),
        "LD_PRELOAD": runtime("libasan.so"),
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    tests = ["tests/unit/kernels/test_kernels.py", "tests/unit/attention/test_paged_attention.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    command += ["--deselect", "tests/unit/kernels/test_kernels.py::test_without_a_compiler_all_goes_the_plain_way"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "passed" in done.stdout
