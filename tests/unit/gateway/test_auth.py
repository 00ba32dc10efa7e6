"""API keys: digests only, one answer for every wrong key, roles, and a name of each to count its requests by."""

from __future__ import annotations

import hmac
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from penstock.cli.app import app
from penstock.gateway import auth
from penstock.gateway.auth import ApiKeys, Caller, Unauthorized, digest_of, new_key
from penstock_core.protocol.errors import InvalidConfiguration

KEY = "pk_of-the-mill"


def test_a_key_stands_for_its_tenant_and_role() -> None:
    operator = "pk_of-the-operator"
    text = json.dumps({digest_of(KEY): "mill", digest_of(operator): {"role": "operator"}})
    keys = ApiKeys.parse(text, "test")
    caller = keys.caller_of(f"Bearer {KEY}")
    assert (caller.tenant, caller.scope) == ("mill", "mill")
    assert keys.caller_of(f"bearer {operator}").scope is None
    assert (keys.required, keys.tenants, keys.operators) == (True, 1, 1)
    assert KEY not in repr(vars(keys))


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", "Basic abc", f"Bearer {KEY}x", f"Bearer {digest_of(KEY)}"]
)
def test_anything_else_is_refused(header: str | None) -> None:
    with pytest.raises(Unauthorized):
        ApiKeys({digest_of(KEY): Caller("mill")}).caller_of(header)


def test_every_digest_is_compared_whatever_the_first_says(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def noticing(one: bytes, other: bytes) -> bool:
        compared.append(one)
        return hmac.compare_digest(one, other)

    monkeypatch.setattr(auth, "hmac", SimpleNamespace(compare_digest=noticing))
    keys = ApiKeys({digest_of(name): Caller("mill") for name in (KEY, "second", "third")})
    keys.caller_of(f"Bearer {KEY}")
    assert len(compared) == 3


def test_without_keys_everybody_is_the_operator() -> None:
    assert ApiKeys({}).caller_of(None).is_operator


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"a-plain-key-of-somebody": "mill"}, "digests only"),
        ({"sha256:12": "mill"}, "64 hex digits"),
        ({digest_of(KEY): "two words"}, "no tenant name"),
        ({digest_of(KEY): {"role": "king"}}, "role"),
        ({digest_of(KEY): {}}, "names no tenant"),
        ({digest_of(KEY): {"tenant": "mill", "rate": 3}}, "requests_per_minute"),
        ({digest_of(KEY): {"tenant": "mill", "requests_per_minute": -1}}, "requests_per_minute"),
        ([], "not a JSON object"),
        ({}, "not a JSON object"),
    ],
)
def test_a_bad_file_is_refused_and_no_key_quoted(entries: Any, said: str, tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_text(json.dumps(entries))
    with pytest.raises(InvalidConfiguration, match=said) as refused:
        ApiKeys.load(tmp_path / "keys.json")
    assert "a-plain-key" not in str(refused.value)


def test_each_key_is_counted_by_a_fingerprint_of_its_own_that_does_not_tell_it() -> None:
    keys = ApiKeys({digest_of(name): Caller("mill", requests_per_minute=2) for name in (KEY, "second")})
    callers = [keys.caller_of(f"Bearer {name}") for name in (KEY, "second")]
    assert len({caller.fingerprint for caller in callers}) == 2
    for caller in callers:
        with pytest.raises(Unauthorized):
            keys.caller_of(f"Bearer {caller.fingerprint}")


def test_the_command_makes_a_key_that_its_entry_admits() -> None:
    made = json.loads(CliRunner().invoke(app, ["key", "mill", "--requests-per-minute", "60", "--json"]).stdout)
    assert re.fullmatch(r"pk_[\w-]{43}", made["key"])
    caller = ApiKeys.parse(json.dumps(made["entry"]), "test").caller_of(f"Bearer {made['key']}")
    assert caller == Caller("mill", "tenant", 60)
    made = json.loads(CliRunner().invoke(app, ["key", "--operator", "--json"]).stdout)
    assert ApiKeys.parse(json.dumps(made["entry"]), "test").caller_of(f"Bearer {made['key']}").is_operator
    assert CliRunner().invoke(app, ["key"]).exit_code == 2
    assert CliRunner().invoke(app, ["key", "two words"]).exit_code == 2
    assert new_key() != new_key()
