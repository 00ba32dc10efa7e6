"""What the terminal can show: whether to colour, how wide it is, and painting text with plain ANSI codes.

Used where importing rich would cost more than it gives (help, one-line errors, `penstock --help` in a tenth of a
second). Honours NO_COLOR, FORCE_COLOR and TERM=dumb (https://no-color.org, https://force-color.org).
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from typing import TextIO

_CODES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "blue": "34", "cyan": "36"}
_ESCAPE = re.compile(r"\x1b\[[0-9;]*m")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def coloured(stream: TextIO) -> bool:
    """Whether ANSI colours belong on `stream`."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return os.environ.get("TERM") != "dumb" and is_terminal(stream)


def is_terminal(stream: TextIO) -> bool:
    """Whether a person is looking at `stream`."""
    try:
        return stream.isatty()
    except ValueError:  # closed
        return False


def paint(text: str, *styles: str, on: bool) -> str:
    """`text` in the given styles (names of `_CODES`), unchanged when `on` is false."""
    if not on or not text:
        return text
    return f"\x1b[{';'.join(_CODES[style] for style in styles)}m{text}\x1b[0m"


def visible_length(text: str) -> int:
    """Number of characters of `text` without its colour codes."""
    return len(_ESCAPE.sub("", text))


def printable(text: str) -> str:
    """`text` without control characters: a model's output must not drive the terminal."""
    return _CONTROL.sub("", text.replace("\r\n", "\n"))


def width(limit: int = 100) -> int:
    """Columns to wrap text at."""
    return max(40, min(limit, shutil.get_terminal_size((limit, 24)).columns - 1))


def say(message: str) -> None:
    """A line for people, on stderr, so that stdout holds only what was asked for."""
    print(message, file=sys.stderr, flush=True)


def note(mark: str, colour: str, message: str) -> None:
    """A line for people that opens with a coloured mark."""
    say(f"{paint(mark, colour, 'bold', on=coloured(sys.stderr))} {message}")
