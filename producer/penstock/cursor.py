"""A reader's place in a job's token log: what it has, what it lacks, what it has seen twice. No I/O.

Chunks reach a reader from two sides, pushed and read from the log, with overlaps and holes in between. The cursor turns
them into one stream in which every token of every choice appears exactly once, in order.
"""

from __future__ import annotations

from penstock_core.protocol.errors import InvalidRequest
from penstock_core.protocol.events import TokenChunk
from penstock_core.protocol.jobs import JobResult


class TokenCursor:
    """Position of one reader, per choice.

    Args:
        from_offset: the first token wanted, of every choice.
        index: the only choice wanted; None wants all.
    """

    __slots__ = ("_finished", "_from_offset", "_index", "_next")

    def __init__(self, from_offset: int = 0, index: int | None = None) -> None:
        if from_offset < 0:
            raise InvalidRequest("from_offset", f"{from_offset} is negative; 0 is the first token")
        if index is not None and index < 0:
            raise InvalidRequest("index", f"{index} is negative; 0 is the first choice")
        self._from_offset = from_offset
        self._index = index
        self._next: dict[int, int] = {}  # choice -> offset after the last token seen or skipped
        self._finished: set[int] = set()

    def lacks_before(self, chunk: TokenChunk) -> bool:
        """Whether wanted tokens before `chunk` have not been seen."""
        if self._index is not None and chunk.index != self._index:
            return False
        return chunk.offset > self._next.get(chunk.index, self._from_offset)

    def lacks_of(self, result: JobResult) -> bool:
        """Whether the job's result has wanted tokens that have not been seen."""
        return any(
            len(choice.token_ids) > self._next.get(choice.index, self._from_offset)
            for choice in result.choices
            if self._index is None or choice.index == self._index
        )

    @staticmethod
    def is_ambiguous(chunk: TokenChunk) -> bool:
        """Whether `chunk` has no token and no finish reason: nothing in it tells a copy from a new one.

        Such a chunk (released text alone) is therefore taken from the log only, where each entry is read once.
        """
        return not chunk.token_ids and chunk.finish_reason is None

    def take(self, chunk: TokenChunk) -> TokenChunk | None:
        """The part of `chunk` that is wanted and new, or None. Moves the position past it.

        The caller has ruled out a hole (`lacks_before`).
        """
        index = chunk.index
        if (self._index is not None and index != self._index) or index in self._finished:
            return None
        position = self._next.get(index, self._from_offset)
        if chunk.finish_reason is not None and chunk.end >= position:
            self._finished.add(index)
        elif chunk.end < position or (chunk.token_ids and chunk.end == position):
            return None
        skip = position - chunk.offset
        if skip <= 0:
            self._next[index] = chunk.end
            return chunk
        self._next[index] = max(position, chunk.end)
        return TokenChunk(
            attempt=chunk.attempt,
            index=index,
            offset=position,
            token_ids=chunk.token_ids[skip:],
            pieces=chunk.pieces[skip:] or ("",),
            finish_reason=chunk.finish_reason,
            logprobs=chunk.logprobs[skip:] if chunk.logprobs is not None else None,
        )
