"""Log lines: every field on one line, a job's with its id and attempt."""

from __future__ import annotations

import io
import json
import logging

import pytest

from penstock_worker.structured_log import JobLog, JsonFormatter, TextFormatter


@pytest.fixture
def lines() -> io.StringIO:
    return io.StringIO()


def logger(stream: io.StringIO, formatter: logging.Formatter) -> logging.Logger:
    made = logging.Logger("penstock_worker.test")
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    made.addHandler(handler)
    return made


def test_json_lines_carry_worker_job_attempt_and_fields(lines: io.StringIO) -> None:
    log = JobLog(logger(lines, JsonFormatter("w1")), "job1", 2)
    log.warning("lost %s", "it", extra={"tokens": 7})
    line = json.loads(lines.getvalue())
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "warning",
        "logger": "penstock_worker.test",
        "worker": "w1",
        "message": "lost it",
        "job": "job1",
        "attempt": 2,
        "tokens": 7,
    }


def test_a_traced_job_says_whose_trace_it_belongs_to(lines: io.StringIO) -> None:
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    JobLog(logger(lines, JsonFormatter("w1")), "job1", 1, trace).info("completed")
    assert json.loads(lines.getvalue())["trace_id"] == "4bf92f3577b34da6a3ce929d0e0e4736"


def test_an_exception_stays_on_its_json_line(lines: io.StringIO) -> None:
    try:
        raise ValueError("a\nb")
    except ValueError:
        logger(lines, JsonFormatter("w1")).exception("failed")
    (line,) = lines.getvalue().splitlines()
    assert "ValueError: a\nb" in json.loads(line)["exception"]


def test_text_lines_are_for_people(lines: io.StringIO) -> None:
    JobLog(logger(lines, TextFormatter(False)), "job1", 1).error("failed", extra={"code": "engine_error"})
    assert lines.getvalue().rstrip().endswith("error   failed  job=job1 attempt=1 code=engine_error")


def test_colour_is_only_for_terminals(lines: io.StringIO) -> None:
    logger(lines, TextFormatter(True)).error("red")
    assert lines.getvalue().startswith("\x1b[31m")
