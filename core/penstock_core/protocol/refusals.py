"""What is wrong with a value, in words: from one entry of pydantic's report to the value, its limit and the remedy.

For every edge where something is refused: SDK, command line, HTTP, worker settings. Knows nothing of the fields.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_SHOWN = 80
_BRANCH = re.compile(
    r"(function-|constrained-|list\[|tuple\[|dict\[|union\[)"
)  # pydantic's names of a union's branches


def first_problem(problems: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The one to speak of: the first field's, and where it may be several things, of what it comes nearest to."""
    field = problems[0]["loc"][:2]
    return max(
        (problem for problem in problems if problem["loc"][:2] == field), key=lambda problem: len(problem["loc"])
    )


def place_of(location: Sequence[str | int]) -> str:
    """A place in the input, as its writer would name it: `messages.0.content`."""
    return ".".join(str(part) for part in location if not _BRANCH.match(str(part)))


def refusal(problem: Mapping[str, Any]) -> str:
    """What to say of `problem`, an entry of `ValidationError.errors()`; the field's name is the caller's to say."""
    kind, limits, value = problem["type"], problem.get("ctx", {}), problem.get("input")
    shown = repr(value)
    shown = shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN - 3]}..."
    match kind:
        case "extra_forbidden":
            return "unknown option; remove it or check its spelling"
        case "missing":
            return "is missing; give it"
        case "value_error":
            return str(problem["msg"]).removeprefix("Value error, ")
        case "less_than_equal":
            return f"{shown} is above {limits['le']}; give at most {limits['le']}"
        case "less_than":
            return f"{shown} is not below {limits['lt']}; give less"
        case "greater_than_equal":
            return f"{shown} is below {limits['ge']}; give at least {limits['ge']}"
        case "greater_than":
            return f"{shown} is not above {limits['gt']}; give more"
        case "string_too_long" if isinstance(value, str):
            return f"{len(value)} characters, at most {limits['max_length']} are allowed; shorten it"
        case "string_too_short" if isinstance(value, str):
            given = f"{len(value)} characters" if value else "is empty"
            return f"{given}; give at least {_counted(limits['min_length'], 'character')}"
        case "too_long" if limits.get("actual_length") is not None:
            return f"{limits['actual_length']} items, at most {limits['max_length']} are allowed; give fewer"
        case "too_short" if limits.get("actual_length") is not None:
            given = f"{limits['actual_length']} items" if limits["actual_length"] else "is empty"
            return f"{given}; give at least {_counted(limits['min_length'], 'item')}"
        case "string_unicode":
            return "is no valid Unicode text; encode it as UTF-8"
        case "string_pattern_mismatch":
            return f"{shown} does not match {limits['pattern']}"
        case _:
            return f"{problem['msg']}, got {shown}"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
