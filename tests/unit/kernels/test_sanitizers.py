"""The kernels' own tests, run once more on libraries built with AddressSanitizer and with ThreadSanitizer.

For the latter the kernels run on teams made of plain threads (team.c): the sanitizer does not know gcc's own runtime.
All runs are started together, each in a process of its own, and every test here waits for one of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock_core.kernels import native

KERNELS = "tests/unit/kernels/test_kernels.py"
MODELS = "tests/parity/test_whole_decoder.py"
DRAFTS = "tests/unit/speculative/test_draft_loop.py::test_one_call_guesses_what_the_sampler_would"
ATTENTION = "tests/unit/attention/test_paged_attention.py"
SHARED = f"{ATTENTION}::test_sequences_that_begin_with_the_same_pages_get_the_bits_of_each_by_itself"
ALONE = ["tests/unit/kernels/test_ranks.py", ATTENTION]  # in one thread each, but for the one above
WITH_A_BARRIER = f"{KERNELS}::test_float_products"  # between the rows' interleaving and their products


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

ADDRESSES = {
    "LD_PRELOAD": runtime("libasan.so"),
    "ASAN_OPTIONS": "detect_leaks=0 malloc_context_size=2 quarantine_size_mb=8",
}
THREADS = {
    "LD_PRELOAD": runtime("libtsan.so"),
    "TSAN_OPTIONS": "exitcode=66 halt_on_error=1 ignore_noninstrumented_modules=1 report_signal_unsafe=0",
}


def build(cache: Path, *flags: str) -> None:
    """Build the kernels where processes with this cache look for them; -O1 takes half of the compiler's time."""
    folder = str(cache / "penstock" / "kernels")
    command = [sys.executable, "-m", "penstock_core.kernels.build", folder, "-O1", *flags]
    subprocess.run(command, check=True, capture_output=True)


class Run:
    """A process that runs tests on the kernels built in a cache, in teams where there is a choice."""

    def __init__(self, cache: Path, name: str, environment: dict[str, str], *tests: str) -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", *tests]
        command += ["-k", "not alone", "--deselect", f"{KERNELS}::test_without_a_compiler_all_goes_the_plain_way"]
        self._said = cache / f"{name}.log"
        with self._said.open("w") as said:
            self.process = subprocess.Popen(
                command, env=os.environ | {"XDG_CACHE_HOME": str(cache)} | environment, stdout=said, stderr=said
            )

    def result(self) -> tuple[int, str]:
        """Wait: (status, output)."""
        status = self.process.wait()
        return status, self._said.read_text()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Run]]:
    addresses, threads = tmp_path_factory.mktemp("addresses"), tmp_path_factory.mktemp("threads")
    source, team = Path(__file__).with_name("team.c"), threads / "team.o"
    subprocess.run(["gcc", "-O1", "-fPIC", "-fsanitize=thread", "-c", source, "-o", team], check=True)
    build(threads, "-fsanitize=thread", str(team), "-Wl,-Bsymbolic")
    started = {
        "races": Run(threads, "races", THREADS, KERNELS, SHARED, MODELS, DRAFTS),
        "no barriers": Run(threads, "barriers", THREADS | {"WITHOUT_BARRIERS": "1"}, WITH_A_BARRIER),
    }
    # Checks that are calls, not written out, take an eighth of the compiler's time.
    build(addresses, "-fsanitize=address", "--param=asan-instrumentation-with-call-threshold=0")
    started["bounds"] = Run(addresses, "bounds", ADDRESSES, KERNELS, *ALONE, MODELS, DRAFTS)
    yield started
    for run in started.values():
        run.process.kill()
        run.process.wait()


def test_no_kernel_reads_or_writes_out_of_bounds(runs: dict[str, Run]) -> None:
    status, said = runs["bounds"].result()
    assert status == 0, said[-4000:]
    assert "passed" in said


def test_no_two_threads_of_a_kernel_race(runs: dict[str, Run]) -> None:
    status, said = runs["races"].result()
    assert status == 0, said[-4000:]
    assert "passed" in said


def test_a_missing_barrier_would_be_noticed(runs: dict[str, Run]) -> None:
    status, said = runs["no barriers"].result()
    assert status != 0
    assert "data race" in said
