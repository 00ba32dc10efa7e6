"""The supervisor: crashed workers are replaced and buried, hopeless ones are not, and signals go through."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from penstock_worker import flags
from penstock_worker.exit_codes import ExitCode
from penstock_worker.groups import deal
from penstock_worker.health import Health, HealthFile, read_one
from penstock_worker.settings import WorkerSettings
from penstock_worker.standing import StandingMetrics
from penstock_worker.supervise import Supervisor

CHILD = """
import os, signal, sys, time
from pathlib import Path
folder = Path({folder!r})
number = 0
while True:  # children start side by side: each takes a number of its own
    try:
        (folder / f"life-{{number}}").touch(exist_ok=False)
        break
    except FileExistsError:
        number += 1
names = ("CUDA_VISIBLE_DEVICES", "PENSTOCK_GPUS", "PENSTOCK_REDIS_URL")
told = [f"{{name}}={{os.environ.get(name)}}" for name in names]
(folder / f"life-{{number}}").write_text("\\n".join(sys.argv[1:] + told))
{body}
"""
DRAINS = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); (folder / 'up').touch(); time.sleep(60)"


@pytest.fixture(autouse=True)
def prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock_worker.role.Backoff.next_s", lambda self: 0.0)


@pytest.fixture
def supervise(tmp_path: Path) -> Callable[..., Supervisor]:
    def make(body: str, processes: int = 2, machine: Sequence[str] = (), **changes: object) -> Supervisor:
        script = tmp_path / "child.py"
        script.write_text(CHILD.format(folder=str(tmp_path), body=body))
        settings = WorkerSettings(
            processes=processes, redis_url="redis://:secret@host", health_dir=tmp_path / "health", **changes
        )
        groups = deal(settings, machine, cores=8)
        return Supervisor(settings, groups, buried(tmp_path), (sys.executable, str(script)))

    return make


def buried(folder: Path) -> Callable[[str], asyncio.Future[None]]:
    async def bury(worker_id: str) -> None:
        with (folder / "buried").open("a") as file:
            file.write(worker_id + "\n")

    return bury  # type: ignore[return-value]


@dataclass
class Life:
    """What one child was given."""

    arguments: list[str]
    environment: dict[str, str]

    @property
    def settings(self) -> WorkerSettings:
        return flags.parse(self.arguments, {})


def lives(folder: Path) -> list[Life]:
    told = [path.read_text().splitlines() for path in sorted(folder.glob("life-*"), key=lambda path: path.name)]
    return [
        Life(
            [line for line in lines if line.startswith("--")],
            dict(line.split("=", 1) for line in lines if not line.startswith("--")),
        )
        for lines in told
    ]


async def test_a_crashed_worker_is_buried_and_replaced_under_a_new_id(
    supervise: Callable[..., Supervisor], tmp_path: Path
) -> None:
    crash_twice = f"sys.exit(1) if number < 2 else None\n{DRAINS}"
    supervisor = supervise(crash_twice, processes=1)
    running = asyncio.create_task(supervisor.run())
    await _until(lambda: (tmp_path / "up").exists())
    supervisor.stop()
    assert await asyncio.wait_for(running, 60) is ExitCode.OK
    ids = [life.settings.worker_id for life in lives(tmp_path)]
    assert len(set(ids)) == 3
    assert (tmp_path / "buried").read_text().split() == ids[:2]


@pytest.mark.parametrize("code", [ExitCode.USAGE, ExitCode.BROKER, ExitCode.MODEL])
async def test_a_hopeless_exit_ends_the_group_with_its_code(
    supervise: Callable[..., Supervisor], tmp_path: Path, code: ExitCode
) -> None:
    hopeless = "any(one.startswith('--worker-id=g-1-') for one in sys.argv)"
    supervisor = supervise(f"sys.exit({int(code)}) if {hopeless} else None\n{DRAINS}", worker_id="g")
    assert await asyncio.wait_for(supervisor.run(), 60) is code


async def test_a_signal_drains_every_worker(supervise: Callable[..., Supervisor], tmp_path: Path) -> None:
    supervisor = supervise(DRAINS.replace("'up'", "f'up-{os.getpid()}'"), processes=2)
    running = asyncio.create_task(supervisor.run())
    await _until(lambda: len(list(tmp_path.glob("up-*"))) == 2)
    os.kill(os.getpid(), signal.SIGTERM)
    assert await asyncio.wait_for(running, 60) is ExitCode.OK
    assert not (tmp_path / "buried").exists()


async def test_the_password_is_not_on_the_command_line(supervise: Callable[..., Supervisor], tmp_path: Path) -> None:
    await asyncio.wait_for(supervise("sys.exit(2)", processes=1).run(), 60)
    (life, *_) = lives(tmp_path)
    assert life.environment["PENSTOCK_REDIS_URL"] == "redis://:secret@host"
    assert "secret" not in " ".join(life.arguments)


async def test_each_group_gets_gpus_threads_and_a_port_of_its_own(
    supervise: Callable[..., Supervisor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PENSTOCK_GPUS", "0,1,2,3")  # for the parent; a child that read it would become one too
    body = "sys.exit(0)"
    supervisor = supervise(body, 1, ["a", "b", "c", "d"], gpus="0,1,2,3", tensor_parallel=2, metrics_port=9000)
    await asyncio.wait_for(supervisor.run(), 60)
    given = sorted(lives(tmp_path), key=lambda life: life.settings.metrics_port or 0)
    assert [life.environment["CUDA_VISIBLE_DEVICES"] for life in given] == ["a,b", "c,d"]
    assert [life.environment["PENSTOCK_GPUS"] for life in given] == ["None", "None"]
    children = [life.settings for life in given]
    assert [child.metrics_port for child in children] == [9001, 9002], "the parent serves on 9000"
    assert {(child.device, child.tensor_parallel, child.threads) for child in children} == {("cuda", 2, 2)}
    assert not any(child.is_supervised for child in children)
    assert {child.supervisor_pid for child in children} == {os.getpid()}


async def test_what_a_dead_worker_leaves_of_its_group_is_gone_before_the_next_life(
    supervise: Callable[..., Supervisor], tmp_path: Path
) -> None:
    """A follower stuck in a collective neither ends nor hears: it holds memory that the next life needs."""
    stuck = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    body = f"""
