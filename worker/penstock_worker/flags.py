"""Flags and environment variables, generated from `WorkerSettings`: `--lease-s` is `PENSTOCK_LEASE_S` is `lease_s`.

A flag wins over its variable, a variable over the default; an empty variable counts as unset, as Compose files write
it.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError

from penstock_core.protocol.errors import InvalidRequest
from penstock_core.protocol.requests import invalid_request
from penstock_worker.settings import WorkerSettings

_ALIASES = {"redis_url": ["--redis"]}
_SECTIONS = {  # heading -> the setting it begins with
    "What it serves": "redis_url",
    "Processes": "worker_id",
    "Engine": "device",
    "Delivery": "lease_s",
    "Watching it": "metrics_port",
}
_UNITS = {"_s": "SECONDS", "_ms": "MS"}


def parser() -> argparse.ArgumentParser:
    """The command line of `python -m penstock_worker`."""
    made = argparse.ArgumentParser(
        prog="penstock worker",
        usage="penstock worker [options]",
        description="Run jobs of one queue on one model.",
        epilog=(
            "Each flag has a variable: PENSTOCK_LEASE_S for --lease-s. Exit codes: 0 drained, 1 crash, 2 wrong flag, "
            "3 Redis cannot be used, 4 model cannot be loaded, 5 engine died. "
            "SIGTERM drains; a second one hands the jobs back at once."
        ),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    starts = {first: heading for heading, first in _SECTIONS.items()}
    section: argparse._ActionsContainer = made
    for name, field in WorkerSettings.model_fields.items():
        if name in starts:
            section = made.add_argument_group(starts[name])
        flags = [*_ALIASES.get(name, []), flag(name)]
        default = "" if field.default is None else f" (default: {field.default})"
        text = f"{field.description}{default}"
        if field.annotation is bool:
            section.add_argument(*flags, dest=name, action=argparse.BooleanOptionalAction, help=text)
        else:
            section.add_argument(*flags, dest=name, metavar=_metavar(name, field.annotation), help=text)
    return made


def _metavar(name: str, annotation: Any) -> str:
    """What stands for a value: the values there are, its unit, or its kind."""
    unit = next((shown for ending, shown in _UNITS.items() if name.endswith(ending)), None)
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
    if get_origin(annotation) is Literal:
        return "|".join(kinds)
    if unit is not None:
        return unit
    return (
        "N"
        if int in (annotation, *kinds)
        else "X"
        if float in (annotation, *kinds)
        else name.rsplit("_", 1)[-1].upper()
    )


def flag(name: str) -> str:
    """The flag of a field."""
    return "--" + name.replace("_", "-")


def variable(name: str) -> str:
    """The environment variable of a field."""
    return "PENSTOCK_" + name.upper()


def parse(arguments: Sequence[str], environment: Mapping[str, str]) -> WorkerSettings:
    """Settings from flags and variables.

    Raises:
        InvalidRequest: a value is out of its limits; the message names the flag and the variable.
        SystemExit: argparse's, for an unknown flag or `--help`.
    """
    values: dict[str, Any] = {
        name: given for name in WorkerSettings.model_fields if (given := environment.get(variable(name), "")) != ""
    }
    values.update(vars(parser().parse_args(arguments)))
    try:
        return WorkerSettings.model_validate(values)
    except ValidationError as error:
        problem = invalid_request(error)
        name = problem.field.split(".")[0]
        raise InvalidRequest(f"{flag(name)} ({variable(name)})", problem.message) from None


def arguments(settings: WorkerSettings, *, leave_out: Sequence[str] = ()) -> list[str]:
    """The flags that `parse` turns back into `settings`: how the supervisor starts its children."""
    given: list[str] = []
    for name in WorkerSettings.model_fields:
        value = getattr(settings, name)
        if value is None or name in leave_out:
            continue
        if isinstance(value, bool):
            given.append(flag(name) if value else "--no-" + flag(name)[2:])
        else:
            given.append(f"{flag(name)}={value}")
    return given
