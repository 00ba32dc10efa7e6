"""An event's id is the reader's whole position: what comes behind it is what the reader lacks, of every choice.

The story: a client that had heard of one choice only when its gateway was killed lost the beginning of the other one.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from penstock.cursor import TokenCursor
from penstock.gateway.native import _events, _Position
from penstock_core.protocol.errors import InvalidRequest
from penstock_core.protocol.events import TokenChunk
from penstock_core.protocol.jobs import FinishReason, JobResult


def chunk(index: int, offset: int, count: int, reason: FinishReason | None = None) -> TokenChunk:
    ids = tuple(range(offset, offset + count))
    return TokenChunk(1, index, offset, ids, tuple(f"{index}:{at} " for at in ids) or ("tail",), reason, None)


LOG = [
    chunk(0, 0, 5),
    chunk(0, 5, 2),
    chunk(1, 0, 3),
    chunk(2, 0, 1, FinishReason.STOP),
    chunk(0, 7, 1, FinishReason.LENGTH),
    chunk(1, 3, 2),
    chunk(1, 5, 0, FinishReason.STOP),  # released by the end: no token, but text
]


class Job:
    """A finished job with this log, read as the client reads it."""

    async def stream(self, start: int, index: int | None) -> AsyncGenerator[TokenChunk]:
        cursor = TokenCursor(start, index)
        for logged in LOG:
            if (taken := cursor.take(logged)) is not None:
                yield taken

    async def result(self, timeout: float) -> JobResult:
        return JobResult()


async def follow(position: str | None, start: int = 0, index: int | None = None) -> list[tuple[str, dict[str, Any]]]:
    job: Any = Job()
    found = []
    async for event in _events(job, _Position.parse(position, start), index):
        fields = dict(line.split(": ", 1) for line in event.strip().split("\n"))
        if fields["event"] == "tokens":
            found.append((fields["id"], json.loads(fields["data"])))
    return found


def text_of(seen: list[tuple[str, dict[str, Any]]]) -> dict[int, str]:
    texts: dict[int, str] = {}
    for _, data in seen:
        texts[data["index"]] = texts.get(data["index"], "") + data["text"]
    return texts


async def test_what_comes_behind_any_event_is_what_was_lacking() -> None:
    whole = await follow(None)
    assert len(whole) == len(LOG)
    for cut, (position, _) in enumerate(whole):
        assert text_of(whole[: cut + 1] + await follow(position)) == text_of(whole), position
    assert await follow(whole[-1][0]) == []


async def test_one_choice_alone_resumes_too() -> None:
    whole = await follow(None, index=1)
    for cut, (position, _) in enumerate(whole):
        assert whole[: cut + 1] + await follow(position, index=1) == whole, position


async def test_a_stream_from_an_offset_resumes_from_there() -> None:
    whole = await follow(None, start=4)
    assert text_of(whole) == {0: "0:4 0:5 0:6 0:7 ", 1: "1:4 tail"}


def test_too_many_choices_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="allowed are 64"):
        _Position.parse(".".join(["1"] * 65), 0)
