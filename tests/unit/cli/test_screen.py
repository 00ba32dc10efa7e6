"""Numbers as people read them, and bars that are as long as they should be."""

from __future__ import annotations

import pytest

from penstock.cli.screen import bar, duration, size, sparkline, state
from penstock_core.protocol.jobs import JobState


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (None, "-"), (0, "0 ms"), (-1, "0 ms"), (0.0421, "42 ms"), (3.24, "3.2 s"), (65, "1 min 05 s"),
        (3725, "1 h 02 min"), (200_000, "2 d 7 h"),
    ],
)  # fmt: skip
def test_durations(seconds, words: str):
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**30, "3.0 GiB"), (2**50, "1024.0 TiB")],
)
def test_sizes(count: int, words: str):
    assert size(count) == words


@pytest.mark.parametrize("fraction", [-1, 0, 0.001, 0.33, 0.5, 0.999, 1, 7])
@pytest.mark.parametrize("cells", [1, 8, 13])
def test_a_bar_always_fills_its_cells(fraction: float, cells: int):
    assert bar(fraction, cells, "brand").cell_len == cells


def test_sparkline_shows_the_latest_values_up_to_the_peak():
    assert sparkline([9, 0, 1, 2], 3) == "▁▄█"
    assert sparkline([0, 0], 5) == "▁▁"
    assert sparkline([], 5) == ""
    assert sparkline([5], 1, top=10) == "▄"


@pytest.mark.parametrize("name", list(JobState))
def test_every_state_has_a_mark(name: JobState):
    assert not state(str(name)).plain.startswith("·")
