"""What scripts answer, as Python values: parsers shared by the wrappers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal, cast

from penstock_core.protocol.codec import ended_template
from penstock_core.protocol.jobs import JobState

HoldStatus = Literal["ok", "fenced", "cancelled", "expired"]

CANCELLED_CODE: Final = "cancelled"
EXPIRED_CODE: Final = "deadline"
POISON_CODE: Final = "poison"
UNDECODABLE_CODE: Final = "undecodable"
LOG_FULL_CODE: Final = "log_full"

CANCELLED: Final = ended_template(JobState.CANCELLED, CANCELLED_CODE, "cancelled by request")
EXPIRED: Final = ended_template(JobState.EXPIRED, EXPIRED_CODE, "its deadline passed before it completed")


def text(value: bytes | str | None) -> str:
    """A string reply; '' for nil."""
    if value is None:
        return ""
    return value if isinstance(value, str) else value.decode()


def number(value: bytes | str | int | None) -> int:
    """An integer reply; 0 for nil and ''."""
    return int(float(value)) if value else 0


def number_or_none(value: bytes | str | int | None) -> int | None:
    """An integer reply; None for nil and ''."""
    return int(float(value)) if value else None


def texts(reply: Any) -> list[str]:
    """A list of strings."""
    return [text(item) for item in reply]


def hold_statuses(reply: Any) -> list[HoldStatus]:
    """One status per hold."""
    return [cast(HoldStatus, text(item)) for item in reply]


def pairs(reply: Any) -> Mapping[str, str]:
    """A hash given as a flat list."""
    flat = texts(reply)
    return dict(zip(flat[::2], flat[1::2], strict=True))
