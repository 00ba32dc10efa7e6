"""Quick records are what the frozen dataclasses beneath them are, in everything but the guard against assignment."""

from __future__ import annotations

from dataclasses import replace

import pytest

from penstock_core.protocol.events import TokenChunk
from penstock_core.protocol.jobs import JobResult, Usage


def test_defaults_equality_hash_and_text_stay() -> None:
    assert Usage(1, cached_tokens=2) == Usage(1, 0, 2) != Usage(1, 0, 3)
    assert hash(Usage(1, 0, 2)) == hash((1, 0, 2))
    assert repr(Usage(1)) == "Usage(prompt_tokens=1, completion_tokens=0, cached_tokens=0)"
    assert JobResult().usage == Usage()
    assert JobResult().usage is not JobResult().usage  # each has its own default
    chunk = TokenChunk(1, 0, 0, (5,), ("five",))
    assert replace(chunk, offset=3) == TokenChunk(1, 0, 3, (5,), ("five",), None, None)


def test_a_missing_or_unknown_field_is_refused() -> None:
    with pytest.raises(TypeError, match="offset"):
        TokenChunk(1, 0)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="colour"):
        Usage(colour=1)  # type: ignore[call-arg]


def test_no_other_attribute_can_be_added() -> None:
    with pytest.raises(AttributeError):
        Usage().colour = 1  # type: ignore[attr-defined]
