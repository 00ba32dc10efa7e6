"""What may reach a terminal: colour only where wanted, and never a model's control characters."""

from __future__ import annotations

import io

import pytest

from penstock.cli import terminal


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("environment", "stream", "expected"),
    [
        ({}, Tty(), True),
        ({}, io.StringIO(), False),
        ({"NO_COLOR": "1"}, Tty(), False),
        ({"TERM": "dumb"}, Tty(), False),
        ({"FORCE_COLOR": "1"}, io.StringIO(), True),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, Tty(), False),
    ],
)
def test_colour_follows_the_conventions(environment, stream, expected, monkeypatch: pytest.MonkeyPatch):
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert terminal.coloured(stream) is expected


def test_a_closed_stream_is_no_terminal():
    stream = Tty()
    stream.close()
    assert not terminal.is_terminal(io.StringIO())


def test_printable_keeps_text_and_drops_what_drives_the_terminal():
    assert terminal.printable("Zoë\n\tsaid \x1b[31mhi\x07\x9b2J\r\n") == "Zoë\n\tsaid [31mhi2J\n"


def test_paint_can_be_measured():
    painted = terminal.paint("text", "red", "bold", on=True)
    assert painted != "text"
    assert terminal.visible_length(painted) == 4
    assert terminal.paint("text", "red", on=False) == "text"
