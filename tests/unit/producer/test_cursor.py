"""The cursor turns chunks that overlap, repeat and come from two sides into each token once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.cursor import TokenCursor
from penstock_core.protocol.errors import InvalidRequest
from penstock_core.protocol.events import TokenChunk
from penstock_core.protocol.jobs import Choice, FinishReason, JobResult, TokenLogprob


def chunk(offset: int, count: int, *, index: int = 0, reason: FinishReason | None = None) -> TokenChunk:
    ids = tuple(range(offset, offset + count))
    return TokenChunk(
        1,
        index,
        offset,
        ids,
        tuple(f"<{i}>" for i in ids) or ("",),
        reason,
        tuple(TokenLogprob(-float(i)) for i in ids),
    )


@given(
    total=st.integers(0, 30),
    start=st.integers(0, 35),
    pieces=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 8)), max_size=60),
)
def test_whatever_overlaps_each_token_comes_once_in_order(
    total: int, start: int, pieces: list[tuple[int, int]]
) -> None:
    cursor = TokenCursor(start)
    found: list[int] = []
    for offset, count in pieces:
        piece = chunk(offset, max(0, min(count, total - offset)))
        if cursor.lacks_before(piece) or not piece.token_ids:
            continue
        new = cursor.take(piece)
        if new is not None:
            assert new.offset == new.token_ids[0]
            assert new.text == "".join(f"<{i}>" for i in new.token_ids)
            assert new.logprobs == tuple(TokenLogprob(-float(i)) for i in new.token_ids)
            found += new.token_ids
    assert found == list(range(start, start + len(found)))


def test_a_hole_is_noticed_per_choice() -> None:
    cursor = TokenCursor()
    assert cursor.take(chunk(0, 2, index=1)) is not None
    assert cursor.lacks_before(chunk(2, 1, index=0))
    assert cursor.lacks_before(chunk(3, 1, index=1))
    assert not cursor.lacks_before(chunk(2, 1, index=1))


def test_only_the_chosen_choice_counts() -> None:
    cursor = TokenCursor(index=1)
    assert not cursor.lacks_before(chunk(5, 1, index=0))
    assert cursor.take(chunk(0, 1, index=0)) is None
    result = JobResult((Choice(0, "", (1, 2), FinishReason.STOP), Choice(1, "", (), FinishReason.STOP)))
    assert not cursor.lacks_of(result)
    assert TokenCursor().lacks_of(result)
    assert not TokenCursor(2).lacks_of(result)


def test_a_finish_comes_once_even_where_all_tokens_are_known() -> None:
    cursor = TokenCursor(3)
    last = chunk(1, 2, reason=FinishReason.STOP)
    taken = cursor.take(last)
    assert taken is not None
    assert (taken.offset, taken.token_ids, taken.pieces, taken.finish_reason) == (3, (), ("",), FinishReason.STOP)
    assert cursor.take(last) is None


def test_a_finish_before_the_wanted_offset_is_not_wanted() -> None:
    assert TokenCursor(9).take(chunk(1, 2, reason=FinishReason.STOP)) is None


def test_released_text_without_a_token_is_kept_from_the_log_and_doubted_when_pushed() -> None:
    held_back = TokenChunk(1, 0, 2, (), ("held",))
    assert TokenCursor.is_ambiguous(held_back)
    assert not TokenCursor.is_ambiguous(TokenChunk(1, 0, 2, (), ("held",), FinishReason.STOP))
    cursor = TokenCursor()
    cursor.take(chunk(0, 2))
    assert cursor.take(held_back) == held_back
    assert TokenCursor(3).take(held_back) is None


@pytest.mark.parametrize(("start", "index"), [(-1, None), (0, -1)])
def test_negative_positions_are_refused(start: int, index: int | None) -> None:
    with pytest.raises(InvalidRequest, match="negative"):
        TokenCursor(start, index)
