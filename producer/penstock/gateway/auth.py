"""Who is asking: API keys, each of one tenant or of an operator, and how often each may ask.

The configuration holds SHA-256 digests, never keys, and they are compared in constant time: neither the file, a memory
dump, nor the time of a refusal tells a key. Keys are random (`penstock key` makes them), so a plain digest is enough.
Without keys the gateway is open and everybody is the operator.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from penstock_core.protocol.errors import InvalidConfiguration, PenstockError, QueueFull
from penstock_core.protocol.requests import DEFAULT_TENANT, Tenant

Role = Literal["tenant", "operator"]

_PREFIX = "sha256:"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_FINGERPRINT = 32  # hex digits of the digest: enough to tell keys apart, and no use to a guesser
_TENANT: TypeAdapter[str] = TypeAdapter(Tenant)
_FIELDS = {"tenant", "role", "requests_per_minute"}
_REMEDY = "'penstock key TENANT' prints a key and the entry for it"


class Unauthorized(PenstockError):
    """No API key, or one that nobody has."""


class Forbidden(PenstockError):
    """The key is known, and may not do this."""


class TooManyRequests(QueueFull):
    """The key's requests_per_minute are used up."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Whom a key stands for.

    Attributes:
        tenant: whose jobs it submits.
        role: an operator sees and ends the jobs of every tenant, requeues dead ones and reads the queue's metrics; a
            tenant sees its own jobs and numbers.
        requests_per_minute: at most so many, of all gateways of the queue together; 0: no limit.
        fingerprint: of the key, by which its requests are counted; from `ApiKeys`.
    """

    tenant: str = DEFAULT_TENANT
    role: Role = "tenant"
    requests_per_minute: int = 0
    fingerprint: str = field(default="", compare=False)

    @property
    def is_operator(self) -> bool:
        """Whether every tenant's jobs are its business."""
        return self.role == "operator"

    @property
    def scope(self) -> str | None:
        """The only tenant whose jobs it may see; None: all."""
        return None if self.is_operator else self.tenant


ANYBODY = Caller(role="operator")
"""Who asks where no keys are in use."""


class ApiKeys:
    """Digests of keys, and whom each stands for.

    Args:
        callers: `sha256:<64 hex digits>` -> caller. Empty: no key is asked for.

    Raises:
        InvalidConfiguration: a digest or a tenant's name is malformed.
    """

    def __init__(self, callers: Mapping[str, Caller]) -> None:
        self._callers: list[tuple[bytes, Caller]] = []
        for digest, caller in callers.items():
            if not _DIGEST.fullmatch(digest):
                shown = f"{digest[:12]}..." if digest.startswith(_PREFIX) else "an entry"
                raise InvalidConfiguration(
                    "api_keys", f"{shown} is not sha256: and 64 hex digits; keys are stored as digests only. {_REMEDY}"
                )
            try:
                _TENANT.validate_python(caller.tenant)
            except ValidationError:
                raise InvalidConfiguration(
                    "api_keys", f"{caller.tenant!r} is no tenant name; use 1 to 64 letters, digits or any of _ . -"
                ) from None
            name = digest.removeprefix(_PREFIX)
            self._callers.append((bytes.fromhex(name), replace(caller, fingerprint=name[:_FINGERPRINT])))

    @classmethod
    def load(cls, path: Path) -> ApiKeys:
        """Keys from a JSON file; see `parse`. Raises `InvalidConfiguration`."""
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidConfiguration("api_keys", f"{path}: {error}") from None
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: str, source: str) -> ApiKeys:
        """Keys from a JSON object `{"sha256:...": "<tenant>" | {"tenant", "role", "requests_per_minute"}, ...}`.

        Raises `InvalidConfiguration`, which never quotes an entry's name: somebody may have put a key there.
        """
        try:
            loaded = json.loads(text)
        except (ValueError, RecursionError):
            loaded = None
        if not isinstance(loaded, dict) or not loaded:
            raise InvalidConfiguration("api_keys", f"{source}: not a JSON object with digests of keys. {_REMEDY}")
        callers = {digest: _caller(entry, source, at) for at, (digest, entry) in enumerate(loaded.items(), 1)}
        return cls(callers)

    @property
    def required(self) -> bool:
        """Whether a key is asked for."""
        return bool(self._callers)

    @property
    def tenants(self) -> int:
        """How many tenants have keys."""
        return len({caller.tenant for _, caller in self._callers if not caller.is_operator})

    @property
    def operators(self) -> int:
        """How many keys are operators'."""
        return sum(caller.is_operator for _, caller in self._callers)

    def caller_of(self, authorization: str | None) -> Caller:
        """Who sends an `Authorization: Bearer <key>` header. Raises `Unauthorized`."""
        if not self._callers:
            return ANYBODY
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise Unauthorized("this gateway asks for an API key: send 'Authorization: Bearer <key>'")
        offered = hashlib.sha256(key.strip().encode(errors="surrogateescape")).digest()
        found: Caller | None = None
        for digest, caller in self._callers:  # all of them, always: the time tells nothing
            if hmac.compare_digest(digest, offered):
                found = caller
        if found is None:
            raise Unauthorized("nobody has this API key")
        return found


def _caller(entry: Any, source: str, at: int) -> Caller:
    values = {"tenant": entry} if isinstance(entry, str) else entry
    if not isinstance(values, dict) or not set(values) <= _FIELDS:
        raise InvalidConfiguration(
            "api_keys", f"{source}: entry {at} is neither a tenant's name nor an object of {', '.join(sorted(_FIELDS))}"
        )
    role, rate = values.get("role", "tenant"), values.get("requests_per_minute", 0)
    if role not in ("tenant", "operator"):
        raise InvalidConfiguration("api_keys", f"{source}: entry {at} has role {role!r}; use tenant or operator")
    if role == "tenant" and not isinstance(values.get("tenant"), str):
        raise InvalidConfiguration("api_keys", f"{source}: entry {at} names no tenant")
    if type(rate) is not int or not 0 <= rate <= 1_000_000:
        raise InvalidConfiguration(
            "api_keys", f"{source}: entry {at} has requests_per_minute {rate!r}; use 1 to 1000000, or 0 for no limit"
        )
    return Caller(str(values.get("tenant", DEFAULT_TENANT)), role, rate)


def digest_of(key: str) -> str:
    """What the configuration holds of a key."""
    return _PREFIX + hashlib.sha256(key.encode()).hexdigest()


def new_key() -> str:
    """A fresh key of 256 random bits."""
    return f"pk_{secrets.token_urlsafe(32)}"
