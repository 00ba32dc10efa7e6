"""Log lines with fields: JSON for machines, one aligned line for people.

Fields travel in the standard library's `extra=`. A job's lines carry its id and attempt, so that one grep follows a job
through every worker it met.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import MutableMapping
from typing import Any, Literal, TextIO

LogFormat = Literal["auto", "json", "text"]

_STANDARD = frozenset(vars(logging.LogRecord("", 0, "", 0, "", (), None))) | {"message", "asctime", "taskName"}
_COLOURS = {"WARNING": "\x1b[33m", "ERROR": "\x1b[31m", "CRITICAL": "\x1b[31;1m", "DEBUG": "\x1b[2m"}
_RESET = "\x1b[0m"


def configure(level: str, log_format: LogFormat, worker_id: str, stream: TextIO | None = None) -> None:
    """Send the records of `penstock_worker` and warnings of everything else to `stream` (stderr)."""
    target = stream or sys.stderr
    as_text = log_format == "text" or (log_format == "auto" and target.isatty())
    handler = logging.StreamHandler(target)
    handler.setFormatter(TextFormatter(target.isatty()) if as_text else JsonFormatter(worker_id))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for package in ("penstock_worker", "penstock_core"):
        logging.getLogger(package).setLevel(level.upper())


class JobLog(logging.LoggerAdapter[logging.Logger]):
    """A logger whose every line carries a job's id and attempt, and its submitter's trace id if there is one."""

    def __init__(self, logger: logging.Logger, job_id: str, attempt: int, traceparent: str | None = None) -> None:
        fields: dict[str, object] = {"job": job_id, "attempt": attempt}
        if traceparent is not None:
            fields["trace_id"] = traceparent.split("-")[1]
        super().__init__(logger, fields)

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """Add the job's fields to those of the line."""
        kwargs["extra"] = {**(self.extra or {}), **(kwargs.get("extra") or {})}
        return msg, kwargs


class JsonFormatter(logging.Formatter):
    """One JSON object a line: `time`, `level`, `logger`, `worker`, `message`, then the line's own fields."""

    def __init__(self, worker_id: str) -> None:
        super().__init__()
        self._worker_id = worker_id

    def format(self, record: logging.LogRecord) -> str:
        """Render `record`."""
        line: dict[str, Any] = {
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "worker": self._worker_id,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """`12:01:33.120 warning message  job=... attempt=2`."""

    def __init__(self, coloured: bool) -> None:
        super().__init__()
        self._coloured = coloured

    def format(self, record: logging.LogRecord) -> str:
        """Render `record`."""
        clock = f"{time.strftime('%H:%M:%S', time.localtime(record.created))}.{int(record.msecs):03d}"
        fields = "".join(f" {key}={value}" for key, value in _fields(record).items())
        line = f"{clock} {record.levelname.lower():<8}{record.getMessage()}{' ' if fields else ''}{fields}"
        if self._coloured and (colour := _COLOURS.get(record.levelname)):
            line = f"{colour}{line}{_RESET}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return {key: value for key, value in vars(record).items() if key not in _STANDARD and not key.startswith("_")}
