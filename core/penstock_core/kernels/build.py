"""Compile the C kernels: one shared library, each file once per instruction set.

Runs at first use, into the user's cache folder, where a compiler is found; `python -m penstock_core.kernels.build`
does it ahead of time, beside the sources or into a given folder, for images without a compiler. The library's name
holds a digest of the sources and the flags, so a stale one is never loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
FLAGS = (
    *("-O2", "-std=gnu11", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wextra"),
    "-ffp-contract=off",  # sampling noise has the same bits everywhere only without contraction
)
INSTRUCTION_SETS: dict[str, tuple[str, ...]] = {"portable": ()}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS = {
        "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mfma", "-mf16c"),
        "avx2": ("-mavx2", "-mfma", "-mf16c"),
        "portable": (),
    }
COMPILE_TIMEOUT_S = 300


class BuildFailed(RuntimeError):
    """The compiler is missing or refused; the message holds what it said."""


def cache_folder() -> Path:
    """Where libraries built at first use live.

    Raises:
        BuildFailed: this user has no home, as one that a container was only given the number of.
    """
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        raise BuildFailed("this user has no home to keep them in; set HOME or XDG_CACHE_HOME") from None
    return Path(base) / "penstock" / "kernels"


def library_name() -> str:
    """The file name of the library these sources make."""
    digest = hashlib.sha256(" ".join((platform.machine(), *FLAGS)).encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    for name, flags in INSTRUCTION_SETS.items():
        digest.update(" ".join((name, *flags)).encode())
    return f"kernels-{digest.hexdigest()[:16]}.so"


def find_library() -> Path | None:
    """A library built before, beside the sources (ahead of time) or in the cache; None where there is none."""
    folders = [SOURCES.parent]
    with contextlib.suppress(BuildFailed):
        folders.append(cache_folder())
    for folder in folders:
        path = folder / library_name()
        with contextlib.suppress(OSError):  # a home that this user may not read
            if path.is_file() and path.stat().st_uid in (os.getuid(), 0):  # never load what another user put there
                return path
    return None


def build(folder: Path, extra_flags: tuple[str, ...] = ()) -> Path:
    """Compile into `folder`, atomically, and return the library's path. `extra_flags` win over the usual ones.

    Raises:
        BuildFailed: there is no compiler, or it refused.
    """
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise BuildFailed("no C compiler (cc, gcc or clang) on PATH")
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            commands, objects = [], []
            for name, flags in INSTRUCTION_SETS.items():
                objects.append(f"{scratch}/{name}.o")
                commands.append([*FLAGS, *flags, f"-DISA={name}", "-c", f"{SOURCES}/kernels.c", "-o", objects[-1]])
            objects.append(f"{scratch}/detect.o")
            commands.append([*FLAGS, "-c", f"{SOURCES}/detect.c", "-o", objects[-1]])
            _run_all([[compiler, *command, *extra_flags] for command in commands])
            library = f"{scratch}/kernels.so"
            _run_all([[compiler, "-shared", "-fopenmp", *objects, "-o", library, *extra_flags, "-lm"]])
            target = folder / library_name()
            os.replace(library, target)
    except OSError as error:
        raise BuildFailed(f"cannot write to {folder}: {error}") from error
    return target


def _run_all(commands: list[list[str]]) -> None:
    """Run compilers side by side and wait for all."""
    running = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for c in commands]
    for process in running:
        try:
            output, _ = process.communicate(timeout=COMPILE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            for other in running:
                other.kill()
            raise BuildFailed(f"{process.args!r} took more than {COMPILE_TIMEOUT_S} s") from None
        if process.returncode != 0:
            raise BuildFailed(f"the C compiler failed:\n{output[:4000]}")


if __name__ == "__main__":
    print(build(Path(sys.argv[1]) if len(sys.argv) > 1 else SOURCES.parent, tuple(sys.argv[2:])))
