"""Who is asking: API keys, each of one tenant.

Keys are kept and compared as SHA-256 digests in constant time, so neither a memory dump of the table nor the time of a
refusal tells a key. Without keys the gateway is open and everybody is the default tenant.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from penstock_core.protocol.errors import InvalidConfiguration, PenstockError
from penstock_core.protocol.requests import DEFAULT_TENANT, Tenant

MIN_KEY_CHARS = 16

_TENANT: TypeAdapter[str] = TypeAdapter(Tenant)


class Unauthorized(PenstockError):
    """No API key, or one that nobody has."""


class ApiKeys:
    """Keys and their tenants.

    Args:
        tenants: API key -> tenant. Empty: no key is asked for.

    Raises:
        InvalidConfiguration: a key is too short to be secret, or a tenant's name is malformed.
    """

    def __init__(self, tenants: Mapping[str, str]) -> None:
        self._tenants: list[tuple[bytes, str]] = []
        for key, tenant in tenants.items():
            if len(key) < MIN_KEY_CHARS:
                raise InvalidConfiguration(
                    "api_keys", f"the key of tenant {tenant!r} has {len(key)} characters; use {MIN_KEY_CHARS} or more"
                )
            try:
                _TENANT.validate_python(tenant)
            except ValidationError:
                raise InvalidConfiguration(
                    "api_keys", f"{tenant!r} is no tenant name; use 1 to 64 letters, digits or any of _ . -"
                ) from None
            self._tenants.append((_digest(key), tenant))

    @classmethod
    def load(cls, path: Path) -> ApiKeys:
        """Keys from a JSON object `{"<key>": "<tenant>", ...}`. Raises `InvalidConfiguration`."""
        try:
            loaded = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise InvalidConfiguration("api_keys", f"{path}: {error}; it holds a JSON object of key: tenant") from None
        if not isinstance(loaded, dict) or not all(isinstance(tenant, str) for tenant in loaded.values()):
            raise InvalidConfiguration("api_keys", f"{path}: not a JSON object of key: tenant")
        return cls(loaded)

    @property
    def required(self) -> bool:
        """Whether a key is asked for."""
        return bool(self._tenants)

    def tenant_of(self, authorization: str | None) -> str:
        """The tenant of an `Authorization: Bearer <key>` header. Raises `Unauthorized`."""
        if not self._tenants:
            return DEFAULT_TENANT
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise Unauthorized("this gateway asks for an API key: send 'Authorization: Bearer <key>'")
        offered = _digest(key.strip())
        found: str | None = None
        for digest, tenant in self._tenants:  # all of them, always: the time tells nothing
            if hmac.compare_digest(digest, offered):
                found = tenant
        if found is None:
            raise Unauthorized("no tenant has this API key")
        return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()
