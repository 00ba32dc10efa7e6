"""The commands as people run them: real processes, real Redis, the bundled model; and the demo with its proof."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import Empty, Queue

import pytest

from tests.worker_process import hear_interrupts

pytest.importorskip("torch")
pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[3]
PENSTOCK = [sys.executable, "-m", "penstock"]


class Serving:
    """`penstock serve` in the background, and the environment in which other commands find it."""

    def __init__(self, folder: Path) -> None:
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("PENSTOCK_", "FORCE_COLOR"))
        }
        self.environment |= {"XDG_RUNTIME_DIR": str(folder / "run"), "XDG_DATA_HOME": str(folder / "data")}
        self.environment |= {"COLUMNS": "100", "PYTHONUNBUFFERED": "1"}
        self.lines: list[str] = []
        self._seen: Queue[str | None] = Queue()
        self.process = subprocess.Popen(
            [*PENSTOCK, "serve", "--max-num-sequences", "8"],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=self.environment,
        )  # fmt: skip
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._seen.put(line)
        self._seen.put(None)

    def wait_for(self, words: str, timeout_s: float = 180.0) -> str:
        """The line with these words, once it has been printed."""
        while True:
            try:
                line = self._seen.get(timeout=timeout_s)
            except Empty:
                raise AssertionError(f"no {words!r} within {timeout_s} s in {self.lines}") from None
            assert line is not None, f"serve ended before {words!r}: {self.lines}"
            self.lines.append(line)
            if words in line:
                return line

    def run(self, *args: str, timeout_s: float = 180.0) -> subprocess.CompletedProcess[str]:
        """Another command of the same user."""
        return subprocess.run(
            [*PENSTOCK, *args], capture_output=True, text=True, env=self.environment, timeout=timeout_s,
            stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("serve")
    (folder / "run").mkdir(mode=0o700)
    server = Serving(folder)
    try:
        server.wait_for("Ctrl-C drains")
        yield server
    finally:
        if server.process.poll() is None:
            server.process.send_signal(signal.SIGTERM)
            server.process.wait(timeout=120)


def test_other_commands_find_the_running_serve(serving: Serving):
    done = serving.run("submit", "Once upon a time", "--max-tokens", "24", "--seed", "1", "--stream")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 5
    assert done.stderr == ""
    again = serving.run("submit", "Once upon a time", "--max-tokens", "24", "--seed", "1", "--wait", "--json")
    assert json.loads(again.stdout)["text"] + "\n" == done.stdout  # the seed makes it repeatable


def test_a_job_is_submitted_watched_and_read_again(serving: Serving):
    job_id = serving.run("submit", "The miller", "--max-tokens", "32", "--ignore-eos").stdout.strip()
    watched = serving.run("watch", job_id, "--json")
    assert watched.returncode == 0, watched.stderr
    events = [json.loads(line) for line in watched.stdout.splitlines()]
    tokens = [token for event in events if event["event"] == "tokens" for token in event["token_ids"]]
    assert events[-1]["state"] == "completed"
    assert events[-1]["choices"][0]["token_ids"] == tokens
    assert len(tokens) == 32
    assert serving.run("result", job_id).stdout == events[-1]["text"] + "\n"
    jobs = [json.loads(line) for line in serving.run("jobs", "--json").stdout.splitlines()]
    assert any(job["job_id"] == job_id and job["state"] == "completed" for job in jobs)


def test_a_running_job_is_cancelled_and_keeps_what_it_said(serving: Serving):
    job_id = serving.run("submit", "A river", "--max-tokens", "900", "--ignore-eos", "--n", "32").stdout.strip()
    with subprocess.Popen(
        [*PENSTOCK, "watch", job_id, "--json"], stdout=subprocess.PIPE, text=True, env=serving.environment
    ) as watcher:
        assert watcher.stdout is not None
        assert json.loads(watcher.stdout.readline())["event"] == "tokens"  # it runs
        assert serving.run("cancel", job_id).returncode == 0
        last = json.loads(watcher.stdout.read().splitlines()[-1])
    assert watcher.returncode == 5
    assert last["state"] == "cancelled"
    assert 0 < len(last["choices"][0]["token_ids"]) < 900
    assert last["choices"][0]["finish_reason"] == "cancelled"


def test_an_over_long_prompt_fails_with_its_reason_and_the_worker_lives(serving: Serving):
    done = serving.run("submit", "word " * 20_000, "--wait")
    assert done.returncode == 5
    assert "error: job " in done.stderr
    assert "tokens" in done.stderr
    assert "Traceback" not in done.stderr
    assert serving.run("submit", "Once", "--max-tokens", "4", "--wait").returncode == 0


def test_doctor_is_content_with_serve(serving: Serving):
    done = serving.run("doctor", "--json")
    report = json.loads(done.stdout)
    broken = [check for check in report["checks"] if check["status"] in ("error", "warning")]
    assert [check for check in broken if check["name"] not in ("disk", "latency")] == []
    assert done.returncode == 0
    bundled = next(check for check in report["checks"] if check["section"] == "Model")
    assert bundled["data"]["tokens"] == 64


def test_serve_drains_and_keeps_what_waits(serving: Serving):
    """Ctrl-C while a job waits for its hour: the next serve on the same data still has it."""
    job_id = serving.run("submit", "Later", "--delay", "3600").stdout.strip()
    serving.process.send_signal(signal.SIGINT)
    serving.wait_for("drained")
    assert serving.process.wait(timeout=120) == 0
    assert serving.run("jobs", job_id).returncode == 7  # nothing is served any more
    folder = Path(serving.environment["XDG_DATA_HOME"]) / "penstock"
    from penstock import Client, EmbeddedBroker

    with EmbeddedBroker(folder) as broker, Client(broker.url) as client:
        assert client.job(job_id).status().state == "delayed"


def test_worker_command_becomes_the_worker():
    done = subprocess.run([*PENSTOCK, "worker", "--help"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: penstock worker")
    assert "--max-num-sequences" in done.stdout


def test_the_demo_kills_a_worker_and_loses_nothing(tmp_path: Path):
    picture = tmp_path / "demo.svg"
    done = subprocess.run(
        [*PENSTOCK, "demo", "--json", "--record", str(picture)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["jobs"] == figures["completed"] >= 36
    for fault in ("lost", "duplicate_tokens", "missing_tokens", "wrong_output"):
        assert figures[fault] == 0, done.stderr
    assert figures["faults"] == []
    assert figures["interrupted"] >= 4
    assert figures["compared_with_undisturbed_run"] >= figures["interrupted"]
    assert 0 < figures["takeover_s"] <= figures["takeover_all_s"]
    assert figures["tokens_per_s"] > 0
    assert figures["ttft_p50_ms"] > 0
    assert 0 < figures["prefix_hit_rate"] <= 1
    assert re.fullmatch(r"\d+\.\d+\.\d+", figures["redis_version"])
    assert "lost 0, duplicated 0, missing 0" in done.stderr
    assert "kill -9 worker-" in done.stderr
    assert len(done.stdout.splitlines()) == 1
    drawing = picture.read_text()
    assert drawing.startswith("<svg")
    assert "@font-face" not in drawing


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_demo_leaves_no_process_behind(number: signal.Signals):
    """Of kill -9 the demo hears nothing: the broker goes with its parent, and the workers notice that it is gone."""
    demo = subprocess.Popen(
        [*PENSTOCK, "demo", "--plain"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=hear_interrupts,
    )
    assert demo.stdout is not None
    while "jobs accepted" not in (line := demo.stdout.readline()):
        assert line, demo.stderr.read() if demo.stderr else ""
    children = _descendants(demo.pid)
    assert len(children) >= 3  # the broker and two workers
    demo.send_signal(number)
    _, said = demo.communicate(timeout=120)
    assert demo.returncode == (128 + number if number is not signal.SIGKILL else -number)
    assert "Traceback" not in said
    psutil = pytest.importorskip("psutil")
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in children if psutil.pid_exists(pid)], timeout=120)
    assert not alive


def _descendants(pid: int) -> list[int]:
    psutil = pytest.importorskip("psutil")
    return [child.pid for child in psutil.Process(pid).children(recursive=True)]