import subprocess
if number == 0:
    follower = subprocess.Popen([sys.executable, "-c", {stuck!r}])
    (folder / "follower").write_text(str(follower.pid))
    os.kill(os.getpid(), signal.SIGKILL)
before = int((folder / "follower").read_text())
stat = Path(f"/proc/{{before}}/stat")
(folder / "seen").write_text(str(stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"))
{DRAINS}"""
    supervisor = supervise(body, processes=1)
    running = asyncio.create_task(supervisor.run())
    await _until(lambda: (tmp_path / "up").exists())
    assert (tmp_path / "seen").read_text() == "False"
    supervisor.stop()
    assert await asyncio.wait_for(running, 60) is ExitCode.OK


async def test_health_is_red_from_a_death_until_the_group_serves_again(
    supervise: Callable[..., Supervisor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each child says what the test wants it to say of itself; the first dies at the test's word."""
    body = """
import json
identity = next(one for one in sys.argv if one.startswith("--worker-id=")).split("=", 1)[1]
slot = identity.split("-")[1]
while not (folder / "stop").exists():
    if slot == "0" and number < 2 and (folder / "die").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    ready = number < 2 or (folder / "recover").exists()
    told = {"worker_id": identity, "pid": os.getpid(), "status": "ready" if ready else "loading", "broker_up": True,
            "held": 3, "written_at": time.time()}
    fresh = folder / "health" / f"{identity}.fresh"
    fresh.write_text(json.dumps(told))
    fresh.replace(folder / "health" / f"{identity}.json")
    time.sleep(0.01)
sys.exit(0)
"""
    monkeypatch.setattr("penstock_worker.supervise._LOOK_EVERY_S", 0.01)
    supervisor = supervise(body, worker_id="g")
    running = asyncio.create_task(supervisor.run())
    standing = supervisor.standing
    await _until(lambda: standing.health().status == "ready")
    await _until(lambda: (told := read_one(tmp_path / "health", "g")) is not None and told.status == "ready")
    assert standing.health().is_healthy
    assert standing.health().held == 6
    (tmp_path / "die").touch()
    await _until(lambda: standing.health().status == "degraded")
    await _until(lambda: (told := read_one(tmp_path / "health", "g")) is not None and not told.is_healthy)
    assert "1 of 2 groups serve" in standing.health().detail
    assert "SIGKILL" in standing.health().detail
    await _until(lambda: len(lives(tmp_path)) == 3)
    assert not standing.health().is_healthy, "it starts again, and does not serve yet"
    metrics = StandingMetrics(standing, "q", "m").registry
    where = {"queue": "q", "model": "m", "group": "0"}
    assert metrics.get_sample_value("penstock_group_up", where) == 0
    (tmp_path / "recover").touch()
    await _until(lambda: standing.health().status == "ready")
    assert metrics.get_sample_value("penstock_group_up", where) == 1
    assert metrics.get_sample_value("penstock_group_restarts_total", where) == 1
    assert (metrics.get_sample_value("penstock_group_outage_seconds", {"queue": "q", "model": "m"}) or 0) > 0
    (tmp_path / "stop").touch()
    assert await asyncio.wait_for(running, 60) is ExitCode.OK
    assert read_one(tmp_path / "health", "g") is None


async def test_what_served_once_is_started_again_whatever_it_died_of(
    supervise: Callable[..., Supervisor], tmp_path: Path
) -> None:
    """A model that was loaded can be loaded: its memory may still be taken, or a rank fell while it started."""
    supervisor = supervise(f"sys.exit({int(ExitCode.MODEL)}) if number == 0 else None\n{DRAINS}", processes=1)
    supervisor.standing.groups[0].has_served = True
    running = asyncio.create_task(supervisor.run())
    await _until(lambda: (tmp_path / "up").exists())
    supervisor.stop()
    assert await asyncio.wait_for(running, 60) is ExitCode.OK


async def test_a_group_that_hangs_is_down(supervise: Callable[..., Supervisor], tmp_path: Path) -> None:
    standing = supervise("", processes=1).standing
    standing.started(0, "w")
    now = time.time()
    for status, age_s, healthy in (("ready", 0, True), ("ready", 60, False), ("stalled", 0, False), ("ready", 0, True)):
        told = Health("w", os.getpid(), status, True, 0, now - age_s)
        HealthFile(tmp_path / "health", "w").write(told)
        standing.look()
        assert standing.health().is_healthy is healthy, (status, age_s)


async def _until(condition: Callable[[], bool], patience_s: float = 60.0) -> None:
    async with asyncio.timeout(patience_s):
        while not condition():
            await asyncio.sleep(0.01)
