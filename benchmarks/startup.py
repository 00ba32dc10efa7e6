"""Start-up: `python -m benchmarks.startup [--json] [--quick]`.

Fresh processes, in turn, until they end or are ready: `penstock --help`, the client's import, a client that has stored
its first job, and a worker on the bundled model from its start to its first heartbeat in Redis; beside them the same of
other queues (from `.bench-venvs`, see `make bench-peers`), the interpreter alone, and `import torch`, of which a worker
is never rid. Medians; the first start of each is not counted: it compiles the Python files, and the worker's kernels.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.queue import _redis
from benchmarks.report import alternate, chart, parser, publish, table
from penstock import Client

_QUEUE = "startup"
_GOALS_MS = {"penstock --help": 150.0, "from penstock import Client": 200.0, "worker ready": 3000.0}
_FIRST_JOB = "import sys; from penstock import Client; Client(sys.argv[1], queue='startup').submit('x', max_tokens=1)"
_PEER_COMMANDS = {
    "celery": ["-m", "celery", "--help"],
    "rq": ["-m", "rq.cli", "--help"],
    "dramatiq": ["-m", "dramatiq", "--help"],
}
_PEER_IMPORTS = {
    "celery": "from celery import Celery",
    "rq": "from rq import Queue",
    "dramatiq": "import dramatiq; from dramatiq.brokers.redis import RedisBroker",
    "arq": "import arq",
    "taskiq": "import taskiq; from taskiq_redis import ListQueueBroker",
}


def main() -> None:
    """Measure, and compare with the goals."""
    options = parser(__doc__)
    options.set_defaults(runs=9)
    arguments = options.parse_args()
    if arguments.quick:
        arguments.runs = 2
    with tempfile.TemporaryDirectory() as bytecode, _redis(appendonly=True) as url:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        environment["PYTHONPYCACHEPREFIX"] = bytecode  # a warm start, as after `pip install`, whatever the environment

        def until_end(command: Sequence[str]) -> Callable[[], Mapping[str, float]]:
            return lambda: {"ms": _until_end(command, environment)}

        contestants = {
            "python, nothing imported": until_end([sys.executable, "-c", "pass"]),
            "penstock --help": until_end([sys.executable, "-m", "penstock", "--help"]),
            **{f"{name} --help": until_end([path, *_PEER_COMMANDS[name]]) for name, path in _peers(_PEER_COMMANDS)},
            "from penstock import Client": until_end([sys.executable, "-c", "from penstock import Client"]),
            **{
                _PEER_IMPORTS[name]: until_end([path, "-c", _PEER_IMPORTS[name]])
                for name, path in _peers(_PEER_IMPORTS)
            },
            "first job stored": until_end([sys.executable, "-c", _FIRST_JOB, url]),
            "import torch": until_end([sys.executable, "-c", "import torch"]),
            "worker ready": lambda: {"ms": _until_ready(url, arguments.threads, environment)},
        }
        measured = alternate(contestants, arguments.runs, "starting")
    figures = {name: taken["ms"] for name, taken in measured.items()}
    rows = [
        [name, f"{ms:,.0f}", f"{goal:,.0f}" if (goal := _GOALS_MS.get(name)) else ""] for name, ms in figures.items()
    ]
    table(f"milliseconds from a process's start, medians of {arguments.runs}", ["", "ms", "goal"], rows)
    chart("import, ms", {"penstock": figures["from penstock import Client"]} | _of_peers(figures, _PEER_IMPORTS))
    helps = {name: f"{name} --help" for name in _PEER_COMMANDS}
    chart("--help, ms", {"penstock": figures["penstock --help"]} | _of_peers(figures, helps))
    missed = {name: figures[name] for name, goal in _GOALS_MS.items() if figures[name] > goal}
    publish("startup", {"milliseconds": figures, "goals": _GOALS_MS, "missed": missed}, as_json=arguments.json)


def _peers(wanted: Mapping[str, object]) -> list[tuple[str, str]]:
    """Name and interpreter of those that are installed."""
    paths = {name: Path(".bench-venvs") / name / "bin/python" for name in wanted}
    return [(name, str(path)) for name, path in paths.items() if path.exists()]


def _of_peers(figures: Mapping[str, float], labels: Mapping[str, str]) -> dict[str, float]:
    return {peer: figures[label] for peer, label in labels.items() if label in figures}


def _until_end(command: Sequence[str], environment: Mapping[str, str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    return (time.perf_counter() - started) * 1e3


def _until_ready(url: str, threads: int, environment: Mapping[str, str]) -> float:
    """Start a worker on the bundled model, wait for its heartbeat, and drain it."""
    command = [sys.executable, "-m", "penstock_worker", "--redis", url, "--queue", _QUEUE, "--threads", str(threads)]
    with Client(url, queue=_QUEUE) as client, tempfile.TemporaryFile() as log:
        started = time.perf_counter()
        worker = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            while not client.queue_snapshot().workers:
                if worker.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(f"the worker ended: {log.read().decode()}")
                time.sleep(0.005)
            return (time.perf_counter() - started) * 1e3
        finally:
            worker.terminate()
            worker.wait(30)


if __name__ == "__main__":
    main()
