"""The health check: some worker lives, and every live one has said so lately."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from penstock_worker import health
from penstock_worker.health import STALE_AFTER_S, Health, HealthFile


def of(worker_id: str = "w1", **changes: object) -> Health:
    values: dict[str, object] = {
        "worker_id": worker_id,
        "pid": os.getpid(),
        "status": "ready",
        "broker_up": True,
        "held": 0,
        "written_at": time.time(),
        **changes,
    }
    return Health(**values)  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PENSTOCK_HEALTH_DIR", str(tmp_path))
    return tmp_path


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_no_worker_is_not_healthy(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert health.main() == 1
    assert str(folder) in capsys.readouterr().out


@pytest.mark.parametrize("status", ["loading", "ready", "draining"])
def test_a_live_worker_is_healthy_at_every_stage(folder: Path, status: str) -> None:
    HealthFile(folder, "w1").write(of(status=status))
    assert health.main() == 0


def test_a_worker_whose_redis_is_away_is_healthy_and_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    HealthFile(folder, "w1").write(of(broker_up=False))
    assert health.main() == 0
    assert "Redis is away" in capsys.readouterr().out


@pytest.mark.parametrize("changes", [{"status": "stalled"}, {"written_at": time.time() - STALE_AFTER_S - 1}])
def test_one_that_hangs_is_not_healthy_beside_one_that_works(folder: Path, changes: dict[str, object]) -> None:
    HealthFile(folder, "w1").write(of())
    HealthFile(folder, "w2").write(of("w2", **changes))
    assert health.main() == 1


def test_files_of_dead_processes_do_not_count_and_are_removed(folder: Path) -> None:
    HealthFile(folder, "w1").write(of(pid=dead_pid(), status="stalled"))
    HealthFile(folder, "w2").write(of("w2"))
    assert health.main() == 0
    assert [path.name for path in folder.iterdir()] == ["w2.json"]


def test_a_file_of_a_process_whose_number_is_used_again_does_not_count(folder: Path) -> None:
    """A restarted container numbers its processes as before, and its old worker's file was stale for ever."""
    HealthFile(folder, "w1").write(of())
    path = folder / "w1.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "born_ticks": 1, "status": "stalled"}))
    HealthFile(folder, "w2").write(of("w2"))
    assert health.main() == 0
    assert not path.exists()


def test_a_write_that_comes_after_the_removal_writes_nothing(folder: Path) -> None:
    file = HealthFile(folder, "w1")
    file.remove()
    file.write(of())
    assert list(folder.iterdir()) == []


def test_a_damaged_file_is_passed_over(folder: Path) -> None:
    (folder / "odd.json").write_text("{")
    (folder / "older.json").write_text(json.dumps({**asdict(of()), "unknown": 1}))
    assert health.read_all(folder) == []


def test_a_worker_that_leaves_takes_its_file_along(folder: Path) -> None:
    file = HealthFile(folder, "w1")
    file.write(of())
    file.remove()
    assert list(folder.iterdir()) == []


def test_the_command_imports_nothing_heavy(folder: Path) -> None:
    HealthFile(folder, "w1").write(of())
    code = "import sys, penstock_worker.health as h; h.main(); print({'torch', 'redis', 'pydantic'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.splitlines()[-1] == "set()"
