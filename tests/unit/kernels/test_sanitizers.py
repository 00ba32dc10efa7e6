"""The kernels' own tests, run once more on libraries built with AddressSanitizer and with ThreadSanitizer.

For the latter the kernels run on teams made of plain threads (team.c): the sanitizer does not know gcc's own runtime.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from penstock_core.kernels import native

KERNELS = "tests/unit/kernels/test_kernels.py"
RANKS = "tests/unit/kernels/test_ranks.py"
MODELS = ["tests/parity/test_whole_decoder.py", "tests/unit/speculative/test_draft_loop.py"]


def runtime(name: str) -> str:
    """The sanitizer's library, which must be loaded before Python; empty where the compiler has none."""
    try:
        done = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    path = done.stdout.strip()
    return path if os.path.isabs(path) else ""


pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(native.kernels() is None or not runtime("libtsan.so"), reason="no gcc with sanitizers here"),
]


def run_tests(cache: Path, flags: list[str], environment: dict[str, str], *tests: str) -> tuple[int, str]:
    """Build the kernels with these flags and run tests on them, in teams where there is a choice: (status, output)."""
    build = [sys.executable, "-m", "penstock_core.kernels.build", cache / "penstock" / "kernels", *flags]
    subprocess.run(build, check=True, capture_output=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    command += ["-k", "not alone", "--deselect", f"{KERNELS}::test_without_a_compiler_all_goes_the_plain_way"]
    done = subprocess.run(
        command, env=os.environ | {"XDG_CACHE_HOME": str(cache)} | environment, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def run_on_plain_threads(cache: Path, *tests: str, defines: str = "-UWITHOUT_BARRIERS") -> tuple[int, str]:
    team = cache / "team.o"
    sanitized = ["-fsanitize=thread", "-g"]
    source = Path(__file__).with_name("team.c")
    subprocess.run(["gcc", "-O1", "-fPIC", *sanitized, defines, "-c", source, "-o", team], check=True)
    environment = {
        "LD_PRELOAD": runtime("libtsan.so"),
        "TSAN_OPTIONS": "exitcode=66 ignore_noninstrumented_modules=1 report_signal_unsafe=0",
    }
    return run_tests(cache, [*sanitized, str(team), "-Wl,-Bsymbolic"], environment, *tests)


def test_no_kernel_reads_or_writes_out_of_bounds(tmp_path: Path) -> None:
    environment = {"LD_PRELOAD": runtime("libasan.so"), "ASAN_OPTIONS": "detect_leaks=0"}
    tests = [KERNELS, RANKS, "tests/unit/attention/test_paged_attention.py", *MODELS]
    status, said = run_tests(tmp_path, ["-fsanitize=address", "-g"], environment, *tests)
    assert status == 0, said[-4000:]
    assert "passed" in said


def test_no_two_threads_of_a_kernel_race(tmp_path: Path) -> None:
    status, said = run_on_plain_threads(tmp_path, KERNELS, *MODELS)
    assert status == 0, said[-4000:]
    assert "passed" in said


def test_a_missing_barrier_would_be_noticed(tmp_path: Path) -> None:
    one_model = f"{MODELS[0]}::test_every_family_without_experts_runs_as_a_whole_with_the_same_bits[team-llama]"
    status, said = run_on_plain_threads(tmp_path, one_model, defines="-DWITHOUT_BARRIERS")
    assert status != 0
    assert "data race" in said
