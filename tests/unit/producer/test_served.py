"""The note of `penstock serve`: found by its user's clients and commands while it runs, trusted by nobody else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from penstock import Client, served
from penstock.cli.session import locate


@pytest.fixture(autouse=True)
def runtime_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    for name in ("PENSTOCK_REDIS_URL", "PENSTOCK_QUEUE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_commands_find_a_running_serve_and_forget_an_ended_one():
    assert locate(None, None).url == "redis://127.0.0.1:6379"
    with served.announced("redis://:secret@127.0.0.1:7", "tales"):
        here = locate(None, None)
        assert (here.url, here.queue) == ("redis://:secret@127.0.0.1:7", "tales")
        assert "secret" not in here.shown_url
        assert locate(None, "other").queue == "other"
        assert locate("redis://elsewhere", None).url == "redis://elsewhere"
    assert served.find_served() is None
    assert not served.note_path().exists()


def test_only_the_user_can_read_the_note():
    with served.announced("redis://:secret@h", "q"):
        assert served.note_path().stat().st_mode & 0o077 == 0
        assert served.note_path().parent.stat().st_mode & 0o077 == 0


def test_a_note_others_could_have_written_is_ignored():
    with served.announced("redis://h", "q"):
        served.note_path().chmod(0o666)
        assert served.find_served() is None
        served.note_path().chmod(0o600)
        served.note_path().parent.chmod(0o777)
        assert served.find_served() is None
        served.note_path().parent.chmod(0o700)
        assert served.find_served() is not None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"url": "redis://h"}', '{"url": "u", "queue": "q", "pid": "x"}'])
def test_a_broken_note_is_ignored(text: str):
    served.note_path().parent.mkdir(mode=0o700)
    served.note_path().touch(0o600)
    served.note_path().write_text(text)
    assert served.find_served() is None


def test_a_note_of_a_process_that_is_gone_is_ignored():
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with served.announced("redis://h", "q"):
        path = served.note_path()
        path.write_text(path.read_text().replace(str(os.getpid()), str(ended.pid)))
        assert served.find_served() is None


@pytest.mark.parametrize(
    ("told", "url", "queue"),
    [
        ({}, "redis://:secret@127.0.0.1:7", "tales"),
        ({"model": "other"}, "redis://:secret@127.0.0.1:7", "other"),
        ({"url": "redis://127.0.0.1:8"}, "redis://127.0.0.1:8", "penstock-story"),
    ],
)
def test_a_client_that_is_told_nothing_finds_the_running_serve(told: dict[str, str], url: str, queue: str):
    with served.announced("redis://:secret@127.0.0.1:7", "tales"), Client(**told) as client:
        assert (client.settings.url, client.settings.queue) == (url, queue)


def test_the_environment_wins_over_the_running_serve(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PENSTOCK_REDIS_URL", "redis://127.0.0.1:9")
    with served.announced("redis://:secret@127.0.0.1:7", "tales"), Client() as client:
        assert (client.settings.url, client.settings.queue) == ("redis://127.0.0.1:9", "penstock-story")
