"""`penstock config`: what an operator sets holds at once, for the queue or for one tenant, and can be taken back."""

from __future__ import annotations

import json

import pytest

from penstock import QueueFull

pytestmark = pytest.mark.integration


def test_a_bound_holds_from_the_next_submission_on(cli, sdk):
    assert cli("config", "set", "max_waiting_jobs=1").exit_code == 0
    waiting = sdk.submit("first")
    with pytest.raises(QueueFull):
        sdk.submit("second")
    assert cli("config", "reset", "max_waiting_jobs").exit_code == 0
    sdk.submit("second").cancel()
    waiting.cancel()


def test_a_tenants_limit_binds_that_tenant_alone_and_keeps_its_others(cli, sdk):
    cli("config", "set", "max_running=3", "--tenant", "small")
    shown = json.loads(cli("config", "set", "max_queued=1", "--tenant", "small", "--json").stdout)
    assert shown["tenants"] == {"small": {"max_queued": 1, "max_running": 3, "tokens_per_minute": None}}
    waiting = sdk.submit("first", tenant="small")
    with pytest.raises(QueueFull):
        sdk.submit("second", tenant="small")
    sdk.submit("second", tenant="other").cancel()
    waiting.cancel()
    cli("config", "reset", "max_queued", "max_running", "--tenant", "small")
    assert json.loads(cli("config", "show", "--json").stdout)["tenants"] == {}


def test_what_holds_is_shown_with_the_limits_of_tenants(cli):
    cli("config", "set", "max_dead=12")
    cli("config", "set", "tokens_per_minute=5000", "--tenant", "acme")
    shown = " ".join(cli("config", "show").stdout.split())
    assert "max_dead 12 10,000 dead letters kept" in shown
    assert "tokens_per_minute of acme 5,000 no limit" in shown


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("set", "max_dead"), "write for example"),
        (("set", "max_dead=many"), "write for example"),
        (("set", "max_dead=0"), "from 1"),
        (("set", "colour=3"), "no such setting"),
        (("set", "max_dead=3", "--tenant", "acme"), "no limit of a tenant"),
        (("reset", "colour"), "no such setting"),
    ],
)
def test_what_cannot_be_set_is_refused_by_name(cli, arguments, reason):
    outcome = cli("config", *arguments)
    assert outcome.exit_code == 2
    assert reason in outcome.stderr
