"""Flags and variables: one definition, in order of precedence, with errors that name both."""

from __future__ import annotations

from typing import Literal, get_args, get_origin

import pytest

from penstock_core.protocol.errors import InvalidRequest
from penstock_worker import flags
from penstock_worker.settings import WorkerSettings, new_worker_id


def test_a_flag_wins_over_its_variable_and_a_variable_over_the_default() -> None:
    settings = flags.parse(["--lease-s", "3"], {"PENSTOCK_LEASE_S": "7", "PENSTOCK_GRACE_S": "9"})
    assert (settings.lease_s, settings.grace_s, settings.heartbeat_s) == (3.0, 9.0, WorkerSettings().heartbeat_s)


def test_an_empty_variable_counts_as_unset() -> None:
    assert flags.parse([], {"PENSTOCK_QUEUE": "", "PENSTOCK_THREADS": ""}) == WorkerSettings()


def test_redis_has_a_short_flag() -> None:
    assert flags.parse(["--redis", "redis://elsewhere"], {}).redis_url == "redis://elsewhere"


def test_settings_survive_the_way_through_a_command_line() -> None:
    settings = flags.parse(
        ["--no-prefix-cache", "--threads=2", "--served-name=-odd", "--target-step-ms", "12.5", "--metrics-port=0"],
        {"PENSTOCK_MODEL": "owner/name"},
    )
    assert flags.parse(flags.arguments(settings), {}) == settings


def test_what_is_left_out_of_a_command_line_is_not_on_it() -> None:
    settings = WorkerSettings(redis_url="redis://:secret@host")
    assert "secret" not in " ".join(flags.arguments(settings, leave_out=("redis_url",)))


@pytest.mark.parametrize(
    ("arguments", "flag", "shown"),
    [
        (["--lease-s", "nan"], "--lease-s", "nan"),
        (["--lease-s", "0"], "--lease-s", "0.5"),
        (["--device", "tpu"], "--device", "tpu"),
        (["--processes", "many"], "--processes", "many"),
        (["--publish-interval-ms", "50"], "--publish-interval-ms", "20"),
        (["--speculation", "hope"], "--speculation", "hope"),
    ],
)
def test_a_wrong_value_is_refused_by_flag_variable_and_limit(arguments: list[str], flag: str, shown: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        flags.parse(arguments, {})
    assert flag in str(refusal.value)
    assert flags.variable(flag[2:].replace("-", "_")) in str(refusal.value)
    assert shown in str(refusal.value)


def test_an_unknown_flag_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        flags.parse(["--turbo"], {})
    assert stop.value.code == 2
    assert "--turbo" in capsys.readouterr().err


def test_every_setting_explains_itself() -> None:
    assert not [name for name, field in WorkerSettings.model_fields.items() if not field.description]


def test_worker_ids_are_never_used_twice() -> None:
    ids = {new_worker_id(slot) for slot in (None, "0", "0", "1")}
    assert len(ids) == 4
    assert all(WorkerSettings(worker_id=one) for one in ids)


def test_the_help_names_every_value_of_a_choice_and_the_unit_of_a_time() -> None:
    shown = flags.parser().format_help()
    for name, field in WorkerSettings.model_fields.items():
        if get_origin(field.annotation) is Literal:
            assert f"{flags.flag(name)} {'|'.join(get_args(field.annotation))}" in shown
    assert "--lease-s SECONDS" in shown
    assert "--batch-timeout-ms MS" in shown
