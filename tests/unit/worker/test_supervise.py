"""The supervisor: crashed workers are replaced and buried, hopeless ones are not, and signals go through."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from penstock_worker import flags
from penstock_worker.exit_codes import ExitCode
from penstock_worker.settings import WorkerSettings
from penstock_worker.supervise import Supervisor, device_of, visible_gpus

CHILD = """
import os, signal, sys, time
from pathlib import Path
folder = Path({folder!r})
number = len(list(folder.glob("life-*")))
(folder / f"life-{{number}}").write_text("\\n".join(sys.argv[1:]) + "\\n" + os.environ["PENSTOCK_REDIS_URL"])
{body}
"""
DRAINS = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); (folder / 'up').touch(); time.sleep(60)"


@pytest.fixture(autouse=True)
def prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock_worker.role.Backoff.next_s", lambda self: 0.0)


@pytest.fixture
def supervise(tmp_path: Path) -> Callable[..., Supervisor]:
    def make(body: str, processes: int = 2, **changes: object) -> Supervisor:
        script = tmp_path / "child.py"
        script.write_text(CHILD.format(folder=str(tmp_path), body=body))
        settings = WorkerSettings(processes=processes, redis_url="redis://:secret@host", **changes)
        return Supervisor(settings, buried(tmp_path), (sys.executable, str(script)))

    return make


def buried(folder: Path) -> Callable[[str], asyncio.Future[None]]:
    async def bury(worker_id: str) -> None:
        with (folder / "buried").open("a") as file:
            file.write(worker_id + "\n")

    return bury  # type: ignore[return-value]


def lives(folder: Path) -> list[list[str]]:
    return [path.read_text().splitlines() for path in sorted(folder.glob("life-*"), key=lambda path: path.name)]


async def test_a_crashed_worker_is_buried_and_replaced_under_a_new_id(
    supervise: Callable[..., Supervisor], tmp_path: Path
) -> None:
    crash_twice = f"sys.exit(1) if number < 2 else None\n{DRAINS}"
    supervisor = supervise(crash_twice, processes=1)
    running = asyncio.create_task(supervisor.run())
    await _until(lambda: (tmp_path / "up").exists())
    supervisor.stop()
    assert await asyncio.wait_for(running, 30) is ExitCode.OK
    ids = [flags.parse([one for one in life if one.startswith("--")], {}).worker_id for life in lives(tmp_path)]
    assert len(set(ids)) == 3
    assert (tmp_path / "buried").read_text().split() == ids[:2]


@pytest.mark.parametrize("code", [ExitCode.USAGE, ExitCode.BROKER, ExitCode.MODEL])
async def test_a_hopeless_exit_ends_the_group_with_its_code(
    supervise: Callable[..., Supervisor], tmp_path: Path, code: ExitCode
) -> None:
    hopeless = "any(one.startswith('--worker-id=g-1-') for one in sys.argv)"
    supervisor = supervise(f"sys.exit({int(code)}) if {hopeless} else None\n{DRAINS}", worker_id="g")
    assert await asyncio.wait_for(supervisor.run(), 30) is code


async def test_a_signal_drains_every_worker(supervise: Callable[..., Supervisor], tmp_path: Path) -> None:
    supervisor = supervise(DRAINS.replace("'up'", "f'up-{os.getpid()}'"), processes=2)
    running = asyncio.create_task(supervisor.run())
    await _until(lambda: len(list(tmp_path.glob("up-*"))) == 2)
    os.kill(os.getpid(), signal.SIGTERM)
    assert await asyncio.wait_for(running, 30) is ExitCode.OK
    assert not (tmp_path / "buried").exists()


async def test_the_password_is_not_on_the_command_line(supervise: Callable[..., Supervisor], tmp_path: Path) -> None:
    await asyncio.wait_for(supervise("sys.exit(2)", processes=1).run(), 30)
    *arguments, url = lives(tmp_path)[0]
    assert url == "redis://:secret@host"
    assert "secret" not in " ".join(arguments)


async def test_children_share_threads_and_ports_are_their_own(
    supervise: Callable[..., Supervisor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    supervisor = supervise("sys.exit(0)", processes=4, metrics_port=9000)
    await asyncio.wait_for(supervisor.run(), 30)
    children = [flags.parse(life[:-1], {}) for life in lives(tmp_path)]
    assert {child.threads for child in children} == {2}
    assert {child.processes for child in children} == {1}
    assert {child.supervisor_pid for child in children} == {os.getpid()}


@pytest.mark.parametrize(
    ("device", "gpus", "given"),
    [
        ("auto", 0, ["auto"] * 3),
        ("auto", 2, ["cuda:0", "cuda:1", "cuda:0"]),
        ("cuda", 2, ["cuda:0", "cuda:1", "cuda:0"]),
        ("cpu", 2, ["cpu"] * 3),
        ("cuda:1", 2, ["cuda:1"] * 3),
    ],
)
def test_gpus_are_dealt_out_in_turn(device: str, gpus: int, given: list[str]) -> None:
    assert [device_of(device, slot, gpus) for slot in range(3)] == given


@pytest.mark.parametrize(("chosen", "count"), [("0,1", 2), ("", 0), ("-1", 0), ("GPU-abc", 1)])
def test_only_visible_gpus_are_dealt_out(chosen: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert visible_gpus() == count


async def _until(condition: Callable[[], bool], patience_s: float = 30.0) -> None:
    async with asyncio.timeout(patience_s):
        while not condition():
            await asyncio.sleep(0.01)
