"""The operator's bounds of a queue: how much may wait, how fair, how long the dead are kept.

Stored in the hash `config`, read by the scripts on every call, so a change holds at once. What is not stored has the
defaults below, which `scripts/shared/base.lua` repeats. 0 means no limit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from penstock_core.protocol.errors import InvalidRequest

_LARGEST = 2**53


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """One tenant's own limits; None leaves the queue's general one.

    Attributes:
        max_queued: jobs waiting (delayed ones included).
        max_running: jobs running.
        tokens_per_minute: estimated input + output tokens admitted per minute (a token bucket of one minute).
    """

    max_queued: int | None = None
    max_running: int | None = None
    tokens_per_minute: int | None = None


@dataclass(frozen=True, slots=True)
class QueueConfig:
    """Bounds of the whole queue, and of every tenant without limits of its own.

    Attributes:
        max_waiting_jobs, max_waiting_bytes: accepted jobs not running, and their requests' bytes.
        max_queued, max_running, tokens_per_minute: per tenant; see `TenantLimits`.
        aging_interval_ms: waiting this long is worth one priority.
        patience_ms: how long a job waits for the worker that has its prefix cached, before anyone takes it.
        max_log_bytes: token log of one job.
        max_crashes: a job whose workers died this often is dead-lettered.
        max_dead: dead letters kept.
        dead_ttl_ms: how long a dead job is kept for `requeue`.
    """

    max_waiting_jobs: int = 100_000
    max_waiting_bytes: int = 1024 * 1024 * 1024
    max_queued: int = 0
    max_running: int = 0
    tokens_per_minute: int = 0
    aging_interval_ms: int = 60_000
    patience_ms: int = 100
    max_log_bytes: int = 64 * 1024 * 1024
    max_crashes: int = 3
    max_dead: int = 10_000
    dead_ttl_ms: int = 7 * 24 * 3600 * 1000

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            checked(name, value)


_AT_LEAST_ONE = frozenset({"aging_interval_ms", "max_crashes", "max_dead", "dead_ttl_ms"})
FIELDS = tuple(field.name for field in fields(QueueConfig))
TENANT_FIELDS = tuple(field.name for field in fields(TenantLimits))


def checked(name: str, value: int) -> int:
    """The value, if it is one the field may have; raises `InvalidRequest`."""
    if name not in FIELDS:
        raise InvalidRequest(name, f"no such setting; the settings are {', '.join(FIELDS)}")
    least = 1 if name in _AT_LEAST_ONE else 0
    if type(value) is not int or not least <= value <= _LARGEST:
        raise InvalidRequest(
            name, f"{value!r} is no integer from {least} to 2^53" + ("" if least else " (0: no limit)")
        )
    return value


def stored(changes: Mapping[str, int | None], tenants: Mapping[str, TenantLimits]) -> list[tuple[str, int | str]]:
    """Hash fields and values for a change; None takes a setting back to its default. Raises `InvalidRequest`."""
    pairs: list[tuple[str, int | str]] = []
    for name, value in changes.items():
        if value is None and name in FIELDS:
            pairs.append((name, ""))
        else:
            pairs.append((name, checked(name, value)))  # type: ignore[arg-type]
    for tenant, limits in tenants.items():
        for name, limit in asdict(limits).items():
            pairs.append((f"{name}:{tenant}", "" if limit is None else checked(name, limit)))
    return pairs


def read(stored_fields: Mapping[str, str]) -> tuple[QueueConfig, dict[str, TenantLimits]]:
    """The configuration a `config` hash holds. Fields nobody knows are ignored, as the scripts do."""
    general: dict[str, int] = {}
    own: dict[str, dict[str, int]] = {}
    for field, text in stored_fields.items():
        name, _, tenant = field.partition(":")
        if not text.isdecimal():
            continue
        if not tenant and name in FIELDS:
            general[name] = int(text)
        elif tenant and name in TENANT_FIELDS:
            own.setdefault(tenant, {})[name] = int(text)
    return QueueConfig(**general), {tenant: TenantLimits(**limits) for tenant, limits in own.items()}
